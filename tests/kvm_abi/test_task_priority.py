"""The task priority: CR8, the local APIC's TPR, and what they hold back. SDM, "Task Priority in IA-32e Mode"."""

from __future__ import annotations

import threading
import time

import pytest
from tests.kvm_abi.irq_guests import APIC, APIC_ON, REPORT, handler

from vmonty.kvm.uapi import Exit
from vmonty.testing.guests import DATA, Mode, TinyGuest

LOW, HIGH = 0x45, 0x95
TPR, SELF_ICR = APIC + 0x80, 0x40000
WAIT_S = 20
HANDLERS = {vector: handler(vector) for vector in (LOW, HIGH)}


def cr8(value: int) -> str:
    """MOV CR8."""
    return f"mov eax, {value}\n mov cr8, rax\n"


def self_ipi(vector: int) -> str:
    """By the ICR."""
    return f"mov ebx, {APIC + 0x300:#x}\n mov dword [rbx], {SELF_ICR | vector:#x}\n"


def test_cr8_and_tpr_are_one_register(chipped: TinyGuest) -> None:
    """What either was given the other has, and user space finds in both. TPR's low half kvm_amd loses at each exit."""
    chipped.load(
        Mode.LONG,
        f"{APIC_ON} mov ecx, {TPR:#x}\n {cr8(7)} mov eax, [rcx]\n out 0x90, al\n"
        f"mov dword [rcx], 0x50\n mov rax, cr8\n out 0x90, al\n mov eax, [rcx]\n out 0x90, al\n hlt",
    )
    assert chipped.out() == (0x90, 0x70)
    assert chipped.vcpu.get_sregs().cr8 == 7
    assert bytes(chipped.vcpu.get_lapic())[0x80] == 0x70
    assert chipped.out() == (0x90, 5)
    assert chipped.out() == (0x90, 0x50)
    assert chipped.vcpu.kvm_run.cr8 == 5


def test_user_space_sets_it(chipped: TinyGuest) -> None:
    chipped.load(Mode.LONG, "again: mov rax, cr8\n out 0x90, al\n jmp again")
    for value in (9, 0, 15):
        sregs = chipped.vcpu.get_sregs()
        sregs.cr8 = value
        chipped.vcpu.set_sregs(sregs)
        assert chipped.out() == (0x90, value)


@pytest.mark.known_gap("set-tpr")
def test_user_space_hears_of_lower_ones_only(guest: TinyGuest) -> None:
    """Without an in-kernel local APIC: KVM_EXIT_SET_TPR, for what was held back may come now."""
    guest.load(
        Mode.LONG, f"{cr8(5)} {cr8(5)} {cr8(9)} mov rbx, cr8\n mov eax, ebx\n out 0x90, al\n {cr8(3)} mov rax, cr8\n"
        f"out 0x91, al\n {cr8(3)} {cr8(4)} out 0x92, al\n {cr8(0)} out 0x93, al",
    )  # fmt: skip
    assert guest.out() == (0x90, 9)
    assert guest.vcpu.kvm_run.cr8 == 9
    assert guest.run() is Exit.SET_TPR
    assert guest.vcpu.kvm_run.cr8 == 3
    assert guest.out() == (0x91, 3)
    assert guest.out() == (0x92, 4)
    assert guest.run() is Exit.SET_TPR
    assert guest.vcpu.kvm_run.cr8 == 0
    assert guest.out() == (0x93, 0)


def test_user_space_sets_it_in_kvm_run(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, "again: mov rax, cr8\n out 0x90, al\n jmp again")
    for value in (9, 9, 0, 15, 2):
        guest.vcpu.kvm_run.cr8 = value
        assert guest.out() == (0x90, value)
        assert guest.vcpu.get_sregs().cr8 == value


@pytest.mark.known_gap("cr8-reserved")
def test_more_than_four_bits(chipped: TinyGuest) -> None:
    """#GP, and the old value stays."""
    chipped.load(Mode.LONG, f"{cr8(3)} {cr8(16)}", handlers={13: "mov rax, cr8\n out 0x90, al\n hlt"})
    assert chipped.out() == (0x90, 3)


@pytest.mark.known_gap("irq-window")
def test_lowering_lets_interrupts_in(chipped: TinyGuest) -> None:
    """One class at a time, by MOV CR8 alone; a value that still holds both back changes nothing."""
    chipped.load(
        Mode.LONG,
        f"{APIC_ON} {cr8(15)} sti\n {self_ipi(LOW)} {self_ipi(HIGH)} nop\n out 0x90, al\n {cr8(9)} nop\n"
        f"out 0x91, al\n {cr8(8)} nop\n out 0x92, al\n {cr8(4)} nop\n out 0x93, al\n {cr8(3)} nop\n out 0x94, al",
        handlers=HANDLERS,
    )
    seen = [chipped.out() for _ in range(7)]
    assert [port if port != REPORT else value for port, value in seen] == [0x90, 0x91, HIGH, 0x92, 0x93, LOW, 0x94]


@pytest.mark.known_gap("irq-window")
def test_lowering_with_interrupts_off(chipped: TinyGuest) -> None:
    """It comes with STI, not before."""
    chipped.load(
        Mode.LONG,
        f"{APIC_ON} {cr8(15)} {self_ipi(LOW)} {cr8(0)} nop\n out 0x90, al\n sti\n nop\n nop\n out 0x91, al",
        handlers=HANDLERS,
    )
    seen = [chipped.out() for _ in range(3)]
    assert [port if port != REPORT else value for port, value in seen] == [0x90, LOW, 0x91]


@pytest.mark.known_gap("irq-window")
@pytest.mark.parametrize("by", ["cr8", "tpr"])
def test_lowering_by_a_guest_that_runs(chipped: TinyGuest, by: str) -> None:
    """The priority holds back an interrupt that comes while the guest makes no exit; then it is lowered."""
    lower = cr8(2) if by == "cr8" else f"mov ebx, {TPR:#x}\n mov dword [rbx], 0x20\n"
    chipped.load(
        Mode.LONG,
        f"{APIC_ON} {cr8(6)} sti\n out 0x90, al\n waits: pause\n cmp dword [abs {DATA}], 1\n jne waits\n"
        f"inc dword [abs {DATA}]\n {lower} nop\n out 0x91, al",
        handlers=HANDLERS,
    )
    assert chipped.out()[0] == 0x90
    seen: list[tuple[int, int]] = []
    thread = threading.Thread(target=lambda: seen.extend(chipped.out() for _ in range(2)))
    thread.start()
    time.sleep(0.05)
    assert chipped.vm.signal_msi(APIC, LOW) == 1
    time.sleep(0.05)
    assert not seen
    chipped.ram.write_u32(DATA, 1)
    thread.join(WAIT_S)
    assert seen[0] == (REPORT, LOW)
    assert seen[1][0] == 0x91
    assert chipped.ram.read_u32(DATA) == 2


def test_saved_while_it_holds_one_back(chipped: TinyGuest) -> None:
    """KVM_GET_LAPIC has the interrupt that waits; lowered by KVM_SET_SREGS, the priority lets it in."""
    chipped.load(
        Mode.LONG, f"{APIC_ON} {cr8(12)} sti\n {self_ipi(HIGH)} again: out 0x90, al\n jmp again", handlers=HANDLERS
    )
    assert chipped.out()[0] == 0x90
    state = chipped.vcpu.get_lapic()
    assert bytes(state)[0x200 + (HIGH >> 5) * 0x10 + (HIGH & 31) // 8] == 1 << (HIGH & 7)
    assert bytes(state)[0x80] == 0xC0
    chipped.vcpu.set_lapic(state)
    assert chipped.out()[0] == 0x90
    sregs = chipped.vcpu.get_sregs()
    sregs.cr8 = 8
    chipped.vcpu.set_sregs(sregs)
    while (seen := chipped.out())[0] == 0x90:
        pass
    assert seen == (REPORT, HIGH)
