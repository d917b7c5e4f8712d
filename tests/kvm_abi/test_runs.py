"""vcpu.runs(): what run() does, several times on one thread; kicks, closes and requests find it as they find run()."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

import pytest

from vmonty.base.errors import HandleClosed, KvmError
from vmonty.base.ram import Ram
from vmonty.kvm.api import Vcpu, Vm
from vmonty.kvm.uapi import Exit
from vmonty.testing.guests import CODE, STACK, USER_STACK, Mode, TinyGuest, load

COUNT = "again: out 0x10, al\n inc al\n jmp again"
FOREVER = "again: jmp again"
WAIT_S = 30


def value(vcpu: Vcpu) -> int:
    reads, size, port, data = vcpu.io_access()
    assert (reads, size, port) == (False, 1, 0x10)
    return data[0]


def test_one_exit_after_another(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, f"xor eax, eax\n {COUNT}")
    with guest.vcpu.runs() as run:
        for expected in range(20):
            assert run() is Exit.IO
            assert value(guest.vcpu) == expected
    assert guest.vcpu.run() is Exit.IO
    assert value(guest.vcpu) == 20
    with guest.vcpu.runs() as run:
        assert run() is Exit.IO
        assert value(guest.vcpu) == 21


def test_other_requests_between(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, f"xor eax, eax\n {COUNT}")
    with guest.vcpu.runs() as run:
        for expected in range(0, 100, 10):
            assert run() is Exit.IO
            assert value(guest.vcpu) == expected
            guest.vcpu.complete_io()
            registers = guest.vcpu.get_regs()
            registers.rax += 9
            guest.vcpu.set_regs(registers)


def test_a_kick_between_two(guest: TinyGuest) -> None:
    """Kept for the next, which completes the access and does no more; the one behind goes on."""
    guest.load(Mode.LONG, f"xor eax, eax\n {COUNT}")
    with guest.vcpu.runs() as run:
        for expected in range(5):
            assert run() is Exit.IO
            assert value(guest.vcpu) == expected
            guest.vcpu.kick()
            guest.vcpu.kick()
            assert run() is Exit.INTR


def in_thread(work: Callable[[], None]) -> tuple[threading.Thread, list[BaseException]]:
    failed: list[BaseException] = []

    def main() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=main)
    thread.start()
    return thread, failed


@pytest.mark.parametrize("when", ["running", "outside"])
def test_a_kick_by_another_thread(guest: TinyGuest, when: str) -> None:
    guest.load(Mode.LONG, f"out 0x10, al\n {FOREVER}")
    reached, kicked = threading.Event(), threading.Event()
    seen: list[Exit | int] = []

    def work() -> None:
        with guest.vcpu.runs() as run:
            seen.append(run())
            reached.set()
            if when == "outside":
                assert kicked.wait(WAIT_S)
            seen.append(run())

    thread, failed = in_thread(work)
    assert reached.wait(WAIT_S)
    guest.vcpu.kick()
    kicked.set()
    thread.join(WAIT_S)
    assert not failed
    assert seen == [Exit.IO, Exit.INTR]


def test_a_close_by_another_thread(guest: TinyGuest) -> None:
    """The run ends, and the file goes with the block."""
    guest.load(Mode.LONG, f"out 0x10, al\n {FOREVER}")
    reached = threading.Event()

    def work() -> None:
        with guest.vcpu.runs() as run:
            run()
            reached.set()
            run()

    thread, failed = in_thread(work)
    assert reached.wait(WAIT_S)
    guest.vcpu.close()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert [type(error) for error in failed] == [HandleClosed]
    with pytest.raises(HandleClosed), guest.vcpu.runs():
        pass


def test_a_close_inside(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, COUNT)
    with guest.vcpu.runs() as run:
        assert run() is Exit.IO
        guest.vcpu.close()
        with pytest.raises(HandleClosed):
            run()
        with pytest.raises(HandleClosed):
            run()


def test_a_refusal(guest: TinyGuest) -> None:
    """An errno is an error, and nothing is left of it."""
    guest.load(Mode.LONG, f"xor eax, eax\n {COUNT}")
    with guest.vcpu.runs() as run:
        guest.vcpu.kvm_run.kvm_valid_regs = 1 << 40
        with pytest.raises(KvmError) as error:
            run()
        assert error.value.errno == errno.EINVAL
        guest.vcpu.kvm_run.kvm_valid_regs = 0
        assert run() is Exit.IO
        assert value(guest.vcpu) == 0


def test_two_on_one_thread_in_turns(configured: Vm, ram: Ram) -> None:
    places = ((CODE, STACK), (CODE + 0x1000, USER_STACK))
    with configured.create_vcpu(0) as first, configured.create_vcpu(1) as second:
        for vcpu, (code, stack) in zip((first, second), places, strict=True):
            load(vcpu, ram, Mode.LONG, f"mov eax, {100 * vcpu.id}\n {COUNT}", code=code, stack=stack)
        with first.runs() as run_first, second.runs() as run_second:
            for turn in range(5):
                for run, vcpu in ((run_first, first), (run_second, second)):
                    assert run() is Exit.IO
                    assert value(vcpu) == 100 * vcpu.id + turn
                first.kick()
                assert run_first() is Exit.INTR
