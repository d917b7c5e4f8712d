"""The PCI transport: capabilities, MSI-X vectors, INTx and ISR, the window in configuration space, moving BARs."""

from __future__ import annotations

import pytest

from vmonty.testing.virtio import PciAccess, VirtioDriver
from vmonty.vmm.hw.pci import config as cfg
from vmonty.vmm.virtio import pci
from vmonty.vmm.virtio.device import VirtioDevice
from vmonty.vmm.virtio.pci import NO_VECTOR, VirtioPci
from vmonty.vmm.virtio.queue import Chain, Queue
from vmonty.vmm.virtio.rng import Rng

from .conftest import Bench


class Echo(VirtioDevice):
    """Two queues that write back what they read."""

    device_id, name = 0x20, "echo"

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench.memory, bench.loop, (64, 16), config=b"configuration")

    def handle(self, queue: Queue) -> None:
        self.serve(queue, self._echo)

    @staticmethod
    def _echo(chain: Chain) -> int:
        return chain.put(b"".join(chain.readable))


@pytest.fixture
def transport() -> str:
    return "pci"


@pytest.fixture
def driver(bench: Bench) -> VirtioDriver:
    return bench.driver(Echo(bench))


@pytest.fixture
def access(driver: VirtioDriver) -> PciAccess:
    assert isinstance(driver.access, PciAccess)
    return driver.access


@pytest.fixture
def function(access: PciAccess) -> VirtioPci:
    return access._function


def test_identity(function: VirtioPci, bench: Bench) -> None:
    assert function.config_read(cfg.VENDOR_ID, 2) == 0x1AF4
    assert function.config_read(cfg.DEVICE_ID, 2) == 0x1060
    assert function.config_read(cfg.REVISION_ID, 1) == 1
    assert VirtioPci(Rng(bench.memory, bench.loop)).config_read(cfg.DEVICE_ID, 2) == 0x1044


def test_a_buffer_goes_round_with_intx(bench: Bench, driver: VirtioDriver) -> None:
    driver.start()
    buffer = driver.queues[1].add([b"hello"], [10], indirect=True)
    driver.queues[1].wait()
    assert buffer.data() == b"hello"
    assert driver.access.acknowledge() == 1
    assert driver.access.acknowledge() == 0
    assert bench.sent == []


def enable_msix(function: VirtioPci, vectors: int) -> None:
    """As a driver does: fill the table, unmask, switch on."""
    function.config_write(cfg.COMMAND, 2, cfg.COMMAND_MASTER | cfg.COMMAND_MEMORY)
    table = next(bar.window.device for bar in function.bars if bar.index == pci.MSIX_BAR)
    for vector in range(vectors):
        for word, value in enumerate((0xFEE0_0000, 0, 0x40 + vector, 0)):
            table.write(16 * vector + 4 * word, 4, value)
    at = function.config_read(cfg.CAPABILITIES, 1)
    while function.config_read(at, 1) != 0x11:
        at = function.config_read(at + 1, 1)
    function.config_write(at + 2, 2, 0x8000)


def test_each_queue_and_the_configuration_have_their_vector(
    bench: Bench, driver: VirtioDriver, access: PciAccess, function: VirtioPci
) -> None:
    enable_msix(function, 3)
    driver.start()
    assert [access.set_vector(0, 2), access.set_vector(1, 1), access.set_vector(None, 0)] == [2, 1, 0]
    for index in (0, 1):
        driver.queues[index].add([b"x"], [1])
        driver.queues[index].wait()
    function.device.change_config(b"other")
    assert bench.sent == [(0xFEE0_0000, 0x42), (0xFEE0_0000, 0x41), (0xFEE0_0000, 0x40)]
    assert access.acknowledge() == 0  # 4.1.4.5.1: not with MSI-X


def test_no_vector_no_message(bench: Bench, driver: VirtioDriver, access: PciAccess, function: VirtioPci) -> None:
    enable_msix(function, 3)
    driver.start()
    assert access.set_vector(0, 3) == NO_VECTOR
    driver.queues[0].add([b"x"], [1])
    bench.settle()
    assert len(driver.queues[0].collect()) == 1
    assert bench.sent == []
    access.set_vector(0, 0)
    driver.access.set_status(0)
    assert access.set_vector(0, NO_VECTOR) == NO_VECTOR


def test_configuration_space_of_the_device(access: PciAccess) -> None:
    assert bytes(access.config(at, 1) for at in range(14)) == b"configuration\0"
    assert access.config(4, 4) == int.from_bytes(b"igur", "little")


def test_the_common_structure_reads_back(driver: VirtioDriver, access: PciAccess) -> None:
    register = pci.Register
    assert access.read(pci.COMMON_CFG, register.NUM_QUEUES, 2) == 2
    assert [access.queue_size(index) for index in range(3)] == [64, 16, 0]
    driver.start()
    queue = driver.queues[1]
    access.write(pci.COMMON_CFG, register.QUEUE_SELECT, 2, 1)
    assert access.read(pci.COMMON_CFG, register.QUEUE_SELECT, 2) == 1
    assert access.read(pci.COMMON_CFG, register.QUEUE_DESC, 4) == queue.descriptors
    assert access.read(pci.COMMON_CFG, register.QUEUE_DEVICE, 4) == queue.used
    assert access.read(pci.COMMON_CFG, register.QUEUE_ENABLE, 2) == 1
    for word in range(2):
        access.write(pci.COMMON_CFG, register.DRIVER_FEATURE_SELECT, 4, word)
        assert access.read(pci.COMMON_CFG, register.DRIVER_FEATURE, 4) == driver.features >> 32 * word & 0xFFFF_FFFF


def test_the_window_in_configuration_space(driver: VirtioDriver, function: VirtioPci, access: PciAccess) -> None:
    at = function._window

    def show(offset: int, length: int) -> None:
        function.config_write(at + pci.CAP_BAR, 1, pci.BAR)
        function.config_write(at + pci.CAP_OFFSET, 4, offset)
        function.config_write(at + pci.CAP_LENGTH, 4, length)

    show(pci.DEVICE, 4)
    assert function.config_read(at + pci.CAP_DATA, 4).to_bytes(4, "little") == b"conf"
    show(pci.COMMON + pci.Register.DEVICE_STATUS, 1)
    function.config_write(at + pci.CAP_DATA, 1, 1)
    assert access.status() == 1
    for bad in ((pci.DEVICE + 1, 4), (pci.DEVICE, 3), (1 << 31, 4)):
        show(*bad)
        function.config_write(at + pci.CAP_DATA, 4, 0xFFFF_FFFF)
        assert function.config_read(at + pci.CAP_DATA, 4) >= 0


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_no_access_of_the_bar_fails(bench: Bench, access: PciAccess, function: VirtioPci, size: int) -> None:
    area = function._area
    for offset in [*range(0x60), 0x1000, 0x1001, 0x2000, 0x200C, 0x2FF8, 0x3000, 0x3004, 0x3010, 0x3FF8]:
        for value in (0, 1, (1 << 8 * size) - 1):
            area.write(offset, size, value)
            assert 0 <= area.read(offset, size) < 1 << 64
    bench.settle()


def test_broken_rings_ask_for_a_reset(bench: Bench, driver: VirtioDriver) -> None:
    driver.start()
    driver.queues[0].describe(0, 1 << 50, 1)
    driver.queues[0].offer(0)
    driver.access.notify(0)
    bench.settle()
    assert driver.broken
    assert driver.access.acknowledge() == 2
