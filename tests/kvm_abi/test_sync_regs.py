"""Registers in the kvm_run page. Source: api.rst, KVM_CAP_SYNC_REGS."""

from __future__ import annotations

import errno

import pytest

from vmonty.kvm.uapi import Cap
from vmonty.kvm.uapi.flags import KVM_SYNC_X86_EVENTS, KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS
from vmonty.testing.guests import Mode, TinyGuest

from .refusals import refused

pytestmark = pytest.mark.needs(Cap.SYNC_REGS)
ALL = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS
COUNT = "again: inc rbx\n mov eax, ebx\n out 0x10, eax\n jmp again"


def test_offered(guest: TinyGuest) -> None:
    assert guest.vm.check_extension(Cap.SYNC_REGS) & ALL == ALL


def test_registers_come_with_the_exit(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, COUNT)
    guest.vcpu.kvm_run.kvm_valid_regs = ALL
    assert guest.out() == (0x10, 1)
    synced = guest.vcpu.kvm_run.s.regs
    assert synced.regs.rbx == 1
    assert bytes(synced.regs) == bytes(guest.vcpu.get_regs())
    assert bytes(synced.sregs) == bytes(guest.vcpu.get_sregs())
    assert bytes(synced.events) == bytes(guest.vcpu.get_vcpu_events())


def test_nothing_comes_unasked(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, COUNT)
    guest.vcpu.kvm_run.s.regs.regs.rbx = 0x5555
    assert guest.out() == (0x10, 1)
    assert guest.vcpu.kvm_run.s.regs.regs.rbx == 0x5555


def test_registers_go_with_the_run(guest: TinyGuest) -> None:
    """kvm_dirty_regs is taken once and then cleared."""
    guest.load(Mode.LONG, COUNT)
    run = guest.vcpu.kvm_run
    run.kvm_valid_regs = KVM_SYNC_X86_REGS
    assert guest.out() == (0x10, 1)
    guest.vcpu.complete_io()
    run.kvm_valid_regs = KVM_SYNC_X86_REGS
    run.s.regs.regs = guest.vcpu.get_regs()
    run.s.regs.regs.rbx = 100
    run.kvm_dirty_regs = KVM_SYNC_X86_REGS
    assert guest.out() == (0x10, 101)
    assert run.kvm_dirty_regs == 0
    assert guest.out() == (0x10, 102)


def test_sregs_go_with_the_run(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, "mov rax, cr2\n out 0x10, eax")
    run = guest.vcpu.kvm_run
    run.s.regs.sregs = guest.vcpu.get_sregs()
    run.s.regs.sregs.cr2 = 0x1234
    run.kvm_dirty_regs = KVM_SYNC_X86_SREGS
    assert guest.out() == (0x10, 0x1234)


@pytest.mark.parametrize("field", ["kvm_valid_regs", "kvm_dirty_regs"])
def test_unknown_set(guest: TinyGuest, field: str) -> None:
    guest.load(Mode.LONG, COUNT)
    setattr(guest.vcpu.kvm_run, field, 1 << 40)
    with refused(errno.EINVAL):
        guest.run()
    setattr(guest.vcpu.kvm_run, field, 0)
    assert guest.out() == (0x10, 1)


def test_impossible_sregs(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, COUNT)
    run = guest.vcpu.kvm_run
    run.s.regs.sregs = guest.vcpu.get_sregs()
    run.s.regs.sregs.cr4 = 0
    run.kvm_dirty_regs = KVM_SYNC_X86_SREGS
    with refused(errno.EINVAL):
        guest.run()
