"""The instruction emulator, for accesses to where no memory is.

It decodes what compilers and kernels use on device registers: moves with and without extension, string stores,
and the read-modify-write forms. Source: SDM, "Instruction Format", "Opcode Map".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmonty.kvm.soft.x86 import VcpuX86

MAX_INSTRUCTION = 15
RAX, RCX, RSI, RDI = 0, 1, 6, 7
PREFIXES = {0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3}
CF, PF, AF, ZF, SF, OF = 1, 4, 0x10, 0x40, 0x80, 0x800
ARITHMETIC = CF | PF | AF | ZF | SF | OF


class CannotEmulate(Exception):
    """The instruction is none that this emulator knows."""


@dataclass
class Decoded:
    """An instruction with a memory operand: *modrm_register* is the other operand's number."""

    opcode: int
    length: int
    operand_size: int
    register: int
    rex: bool
    immediate: int
    repeated: bool


class Emulator:
    """Emulates one instruction of *vcpu* whose memory operand lies at guest-physical *gpa*."""

    def __init__(self, vcpu: VcpuX86) -> None:
        self._vcpu = vcpu

    def emulate(self, code: bytes, bits: int, gpa: int) -> bool:
        """Execute the instruction in *code* (at most 15 bytes, from rip); True to go on, False for an exit.

        *bits* is the code segment's size: 16, 32 or 64. Raises CannotEmulate.
        """
        insn = _decode(code, bits)
        size = insn.operand_size
        match insn.opcode:
            case 0x88 | 0x89:
                return self._store(insn, gpa, self._register(insn.register, size, insn.rex))
            case 0x8A | 0x8B:
                return self._load(insn, gpa, size, lambda value: self._set(insn.register, size, value, insn.rex))
            case 0xC6 | 0xC7:
                return self._store(insn, gpa, insn.immediate)
            case 0xA0 | 0xA1:
                return self._load(insn, gpa, size, lambda value: self._set(RAX, size, value, True))
            case 0xA2 | 0xA3:
                return self._store(insn, gpa, self._register(RAX, size, True))
            case 0x0FB6 | 0x0FB7 | 0x0FBE | 0x0FBF:
                return self._extend(insn, gpa)
            case 0xAA | 0xAB if not insn.repeated:
                return self._stos(insn, gpa, bits)
            case _:
                return self._modify(insn, gpa)

    def _finish(self, insn: Decoded) -> None:
        self._vcpu.vendor.set_rip(self._vcpu.vendor.get_rip() + insn.length)
        self._vcpu.vendor.set_interrupt_shadow(0)

    def _store(self, insn: Decoded, gpa: int, value: int) -> bool:
        size = insn.operand_size
        self._finish(insn)
        return self._vcpu.mmio_write(gpa, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))

    def _load(self, insn: Decoded, gpa: int, size: int, use: Callable[[int], object]) -> bool:
        def done(data: bytes) -> bool:
            use(int.from_bytes(data, "little"))
            self._finish(insn)
            return True

        return self._vcpu.mmio_read(gpa, size, done)

    def _extend(self, insn: Decoded, gpa: int) -> bool:
        narrow = 1 if insn.opcode in (0x0FB6, 0x0FBE) else 2

        def use(value: int) -> None:
            if insn.opcode >= 0x0FBE and value >> 8 * narrow - 1:
                value |= -1 << 8 * narrow
            self._set(insn.register, insn.operand_size, value & (1 << 8 * insn.operand_size) - 1, True)

        return self._load(insn, gpa, narrow, use)

    def _stos(self, insn: Decoded, gpa: int, bits: int) -> bool:
        vendor = self._vcpu.vendor
        step = -insn.operand_size if vendor.get_rflags() & 0x400 else insn.operand_size
        mask = (1 << bits) - 1
        rdi = vendor.get_gpr(RDI)
        vendor.set_gpr(RDI, rdi & ~mask | (rdi + step) & mask)
        return self._store(insn, gpa, self._register(RAX, insn.operand_size, True))

    def _modify(self, insn: Decoded, gpa: int) -> bool:
        """Read, compute, and write back where the instruction does."""
        size = insn.operand_size
        compute = _ALU.get(_alu_of(insn))
        to_register = insn.opcode < 0x40 and insn.opcode & 2
        if compute is None:
            raise CannotEmulate(f"opcode {insn.opcode:#x}")
        operand = insn.immediate if insn.opcode in (0x80, 0x81, 0x83, 0xF6, 0xF7) else None
        if operand is None:
            operand = self._register(insn.register, size, insn.rex)
        keeps = _alu_of(insn) in ("cmp", "test")
        result_box: list[int] = []

        def use(memory: int) -> None:
            left, right = (operand, memory) if to_register else (memory, operand)
            flags = self._vcpu.vendor.get_rflags()
            value, status = compute(left, right & (1 << 8 * size) - 1, 8 * size, flags & CF)
            self._vcpu.vendor.set_rflags(flags & ~ARITHMETIC | status)
            if keeps:
                return
            if to_register:
                self._set(insn.register, size, value, insn.rex)
            else:
                result_box.append(value)

        def done(data: bytes) -> bool:
            use(int.from_bytes(data, "little"))
            self._finish(insn)
            return not result_box or self._vcpu.mmio_write(gpa, result_box[0].to_bytes(size, "little"))

        return self._vcpu.mmio_read(gpa, size, done)

    def _register(self, number: int, size: int, rex: bool) -> int:
        if size == 1 and not rex and 4 <= number < 8:
            return self._vcpu.vendor.get_gpr(number - 4) >> 8 & 0xFF
        return self._vcpu.vendor.get_gpr(number) & (1 << 8 * size) - 1

    def _set(self, number: int, size: int, value: int, rex: bool) -> None:
        vendor = self._vcpu.vendor
        if size == 1 and not rex and 4 <= number < 8:
            old = vendor.get_gpr(number - 4)
            vendor.set_gpr(number - 4, old & ~0xFF00 | (value & 0xFF) << 8)
        elif size >= 4:
            vendor.set_gpr(number, value)
        else:
            mask = (1 << 8 * size) - 1
            vendor.set_gpr(number, vendor.get_gpr(number) & ~mask | value & mask)


def _status(value: int, bits: int) -> int:
    return (
        (ZF if value == 0 else 0)
        | (SF if value >> bits - 1 else 0)
        | (PF if (value & 0xFF).bit_count() % 2 == 0 else 0)
    )


def _add(left: int, right: int, bits: int, carry: int) -> tuple[int, int]:
    mask = (1 << bits) - 1
    full = left + right + carry
    value = full & mask
    overflow = ~(left ^ right) & (left ^ value) & 1 << bits - 1
    auxiliary = (left ^ right ^ value) & AF
    return value, _status(value, bits) | (CF if full > mask else 0) | (OF if overflow else 0) | auxiliary


def _subtract(left: int, right: int, bits: int, carry: int) -> tuple[int, int]:
    mask = (1 << bits) - 1
    full = left - right - carry
    value = full & mask
    overflow = (left ^ right) & (left ^ value) & 1 << bits - 1
    auxiliary = (left ^ right ^ value) & AF
    return value, _status(value, bits) | (CF if full < 0 else 0) | (OF if overflow else 0) | auxiliary


def _logic(operation: Callable[[int, int], int]) -> Callable[[int, int, int, int], tuple[int, int]]:
    def compute(left: int, right: int, bits: int, carry: int) -> tuple[int, int]:
        value = operation(left, right)
        return value, _status(value, bits)

    return compute


_NAMES = ("add", "or", "adc", "sbb", "and", "sub", "xor", "cmp")
_ALU: dict[str, Callable[[int, int, int, int], tuple[int, int]]] = {
    "add": lambda left, right, bits, carry: _add(left, right, bits, 0),
    "adc": _add,
    "sub": lambda left, right, bits, carry: _subtract(left, right, bits, 0),
    "sbb": _subtract,
    "cmp": lambda left, right, bits, carry: _subtract(left, right, bits, 0),
    "or": _logic(lambda left, right: left | right),
    "and": _logic(lambda left, right: left & right),
    "test": _logic(lambda left, right: left & right),
    "xor": _logic(lambda left, right: left ^ right),
}


def _alu_of(insn: Decoded) -> str:
    if insn.opcode < 0x40 and insn.opcode & 7 < 4:
        return _NAMES[insn.opcode >> 3]
    if insn.opcode in (0x80, 0x81, 0x83):
        return _NAMES[insn.register & 7]
    if insn.opcode in (0x84, 0x85) or (insn.opcode in (0xF6, 0xF7) and insn.register & 7 < 2):
        return "test"
    return ""


def _decode(code: bytes, bits: int) -> Decoded:
    """Decode up to the immediate. Raises CannotEmulate when the bytes end too early."""
    try:
        return _decode_checked(code[:MAX_INSTRUCTION], bits)
    except IndexError as error:
        raise CannotEmulate("the instruction is longer than what could be fetched") from error


def _decode_checked(code: bytes, bits: int) -> Decoded:
    at, prefixes, rex = 0, set(), 0
    while code[at] in PREFIXES:
        prefixes.add(code[at])
        at += 1
    if bits == 64 and code[at] & 0xF0 == 0x40:
        rex = code[at]
        at += 1
    opcode = code[at]
    at += 1
    if opcode == 0x0F:
        opcode = 0x0F00 | code[at]
        at += 1
    default = 2 if bits == 16 else 4
    word = 8 if rex & 8 else (6 - default if 0x66 in prefixes else default)
    address_bits = bits
    if 0x67 in prefixes:
        address_bits = {64: 32, 32: 16, 16: 32}[bits]
    size = word
    if opcode in (0x88, 0x8A, 0xC6, 0xA0, 0xA2, 0xAA, 0x80, 0x84, 0xF6) or (opcode < 0x40 and not opcode & 1):
        size = 1
    register, immediate_size = 0, 0
    if opcode in (0xA0, 0xA1, 0xA2, 0xA3):
        at += address_bits // 8
    elif opcode not in (0xAA, 0xAB):
        modrm = code[at]
        register = modrm >> 3 & 7 | (8 if rex & 4 else 0)
        at = _skip_modrm(code, at, address_bits)
    if opcode in (0xC6, 0x80, 0x83) or (opcode == 0xF6 and register & 7 < 2):
        immediate_size = 1
    elif opcode in (0xC7, 0x81) or (opcode == 0xF7 and register & 7 < 2):
        immediate_size = min(size, 4)
    raw = code[at : at + immediate_size]
    if len(raw) < immediate_size:
        raise IndexError
    immediate = int.from_bytes(raw, "little", signed=True)
    return Decoded(opcode, at + immediate_size, size, register, bool(rex), immediate, bool(prefixes & {0xF2, 0xF3}))


def _skip_modrm(code: bytes, at: int, address_bits: int) -> int:
    modrm = code[at]
    mod, rm = modrm >> 6, modrm & 7
    if mod == 3:
        raise CannotEmulate("no memory operand")
    at += 1
    if address_bits == 16:
        return at + (2 if mod == 2 or (mod == 0 and rm == 6) else mod)
    if rm == 4:
        base = code[at] & 7
        at += 1
        if mod == 0 and base == 5:
            return at + 4
    if mod == 0 and rm == 5:
        return at + 4
    return at + (0, 1, 4)[mod]
