"""Operands at the end of a page: what an instruction does not touch does not fault."""

from __future__ import annotations

import struct

import pytest

from vmonty.testing.nasm import assemble

from .machine import CODE, SIZE, Machine

TABLES, PAGE = 0x20000, 0x41000  # 4 KiB pages; PAGE is missing
DATA, MASK = 0x30000, 0x30010


@pytest.fixture
def long() -> Machine:
    machine = Machine().long_mode()
    for level in range(3):
        machine.ram.write_u64(TABLES + 0x1000 * level, TABLES + 0x1000 * (level + 1) + 7)
    pages = [0x7 | page << 12 for page in range(SIZE >> 12)]
    pages[PAGE >> 12] = 0
    machine.ram.write(TABLES + 0x3000, struct.pack(f"<{len(pages)}Q", *pages))
    machine["cr3"] = TABLES
    machine["cr4"] |= 0x200
    machine.ram.write(DATA, bytes(range(1, 17)))
    return machine


CASES = {
    "maskmovdqu": (16, f"movdqu xmm0, [{DATA}]\n movdqu xmm1, [{MASK}]\n maskmovdqu xmm0, xmm1"),
    "maskmovq": (8, f"movq mm0, [{DATA}]\n movq mm5, [{MASK}]\n maskmovq mm0, mm5\n emms"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chosen", [0, 0b11, 0b1010, 0x80])
@pytest.mark.parametrize("inside", [3, 8])
def test_only_chosen_bytes_fault(long: Machine, name: str, chosen: int, inside: int) -> None:
    """SDM, "MASKMOVQ—Store Selected Bytes of Quadword", "MASKMOVDQU—Store Selected Bytes of Double Quadword"."""
    size, code = CASES[name]
    at = PAGE - inside
    long.ram.write(MASK, bytes(0xFF if chosen >> n & 1 else 0x7F for n in range(16)))
    long.ram.write(at, b"\xee" * inside)
    assert long.run(assemble(f"mov edi, {at}\n {code}\n mov eax, 1\n hlt", 64, CODE)) == "halt"
    first = next((n for n in range(inside, size) if chosen >> n & 1), None)
    if first is not None:
        assert (long.handler, long["cr2"]) == (14, PAGE + first - inside)
        assert long.ram.read(at, inside) == b"\xee" * inside
    else:
        assert long["rax"] == 1
        assert long.ram.read(at, inside) == bytes(n + 1 if chosen >> n & 1 else 0xEE for n in range(inside))


@pytest.mark.parametrize("opcode", ["0x66, 0x63, 0x03", "0x66, 0x41, 0x63, 0x03"])
def test_movsxd_of_16_bits_reads_two_bytes(long: Machine, opcode: str) -> None:
    """SDM, "MOVSX/MOVSXD—Move With Sign-Extension": it extends nothing then, but takes r/m16 (seed 771004)."""
    long.ram.write(PAGE - 2, b"\x01\x80")
    source = f"mov rax, 0x1111111111111111\n mov ebx, {PAGE - 2}\n mov r11, rbx\n db {opcode}\n mov ecx, 1\n hlt"
    assert long.run(assemble(source, 64, CODE)) == "halt"
    assert (long["rcx"], long["rax"]) == (1, 0x1111_1111_1111_8001)


def test_mmx_registers_wherever_the_top_of_the_stack_is(long: Machine) -> None:
    """The byte-wise way finds MM0 and MM5 in the x87 registers, and makes MMX registers of all: none is empty."""
    long.ram.write_u64(MASK, 0x00FFFFFFFFFFFFFF)
    code = f"mov edi, {PAGE - 7}\n movq mm0, [{DATA}]\n movq mm5, [{MASK}]\n fincstp\n fincstp\n maskmovq mm0, mm5\n"
    assert long.run(assemble(f"{code} fnstenv [{DATA + 0x100}]\n mov eax, 1\n hlt", 64, CODE)) == "halt"
    assert long.ram.read(PAGE - 7, 7) == bytes(range(1, 8))
    _control, status, tags = (long.ram.read_u64(DATA + 0x100 + 4 * n) & 0xFFFF for n in range(3))
    assert status >> 11 & 7 == 0
    assert all(tags >> 2 * n & 3 != 3 for n in range(8))
