"""A vCPU's thread: its CPUID, what its exits lead to, and how it ends."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vmonty.kvm.api import System
from vmonty.kvm.uapi import Exit
from vmonty.kvm.uapi.flags import KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN
from vmonty.vmm import boards, inspection
from vmonty.vmm.cpu import FEATURE_HYPERVISOR, FEATURE_TSC_DEADLINE, cpuid_for
from vmonty.vmm.machine import Config, Machine
from vmonty.vmm.outcome import Ending, Outcome

from . import kernels
from .conftest import LIMIT_S
from .fake_kvm import FakeKvm
from .steps import Guest, In, Leave, Load, Out, Refuse, Store, Wait

POWER_OFF = Out(0x604, 5 << 10 | 1 << 13, 2)


def run(
    guest: Callable[[int], Guest], image: bytes, console: Callable[[bytes], None] = bytes
) -> tuple[Outcome, FakeKvm]:
    """Play *guest* on each vCPU of a machine of one; return how it ended."""
    fake = FakeKvm(guest)
    with System(fake) as system, boards.create(system, Config(image, memory=kernels.MEMORY), console) as machine:
        machine.start()
        outcome = machine.wait(LIMIT_S)
    assert outcome is not None, "the machine did not end"
    assert not fake.files, "files left open"
    return outcome, fake


# ---- CPUID ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1, 254])
def test_cpuid_of_each_vcpu(index: int) -> None:
    with System(FakeKvm()) as system:
        entries = {entry.function: entry for entry in cpuid_for(system.supported_cpuid(), index)}
    assert entries[0].edx == 0x77, "other leaves are KVM's"
    assert entries[1].ebx >> 24 == index
    assert entries[1].ecx & FEATURE_HYPERVISOR
    assert entries[1].ecx & FEATURE_TSC_DEADLINE
    assert entries[0xB].edx == entries[0x1F].edx == index


def test_cpuid_on_a_real_kvm(system: System) -> None:
    entries = cpuid_for(system.supported_cpuid(), 3)
    assert len(entries) == len(system.supported_cpuid())
    (features,) = [entry for entry in entries if entry.function == 1]
    assert features.ebx >> 24 == 3
    assert features.ecx & FEATURE_HYPERVISOR


# ---- exits ---------------------------------------------------------------------------------------------


def test_port_and_memory_accesses_reach_their_devices(image: bytes) -> None:
    read: list[int] = []
    printed = bytearray()

    def guest(cpu: int) -> Guest:
        yield Out(0x3F8, ord("A"))
        read.append((yield In(0x3FD)))
        read.append((yield In(0x3FD, 2)))
        read.append((yield In(0x1234, 4)))
        read.append((yield Load(0xD000_0000, 8)))
        yield Store(0xD000_0000, 1)
        yield Out(0x1234, 7)
        yield POWER_OFF

    outcome, _ = run(guest, image, printed.extend)
    assert outcome.ending is Ending.POWER_OFF
    assert printed == b"A"
    assert read == [0x60, 0x60, 0xFFFF_FFFF, (1 << 64) - 1]


def test_string_output_is_one_exit(image: bytes) -> None:
    printed = bytearray()

    def three(run: Any) -> None:
        io = run.u.io
        io.port, io.size, io.count, io.direction, io.data_offset = 0x3F8, 1, 3, 1, 4096

    def guest(cpu: int) -> Guest:
        yield Leave(Exit.IO, three)
        yield POWER_OFF

    run(guest, image, printed.extend)
    assert len(printed) == 3


def event(kind: int) -> Callable[[Any], None]:
    def fill(run: Any) -> None:
        run.u.system_event.type = kind

    return fill


def internal(run: Any) -> None:
    run.u.internal.suberror, run.u.internal.ndata = 1, 200
    run.u.internal.data[0] = 0xF00D


def entry(run: Any) -> None:
    run.u.fail_entry.hardware_entry_failure_reason = 0x8000_0021


@pytest.mark.parametrize(
    ("step", "ending", "says", "registers"),
    [
        (POWER_OFF, Ending.POWER_OFF, "powered off", False),
        (Out(0x64, 0xFE), Ending.RESET, "reset", False),
        (Leave(Exit.SHUTDOWN), Ending.SHUTDOWN, "triple fault", True),
        (Leave(Exit.HLT), Ending.HALTED, "halted", True),
        (Leave(Exit.SYSTEM_EVENT, event(KVM_SYSTEM_EVENT_SHUTDOWN)), Ending.POWER_OFF, "powered off", False),
        (Leave(Exit.SYSTEM_EVENT, event(KVM_SYSTEM_EVENT_RESET)), Ending.RESET, "reset", False),
        (Leave(Exit.SYSTEM_EVENT, event(KVM_SYSTEM_EVENT_CRASH)), Ending.SHUTDOWN, "crash", True),
        (Leave(Exit.FAIL_ENTRY, entry), Ending.ERROR, "hardware reason 0x80000021", True),
        (Leave(Exit.INTERNAL_ERROR, internal), Ending.ERROR, "internal error 1 (data: 0xf00d", True),
        (Leave(Exit.HYPERV), Ending.ERROR, "Exit.HYPERV", True),
        (Leave(4711), Ending.ERROR, "exit reason 4711", True),
        (Refuse(errno.EFAULT), Ending.ERROR, "KVM_RUN: Bad address; a remedy", True),
    ],
    ids=lambda value: None if isinstance(value, (bool, str)) else repr(value)[:30],
)
def test_endings(image: bytes, step: Any, ending: Ending, says: str, registers: bool) -> None:
    def guest(cpu: int) -> Guest:
        yield step

    outcome, _ = run(guest, image)
    assert outcome.ending is ending
    assert says in outcome.detail
    assert "\n" not in outcome.detail
    assert bool(outcome.registers) is registers


@pytest.mark.parametrize(
    "passing", [Leave(Exit.INTR), Leave(Exit.IRQ_WINDOW_OPEN), Refuse(errno.EINTR), Refuse(errno.EAGAIN)]
)
def test_what_is_no_ending(image: bytes, passing: Any) -> None:
    def guest(cpu: int) -> Guest:
        yield passing
        yield POWER_OFF

    assert run(guest, image)[0].ending is Ending.POWER_OFF


def test_an_error_of_ours_ends_the_machine_too(image: bytes) -> None:
    """A device or a console that raises must not leave a machine that nobody ends."""

    def guest(cpu: int) -> Guest:
        yield Out(0x3F8, 0)

    def broken(data: bytes) -> None:
        raise RuntimeError("no ink")

    outcome, _ = run(guest, image, broken)
    assert outcome.ending is Ending.ERROR
    assert outcome.detail == "internal error on CPU 0/KVM: RuntimeError: no ink"


def test_input_wakes_a_halted_guest(image: bytes) -> None:
    """As a driver takes it: the line rises, the identification says why, the byte is there."""
    seen: list[Any] = []

    def guest(cpu: int) -> Guest:
        yield Out(0x3FC, 0x0B)
        yield Out(0x3F9, 1)
        machines[0].serial.receive(b"k")
        seen.append((yield Wait()))
        seen.append((yield In(0x3FA)))
        seen.append(chr((yield In(0x3F8))))
        yield POWER_OFF

    machines: list[Machine] = []
    fake = FakeKvm(guest)
    with System(fake) as system, boards.create(system, Config(image, memory=kernels.MEMORY), bytes) as machine:
        machines.append(machine)
        machine.start()
        assert machine.wait(LIMIT_S) is not None
    assert seen == [4, 4, "k"]
    assert fake.lines == [(4, 1), (4, 0), (9, 0)]


def test_pauses_that_follow_each_other_at_once(image: bytes) -> None:
    """A resume() and the next pause() may both come before the thread has begun to wait, or has woken."""
    steps = [0, 0]

    def guest(cpu: int) -> Guest:
        while True:
            steps[cpu] += 1
            yield In(0x3FD)

    with (
        System(FakeKvm(guest)) as system,
        boards.create(system, Config(image, memory=kernels.MEMORY, cpus=2), bytes) as machine,
    ):
        machine.start()
        for turn in range(300):
            inspection.pause(machine)
            before = list(steps)
            if turn % 10 == 0:
                time.sleep(0.002)
            assert steps == before
            inspection.resume(machine)
        inspection.pause(machine)
        machine.stop()
        assert machine.wait(LIMIT_S) is not None


# ---- outcomes --------------------------------------------------------------------------------------------


def test_register_dump() -> None:
    names = ["rax", "rbx", "rcx", "rdx", "cs.base"]
    outcome = Outcome(Ending.SHUTDOWN, "it", {name: number for number, name in enumerate(names)})
    first, second = outcome.register_dump().splitlines()
    assert first.split() == ["rax", f"{0:016x}", "rbx", f"{1:016x}", "rcx", f"{2:016x}", "rdx", f"{3:016x}"]
    assert second.split() == ["cs.base", f"{4:016x}"]
    assert Outcome(Ending.POWER_OFF, "it").register_dump() == ""


@pytest.fixture(autouse=True)
def no_exception_is_lost(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a thread raises and nobody catches fails the test."""
    lost: list[Any] = []
    monkeypatch.setattr("threading.excepthook", lost.append)
    yield
    assert not lost
