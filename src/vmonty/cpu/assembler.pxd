"""An emitter of x86-64 machine code: exactly what the translator and its stubs need."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    NONE = -1
    # condition codes
    CC_O = 0
    CC_NO = 1
    CC_B = 2
    CC_AE = 3
    CC_E = 4
    CC_NE = 5
    CC_BE = 6
    CC_A = 7
    CC_GE = 13
    CC_LE = 14

cdef struct Assembler:
    uint8_t *at              # next byte, in the writable mapping
    uint8_t *limit
    int64_t delta            # executable address minus writable address


# Inline, as every emitted byte comes through them.
cdef inline void put8(Assembler *a, uint32_t value) noexcept nogil:
    """Append one byte."""
    a.at[0] = <uint8_t>value
    a.at += 1


cdef inline void put16(Assembler *a, uint32_t value) noexcept nogil:
    """Append two bytes, little-endian."""
    (<uint16_t *>a.at)[0] = <uint16_t>value
    a.at += 2


cdef inline void put32(Assembler *a, uint32_t value) noexcept nogil:
    """Append four bytes, little-endian."""
    (<uint32_t *>a.at)[0] = value
    a.at += 4


cdef inline void put64(Assembler *a, uint64_t value) noexcept nogil:
    """Append eight bytes, little-endian."""
    (<uint64_t *>a.at)[0] = value
    a.at += 8


cdef inline uint64_t here(Assembler *a) noexcept nogil:
    """Give the address at which the next byte will execute."""
    return <uint64_t>a.at + a.delta


cdef uint8_t NOPS[9][9]


cdef inline void fit(Assembler *a, int length) noexcept nogil:
    """Have the jumps in the next ``length`` bytes lie within 32 bytes, with no end at their border.

    Intel, "Mitigations for Jump Conditional Code Erratum": others are decoded anew each time.
    """
    cdef int at = <uint64_t>a.at & 31
    if at + length >= 32:
        pad(a, 32 - at)


cdef void pad(Assembler *a, int length) noexcept nogil


cdef inline uint8_t *address(uint8_t *p, int reg, int base, int index, int scale, int32_t disp) noexcept nogil:
    """Write modrm, SIB and displacement at ``p``; gives where they end."""
    cdef int field = (reg & 7) << 3
    cdef int mod
    if base < 0:
        p[0] = field | 4
        p[1] = (scale << 6) | (((index & 7) << 3) if index >= 0 else 0x20) | 5
        (<int32_t *>(p + 2))[0] = disp
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
    if mod == 0:
        return p
    (<int32_t *>p)[0] = disp  # what is too much is overwritten
    return p + (1 if mod == 0x40 else 4)


cdef inline uint8_t *_opcode(uint8_t *p, int prefix, int rex, int opcode) noexcept nogil:
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


cdef inline void memory(Assembler *a, int reg, int base, int index, int scale, int32_t disp) noexcept nogil:
    """Append modrm, SIB and displacement of [base + index << scale + disp]; base may be NONE (then disp32)."""
    a.at = address(a.at, reg, base, index, scale, disp)


cdef inline void op_reg(Assembler *a, int prefix, int w, int opcode, int reg, int rm) noexcept nogil:
    """Append a register-register instruction (modrm.mod = 3). ``w`` 2 forces a bare REX for byte registers."""
    cdef int rex = ((reg & 8) >> 1) | ((rm & 8) >> 3)
    cdef uint8_t *p
    if w == 1:
        rex |= 8
    if w == 2:
        rex |= 0x40
    p = _opcode(a.at, prefix, rex, opcode)
    p[0] = 0xC0 | ((reg & 7) << 3) | (rm & 7)
    a.at = p + 1


cdef inline void op_mem(Assembler *a, int prefix, int w, int opcode, int reg, int base, int index, int scale,
                        int32_t disp) noexcept nogil:
    """Append an instruction with a memory operand."""
    cdef int rex = (reg & 8) >> 1
    if w == 1:
        rex |= 8
    if w == 2:
        rex |= 0x40
    if base >= 8:
        rex |= 1
    if index >= 8:
        rex |= 2
    a.at = address(_opcode(a.at, prefix, rex, opcode), reg, base, index, scale, disp)


cdef inline void mov_rr(Assembler *a, int to, int source) noexcept nogil:
    """``mov to, source`` (64 bits)."""
    if to != source:
        op_reg(a, 0, 1, 0x8B, to, source)


cdef inline void mov_rr32(Assembler *a, int to, int source) noexcept nogil:
    """``mov to, source`` (32 bits, zero-extends)."""
    op_reg(a, 0, 0, 0x8B, to, source)


cdef inline void load(Assembler *a, int reg, int base, int32_t disp) noexcept nogil:
    """``mov reg, [base + disp]`` (64 bits)."""
    op_mem(a, 0, 1, 0x8B, reg, base, NONE, 0, disp)


cdef inline void load32(Assembler *a, int reg, int base, int32_t disp) noexcept nogil:
    """``mov reg, [base + disp]`` (32 bits)."""
    op_mem(a, 0, 0, 0x8B, reg, base, NONE, 0, disp)


cdef inline void store(Assembler *a, int reg, int base, int32_t disp) noexcept nogil:
    """``mov [base + disp], reg`` (64 bits)."""
    op_mem(a, 0, 1, 0x89, reg, base, NONE, 0, disp)


cdef inline void store32(Assembler *a, int reg, int base, int32_t disp) noexcept nogil:
    """``mov [base + disp], reg`` (32 bits)."""
    op_mem(a, 0, 0, 0x89, reg, base, NONE, 0, disp)


cdef inline void lea(Assembler *a, int reg, int base, int index, int scale, int32_t disp) noexcept nogil:
    """``lea reg, [base + index << scale + disp]`` (64 bits)."""
    op_mem(a, 0, 1, 0x8D, reg, base, index, scale, disp)


cdef inline void mov_imm(Assembler *a, int reg, uint64_t value) noexcept nogil:
    """Load a constant in the shortest form that leaves the flags alone."""
    cdef uint8_t *p = a.at
    if not value >> 32:
        p[0] = 0x41
        p += reg >= 8
        p[0] = 0xB8 | (reg & 7)
        (<uint32_t *>(p + 1))[0] = <uint32_t>value
        a.at = p + 5
        return
    p[0] = 0x49 if reg >= 8 else 0x48
    if <int64_t>value >> 31 == -1:
        p[1] = 0xC7
        p[2] = 0xC0 | (reg & 7)
        (<uint32_t *>(p + 3))[0] = <uint32_t>value
        a.at = p + 7
    else:
        p[1] = 0xB8 | (reg & 7)
        (<uint64_t *>(p + 2))[0] = value
        a.at = p + 10


cdef inline void store_imm32(Assembler *a, int base, int32_t disp, uint32_t value) noexcept nogil:
    """``mov dword [base + disp], value``."""
    op_mem(a, 0, 0, 0xC7, 0, base, NONE, 0, disp)
    put32(a, value)


cdef inline void alu_imm(Assembler *a, int w, int digit, int reg, int32_t value) noexcept nogil:
    """``add/or/adc/sbb/and/sub/xor/cmp reg, value`` by /digit."""
    cdef int short_form = -128 <= value <= 127
    op_reg(a, 0, w, 0x83 if short_form else 0x81, digit, reg)
    (<int32_t *>a.at)[0] = value  # what is too much is overwritten
    a.at += 1 if short_form else 4


cdef inline uint8_t *_vex3(uint8_t *p, int map, int pp, int w, int l, int vvvv, int r, int x, int b) noexcept nogil:
    p[0] = 0xC4
    p[1] = (0 if r else 0x80) | (0 if x else 0x40) | (0 if b else 0x20) | map
    p[2] = (w << 7) | (((~vvvv) & 15) << 3) | (l << 2) | pp
    return p + 3


cdef inline void vex3(Assembler *a, int map, int pp, int w, int l, int vvvv, int r, int x, int b) noexcept nogil:
    """Append a three-byte VEX prefix; ``r x b`` are the high register bits as they are (not inverted)."""
    a.at = _vex3(a.at, map, pp, w, l, vvvv, r, x, b)


cdef inline void rorx(Assembler *a, int w, int to, int source, int count) noexcept nogil:
    """``rorx to, source, count``: a rotate that leaves the flags alone (BMI2)."""
    cdef uint8_t *p = _vex3(a.at, 3, 3, w, 0, 0, to >> 3, 0, source >> 3)
    p[0] = 0xF0
    p[1] = 0xC0 | ((to & 7) << 3) | (source & 7)
    p[2] = count
    a.at = p + 3


cdef inline void pext_mem(Assembler *a, int to, int source, int base, int32_t disp) noexcept nogil:
    """``pext to, source, [base + disp]`` (64 bits, BMI2)."""
    cdef uint8_t *p = _vex3(a.at, 2, 2, 1, 0, source, to >> 3, 0, base >> 3)
    p[0] = 0xF5
    a.at = address(p + 1, to, base, NONE, 0, disp)


cdef inline uint8_t *_relative(uint8_t *p, uint64_t target, int64_t delta) noexcept nogil:
    """Write the rel32 at ``p`` of a jump to ``target``; gives where it ends."""
    (<uint32_t *>p)[0] = <uint32_t>(target - (<uint64_t>p + delta + 4))
    return p + 4


cdef inline void jmp_to(Assembler *a, uint64_t target) noexcept nogil:
    """``jmp rel32``."""
    cdef uint8_t *p = a.at
    p[0] = 0xE9
    a.at = _relative(p + 1, target, a.delta)


cdef inline void call_to(Assembler *a, uint64_t target) noexcept nogil:
    """``call rel32``."""
    cdef uint8_t *p = a.at
    p[0] = 0xE8
    a.at = _relative(p + 1, target, a.delta)


cdef inline void jcc_to(Assembler *a, int cc, uint64_t target) noexcept nogil:
    """``jcc rel32``."""
    cdef uint8_t *p = a.at
    p[0] = 0x0F
    p[1] = 0x80 | cc
    a.at = _relative(p + 2, target, a.delta)


cdef inline uint8_t *jmp_open(Assembler *a) noexcept nogil:
    """``jmp rel32`` to somewhere; gives where the rel32 is to be written."""
    cdef uint8_t *p = a.at
    p[0] = 0xE9
    a.at = p + 5
    return p + 1


cdef inline uint8_t *jcc_open(Assembler *a, int cc) noexcept nogil:
    """``jcc rel32`` to somewhere; gives where the rel32 is to be written."""
    cdef uint8_t *p = a.at
    p[0] = 0x0F
    p[1] = 0x80 | cc
    a.at = p + 6
    return p + 2


cdef inline void push_imm32(Assembler *a, uint32_t value) noexcept nogil:
    """``push imm32``."""
    cdef uint8_t *p = a.at
    p[0] = 0x68
    (<uint32_t *>(p + 1))[0] = value
    a.at = p + 5
