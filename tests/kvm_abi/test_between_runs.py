"""What user space does between two port exits counts for the next run, however often the guest has left this way.

Source: api.rst, "KVM_RUN", "KVM_INTERRUPT", "KVM_SET_REGS", "KVM_CAP_SYNC_REGS".
"""

from __future__ import annotations

import errno
import signal
import struct

import pytest

from vmonty.base import hostcall
from vmonty.kvm.uapi import Cap, Exit, Requests, flags
from vmonty.testing.guests import DATA, RAM_SIZE, Mode, TinyGuest

from .irq_guests import GSI, LINE_VECTOR, REPORT, ioapic_guest
from .test_interrupts import handler

# Enough for whatever a KVM does differently from the second time on.
BEFORE = 3
OUTS = "sti\n again: out 0x10, al\n inc eax\n jmp again"
INS = "again: in al, 0x10\n out 0x11, al\n inc eax\n jmp again"
VECTOR = 0x40


@pytest.fixture
def warm(guest: TinyGuest) -> TinyGuest:
    """A guest with interrupts on that counts in AL, and has told so some times."""
    guest.load(Mode.LONG, OUTS, handlers={VECTOR: handler(Mode.LONG, VECTOR), 2: handler(Mode.LONG, 2)})
    first = guest.out()[1]
    assert [guest.out() for _ in range(BEFORE)] == [(0x10, first + turn) for turn in range(1, BEFORE + 1)]
    return guest


def test_registers(warm: TinyGuest) -> None:
    regs = warm.vcpu.get_regs()
    regs.rax = 0x77
    warm.vcpu.set_regs(regs)
    assert warm.outs(2) == [0x78, 0x79]


def test_registers_by_the_page(warm: TinyGuest) -> None:
    if not warm.vm.check_extension(Cap.SYNC_REGS) & flags.KVM_SYNC_X86_REGS:
        pytest.skip("this KVM has no KVM_CAP_SYNC_REGS")
    run = warm.vcpu.kvm_run
    run.kvm_valid_regs = flags.KVM_SYNC_X86_REGS
    value = warm.out()[1]
    assert run.s.regs.regs.rax & 0xFF == value
    run.s.regs.regs.rax = 0x77
    run.kvm_dirty_regs = flags.KVM_SYNC_X86_REGS
    assert warm.outs(2) == [0x78, 0x79]
    run.kvm_valid_regs = 1 << 40
    assert warm.vcpu.try_ioctl(Requests.KVM_RUN, 0) == -errno.EINVAL


def test_interrupt(warm: TinyGuest) -> None:
    warm.vcpu.interrupt(VECTOR)
    assert warm.out() == (0x20, VECTOR)
    assert warm.out()[0] == 0x10


def test_nmi(warm: TinyGuest) -> None:
    warm.vcpu.nmi()
    assert warm.out() == (0x20, 2)
    assert warm.out()[0] == 0x10


@pytest.mark.known_gap("irq-window")
def test_interrupt_window(warm: TinyGuest) -> None:
    warm.vcpu.kvm_run.request_interrupt_window = 1
    assert warm.run() is Exit.IRQ_WINDOW_OPEN
    warm.vcpu.kvm_run.request_interrupt_window = 0
    assert warm.out()[0] == 0x10


def test_immediate_exit_and_kick(warm: TinyGuest) -> None:
    value = warm.out()[1]
    warm.vcpu.kvm_run.immediate_exit = 1
    assert [warm.run(), warm.run()] == [Exit.INTR] * 2
    warm.vcpu.kvm_run.immediate_exit = 0
    assert warm.out()[1] == value + 1
    warm.vcpu.kick()
    assert warm.run() is Exit.INTR
    assert warm.outs(2) == [value + 2, value + 3]


def test_task_priority(warm: TinyGuest) -> None:
    """Without an in-kernel APIC the page has CR8, in both directions."""
    warm.vcpu.kvm_run.cr8 = 5
    warm.out()
    assert warm.vcpu.kvm_run.cr8 == 5
    assert warm.vcpu.get_sregs().cr8 == 5


def test_saved_flags(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, "again: sti\n nop\n out 0x10, al\n cli\n out 0x11, al\n jmp again")
    for _ in range(BEFORE):
        for port, open_ in ((0x10, 1), (0x11, 0)):
            assert guest.out()[0] == port
            run = guest.vcpu.kvm_run
            assert (run.if_flag, run.ready_for_interrupt_injection) == (open_, open_)


def test_memory_that_is_taken_away(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, f"mov ebx, {RAM_SIZE:#x}\n again: mov al, [rbx]\n out 0x10, al\n jmp again")
    other = type(guest.ram)(0x1000)
    other.write(0, b"\x55")
    guest.vm.set_user_memory_region(1, RAM_SIZE, other)
    assert guest.outs(BEFORE) == [0x55] * BEFORE
    guest.vm.set_user_memory_region(1, RAM_SIZE, None)
    assert guest.run() is Exit.MMIO
    mmio = guest.vcpu.kvm_run.u.mmio
    assert (mmio.phys_addr, mmio.len, mmio.is_write) == (RAM_SIZE, 1, 0)
    mmio.data[0] = 0x66
    assert guest.out()[1] == 0x66


def test_other_exits_in_between(guest: TinyGuest) -> None:
    """A loop of ports, memory without a slot, and HLT: each completes the one before."""
    accesses = "in al, 0x10\n mov [rbx], al\n mov al, [rbx]\n out 0x11, al\n hlt"
    guest.load(Mode.LONG, f"mov ebx, {RAM_SIZE:#x}\n again: {accesses}\n jmp again")
    for turn in range(BEFORE):
        assert guest.run() is Exit.IO
        guest.vcpu.io_data()[:] = bytes([turn])
        assert guest.run() is Exit.MMIO
        mmio = guest.vcpu.kvm_run.u.mmio
        assert (mmio.is_write, mmio.data[0]) == (1, turn)
        assert guest.run() is Exit.MMIO
        guest.vcpu.kvm_run.u.mmio.data[0] = turn + 0x40
        assert guest.out() == (0x11, turn + 0x40)
        assert guest.run() is Exit.HLT


def test_a_read_and_the_registers_before_its_end(guest: TinyGuest) -> None:
    """What user space reads between a port read and its answer does not lose the answer."""
    guest.load(Mode.LONG, INS)
    for turn in range(2 * BEFORE):
        assert guest.run() is Exit.IO
        assert guest.vcpu.io_access()[:3] == (True, 1, 0x10)
        guest.vcpu.io_access()[3][:] = bytes([turn])
        if turn % 2:
            guest.vcpu.get_regs()
        assert guest.out() == (0x11, turn)


@pytest.mark.needs(Cap.IMMEDIATE_EXIT)
def test_a_read_is_completed_by_immediate_exit(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, INS)
    for turn in range(BEFORE):
        assert guest.run() is Exit.IO
        before = guest.vcpu.get_regs()
        guest.vcpu.io_data()[:] = bytes([turn + 0x30])
        guest.vcpu.complete_io()
        after = guest.vcpu.get_regs()
        assert after.rax & 0xFF == turn + 0x30
        assert after.rip - before.rip == 2
        assert guest.out() == (0x11, turn + 0x30)


def test_wide_reads(guest: TinyGuest) -> None:
    """AX keeps what is above it, EAX clears the upper half."""
    reads = f"in ax, 0x10\n mov [abs {DATA}], rax\n in eax, 0x10\n mov [abs {DATA + 8}], rax"
    guest.load(Mode.LONG, f"again: mov rax, -1\n {reads}\n jmp again")
    for _ in range(BEFORE):
        assert guest.run() is Exit.IO
        guest.vcpu.io_data()[:] = b"\x11\x22"
        assert guest.run() is Exit.IO
        guest.vcpu.io_data()[:] = b"\x33\x44\x55\x66"
    assert guest.run() is Exit.IO
    assert struct.unpack("<QQ", guest.ram.read(DATA, 16)) == (0xFFFF_FFFF_FFFF_2211, 0x6655_4433)


def test_interrupt_line(chipped: TinyGuest) -> None:
    """A line that is raised while the guest is in user space is served when it comes back."""
    ioapic_guest(chipped)
    for _ in range(BEFORE):
        assert chipped.out()[0] == 0x10
        assert chipped.out()[0] == 0x10
        chipped.vm.irq_line(GSI, 1)
        chipped.vm.irq_line(GSI, 0)
        assert chipped.out() == (REPORT, LINE_VECTOR)


def test_a_mask_of_signals(warm: TinyGuest) -> None:
    """A signal that the thread blocks ends the run if the mask of the run lets it through."""
    warm.out()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [hostcall.KICK_SIGNAL])
    try:
        signal.raise_signal(hostcall.KICK_SIGNAL)
        assert warm.out()[0] == 0x10  # it is pending and stays so
        warm.vcpu.set_signal_mask([])
        while warm.run() is not Exit.INTR:
            pass
    finally:
        warm.vcpu.set_signal_mask(None)
        signal.sigtimedwait([hostcall.KICK_SIGNAL], 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    assert warm.out()[0] == 0x10
