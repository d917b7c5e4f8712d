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
