"""Real mode with segment limits of 4 GiB, as firmware uses it. SDM, "Real-Address Mode Operation"."""

from __future__ import annotations

import mmap

import pytest

from vmonty.cpu import core
from vmonty.testing.nasm import assemble

# Limits of 4 GiB for DS, ES and SS in protected mode, then real mode with their bases 0, where all are flat; then a
# base other than 0, by MOV to DS and by POP ES. What is read there tells which segment base counted.
PROGRAM = """
    cli
    xor ax, ax
    mov ds, ax
    lgdt [table]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    mov bx, 8
    mov ds, bx
    mov es, bx
    mov ss, bx
    and al, 0xfe
    mov cr0, eax
    jmp 0:real
real:
    mov ds, ax
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0x7000
    mov al, [0x600]
    mov [0x500], al
    mov al, [es:0x600]
    mov [0x501], al
    mov ax, 0x1000
    mov ds, ax
    mov al, [0x600]
    mov [ss:0x502], al
    push word 0x2000
    pop es
    mov al, [es:0x600]
    mov [ss:0x503], al
    xor ax, ax
    mov ds, ax
    mov al, [0x600]
    mov [ss:0x504], al
    hlt
table: dw 15
    dd entries
    dw 0
entries: dq 0, 0x00cf92000000ffff
"""


@pytest.mark.parametrize("turns", [1, 3])
def test_the_base_counts_after_a_load_in_real_mode(turns: int) -> None:
    cpu = core.Cpu()
    low, rom = mmap.mmap(-1, 1 << 20), mmap.mmap(-1, 65536)
    cpu.add_region(0, low)
    cpu.add_region(0xFFFF0000, rom)
    rom[0xFFF0:0xFFF5] = bytes.fromhex("ea007c0000")
    program = assemble(
        f"mov cx, {turns}\nagain:\n" + PROGRAM.replace("    hlt\n", "    loop again\n    hlt\n"), org=0x7C00
    )
    low[0x7C00 : 0x7C00 + len(program)] = program
    low[0x600], low[0x1_0600], low[0x2_0600] = 1, 2, 3
    assert cpu.run() == "halt"
    assert low[0x500:0x505] == bytes((1, 1, 2, 3, 1))
