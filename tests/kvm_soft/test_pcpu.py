"""Physical processors: fewer than vCPUs, going and coming, and a host that sleeps or restarts."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator

import pytest
from tests.kvm_soft.conftest import own_pool

from vmonty import kvm
from vmonty.base.errors import KvmError
from vmonty.base.ram import Ram
from vmonty.kvm.api import System, Vcpu
from vmonty.kvm.soft import modules, pcpu
from vmonty.kvm.uapi import Exit
from vmonty.testing.guests import RAM_SIZE, Mode, TinyGuest

WAIT_S = 40
# Counts in a register, in vector state and in memory; tells rbx after each million steps.
COUNTER = """
    mov rbx, {start}
    movq xmm3, rbx
again:
    mov rcx, 300000
busy:
    inc rbx
    loop busy
    movq rax, xmm3
    mov edx, 0x20
    out dx, eax
    jmp again
"""


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[pcpu.PhysicalCpus]:
    """A pool with room for two, one of them online; no module yet."""
    with own_pool(monkeypatch, limit=2, online=1) as made:
        yield made


@pytest.fixture(params=["kvm_intel", "kvm_amd", "kvm_intel ept=0", "kvm_amd npt=0"])
def system(pool: pcpu.PhysicalCpus, request: pytest.FixtureRequest) -> Iterator[System]:
    name, parameters = modules.parse(request.param)
    modules.load(name, **parameters)
    with kvm.open("soft") as opened:
        yield opened


class Counting:
    """A VM whose guest counts on a thread of its own."""

    def __init__(self, system: System, start: int) -> None:
        self.start = start
        self.vm = system.create_vm()
        ram = Ram(RAM_SIZE)
        self.vm.set_user_memory_region(0, 0, ram)
        self.vcpu: Vcpu = self.vm.create_vcpu()
        TinyGuest(self.vm, self.vcpu, ram).load(Mode.LONG, COUNTER.format(start=start))
        self.told = threading.Semaphore(0)
        self.wrong: list[object] = []
        self.stop = False
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            while not self.stop:
                reason = self.vcpu.run()
                value = int.from_bytes(self.vcpu.io_data(), "little")
                if reason is not Exit.IO or value != self.start:
                    self.wrong.append((reason, value))
                self.told.release()
        except BaseException as error:
            self.wrong.append(error)
            self.told.release()

    def progress(self, times: int = 1) -> None:
        for _ in range(times):
            assert self.told.acquire(timeout=WAIT_S), "the guest does not go on"
        assert not self.wrong

    def end(self) -> None:
        self.stop = True
        while self.thread.is_alive():
            self.thread.join(0.05)
        self.vcpu.close()
        self.vm.close()


@pytest.fixture
def counting(system: System, request: pytest.FixtureRequest) -> Iterator[list[Counting]]:
    made = [Counting(system, 1000 * (1 + number)) for number in range(getattr(request, "param", 1))]
    yield made
    for guest in made:
        guest.end()


@pytest.mark.parametrize("counting", [5], indirect=True)
def test_more_vcpus_than_processors_all_go_on(counting: list[Counting], pool: pcpu.PhysicalCpus) -> None:
    for guest in counting:
        guest.progress(3)
    assert len(pool) == 2


def test_registers_survive_a_move_to_another_processor(counting: list[Counting], pool: pcpu.PhysicalCpus) -> None:
    (guest,) = counting
    for number in (0, 1, 0):
        guest.progress()
        pool.online(1 - number)
        pool.offline(number)
        guest.progress(3)
        assert [processor.number for processor in pool] == [1 - number]


def test_a_processor_that_comes_up_has_virtualization_on(pool: pcpu.PhysicalCpus, system: System) -> None:
    assert pool.online(1).virtualization is not None
    pool.offline(1)
    with pytest.raises(OSError) as caught:
        pool.offline(0)
    assert caught.value.errno == errno.EBUSY


def test_a_processor_that_cannot_start_stays_offline(
    pool: pcpu.PhysicalCpus, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    undone: list[int] = []

    def fail(processor: pcpu.PhysicalCpu) -> None:
        raise OSError(errno.EIO, "injected")

    first = pcpu.HotplugState("test:first", lambda processor: None, lambda processor: undone.append(processor.number))
    with pool.cpuhp_state(first), pool.cpuhp_state(pcpu.HotplugState("test:last", fail, fail)):
        with pytest.raises(OSError, match="injected"):
            pool.online(1)
        assert undone == [1]
    assert [processor.number for processor in pool] == [0]


def test_suspend_freezes_guests_and_resume_lets_them_go_on(counting: list[Counting], pool: pcpu.PhysicalCpus) -> None:
    (guest,) = counting
    guest.progress()
    pool.online(1)
    pool.suspend()
    assert [processor.virtualization for processor in pool] == [None]
    while guest.told.acquire(blocking=False):
        pass
    assert not guest.told.acquire(timeout=0.1)
    pool.resume()
    assert all(processor.virtualization for processor in pool)
    assert len(pool) == 2
    guest.progress(2)


def test_reboot_turns_virtualization_off_and_no_guest_runs_any_more(system: System, pool: pcpu.PhysicalCpus) -> None:
    with system.create_vm() as vm, vm.create_vcpu() as vcpu:
        pool.reboot()
        assert [processor.virtualization for processor in pool] == [None]
        pool.thaw()
        with pytest.raises(KvmError) as caught:
            vcpu.get_regs()
        assert caught.value.errno == errno.EIO
        for processor in pool:
            module = modules.loaded()
            assert module is not None
            module.ops.hardware_enable(processor)


def test_a_processor_goes_after_a_reboot_that_turned_virtualization_off_there(
    system: System, pool: pcpu.PhysicalCpus
) -> None:
    pool.online(1)
    pool.reboot()
    pool.offline(0)
    pool.thaw()
    assert [(processor.number, processor.virtualization) for processor in pool] == [(1, None)]
    assert pool.online(0).virtualization is not None


@pytest.fixture
def amd(pool: pcpu.PhysicalCpus) -> Iterator[System]:
    modules.load("kvm_amd")
    with kvm.open("soft") as opened:
        yield opened


def test_each_vcpu_has_an_asid_until_its_processors_generation_ends(
    amd: System, pool: pcpu.PhysicalCpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one processor with three ASIDs, none is had by two in the same generation."""
    pool.limit = 1
    (processor,) = pool
    operation = processor.virtualization
    monkeypatch.setattr(operation, "max_asid", 3)
    with amd.create_vm() as vm, vm.create_vcpu(0) as first, vm.create_vcpu(1) as second:
        seen = []
        for vcpu in (first, second, first, first, second, first, second):
            vcpu.get_regs()
            seen.append((operation.asid_generation, vcpu.dump_vmcb()["ASID"]))
    of_first = [one for one, vcpu in zip(seen, (1, 2, 1, 1, 2, 1, 2), strict=True) if vcpu == 1]
    of_second = [one for one, vcpu in zip(seen, (1, 2, 1, 1, 2, 1, 2), strict=True) if vcpu == 2]
    assert not set(of_first) & set(of_second)
    assert all(1 <= asid <= 3 for _, asid in seen)


def test_an_asid_is_another_on_another_processor(amd: System, pool: pcpu.PhysicalCpus) -> None:
    pool.online(1)
    for processor, start in zip(pool, (5, 9), strict=True):
        processor.virtualization.next_asid = start
    with amd.create_vm() as vm, vm.create_vcpu() as vcpu:
        vcpu.get_regs()
        assert vcpu.dump_vmcb()["ASID"] == 5
        pool.offline(0)
        vcpu.get_regs()
        assert vcpu.dump_vmcb()["ASID"] == 9
