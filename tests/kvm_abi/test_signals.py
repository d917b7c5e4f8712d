"""Getting out of KVM_RUN: immediate_exit, kick, signals and their mask.

Source: api.rst, KVM_RUN, KVM_SET_SIGNAL_MASK.
"""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from vmonty.base import hostcall
from vmonty.kvm.api import Vcpu
from vmonty.kvm.uapi import Cap, Exit, Requests
from vmonty.testing.guests import DATA, Mode, TinyGuest

from .refusals import refused
from .runner import Runner

SPIN = f"inc dword [abs {DATA}]\n out 0x10, al\n spin: inc dword [abs {DATA + 4}]\n jmp spin"
Start = Callable[[Vcpu], Runner]


@pytest.fixture
def blocked_kick() -> Iterator[None]:
    """The kick signal blocked in this thread, and taken away afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [hostcall.KICK_SIGNAL])
    yield
    while signal.sigtimedwait([hostcall.KICK_SIGNAL], 0) is not None:
        pass
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.mark.needs(Cap.IMMEDIATE_EXIT)
def test_immediate_exit(guest: TinyGuest) -> None:
    """KVM_RUN returns before the guest runs, each time while the flag is set."""
    guest.load(Mode.LONG, SPIN)
    guest.vcpu.kvm_run.immediate_exit = 1
    assert guest.run() is Exit.INTR
    assert guest.run() is Exit.INTR
    assert guest.ram.read_u32(DATA) == 0
    guest.vcpu.kvm_run.immediate_exit = 0
    assert guest.out()[0] == 0x10
    assert guest.ram.read_u32(DATA) == 1


def test_immediate_exit_is_eintr(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, SPIN)
    guest.vcpu.kvm_run.immediate_exit = 1
    assert guest.vcpu.try_ioctl(Requests.KVM_RUN, 0) == -errno.EINTR


def test_kick_before_run(guest: TinyGuest) -> None:
    """It counts for the next run, once."""
    guest.load(Mode.LONG, SPIN)
    guest.vcpu.kick()
    guest.vcpu.kick()
    assert guest.run() is Exit.INTR
    assert guest.ram.read_u32(DATA) == 0
    assert guest.out()[0] == 0x10


@pytest.mark.parametrize("mode", [Mode.LONG, Mode.USER], ids=lambda mode: mode.value)
def test_kick_of_a_spinning_guest(guest: TinyGuest, runner: Start, mode: Mode) -> None:
    """The guest would never exit by itself; it goes on from where it was."""
    guest.load(mode, SPIN)
    for turn in range(3):
        thread = runner(guest.vcpu)
        if turn == 0:
            assert thread.next() == (0x10, 0)
        before = guest.ram.read_u32(DATA + 4)
        while guest.ram.read_u32(DATA + 4) == before and thread.thread.is_alive():
            pass
        guest.vcpu.kick()
        assert thread.next() is Exit.INTR
        thread.join()
    assert guest.ram.read_u32(DATA) == 1


def test_kick_of_a_halted_guest(chipped: TinyGuest, runner: Start) -> None:
    """HLT blocks inside KVM when the local APIC is there; a kick ends it."""
    chipped.load(Mode.LONG, "out 0x80, al\n hlt\n out 0x81, al")
    thread = runner(chipped.vcpu)
    assert thread.next() == (0x80, 0)
    chipped.vcpu.kick()
    assert thread.next() is Exit.INTR
    thread.join()


def test_many_kicks(guest: TinyGuest, runner: Start) -> None:
    """However many come, they end the run in progress and at most the next one."""
    guest.load(Mode.LONG, SPIN)
    thread = runner(guest.vcpu)
    assert thread.next() == (0x10, 0)
    for _ in range(50):
        guest.vcpu.kick()
    assert thread.next() is Exit.INTR
    thread.join()
    guest.load(Mode.LONG, SPIN)
    reason = guest.run()
    if reason is Exit.INTR:
        reason = guest.run()
    assert reason is Exit.IO


def signal_in(thread: Runner) -> None:
    assert thread.thread.ident is not None
    signal.pthread_kill(thread.thread.ident, hostcall.KICK_SIGNAL)


def test_signal_ends_the_run(guest: TinyGuest, runner: Start) -> None:
    """EINTR with exit reason KVM_EXIT_INTR; the page says so as well."""
    guest.load(Mode.LONG, SPIN)
    thread = runner(guest.vcpu)
    assert thread.next() == (0x10, 0)
    while guest.ram.read_u32(DATA + 4) == 0:
        pass
    signal_in(thread)
    assert thread.next() is Exit.INTR
    assert guest.vcpu.kvm_run.exit_reason == Exit.INTR


def test_signal_that_the_thread_blocks(guest: TinyGuest, blocked_kick: None) -> None:
    """A blocked signal does not end the run."""
    guest.load(Mode.LONG, SPIN)
    signal.pthread_kill(threading.get_ident(), hostcall.KICK_SIGNAL)
    assert guest.out()[0] == 0x10


def test_signal_mask_unblocks_during_the_run(guest: TinyGuest, blocked_kick: None) -> None:
    """KVM_SET_SIGNAL_MASK: a signal that the thread blocks, and KVM_RUN does not, ends the run and stays pending."""
    guest.load(Mode.LONG, SPIN)
    guest.vcpu.set_signal_mask([])
    signal.pthread_kill(threading.get_ident(), hostcall.KICK_SIGNAL)
    assert guest.run() is Exit.INTR
    assert hostcall.KICK_SIGNAL in signal.sigpending()
    assert signal.sigtimedwait([hostcall.KICK_SIGNAL], 0) is not None
    assert guest.out()[0] == 0x10


def test_signal_mask_blocks_during_the_run(guest: TinyGuest, blocked_kick: None) -> None:
    guest.load(Mode.LONG, SPIN)
    guest.vcpu.set_signal_mask([hostcall.KICK_SIGNAL])
    signal.pthread_kill(threading.get_ident(), hostcall.KICK_SIGNAL)
    assert guest.out()[0] == 0x10
    guest.vcpu.set_signal_mask([])
    assert guest.run() is Exit.INTR


def test_signal_mask_is_taken_back(guest: TinyGuest, blocked_kick: None) -> None:
    guest.load(Mode.LONG, SPIN)
    guest.vcpu.set_signal_mask([])
    guest.vcpu.set_signal_mask(None)
    signal.pthread_kill(threading.get_ident(), hostcall.KICK_SIGNAL)
    assert guest.out()[0] == 0x10


def test_signal_mask_of_a_wrong_length(vcpu: Vcpu) -> None:
    with refused(errno.EINVAL):
        vcpu.ioctl(Requests.KVM_SET_SIGNAL_MASK, bytearray(b"\x04\0\0\0" + bytes(8)))


def test_python_signal_handlers_run(guest: TinyGuest) -> None:
    """A signal with a Python handler ends the run, and the handler is called: Ctrl-C works."""
    called = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: called.append(number))
    try:
        guest.load(Mode.LONG, "spin: jmp spin")
        main = threading.get_ident()
        timer = threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGUSR1))
        timer.start()
        assert guest.run() is Exit.INTR
        timer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert called == [signal.SIGUSR1]
