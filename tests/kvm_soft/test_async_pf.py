"""Asynchronous page faults of the software KVM: which memory is waited for, and what becomes of who waits."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvm_abi.async_guests import (
    AWAY,
    BROADCAST,
    DONE,
    ELSEWHERE,
    EN,
    MEANWHILE,
    ON,
    PAGES,
    SEND_ALWAYS,
    TOLD_ABSENT,
    TOLD_READY,
    TOUCH,
    VALUE,
    begin,
    until,
    wrmsr,
)
from kvm_abi.missing_memory import MissingMemory, missing_slot
from kvm_abi.runner import Runner, runners
from vmonty.base import hostcall
from vmonty.base.ram import PAGE_SIZE, Ram
from vmonty.kvm.api import Vcpu
from vmonty.kvm.soft.async_pf import MOST_THREADS, AsyncPf, Work, Workers
from vmonty.kvm.soft.memslots import Memslot
from vmonty.kvm.soft.mmu.residency import Residency
from vmonty.kvm.uapi import Exit, Requests
from vmonty.kvm.uapi.vm import kvm_userspace_memory_region
from vmonty.testing.guests import TinyGuest

from .conftest import with_irqchip

# Modules and how they translate.
WAYS = [("kvm_intel", {}), ("kvm_intel", {"ept": False}), ("kvm_amd", {}), ("kvm_amd", {"npt": False})]


@pytest.fixture(params=WAYS, ids=["ept", "shadow-vmx", "npt", "shadow-svm"])
def chipped(request: pytest.FixtureRequest) -> Iterator[TinyGuest]:
    module, parameters = request.param
    with with_irqchip(module, **parameters) as guest:
        yield guest


@pytest.fixture
def away(chipped: TinyGuest) -> Iterator[MissingMemory]:
    with missing_slot(chipped.vm, 1, AWAY, PAGES) as memory:
        yield memory


@pytest.fixture
def runner() -> Iterator[Callable[[Vcpu], Runner]]:
    with runners() as start:
        yield start


def workers() -> int:
    return sum(thread.name == "kvm-async-pf" for thread in threading.enumerate())


def test_turned_off_while_a_page_is_away(chipped: TinyGuest, away: MissingMemory) -> None:
    """No token is sent for it, and nobody waits. (Linux's KVM waits here.) Turned on again: a broadcast."""
    off = f"{wrmsr(EN, 0)} out {MEANWHILE:#x}, al\n {wrmsr(EN, ON)} {ELSEWHERE}"
    begin(chipped, TOUCH, ON | SEND_ALWAYS, off)
    until(chipped, TOLD_ABSENT)
    assert away.wanted() == 0
    assert chipped.out()[0] == MEANWHILE
    away.give(0, 0x600D)
    assert until(chipped, TOLD_READY) == BROADCAST
    assert [chipped.out()[0] for _ in range(20)] == [MEANWHILE] * 20


def test_turned_off_by_user_space_while_a_vcpu_waits() -> None:
    """As a reset does it: nobody would wake it any more."""

    vcpu = SimpleNamespace(apic=object(), pv=SimpleNamespace(has=lambda feature: True))
    waiting = AsyncPf(vcpu)  # type: ignore[arg-type]
    waiting.control, waiting.halted = ON, True
    assert waiting.write_control(0)
    assert not waiting.halted


def test_a_vm_ends_while_a_page_is_away(chipped: TinyGuest, away: MissingMemory) -> None:
    begin(chipped, TOUCH, ON | SEND_ALWAYS)
    until(chipped, TOLD_ABSENT)
    assert away.wanted() == 0
    assert workers() == 1
    chipped.close()
    away.close()
    for thread in threading.enumerate():
        if thread.name == "kvm-async-pf":
            thread.join(30)
    assert workers() == 0


def test_threads_end_with_the_vm(chipped: TinyGuest, away: MissingMemory) -> None:
    begin(chipped, f"{TOUCH} {DONE}", ON | SEND_ALWAYS)
    until(chipped, TOLD_ABSENT)
    assert away.wanted() == 0
    away.give(0, 0x600D)
    until(chipped, TOLD_READY)
    assert chipped.out() == (VALUE, 0x600D)
    assert workers() == 1
    chipped.close()
    for thread in threading.enumerate():
        if thread.name == "kvm-async-pf":
            thread.join(30)
    assert workers() == 0


def test_memory_that_is_registered_later(chipped: TinyGuest) -> None:
    """It was mapped whole: who registers it tells the KVM, as of all that is done to its mappings."""
    memory = Ram(PAGES * PAGE_SIZE)
    chipped.vm.set_user_memory_region(1, AWAY, memory)
    begin(chipped, f"{TOUCH} mov eax, [abs {AWAY + PAGE_SIZE}]\n out {VALUE:#x}, eax\n {DONE}", ON | SEND_ALWAYS)
    assert chipped.out() == (VALUE, 0)
    missing = MissingMemory(memory)
    try:
        chipped.vm.provider.memory_unmapped(memory.address, memory.size)
        token = until(chipped, TOLD_ABSENT)
        assert missing.wanted() == 1
        missing.give(1, 7)
        assert until(chipped, TOLD_READY) == token
        assert chipped.out() == (VALUE, 7)
    finally:
        missing.close()


def test_memory_that_the_kernel_does_not_wait_for(chipped: TinyGuest, runner: Callable[[Vcpu], Runner]) -> None:
    """No worker can: the processor itself waits, as without asynchronous faults."""
    missing = MissingMemory(Ram(PAGES * PAGE_SIZE), user_mode=True)
    try:
        chipped.vm.set_user_memory_region(1, AWAY, missing.ram)
        begin(chipped, f"{TOUCH} {TOUCH} {DONE}")
        thread = runner(chipped.vcpu)
        assert missing.wanted() == 0
        missing.give(0, 0x600D)
        assert [thread.next() for _ in range(2)] == [(VALUE, 0x600D)] * 2
    finally:
        missing.close()


def test_memory_that_never_comes(chipped: TinyGuest, away: MissingMemory, runner: Callable[[Vcpu], Runner]) -> None:
    """Its worker fails; the guest finds what it would have found without one."""
    begin(chipped, f"{TOUCH} {DONE}")
    thread = runner(chipped.vcpu)
    assert away.wanted() == 0
    os.ftruncate(away.ram.fileno(), 0)
    away.close()
    ended = thread.next()
    assert isinstance(ended, OSError)
    assert chipped.vcpu.kvm_run.exit_reason == Exit.MEMORY_FAULT
    os.ftruncate(away.ram.fileno(), PAGES * PAGE_SIZE)
    assert chipped.out() == (VALUE, 0)


def test_no_thread_to_be_had(
    chipped: TinyGuest, away: MissingMemory, runner: Callable[[Vcpu], Runner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processor waits itself."""
    asked: list[Work] = []
    monkeypatch.setattr(Workers, "submit", lambda _, work: asked.append(work))
    begin(chipped, f"{TOUCH} {DONE}", ON | SEND_ALWAYS)
    thread = runner(chipped.vcpu)
    assert away.wanted() == 0
    away.give(0, 0x600D)
    assert thread.next() == (VALUE, 0x600D)
    assert len(asked) == 1


def test_the_host_has_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        assert not Workers().submit(Work(Waiting(), 0, 0, 0))  # type: ignore[arg-type]


class Waiting:
    """Stands for the vCPU that pages are fetched for."""

    def __init__(self) -> None:
        self.done: list[int] = []

    def fetched(self, work: Work) -> None:
        self.done.append(work.token)


def test_threads_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as pages are waited for, up to a limit; then pages wait for threads."""
    come, touched = threading.Semaphore(0), threading.Semaphore(0)

    def touch(_: int) -> int:
        touched.release()
        come.acquire()
        return 0

    monkeypatch.setattr(hostcall, "touch", touch)
    workers_of_a_vm, owner = Workers(), Waiting()
    works = [Work(owner, number, 0, number) for number in range(MOST_THREADS + 4)]  # type: ignore[arg-type]
    for number in range(3):
        assert workers_of_a_vm.submit(works[number])
        touched.acquire()
    assert workers() == 3
    for work in works[3:]:
        assert workers_of_a_vm.submit(work)
    works[-1].cancelled = True  # before its turn
    for _ in range(MOST_THREADS - 3):
        touched.acquire()
    assert workers() == MOST_THREADS
    come.release(len(works))
    workers_of_a_vm.close()
    for thread in threading.enumerate():
        if thread.name == "kvm-async-pf":
            thread.join(30)
    assert sorted(owner.done) == list(range(len(works) - 1))


# ---- which memory ------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A file on a disk."""
    path = Path("/var/tmp") / f"vmonty-test-{os.getpid()}"  # /tmp may be memory
    path.write_bytes(b"\x2a" * 8 * PAGE_SIZE)
    fd = os.open(path, os.O_RDWR)
    path.unlink()
    os.fsync(fd)
    yield fd
    os.close(fd)


def ranges(address: int, size: int) -> list[tuple[int, int, bool]]:
    """What of it is fetched, by offset."""
    slot = Memslot(0, 0, size // PAGE_SIZE, address, 0)
    Residency().look([slot])
    return [(start - address, end - address, by_user) for start, end, by_user in slot.fetched or ()]


def mapped(mapping: mmap.mmap) -> list[tuple[int, int, bool]]:
    return ranges(hostcall.address_of(mapping), len(mapping))


def test_memory_of_its_own_is_at_hand() -> None:
    ram = Ram(PAGES * PAGE_SIZE)
    assert ranges(ram.address, ram.size) == []
    with mmap.mmap(-1, 4 * PAGE_SIZE) as anonymous:
        assert mapped(anonymous) == []


def test_missing_memory_is_fetched() -> None:
    missing = MissingMemory(Ram(PAGES * PAGE_SIZE))
    ram = missing.ram
    try:
        assert ranges(ram.address, ram.size) == [(0, ram.size, True)]
        assert ranges(ram.address + PAGE_SIZE, PAGE_SIZE) == [(0, PAGE_SIZE, True)]
        slot = Memslot(0, 0x100, PAGES, ram.address, 0)
        residency = Residency()
        missing.give(2, 1)
        ram.read_u32(2 * PAGE_SIZE)  # give() puts it into the file, this into the page tables
        assert residency.present(slot, 0x100, PAGES) == b"\0\0\1\0"
        assert residency.present(slot, 0x102, 1) == b"\1"
    finally:
        missing.close()
    assert ranges(ram.address, ram.size) == []


def test_a_file_is_read_from_its_disk(file: int) -> None:
    with mmap.mmap(file, 8 * PAGE_SIZE) as mapping:
        found = mapped(mapping)
        if not found:
            pytest.skip("/var/tmp is in memory here")
        assert found == [(0, 8 * PAGE_SIZE, False)]
        begin = hostcall.address_of(mapping)
        residency, slot = Residency(), Memslot(0, 0, 8, begin, 0)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        there = residency.present(slot, 0, 8)
        assert len(there) == 8
        assert hostcall.touch(begin + 3 * PAGE_SIZE) == 0
        assert residency.present(slot, 3, 1) == b"\1"


def test_guests_read_a_file_that_is_not_in_memory(chipped: TinyGuest, file: int) -> None:
    """Whichever way: a disk may be too quick to be seen waiting for."""
    with mmap.mmap(file, 8 * PAGE_SIZE) as mapping:
        if not mapped(mapping):
            pytest.skip("/var/tmp is in memory here")
        region = kvm_userspace_memory_region(
            slot=1, guest_phys_addr=AWAY, memory_size=8 * PAGE_SIZE, userspace_addr=hostcall.address_of(mapping)
        )
        chipped.vm.ioctl(Requests.KVM_SET_USER_MEMORY_REGION, region)
        reads = "".join(f"mov eax, [abs {AWAY + page * PAGE_SIZE}]\n out {VALUE:#x}, eax\n" for page in range(8))
        begin(chipped, f"{reads} {DONE}")
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        assert [chipped.out() for _ in range(8)] == [(VALUE, 0x2A2A2A2A)] * 8
        region.memory_size = 0
        chipped.vm.ioctl(Requests.KVM_SET_USER_MEMORY_REGION, region)


def test_memory_of_its_own_stays_in_large_pages(chipped: TinyGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is never asked where it is."""
    asked: list[int] = []
    monkeypatch.setattr("vmonty.kvm.soft.mmu.residency._in_memory", lambda low, high: asked.append(low) or b"\0")
    chipped.vm.set_user_memory_region(1, AWAY, Ram(4 << 20))
    begin(chipped, f"{TOUCH} mov eax, [abs {AWAY + (2 << 20)}]\n {DONE}")
    assert chipped.out() == (VALUE, 0)
    chipped.out()
    with chipped.vm.stats() as counters:
        assert counters.read()["pages_2m"] >= 2
    assert not asked
