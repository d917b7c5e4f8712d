"""Whole machines: built, run, stopped and closed, on a KVM that refuses at will."""

from __future__ import annotations

import errno
import gc
import os
import threading
from types import SimpleNamespace

import pytest

from vmonty.base.errors import BootImageError, KvmError, UsageError
from vmonty.kvm.api import System
from vmonty.vmm import boards
from vmonty.vmm.boards.pci_host import PM_BASE
from vmonty.vmm.machine import MOST_VCPUS, Config
from vmonty.vmm.outcome import Ending

from . import kernels
from .conftest import LIMIT_S
from .fake_kvm import FakeKvm
from .steps import Guest, Out, Wait


def config(image: bytes, **changes: object) -> Config:
    return Config(image, memory=kernels.MEMORY, **changes)  # type: ignore[arg-type]


# ---- configurations -----------------------------------------------------------------------------------


def test_defaults(image: bytes) -> None:
    made = Config(image)
    assert (made.memory, made.cpus, made.command_line, made.initrd) == (512 << 20, 1, "console=ttyS0", None)


@pytest.mark.parametrize("memory", [0, -1, 4097, 1 << 60])
def test_impossible_memory(image: bytes, memory: int) -> None:
    with pytest.raises(UsageError, match="memory of"):
        Config(image, memory=memory)


def test_no_kernel() -> None:
    with pytest.raises(BootImageError):
        Config(b"text")


@pytest.mark.parametrize("cpus", [0, -1, MOST_VCPUS + 1])
def test_impossible_number_of_vcpus(image: bytes, cpus: int) -> None:
    with pytest.raises(UsageError, match=f"{cpus} vCPUs: a machine has 1 to 255"):
        config(image, cpus=cpus)


def test_more_vcpus_than_this_kvm_takes(image: bytes) -> None:
    fake = FakeKvm(max_vcpus=8)
    with System(fake) as system, pytest.raises(UsageError, match="9 vCPUs: this KVM takes 1 to 8"):
        boards.create(system, config(image, cpus=9), bytes)
    assert not fake.files


def test_what_does_not_fit_is_told_before_a_kvm_is_opened(image: bytes) -> None:
    with pytest.raises(BootImageError, match="the initrd of 8 MiB does not fit"):
        config(image, initrd=bytes(kernels.MEMORY))
    with pytest.raises(BootImageError, match="command line is 5000 bytes"):
        config(image, command_line="x" * 5000)


def test_as_many_vcpus_as_there_can_be(image: bytes) -> None:
    fake = FakeKvm()
    with System(fake) as system, boards.create(system, config(image, cpus=MOST_VCPUS), bytes) as machine:
        assert [thread.vcpu.id for thread in machine.vcpus] == list(range(MOST_VCPUS))
    assert not fake.files


# ---- building ---------------------------------------------------------------------------------------------


LEGACY = [
    ("i8042-data", 0x60), ("i8042-command", 0x64), ("cmos", 0x70), ("post", 0x80), ("port92", 0x92), ("serial", 0x3F8),
    ("pvpanic", 0x505), ("fw_cfg", 0x510), ("acpi-pm", PM_BASE), ("pci-config", 0xCF8),
    ("acpi-pci-hotplug", 0xAE00), ("acpi-gpe0", 0xAFE0),
]  # fmt: skip
STANDS = {
    "pc": [*LEGACY, ("shadow-ram", 0xC_0000), ("hpet", 0xFED0_0000)],
    "pc,hpet=off": [*LEGACY, ("shadow-ram", 0xC_0000)],
    "q35": [*LEGACY, ("shadow-ram", 0xC_0000), ("ecam", 0xB000_0000), ("hpet", 0xFED0_0000)],
    "microvm": [("serial", 0x3F8), ("acpi-ged", 0xFEA0_0000)],
}


@pytest.mark.parametrize("board", STANDS)
def test_what_stands_where(image: bytes, board: str) -> None:
    with System(FakeKvm()) as system, boards.create(system, config(image, machine=board), bytes) as machine:
        machine.start()
        placed = machine.ports.ranges() + machine.mmio.ranges()
        assert [(one.name, one.base) for one in placed] == STANDS[board]


def test_an_unknown_board(image: bytes) -> None:
    with System(FakeKvm()) as system, pytest.raises(UsageError, match="unknown machine 'z80'; there are: pc, q35"):
        boards.create(system, config(image, machine="z80"), bytes)


REQUESTS = [
    "KVM_CREATE_VM", "KVM_SET_IDENTITY_MAP_ADDR", "KVM_SET_TSS_ADDR", "KVM_CREATE_IRQCHIP", "KVM_SET_GSI_ROUTING",
    "KVM_CREATE_PIT2",
    "KVM_SET_USER_MEMORY_REGION", "KVM_CREATE_VCPU", "KVM_GET_SUPPORTED_CPUID", "KVM_SET_CPUID2", "KVM_SET_MSRS",
    "KVM_GET_LAPIC", "KVM_SET_LAPIC", "KVM_GET_SREGS", "KVM_SET_SREGS", "KVM_GET_REGS", "KVM_SET_REGS",
]  # fmt: skip


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_kvm_that_refuses_leaves_nothing_open(image: bytes, request_: str) -> None:
    fake = FakeKvm(refuses={request_: errno.ENOMEM})
    with System(fake) as system:
        with pytest.raises(KvmError, match=request_) as error:  # noqa: SIM117
            with boards.create(system, config(image, cpus=2), bytes) as machine:
                machine.start()
        assert error.value.errno == errno.ENOMEM
        assert len(fake.files) == 1, "only the system file is open"


def test_every_request_of_a_build_is_in_the_list(image: bytes) -> None:
    fake = FakeKvm()
    with System(fake) as system:
        fake.calls.clear()
        with boards.create(system, config(image), bytes) as machine:
            machine.start()
    assert set(fake.calls) - {"KVM_RUN"} == {*REQUESTS, "KVM_CHECK_EXTENSION"}


# ---- running ------------------------------------------------------------------------------------------------


def test_threads_have_names(image: bytes) -> None:
    with System(FakeKvm()) as system, boards.create(system, config(image, cpus=3), bytes) as machine:
        machine.start()
        names = {thread.name for thread in threading.enumerate()}
        assert {f"CPU {index}/KVM" for index in range(3)} <= names


def test_stop_from_another_thread(image: bytes) -> None:
    with System(FakeKvm()) as system, boards.create(system, config(image, cpus=2), bytes) as machine:
        machine.start()
        assert machine.wait(0) is None
        threading.Thread(target=machine.stop, args=("enough",)).start()
        outcome = machine.wait(LIMIT_S)
        assert outcome is not None
        assert (outcome.ending, outcome.detail) == (Ending.STOPPED, "enough")


def test_the_first_ending_counts(image: bytes) -> None:
    def guest(cpu: int) -> Guest:
        yield Out(0x64, 0xFE)

    with System(FakeKvm(guest)) as system, boards.create(system, config(image, cpus=4), bytes) as machine:
        machine.start()
        outcome = machine.wait(LIMIT_S)
        machine.stop()
        assert outcome is not None
        assert outcome.ending is Ending.RESET
        assert machine.wait(0) is outcome


def test_stopped_before_it_started(image: bytes) -> None:
    with System(FakeKvm()) as system, boards.create(system, config(image), bytes) as machine:
        machine.stop()
        machine.start()
        assert machine.wait(LIMIT_S) is not None


def test_close_ends_a_run_and_may_be_repeated(image: bytes) -> None:
    fake = FakeKvm()
    with System(fake) as system:
        machine = boards.create(system, config(image, cpus=2), bytes)
        machine.start()
        machine.close()
        machine.close()
        assert len(fake.files) == 1


def test_input_that_comes_too_late_is_no_error(image: bytes) -> None:
    """The console's thread outlives the machine by a moment."""
    reached = threading.Event()

    def guest(cpu: int) -> Guest:
        yield Out(0x3F9, 1)
        reached.set()
        yield Wait()

    with System(FakeKvm(guest)) as system:
        with boards.create(system, config(image), bytes) as machine:
            machine.start()
            assert reached.wait(LIMIT_S)
        machine.serial.receive(b"late")
        machine.acpi_pm.press_power_button()


def test_the_power_button_reaches_the_guest(image: bytes) -> None:
    lines: list[object] = []
    ready = threading.Event()

    def guest(cpu: int) -> Guest:
        yield Out(PM_BASE + 2, 1 << 8, 2)
        ready.set()
        lines.append((yield Wait()))
        yield Out(PM_BASE + 4, 5 << 10 | 1 << 13, 2)

    with System(FakeKvm(guest)) as system, boards.create(system, config(image), bytes) as machine:
        machine.start()
        assert ready.wait(LIMIT_S)
        machine.acpi_pm.press_power_button()
        assert machine.wait(LIMIT_S) is not None
    assert lines == [9]


def test_cells_made_after_all_ports_are_seen(image: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Firmware's are made when the machine starts, which is after an observer came."""
    with (
        System(FakeKvm()) as system,
        boards.create(system, Config(image, memory=kernels.MEMORY), bytes) as machine,
    ):
        hidden: list[int] = []

        def make(port: int, *arguments: int) -> SimpleNamespace:
            return SimpleNamespace(value=0, hide=lambda: hidden.append(port))

        monkeypatch.setattr(machine.vm, "port_cell", make)
        machine.port_cell(0x500, 1)
        assert hidden == []
        machine.see_all_ports()
        machine.port_cell(0x402, 1)
        assert hidden == [0x500, 0x402]


def test_memory_goes_with_the_machine(image: bytes) -> None:
    def guest_rams() -> int:
        links = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
        return sum("vmonty-ram" in os.readlink(link) for link in links if os.path.islink(link))

    gc.collect()
    before = guest_rams()
    with System(FakeKvm()) as system:
        for _ in range(3):
            boards.create(system, config(image), bytes).close()
            gc.collect()
            assert guest_rams() == before
