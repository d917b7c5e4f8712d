"""Code that changes after it has run: a processor runs what memory holds. SDM, "Self-Modifying Code"."""

from __future__ import annotations

import pytest

from vmonty.kvm.uapi import Exit, flags
from vmonty.testing.guests import CODE, Mode, TinyGuest

PORT, INPUT = 0x10, 0x20

# Puts `mov al, 1; ret` where the others find its immediate at PATCH + 1, runs it, does something, runs it again.
PATCH = 0x80
TWICE = """
    mov edi, {at}
    call routine
    out {port:#x}, al
    {between}
    call routine
    out {port:#x}, al
    hlt
    times {patch:#x} - ($ - $$) nop
routine:
    mov al, 1
    ret
"""


def code(between: str) -> str:
    return TWICE.format(at=CODE + PATCH + 1, port=PORT, patch=PATCH, between=between)


def test_user_space_writes_and_says_so(guest: TinyGuest, mode: Mode) -> None:
    guest.load(mode, code(f"out {INPUT:#x}, al"))
    assert guest.out() == (PORT, 1)
    assert guest.out() == (INPUT, 1)
    guest.ram.view(CODE + PATCH + 1, 1)[0] = 7
    guest.vm.provider.memory_written(guest.ram.address + CODE + PATCH + 1, 1)
    assert guest.out() == (PORT, 7)


def test_port_input_over_code(guest: TinyGuest, mode: Mode) -> None:
    """INS stores what user space gave: KVM itself, or its emulator, writes guest memory."""
    guest.load(mode, code(f"mov dx, {INPUT:#x}\n insb"))
    assert guest.out() == (PORT, 1)
    assert guest.run() is Exit.IO
    guest.vcpu.io_data()[:] = b"\x09"
    assert guest.out() == (PORT, 9)


@pytest.mark.parametrize("how", ["regs", "sregs", "debug"])
def test_a_loader_writes_and_sets_state(guest: TinyGuest, mode: Mode, how: str) -> None:
    """Nobody is told; but who sets registers or breakpoints has perhaps written code."""
    guest.load(mode, code(f"out {INPUT:#x}, al\n nop"))
    assert guest.out() == (PORT, 1)
    assert guest.out() == (INPUT, 1)
    guest.ram.view(CODE + PATCH + 1, 1)[0] = 5
    match how:
        case "regs":
            guest.vcpu.complete_io()
            regs = guest.vcpu.get_regs()
            regs.rip += 1  # over the NOP
            guest.vcpu.set_regs(regs)
        case "sregs":
            guest.vcpu.set_sregs(guest.vcpu.get_sregs())
        case "debug":
            guest.vcpu.set_guest_debug(flags.KVM_GUESTDBG_ENABLE | flags.KVM_GUESTDBG_USE_SW_BP)
    assert guest.out() == (PORT, 5)
