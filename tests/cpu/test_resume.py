"""What goes on behind an instruction that ends its block, without the dispatcher."""

from __future__ import annotations

import struct

import pytest

from vmonty.testing.nasm import assemble

from .machine import CODE, CODE64, DATA, SIZE, STACK3, TABLES, Machine

TREES, FAR = 0x20000, 0x40000  # two sets of tables with 4 KiB pages; code that reaches into a second page


@pytest.fixture
def long() -> Machine:
    return Machine().long_mode()


@pytest.mark.parametrize("code", ["cli", "swapgs"])
def test_what_was_translated_at_cpl_0_faults_at_cpl_1(long: Machine, code: str) -> None:
    """CLI with IOPL 0, and SWAPGS, at CPL 1: SDM, "CLI—Clear Interrupt Flag", "SWAPGS—Swap GS Base Register"."""
    long["kernel_gs_base"] = 0x1000
    long.set_segment("gs", DATA, 0x2000, 0xFFFFFFFF, 0xC093)
    assert long.run(assemble(f"{code}\nhlt", 64, CODE)) == "halt"
    assert long["rip"] == CODE + len(assemble(f"{code}\nhlt", 64, CODE))
    bases = (long.segment("gs").base, long["kernel_gs_base"])
    assert bases == ((0x1000, 0x2000) if code == "swapgs" else (0x2000, 0x1000))
    long.set_segment("cs", CODE64 | 1, 0, 0xFFFFFFFF, 0xA0BB)
    long.set_segment("ss", DATA | 1, 0, 0xFFFFFFFF, 0xC0B3)
    long["cpl"], long["rsp"], long["rip"], long["activity"] = 1, STACK3, CODE, 0
    assert long.cpu.run() == "halt"
    assert (long.handler, long.stack(2)) == (13, [0, CODE])


def trees(machine: Machine) -> None:
    """Global identity pages, but for the one behind FAR: there the two sets of tables differ."""
    for number in range(2):
        root = TREES + 0x4000 * number
        for level in range(3):
            machine.ram.write_u64(root + 0x1000 * level, root + 0x1000 * (level + 1) + 7)
        pages = [0x107 | page << 12 for page in range(512)]
        pages[(FAR >> 12) + 1] = 0x7 | FAR + 0x1000 * (number + 1)
        machine.ram.write(root + 0x3000, struct.pack("<512Q", *pages))


def test_a_load_of_cr3_reaches_the_second_page_of_a_block(long: Machine) -> None:
    """Its first page is global, its second is not. SDM, "Global Pages"."""
    trees(long)
    block = b"\x05" + struct.pack("<I", 0x11) + b"\xff\xe6"  # add eax, 0x11; jmp rsi
    long.ram.write(FAR + 0xFFE, block[:2])
    for number in range(2):
        long.ram.write(FAR + 0x1000 * (number + 1), b"\0\0\0" + block[5:])
    long.ram.write(FAR + 0x2000, b"\0\0\x01")
    long["cr4"] |= 0x80
    code = f"""
    mov edi, {FAR + 0xFFE}
    xor ecx, ecx
    again:
    mov eax, {TREES}
    test ecx, 1
    jz first
    mov eax, {TREES + 0x4000}
    first: mov cr3, rax
    xor eax, eax
    lea rsi, [rel back]
    jmp rdi
    back: push rax
    inc ecx
    cmp ecx, 6
    jne again
    hlt
    """
    assert SIZE > FAR + 0x3000 > TABLES
    assert long.run(assemble(code, 64, CODE)) == "halt"
    assert long.stack(6) == [0x1000011, 0x11] * 3
