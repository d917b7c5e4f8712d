"""The MMIO transport's registers, and its ioeventfds and irqfd on a KVM."""

from __future__ import annotations

import threading
import time

import pytest

from vmonty.base.ram import Ram
from vmonty.kvm.api import System
from vmonty.kvm.uapi.flags import KVM_IRQCHIP_PIC_MASTER
from vmonty.testing.guests import HIGH_MMIO, RAM_SIZE, Mode, TinyGuest
from vmonty.testing.virtio import LIMIT_S, VirtioDriver
from vmonty.vmm.eventfds import IrqfdLine
from vmonty.vmm.virtio.device import VirtioDevice
from vmonty.vmm.virtio.mmio import MmioTransport, Register
from vmonty.vmm.virtio.queue import Queue

from .conftest import Bench


class Counter(VirtioDevice):
    """Two queues, of 64 and 8, and a configuration of six bytes of which two can be written."""

    device_id, name = 0x77, "counter"

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench.memory, bench.loop, (64, 8), features=1 << 3, config=b"config")
        self.seen: list[int] = []
        self.wakes = threading.Semaphore(0)

    def handle(self, queue: Queue) -> None:
        self.seen.append(queue.index)
        self.wakes.release()

    def config_written(self, offset: int, size: int, value: int) -> None:
        if offset + size <= 2:
            self.config[offset : offset + size] = value.to_bytes(size, "little")


@pytest.fixture
def device(bench: Bench) -> Counter:
    return Counter(bench)


@pytest.fixture
def driver(bench: Bench, device: Counter) -> VirtioDriver:
    return bench.driver(device)


@pytest.fixture
def registers(driver: VirtioDriver, device: Counter) -> MmioTransport:
    assert isinstance(device.transport, MmioTransport)
    return device.transport


def test_identity(registers: MmioTransport) -> None:
    assert registers.read(Register.MAGIC_VALUE, 4).to_bytes(4, "little") == b"virt"
    assert registers.read(Register.VERSION, 4) == 2
    assert registers.read(Register.DEVICE_ID, 4) == 0x77
    assert registers.read(Register.VENDOR_ID, 4) != 0


def test_features_in_two_words_and_nothing_beyond(driver: VirtioDriver, registers: MmioTransport) -> None:
    assert driver.access.features() == 1 << 32 | 1 << 29 | 1 << 28 | 1 << 3
    registers.write(Register.DEVICE_FEATURES_SEL, 4, 0xFFFF_FFFF)
    assert registers.read(Register.DEVICE_FEATURES, 4) == 0


def test_configuration_is_read_in_any_width_and_written_where_the_device_lets(
    driver: VirtioDriver, registers: MmioTransport
) -> None:
    assert [registers.read(Register.CONFIG + at, 1) for at in range(7)] == [*b"config", 0]
    assert registers.read(Register.CONFIG + 2, 4) == int.from_bytes(b"nfig", "little")
    assert registers.read(Register.CONFIG + 4, 8) == int.from_bytes(b"ig", "little")
    driver.access.set_config(0, 2, 0x4241)
    driver.access.set_config(1, 2, 0)
    assert registers.read(Register.CONFIG, 4) == int.from_bytes(b"ABnf", "little")


def test_a_change_of_configuration_has_its_generation_and_interrupt(
    bench: Bench, device: Counter, driver: VirtioDriver, registers: MmioTransport
) -> None:
    device.change_config(b"before")
    assert bench.interrupts.count == 0  # nobody is there yet
    driver.start()
    before = registers.read(Register.CONFIG_GENERATION, 4)
    device.change_config(b"behind")
    assert bench.interrupts.count == 1
    assert driver.access.acknowledge() == 2
    assert driver.access.acknowledge() == 0
    assert registers.read(Register.CONFIG_GENERATION, 4) != before


def test_queues_are_told_apart_and_others_are_not_there(driver: VirtioDriver, device: Counter) -> None:
    assert [driver.access.queue_size(index) for index in (0, 1, 2, 0xFFFF_FFFF)] == [64, 8, 0, 0]
    driver.start()
    device.seen.clear()
    for index in (1, 0, 2, 0xFFFF_FFFF, 1):
        driver.access.notify(index)
    device.loop.run(lambda: None)
    assert device.seen == [1, 0, 1]


def test_queues_can_be_enabled_only_after_features_and_stay_as_they_were_set(
    driver: VirtioDriver, registers: MmioTransport, device: Counter
) -> None:
    driver.access.set_queue(0, 16, 0x1000, 0x2000, 0x3000)
    assert registers.read(Register.QUEUE_READY, 4) == 0
    driver.start(queues=1)
    registers.write(Register.QUEUE_SEL, 4, 0)
    assert registers.read(Register.QUEUE_READY, 4) == 1
    registers.write(Register.QUEUE_DESC, 4, 0x5000)
    assert device.queues[0].descriptors == driver.queues[0].descriptors
    registers.write(Register.QUEUE_READY, 4, 0)
    assert registers.read(Register.QUEUE_READY, 4) == 0


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_no_register_access_fails(registers: MmioTransport, size: int) -> None:
    for offset in range(0x200 - size + 1):
        for value in (0, 1, (1 << 8 * size) - 1, 1 << 8 * size - 1):
            registers.write(offset, size, value)
            assert 0 <= registers.read(offset, size) < 1 << 64


def test_a_driver_without_features_ok_does_not_get_going(driver: VirtioDriver, device: Counter) -> None:
    driver.access.set_status(7)
    assert not device.running
    driver.access.notify(0)
    device.loop.run(lambda: None)
    assert device.seen == []


def test_status_bits_only_come(driver: VirtioDriver) -> None:
    driver.start()
    driver.access.set_status(1)
    assert driver.access.status() == 15
    driver.access.set_status(0x40)  # only the device says that it needs a reset
    assert driver.access.status() == 15


def test_failed_queue_addresses_break_the_device(driver: VirtioDriver, device: Counter) -> None:
    driver.start(queues=0)
    driver.access.set_queue(0, 16, 1 << 60, 0x2000, 0x3000)
    assert driver.broken
    assert "descriptor table" in (device.failure or "")
    driver.access.set_status(0)
    assert driver.access.status() == 0


def test_doorbells_by_ioeventfd(system: System, bench: Bench, device: Counter, driver: VirtioDriver) -> None:
    """A guest's store to QueueNotify reaches the device without an exit to us."""
    assert isinstance(device.transport, MmioTransport)
    driver.start()
    device.loop.run(device.seen.clear)
    while device.wakes.acquire(blocking=False):
        pass
    notify = HIGH_MMIO + Register.QUEUE_NOTIFY
    with system.create_vm() as vm:
        ram = Ram(RAM_SIZE)
        vm.set_user_memory_region(0, 0, ram)
        device.transport.connect(vm, HIGH_MMIO)
        with vm.create_vcpu() as vcpu:
            guest = TinyGuest(vm, vcpu, ram)
            guest.load(Mode.LONG, f"mov ebx, {notify}\nmov dword [rbx], 1\nmov dword [rbx], 0\nmov al, 7\nout 0x80, al")
            assert guest.out() == (0x80, 7)
            for _ in range(2):
                assert device.wakes.acquire(timeout=LIMIT_S)
            assert sorted(device.seen) == [0, 1]
        device.transport.close()


def test_an_irqfd_line_pulses(system: System) -> None:
    with system.create_vm() as vm:
        ram = Ram(RAM_SIZE)
        vm.set_user_memory_region(0, 0, ram)
        vm.create_irqchip()
        line = IrqfdLine(vm, 4)
        line(0)
        line(1)
        deadline = time.monotonic() + LIMIT_S
        while not vm.get_irqchip(KVM_IRQCHIP_PIC_MASTER).chip.pic.irr & 1 << 4:
            assert time.monotonic() < deadline
            time.sleep(0.001)  # another thread, or the kernel, raises it
        line.close()
        line.close()
        line(1)
