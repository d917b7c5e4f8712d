"""Direct jumps between global pages: INVLPG of a page undoes those that lead to it, and no mapping outlives it."""

from __future__ import annotations

import pytest

from vmonty.testing.nasm import assemble

from .machine import TABLES, Machine

PGE = 1 << 7
WINDOW, TABLE = 0x20_0000, TABLES + 0x3000
# A loop in the first page jumps through both others; between its rounds those change places.
SOURCE = f"""
first:
    xor eax, eax
    mov edi, 4
round:
    mov ecx, 50
again:
    jmp second
back:
    dec ecx
    jnz again
    xor qword [{TABLE} + 8], 0x3000
    INVALIDATE
    dec edi
    jnz round
    hlt
    times 4096 - ($ - first) db 0x90
second:
    add eax, 1
    jmp third
    times 8192 - ($ - first) db 0x90
third:
    add eax, 10000
    jmp back
"""
ALL = "mov rdx, cr4\n xor rdx, 0x80\n mov cr4, rdx\n xor rdx, 0x80\n mov cr4, rdx"


@pytest.mark.parametrize("invalidate", ["invlpg [second]", "invlpg [second + 0xFFF]", ALL])
@pytest.mark.parametrize("is_global", [True, False])
def test_a_page_that_others_jump_to(invalidate: str, is_global: bool) -> None:
    source = SOURCE.replace("INVALIDATE", invalidate)
    pages = assemble(source, 64, WINDOW)
    changed = assemble(source.replace("    add eax, 1\n", "    add eax, 100\n"), 64, WINDOW)
    machine = Machine().long_mode()
    machine["cr4"] |= PGE
    machine.ram.write(0x2_0000, pages[:0x2000])
    machine.ram.write(0x2_2000, changed[0x1000:0x2000])
    machine.ram.write(0x2_4000, pages[0x2000:])
    machine.ram.write_u64(TABLES + 0x2008, TABLE + 3)
    for page, where in enumerate((0x2_0000, 0x2_1000, 0x2_4000)):
        machine.ram.write_u64(TABLE + 8 * page, where | 3 | is_global << 8)
    machine["rip"] = WINDOW
    assert machine.cpu.run() == "halt"
    assert machine["rax"] == 2 * 50 * (1 + 100) + 4 * 50 * 10000
