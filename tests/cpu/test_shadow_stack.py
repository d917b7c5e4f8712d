"""The host stack of return predictions is full: what translated code has on it besides must stay."""

from __future__ import annotations

import pytest

from vmonty.testing.nasm import assemble

from .machine import CODE, Machine

DEPTH = 9000  # more calls than the shadow stack has words (8192)


@pytest.mark.parametrize(("operand", "at"), [("gs:0x10", 0x40010), ("0x40ffe", 0x40FFE)], ids=["base", "two pages"])
def test_a_word_pushed_for_a_stub_outlives_a_full_stack(operand: str, at: int) -> None:
    """At every depth an access asks a stub, by a word that is pushed before a call: one of them meets the guard page.

    Offsets in a segment with a base go through one stub, accesses across two pages through another.
    """
    machine = Machine().protected_mode()
    machine["rsp"], machine["rax"] = 0x100000, 0
    machine.set_segment("gs", 0x10, 0x40000, 0xFFFF, 0x4093)
    access = f"inc dword [{operand}]"
    source = f"""mov ecx, {DEPTH}\n call f\n hlt
    f: {access}\n dec ecx\n jz out\n call f
    out: {access}\n inc eax\n ret"""
    assert machine.run(assemble(source, 32, CODE)) == "halt"
    assert (machine["rax"], machine["rsp"]) == (DEPTH, 0x100000)
    assert machine.ram.read(at, 4) == (2 * DEPTH).to_bytes(4, "little")


def test_calls_that_never_return_leave_their_callers_a_way_back() -> None:
    """Code that drops return addresses, as a thread does that ends deep in its calls, fills the stack bit by bit.

    Each read crosses two pages and asks a stub; the two returns at the end had their calls before the stack was full.
    """
    machine = Machine().long_mode()
    stack = machine["rsp"]
    machine.ram.write(0x40FFC, (1 << 32).to_bytes(8, "little"))
    source = f"""
        mov ecx, {DEPTH}
        xor eax, eax
        xor ebx, ebx
        call f
        inc eax
        hlt
    f:  call g
        inc eax
        ret
    g:  call on
    on: add rsp, 8
        mov rdx, [0x40ffc]
        add rbx, rdx
        dec ecx
        jnz g
        ret"""
    assert machine.run(assemble(source, 64, CODE)) == "halt"
    assert (machine["rax"], machine["rbx"], machine["rsp"]) == (2, DEPTH << 32, stack)


@pytest.mark.parametrize("room", [8, 9, 16, 7680])
def test_any_room_for_predictions_will_do(room: int) -> None:
    """Returns that were predicted and returns whose predictions were pushed out go back alike."""
    machine = Machine().long_mode()
    machine.cpu.predict_returns(room)
    stack = machine["rsp"]
    source = "mov ecx, 500\n xor eax, eax\n call f\n hlt\n f: dec ecx\n jz out\n call f\n out: inc eax\n ret"
    assert machine.run(assemble(source, 64, CODE)) == "halt"
    assert (machine["rax"], machine["rsp"]) == (500, stack)


@pytest.mark.parametrize("room", [7, 7681])
def test_rooms_that_there_are_not(room: int) -> None:
    with pytest.raises(ValueError, match="from 8 to 7680"):
        Machine().cpu.predict_returns(room)
