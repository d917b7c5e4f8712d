"""Handles: closing in any order, from any thread, during a run; nothing leaks. Source: api.rst, "API description"."""

from __future__ import annotations

import gc
import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from vmonty.base.errors import HandleClosed
from vmonty.base.ram import Ram
from vmonty.kvm.api import Handle, System, Vcpu, Vm
from vmonty.kvm.uapi import Exit
from vmonty.testing.guests import DATA, RAM_SIZE, Mode, TinyGuest, load

from .runner import Runner
from .watched import WatchedProvider

Start = Callable[[Vcpu], Runner]


def open_fds() -> set[str]:
    return {os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()}


def count_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize(
    "order", list(itertools.permutations(range(3))), ids=lambda order: "".join("svc"[i] for i in order)
)
def test_close_in_any_order(provider: WatchedProvider, order: tuple[int, ...]) -> None:
    """System, VM and vCPU; what is still open goes on working."""
    system = System(provider)
    vm = system.create_vm()
    ram = Ram(RAM_SIZE)
    vm.set_user_memory_region(0, 0, ram)
    vcpu = vm.create_vcpu()
    load(vcpu, ram, Mode.LONG, "again: out 0x10, al\n jmp again")
    handles: list[Handle] = [system, vm, vcpu]
    for index in order:
        handles[index].close()
        assert handles[index].closed
        if not vcpu.closed:
            assert vcpu.run() is Exit.IO
    for handle in handles:
        with pytest.raises(HandleClosed):
            handle.fileno()


def test_vcpu_keeps_the_vm_and_its_memory(provider: WatchedProvider) -> None:
    with System(provider) as system:
        vm = system.create_vm()
    ram = Ram(RAM_SIZE)
    vm.set_user_memory_region(0, 0, ram)
    vcpu = vm.create_vcpu()
    load(vcpu, ram, Mode.LONG, f"mov dword [abs {DATA}], 9\n mov eax, [abs {DATA}]\n out 0x10, eax")
    vm.close()
    del vm, ram
    gc.collect()
    assert vcpu.run() is Exit.IO
    assert bytes(vcpu.io_data()) == (9).to_bytes(4, "little")
    vcpu.close()


def test_closed_handle_refuses(vm: Vm) -> None:
    with vm.create_vcpu() as vcpu:
        pass
    for call in (vcpu.run, vcpu.get_regs, vcpu.nmi, vcpu.fileno):
        with pytest.raises(HandleClosed):
            call()


def test_close_twice(vm: Vm) -> None:
    vm.close()
    fd = os.open("/dev/null", os.O_RDONLY)  # takes the number that was freed
    vm.close()
    os.fstat(fd)
    os.close(fd)


def test_with_closes_on_an_exception(system: System) -> None:
    with pytest.raises(ZeroDivisionError), system.create_vm() as vm:
        _ = 1 / 0
    assert vm.closed


def test_repr_tells_the_state(vm: Vm) -> None:
    assert f"fd {vm.fileno()}" in repr(vm)
    vm.close()
    assert "closed" in repr(vm)


@pytest.mark.parametrize("source", ["spin: jmp spin", "hlt"], ids=["spinning", "halted"])
def test_close_during_a_run(chipped: TinyGuest, runner: Start, source: str) -> None:
    """The run ends with HandleClosed in its own thread; the fd goes when it has returned."""
    chipped.load(Mode.LONG, f"out 0x80, al\n {source}")
    thread = runner(chipped.vcpu)
    assert thread.next() == (0x80, 0)
    fd = chipped.vcpu.fileno()
    chipped.vcpu.close()
    assert isinstance(thread.next(), HandleClosed)
    thread.join()
    with pytest.raises(OSError):
        os.fstat(fd)


def test_close_of_vm_and_system_during_a_run(provider: WatchedProvider, runner: Start) -> None:
    system = System(provider)
    vm = system.create_vm()
    ram = Ram(RAM_SIZE)
    vm.set_user_memory_region(0, 0, ram)
    vcpu = vm.create_vcpu()
    load(vcpu, ram, Mode.LONG, f"out 0x80, al\n spin: inc dword [abs {DATA}]\n jmp spin")
    thread = runner(vcpu)
    assert thread.next() == (0x80, 0)
    system.close()
    vm.close()
    before = ram.read_u32(DATA)
    while ram.read_u32(DATA) == before and thread.thread.is_alive():
        pass
    vcpu.kick()
    assert thread.next() is Exit.INTR
    vcpu.close()


def test_close_from_many_threads(vm: Vm) -> None:
    """The fd is closed once: another file with its number is not hit."""
    vcpu = vm.create_vcpu()
    barrier = threading.Barrier(8)
    errors: list[BaseException] = []

    def close() -> None:
        try:
            barrier.wait()
            vcpu.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=close) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert vcpu.closed


def test_no_fd_leaks(provider: WatchedProvider) -> None:
    """A VM with all that has fds, made and closed again and again."""
    ram = Ram(RAM_SIZE)

    def life() -> None:
        with System(provider) as system, system.create_vm() as vm:
            vm.create_irqchip()
            vm.set_user_memory_region(0, 0, ram)
            with vm.create_vcpu(0) as first, vm.create_vcpu(1):
                load(first, ram, Mode.LONG, "out 0x80, al")
                first.run()

    life()
    gc.collect()
    before = count_fds()
    for _ in range(10):
        life()
    gc.collect()
    assert count_fds() == before, open_fds()


def test_nothing_leaks_when_creation_fails(vm: Vm) -> None:
    with vm.create_vcpu(0):
        before = count_fds()
        for _ in range(5):
            with pytest.raises(OSError):
                vm.create_vcpu(0)
        assert count_fds() == before


def test_fds_close_on_exec(system: System, vm: Vm, vcpu: Vcpu) -> None:
    for handle in (system, vm, vcpu):
        assert not os.get_inheritable(handle.fileno()), handle


def test_kvm_run_stays_readable_after_close(guest: TinyGuest) -> None:
    """The page is unmapped with its last view, not with the fd."""
    guest.load(Mode.LONG, "out 0x80, al")
    guest.out()
    guest.vcpu.close()
    assert guest.vcpu.kvm_run.exit_reason == Exit.IO


def test_kick_of_a_closed_vcpu(vm: Vm) -> None:
    vcpu = vm.create_vcpu()
    vcpu.close()
    vcpu.kick()
    with pytest.raises(HandleClosed):
        vcpu.run()
