"""vCPU state: what is set is what is read, and what the guest sees. Source: api.rst, KVM_GET_REGS and following."""

from __future__ import annotations

import ctypes
import errno

import pytest

from vmonty.kvm.api import CpuidEntry, Vcpu
from vmonty.kvm.uapi import Cap, Requests
from vmonty.kvm.uapi.flags import (
    KVM_MP_STATE_HALTED,
    KVM_MP_STATE_RUNNABLE,
    KVM_REG_SIZE_U64,
    KVM_REG_X86,
    KVM_SREGS2_FLAGS_PDPTRS_VALID,
    KVM_X86_REG_TYPE_MSR,
)
from vmonty.kvm.uapi.irq import kvm_lapic_state
from vmonty.kvm.uapi.vcpu import kvm_regs
from vmonty.testing.guests import CR4_PAE, DATA, EFER_LMA, EFER_LME, Mode, TinyGuest, load

from .refusals import refused

GENERAL = [name for name, *_ in kvm_regs._fields_ if name not in ("rip", "rflags")]
PATTERN = 0x0123456789ABCDEF


@pytest.mark.parametrize("name", [*GENERAL, "rip"])
def test_general_register_round_trip(vcpu: Vcpu, name: str) -> None:
    """One register at a time: no other may change."""
    regs = vcpu.get_regs()
    setattr(regs, name, PATTERN)
    vcpu.set_regs(regs)
    assert bytes(vcpu.get_regs()) == bytes(regs)


def test_guest_sees_all_general_registers(guest: TinyGuest) -> None:
    stores = "\n".join(f"mov [abs {DATA + 8 * index:#x}], {name}" for index, name in enumerate(GENERAL))
    guest.load(Mode.LONG, f"{stores}\n out 0x10, al")
    regs = guest.vcpu.get_regs()
    for index, name in enumerate(GENERAL):
        setattr(regs, name, PATTERN + index)
    guest.vcpu.set_regs(regs)
    assert guest.out()[0] == 0x10
    assert [guest.ram.read_u64(DATA + 8 * index) for index in range(16)] == [PATTERN + index for index in range(16)]


def test_guests_registers_are_read(guest: TinyGuest) -> None:
    moves = "\n".join(f"mov {name}, {PATTERN + index:#x}" for index, name in enumerate(GENERAL))
    guest.load(Mode.LONG, f"{moves}\n out 0x10, al")
    assert guest.out()[0] == 0x10
    guest.vcpu.complete_io()
    regs = guest.vcpu.get_regs()
    assert [getattr(regs, name) for name in GENERAL] == [PATTERN + index for index in range(16)]


def test_rflags(guest: TinyGuest) -> None:
    """Bit 1 always reads as set (SDM, "EFLAGS Register")."""
    regs = guest.vcpu.get_regs()
    regs.rflags = 0x202 | 0x400 | 0x8D5
    guest.vcpu.set_regs(regs)
    assert guest.vcpu.get_regs().rflags == 0x202 | 0x400 | 0x8D5
    regs.rflags = 0
    guest.vcpu.set_regs(regs)
    assert guest.vcpu.get_regs().rflags == 2


SEGMENTS = ["cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"]


@pytest.mark.parametrize("mode", list(Mode), ids=lambda mode: mode.value)
def test_sregs_round_trip(guest: TinyGuest, mode: Mode) -> None:
    guest.load(mode, "hlt")
    before = guest.vcpu.get_sregs()
    guest.vcpu.set_sregs(before)
    assert bytes(guest.vcpu.get_sregs()) == bytes(before)
    assert (before.efer & EFER_LMA != 0) == mode.long


@pytest.mark.parametrize("name", SEGMENTS)
def test_segment_base_round_trip(guest: TinyGuest, name: str) -> None:
    guest.load(Mode.PROTECTED, "hlt")
    sregs = guest.vcpu.get_sregs()
    chosen = getattr(sregs, name)
    chosen.base, chosen.selector = 0x12340, 0x58 | chosen.selector & 3
    guest.vcpu.set_sregs(sregs)
    again = getattr(guest.vcpu.get_sregs(), name)
    assert (again.base, again.selector, again.limit) == (0x12340, chosen.selector, chosen.limit)


def test_tables_and_control_registers_round_trip(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, "hlt")
    sregs = guest.vcpu.get_sregs()
    sregs.gdt.base, sregs.gdt.limit = 0x11000, 0x77
    sregs.idt.base, sregs.idt.limit = 0x12000, 0x99
    sregs.cr2, sregs.cr8 = 0xDEADB000, 5
    guest.vcpu.set_sregs(sregs)
    again = guest.vcpu.get_sregs()
    assert (again.gdt.base, again.gdt.limit, again.idt.base, again.idt.limit) == (0x11000, 0x77, 0x12000, 0x99)
    assert (again.cr2, again.cr8, again.cr3) == (0xDEADB000, 5, sregs.cr3)


def test_guest_sees_control_registers(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, f"mov rax, cr2\n mov [abs {DATA}], rax\n mov rax, cr3\n mov [abs {DATA + 8}], rax\n"
               f" mov rax, cr4\n mov [abs {DATA + 16}], rax\n out 0x10, al")  # fmt: skip
    sregs = guest.vcpu.get_sregs()
    sregs.cr2 = 0x123456789000
    guest.vcpu.set_sregs(sregs)
    assert guest.out()[0] == 0x10
    assert [guest.ram.read_u64(DATA + 8 * index) for index in range(3)] == [0x123456789000, sregs.cr3, sregs.cr4]


IMPOSSIBLE = [
    ("long-mode-without-pae", {"cr4": 0}),
    ("cr4-reserved-bit", {"cr4": CR4_PAE | 1 << 31}),
    ("cr0-above-32-bits", {"cr0": 1 << 40 | 0x80000011}),
    ("cr3-beyond-physical-addresses", {"cr3": 1 << 60}),
]


@pytest.mark.parametrize("change", [row[1] for row in IMPOSSIBLE], ids=[row[0] for row in IMPOSSIBLE])
def test_impossible_sregs(guest: TinyGuest, change: dict[str, int]) -> None:
    """A state that no processor can have is refused and changes nothing."""
    guest.load(Mode.LONG, "hlt")
    before = guest.vcpu.get_sregs()
    wrong = guest.vcpu.get_sregs()
    for name, value in change.items():
        setattr(wrong, name, value)
    with refused(errno.EINVAL):
        guest.vcpu.set_sregs(wrong)
    after = guest.vcpu.get_sregs()
    assert (after.cr0, after.cr3, after.cr4, after.efer) == (before.cr0, before.cr3, before.cr4, before.efer)


@pytest.mark.needs(Cap.SREGS2)
class TestSregs2:
    def test_same_as_sregs(self, guest: TinyGuest) -> None:
        guest.load(Mode.LONG, "hlt")
        old, new = guest.vcpu.get_sregs(), guest.vcpu.get_sregs2()
        for name in (*SEGMENTS, "gdt", "idt"):
            assert bytes(getattr(old, name)) == bytes(getattr(new, name)), name
        assert (new.cr0, new.cr3, new.cr4, new.efer) == (old.cr0, old.cr3, old.cr4, old.efer)
        new.cr2 = 0x5000
        guest.vcpu.set_sregs2(new)
        assert guest.vcpu.get_sregs2().cr2 == 0x5000

    def test_pdptes_in_pae_mode(self, guest: TinyGuest) -> None:
        """PAE paging caches four PDPTEs; sregs2 carries them."""
        guest.load(Mode.PROTECTED, "hlt")
        sregs = guest.vcpu.get_sregs2()
        table = 0x40000
        for index in range(4):
            guest.ram.write_u64(table + 8 * index, 0x41000 + 0x1000 * index | 1)
        sregs.cr3, sregs.cr4, sregs.cr0 = table, CR4_PAE, sregs.cr0 | 1 << 31
        sregs.flags = KVM_SREGS2_FLAGS_PDPTRS_VALID
        sregs.pdptrs[:] = [0x41000 + 0x1000 * index | 1 for index in range(4)]
        guest.vcpu.set_sregs2(sregs)
        again = guest.vcpu.get_sregs2()
        if again.flags & KVM_SREGS2_FLAGS_PDPTRS_VALID:
            assert list(again.pdptrs) == list(sregs.pdptrs)
        assert again.cr3 == table

    def test_unknown_flag(self, guest: TinyGuest) -> None:
        sregs = guest.vcpu.get_sregs2()
        sregs.flags = 1 << 40
        with refused(errno.EINVAL):
            guest.vcpu.set_sregs2(sregs)


def test_debugregs_round_trip(vcpu: Vcpu) -> None:
    registers = vcpu.get_debugregs()
    assert (registers.dr6, registers.dr7) == (0xFFFF0FF0, 0x400)
    registers.db[:] = [0x1000, 0x2000, 0x3000, 0x4000]
    registers.dr7 = 0x401
    vcpu.set_debugregs(registers)
    again = vcpu.get_debugregs()
    assert (list(again.db), again.dr7) == ([0x1000, 0x2000, 0x3000, 0x4000], 0x401)


def test_debugregs_refused(vcpu: Vcpu) -> None:
    registers = vcpu.get_debugregs()
    registers.flags = 1
    with refused(errno.EINVAL):
        vcpu.set_debugregs(registers)
    registers.flags, registers.dr7 = 0, 1 << 32
    with refused(errno.EINVAL):
        vcpu.set_debugregs(registers)


def test_guest_reads_debugregs(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, "mov rax, dr1\n out 0x10, eax")
    registers = guest.vcpu.get_debugregs()
    registers.db[1] = 0x87654321
    guest.vcpu.set_debugregs(registers)
    assert guest.out() == (0x10, 0x87654321)


def test_vcpu_events_round_trip(vcpu: Vcpu) -> None:
    events = vcpu.get_vcpu_events()
    assert not any((events.exception.injected, events.interrupt.injected, events.nmi.injected, events.nmi.pending))
    events.interrupt.injected, events.interrupt.nr = 1, 0x44
    vcpu.set_vcpu_events(events)
    again = vcpu.get_vcpu_events()
    assert (again.interrupt.injected, again.interrupt.nr) == (1, 0x44)


def test_mp_state(chipped: TinyGuest) -> None:
    vcpu = chipped.vcpu
    assert vcpu.get_mp_state() == KVM_MP_STATE_RUNNABLE
    vcpu.set_mp_state(KVM_MP_STATE_HALTED)
    assert vcpu.get_mp_state() == KVM_MP_STATE_HALTED
    with refused(errno.EINVAL):
        vcpu.set_mp_state(99)


def test_halted_without_local_apic(vcpu: Vcpu) -> None:
    """Without an in-kernel local APIC a vCPU is runnable or nothing."""
    with refused(errno.EINVAL):
        vcpu.set_mp_state(KVM_MP_STATE_HALTED)


def test_lapic_round_trip(chipped: TinyGuest) -> None:
    state = chipped.vcpu.get_lapic()
    registers = (ctypes.c_uint32 * 256).from_buffer(state)
    assert registers[0x30 // 4] & 0xFF in range(0x10, 0x20), "an integrated APIC's version"
    registers[0x80 // 4] = 0x20  # TPR
    registers[0x320 // 4] = 0x10031  # LVT timer, masked
    chipped.vcpu.set_lapic(state)
    again = (ctypes.c_uint32 * 256).from_buffer(chipped.vcpu.get_lapic())
    assert (again[0x80 // 4], again[0x320 // 4]) == (0x20, 0x10031)


def test_lapic_without_irqchip(vcpu: Vcpu) -> None:
    with refused(errno.EINVAL):
        vcpu.get_lapic()
    with refused(errno.EINVAL):
        vcpu.set_lapic(kvm_lapic_state())


def test_one_reg(vcpu: Vcpu) -> None:
    """MSRs by KVM_GET_ONE_REG (Linux 6.18 and newer); else the request is unknown."""
    star = KVM_REG_X86 | KVM_REG_SIZE_U64 | KVM_X86_REG_TYPE_MSR << 32 | 0xC0000081
    vcpu.set_msrs({0xC0000081: 0x1234000000000000})
    if vcpu.try_ioctl(Requests.KVM_GET_ONE_REG, 0) == -errno.EFAULT:
        assert vcpu.get_one_reg(star) == 0x1234000000000000
        vcpu.set_one_reg(star, 0x4321000000000000)
        assert vcpu.get_msrs([0xC0000081]) == {0xC0000081: 0x4321000000000000}
    with refused(errno.EINVAL, errno.ENOENT, errno.ENOTTY):
        vcpu.get_one_reg(0)
    with refused(errno.EINVAL, errno.ENOENT, errno.ENOTTY):
        vcpu.set_one_reg(0, 0)


def test_setting_up_long_mode_in_the_guest(guest: TinyGuest, cpuid: list[CpuidEntry]) -> None:
    """The guest goes from protected to 64-bit mode by itself, and user space sees it in sregs.

    WRMSR takes EFER.LME only if CPUID shows long mode.
    """
    guest.load(Mode.LONG, "hlt")  # only for its tables
    load(
        guest.vcpu, guest.ram, Mode.PROTECTED,
        """
        mov eax, 0x20
        mov cr4, eax
        mov eax, 0x30000
        mov cr3, eax
        mov ecx, 0xc0000080
        rdmsr
        or eax, 0x100
        wrmsr
        mov eax, cr0
        or eax, 0x80000000
        mov cr0, eax
        jmp 0x18:entry
        bits 64
        entry: mov rax, 0x1122334455667788
        shr rax, 32
        out 0x10, eax
        """,
        cpuid=cpuid,
    )  # fmt: skip
    assert guest.out() == (0x10, 0x11223344)
    assert guest.vcpu.get_sregs().efer & (EFER_LMA | EFER_LME) == EFER_LMA | EFER_LME
    assert guest.vcpu.get_sregs().cs.l == 1
