"""Guest debugging from user space. Source: api.rst, KVM_SET_GUEST_DEBUG."""

from __future__ import annotations

import pytest

from vmonty.kvm.uapi import Cap, Exit
from vmonty.kvm.uapi.flags import (
    BP_VECTOR,
    DB_VECTOR,
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_INJECT_DB,
    KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW_BP,
    KVM_GUESTDBG_USE_SW_BP,
)
from vmonty.testing.guests import CODE, DATA, Mode, TinyGuest, describe

pytestmark = pytest.mark.needs(Cap.SET_GUEST_DEBUG)
STEP = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP
MODES = [
    *(pytest.param(mode, id=mode.value) for mode in Mode if mode is not Mode.USER),
    pytest.param(Mode.USER, id="long-cpl3", marks=pytest.mark.known_gap("debug-cpl3")),
]
DR6_BS = 1 << 14


def expect_debug(guest: TinyGuest, vector: int, pc: int) -> None:
    reason = guest.run()
    assert reason is Exit.DEBUG, describe(guest.vcpu, reason)
    arch = guest.vcpu.kvm_run.u.debug.arch
    assert (arch.exception, arch.pc) == (vector, pc), f"{arch.exception} at {arch.pc:#x}"


@pytest.mark.parametrize("mode", MODES)
def test_single_step(guest: TinyGuest, mode: Mode) -> None:
    """Every instruction ends in an exit with the next one's address."""
    guest.load(mode, "nop\n nop\n nop\n out 0x10, al")
    guest.vcpu.set_guest_debug(STEP)
    for step in range(1, 4):
        expect_debug(guest, DB_VECTOR, CODE + step)
        assert guest.vcpu.kvm_run.u.debug.arch.dr6 & DR6_BS
    guest.vcpu.set_guest_debug(0)
    assert guest.out()[0] == 0x10


def test_single_step_hides_its_trap_flag(guest: TinyGuest) -> None:
    """RFLAGS.TF that KVM uses itself is not in what user space reads, nor in what the guest pushes."""
    guest.load(Mode.LONG, "nop\n pushfq\n pop rax\n nop\n out 0x10, eax")
    guest.vcpu.set_guest_debug(STEP)
    expect_debug(guest, DB_VECTOR, CODE + 1)
    assert guest.vcpu.get_regs().rflags & 0x100 == 0


@pytest.mark.known_gap("hw-breakpoint")
@pytest.mark.parametrize("mode", MODES)
def test_hardware_breakpoint(guest: TinyGuest, mode: Mode) -> None:
    guest.load(mode, "nop\n nop\n out 0x10, al")
    guest.vcpu.set_guest_debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP, {0: CODE + 1, 7: 0x401 | 1 << 1})
    expect_debug(guest, DB_VECTOR, CODE + 1)
    assert guest.vcpu.kvm_run.u.debug.arch.dr6 & 1
    guest.vcpu.set_guest_debug(0)
    assert guest.out()[0] == 0x10


@pytest.mark.known_gap("watchpoint")
@pytest.mark.parametrize("mode", [Mode.LONG, Mode.USER], ids=lambda mode: mode.value)
def test_watchpoint(guest: TinyGuest, mode: Mode) -> None:
    """A write to the watched bytes traps behind the instruction."""
    guest.load(mode, f"nop\n mov byte [abs {DATA}], 5\n nop\n out 0x10, al")
    control = 0x402 | 1 << 0 | 0b0001 << 16
    guest.vcpu.set_guest_debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP, {0: DATA, 7: control})
    reason = guest.run()
    assert reason is Exit.DEBUG, describe(guest.vcpu, reason)
    assert guest.vcpu.kvm_run.u.debug.arch.dr6 & 1
    assert guest.ram.read_u8(DATA) == 5


@pytest.mark.known_gap("sw-breakpoint")
@pytest.mark.parametrize("mode", [Mode.PROTECTED, Mode.LONG, Mode.USER], ids=lambda mode: mode.value)
def test_software_breakpoint(guest: TinyGuest, mode: Mode) -> None:
    """INT3 comes to user space, with RIP at it."""
    guest.load(mode, "nop\n int3\n out 0x10, al")
    guest.vcpu.set_guest_debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP)
    expect_debug(guest, BP_VECTOR, CODE + 1)


@pytest.mark.known_gap("int3-cpl0")
def test_int3_without_debugging_is_the_guests(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, "int3", handlers={3: "mov al, 3\n out 0x20, al"})
    guest.vcpu.set_guest_debug(KVM_GUESTDBG_ENABLE)
    assert guest.out() == (0x20, 3)


def test_injected_debug_exception(guest: TinyGuest) -> None:
    """KVM_GUESTDBG_INJECT_DB: #DB in the guest, as after a debugger's step that the guest asked for itself."""
    guest.load(Mode.LONG, "nop\n out 0x10, al", handlers={1: "mov al, 1\n out 0x20, al"})
    guest.vcpu.set_guest_debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_INJECT_DB)
    assert guest.out() == (0x20, 1)


def test_guests_own_single_step(guest: TinyGuest) -> None:
    """RFLAGS.TF set by the guest traps in the guest."""
    guest.load(Mode.LONG, "pushfq\n or qword [rsp], 0x100\n popfq\n nop\n out 0x10, al",
               handlers={1: "mov al, 1\n out 0x20, al"})  # fmt: skip
    assert guest.out() == (0x20, 1)


@pytest.mark.parametrize("exits", ["cpuid", "mov dx, 0x1234", "rdmsr"])
def test_guests_own_single_step_over_what_exits(guest: TinyGuest, exits: str) -> None:
    """kvm_skip_emulated_instruction(): the trap comes right behind what KVM executes for the guest."""
    guest.load(
        Mode.LONG,
        f"mov ecx, 0x1b\n lea rsi, [rel behind]\n pushfq\n or qword [rsp], 0x100\n popfq\n {exits}\n behind: nop\n"
        " out 0x10, al",
        handlers={1: "cmp [rsp], rsi\n sete al\n out 0x20, al"},
    )
    assert guest.out() == (0x20, 1)


def test_switched_off(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, "nop\n nop\n out 0x10, al")
    guest.vcpu.set_guest_debug(STEP)
    expect_debug(guest, DB_VECTOR, CODE + 1)
    guest.vcpu.set_guest_debug(0)
    assert guest.out()[0] == 0x10
