"""An emitter of x86-64 machine code: exactly what the translator and its stubs need.

Register arguments are hardware numbers (0 rax … 15 r15); ``NONE`` means no base or index. ``opcode`` carries its map
in bits 8 and 9: 0x8B, 0x1AF for 0F AF, 0x2F0 for 0F 38 F0. The caller guarantees room between ``at`` and ``limit``.
SDM, "Instruction Format".
"""

import cython

# SDM, "NOP", "Recommended Multi-Byte Sequence of NOP Instruction": of one to nine bytes, nine places each.
_SEQUENCES = cython.declare(
    bytes,
    b"\x90........"
    b"\x66\x90......."
    b"\x0f\x1f\x00......"
    b"\x0f\x1f\x40\x00....."
    b"\x0f\x1f\x44\x00\x00...."
    b"\x66\x0f\x1f\x44\x00\x00..."
    b"\x0f\x1f\x80\x00\x00\x00\x00.."
    b"\x0f\x1f\x84\x00\x00\x00\x00\x00."
    b"\x66\x0f\x1f\x84\x00\x00\x00\x00\x00",
)


def _build():
    source: cython.p_uchar = _SEQUENCES
    k: cython.int
    for k in range(81):
        NOPS[k // 9][k % 9] = source[k]


_build()


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _memory(
    p: cython.p_uchar, reg: cython.int, base: cython.int, index: cython.int, scale: cython.int, disp: int32_t
) -> cython.p_uchar:
    """Write modrm, SIB and displacement at ``p``; gives where they end."""
    field: cython.int = (reg & 7) << 3
    mod: cython.int
    if base < 0:
        p[0] = field | 4
        p[1] = (scale << 6) | (((index & 7) << 3) if index >= 0 else 0x20) | 5
        cython.cast(cython.pointer(int32_t), p + 2)[0] = disp
        return p + 6
    if disp == 0 and (base & 7) != 5:
        mod = 0
    elif -128 <= disp <= 127:
        mod = 0x40
    else:
        mod = 0x80
    if index >= 0 or (base & 7) == 4:
        p[0] = mod | field | 4
        p[1] = (scale << 6) | (((index & 7) << 3) if index >= 0 else 0x20) | (base & 7)
        p += 2
    else:
        p[0] = mod | field | (base & 7)
        p += 1
    if mod == 0x40:
        p[0] = disp & 0xFF
        p += 1
    elif mod == 0x80:
        cython.cast(cython.pointer(int32_t), p)[0] = disp
        p += 4
    return p


def memory(a, reg, base, index, scale, disp):
    """Append modrm, SIB and displacement of [base + index << scale + disp]; base may be NONE (then disp32)."""
    a.at = _memory(a.at, reg, base, index, scale, disp)


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _opcode(p: cython.p_uchar, prefix: cython.int, rex: cython.int, opcode: cython.int) -> cython.p_uchar:
    """Write prefix, REX and opcode; opcodes of the 0F map have 0x100 set, 0F38 0x200, 0F3A 0x300."""
    if prefix:
        p[0] = prefix
        p += 1
    if rex:
        p[0] = rex | 0x40
        p += 1
    if opcode >= 0x100:
        p[0] = 0x0F
        p += 1
        if opcode >= 0x200:
            p[0] = 0x3A if opcode >= 0x300 else 0x38
            p += 1
    p[0] = opcode & 0xFF
    return p + 1


def pad(a, length):
    """Append NOPs."""
    part: cython.int
    k: cython.int
    while length > 0:
        part = min(length, 9)
        length -= part
        for k in range(part):
            a.at[k] = NOPS[part - 1][k]
        a.at += part


def op_reg(a, prefix, w, opcode, reg, rm):
    """Append a register-register instruction (modrm.mod = 3). ``w`` 2 forces a bare REX for byte registers."""
    rex: cython.int = ((reg & 8) >> 1) | ((rm & 8) >> 3)
    p: cython.p_uchar
    if w == 1:
        rex |= 8
    if w == 2:
        rex |= 0x40
    p = _opcode(a.at, prefix, rex, opcode)
    p[0] = 0xC0 | ((reg & 7) << 3) | (rm & 7)
    a.at = p + 1


def op_mem(a, prefix, w, opcode, reg, base, index, scale, disp):
    """Append an instruction with a memory operand."""
    rex: cython.int = (reg & 8) >> 1
    if w == 1:
        rex |= 8
    if w == 2:
        rex |= 0x40
    if base >= 8:
        rex |= 1
    if index >= 8:
        rex |= 2
    a.at = _memory(_opcode(a.at, prefix, rex, opcode), reg, base, index, scale, disp)


def mov_rr(a, to, source):
    """``mov to, source`` (64 bits)."""
    if to != source:
        op_reg(a, 0, 1, 0x8B, to, source)


def mov_rr32(a, to, source):
    """``mov to, source`` (32 bits, zero-extends)."""
    op_reg(a, 0, 0, 0x8B, to, source)


def load(a, reg, base, disp):
    """``mov reg, [base + disp]`` (64 bits)."""
    op_mem(a, 0, 1, 0x8B, reg, base, NONE, 0, disp)


def load32(a, reg, base, disp):
    """``mov reg, [base + disp]`` (32 bits)."""
    op_mem(a, 0, 0, 0x8B, reg, base, NONE, 0, disp)


def store(a, reg, base, disp):
    """``mov [base + disp], reg`` (64 bits)."""
    op_mem(a, 0, 1, 0x89, reg, base, NONE, 0, disp)


def store32(a, reg, base, disp):
    """``mov [base + disp], reg`` (32 bits)."""
    op_mem(a, 0, 0, 0x89, reg, base, NONE, 0, disp)


def lea(a, reg, base, index, scale, disp):
    """``lea reg, [base + index << scale + disp]`` (64 bits)."""
    op_mem(a, 0, 1, 0x8D, reg, base, index, scale, disp)


def mov_imm(a, reg, value):
    """Load a constant in the shortest form that leaves the flags alone."""
    if not value >> 32:
        if reg >= 8:
            put8(a, 0x41)
        put8(a, 0xB8 | (reg & 7))
        put32(a, value)
    elif cython.cast(int64_t, value) >> 31 == -1:
        put8(a, 0x49 if reg >= 8 else 0x48)
        put8(a, 0xC7)
        put8(a, 0xC0 | (reg & 7))
        put32(a, cython.cast(uint32_t, value))
    else:
        put8(a, 0x49 if reg >= 8 else 0x48)
        put8(a, 0xB8 | (reg & 7))
        put64(a, value)


def store_imm32(a, base, disp, value):
    """``mov dword [base + disp], value``."""
    op_mem(a, 0, 0, 0xC7, 0, base, NONE, 0, disp)
    put32(a, value)


def alu_imm(a, w, digit, reg, value):
    """``add/or/adc/sbb/and/sub/xor/cmp reg, value`` by /digit."""
    if -128 <= value <= 127:
        op_reg(a, 0, w, 0x83, digit, reg)
        put8(a, value)
    else:
        op_reg(a, 0, w, 0x81, digit, reg)
        put32(a, value)


def vex3(a, map, pp, w, l, vvvv, r, x, b):  # noqa: A002, E741
    """Append a three-byte VEX prefix; ``r x b`` are the high register bits as they are (not inverted)."""
    put8(a, 0xC4)
    put8(a, (0 if r else 0x80) | (0 if x else 0x40) | (0 if b else 0x20) | map)
    put8(a, (w << 7) | (((~vvvv) & 15) << 3) | (l << 2) | pp)


def rorx(a, w, to, source, count):
    """``rorx to, source, count``: a rotate that leaves the flags alone (BMI2)."""
    vex3(a, 3, 3, w, 0, 0, to >> 3, 0, source >> 3)
    put8(a, 0xF0)
    put8(a, 0xC0 | ((to & 7) << 3) | (source & 7))
    put8(a, count)


def pext_mem(a, to, source, base, disp):
    """``pext to, source, [base + disp]`` (64 bits, BMI2)."""
    vex3(a, 2, 2, 1, 0, source, to >> 3, 0, base >> 3)
    put8(a, 0xF5)
    memory(a, to, base, NONE, 0, disp)


def jmp_to(a, target):
    """``jmp rel32``."""
    put8(a, 0xE9)
    put32(a, cython.cast(uint32_t, target - (here(a) + 4)))


def call_to(a, target):
    """``call rel32``."""
    put8(a, 0xE8)
    put32(a, cython.cast(uint32_t, target - (here(a) + 4)))


def jcc_to(a, cc, target):
    """``jcc rel32``."""
    put8(a, 0x0F)
    put8(a, 0x80 | cc)
    put32(a, cython.cast(uint32_t, target - (here(a) + 4)))


def push_imm32(a, value):
    """``push imm32``."""
    put8(a, 0x68)
    put32(a, value)
