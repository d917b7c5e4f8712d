"""Blocks that are translated before anything goes there: nobody may notice."""

from __future__ import annotations

import struct

import pytest

from vmonty.testing.nasm import assemble

from .flat import CODE as FLAT_CODE
from .flat import Machine as Flat
from .machine import CODE, SIZE, Machine

TABLES = 0x20000


def test_code_that_is_changed_before_it_runs() -> None:
    """The jump's target is translated with the jump, which stands behind the write to it."""
    source = """
        mov eax, 1
        jmp next
        align 16
    next:
        mov byte [rel place + 1], 7
        jmp place
        align 16
    place:
        mov ecx, 3
        hlt
    """
    machine = Flat()
    assert machine.run(assemble(source, 64, FLAT_CODE)) == "halt"
    assert machine.cpu["rcx"] == 7


@pytest.mark.parametrize("inside", range(1, 10))
def test_an_instruction_that_ends_in_a_missing_page(inside: int) -> None:
    """It is behind a conditional jump that is taken, so it is never fetched: no page fault."""
    machine = Machine().long_mode()
    for level in range(3):
        machine.ram.write_u64(TABLES + 0x1000 * level, TABLES + 0x1000 * (level + 1) + 7)
    pages = [0x7 | page << 12 for page in range(SIZE >> 12)]
    pages[(CODE >> 12) + 1] = 0
    machine.ram.write(TABLES + 0x3000, struct.pack(f"<{len(pages)}Q", *pages))
    machine["cr3"] = TABLES
    source = f"""
        jmp start
    out:
        mov ebx, 1
        hlt
        times {4096 - inside - 8} - ($ - $$) nop
    start:
        inc eax
        jne near out
        mov rax, 0x1122334455667788
    """
    assert machine.run(assemble(source, 64, CODE)) == "halt"
    assert machine["rbx"] == 1, machine.handler


def test_single_steps_see_each_instruction() -> None:
    """A budget of one instruction at a time goes the same way as none."""
    source = "mov eax, 5\n jmp a\n a: dec eax\n jne a\n jmp b\n b: mov ebx, 9\n hlt"
    machine = Flat()
    machine.load(assemble(source, 64, FLAT_CODE))
    seen = []
    while machine.cpu["rip"] not in seen[-1:] and len(seen) < 100:
        seen.append(machine.cpu["rip"])
        machine.cpu.step()
    assert machine.cpu["rbx"] == 9
    assert seen.count(FLAT_CODE + 7) == 5
