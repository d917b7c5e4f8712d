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
cdef void memory(Assembler *a, int reg, int base, int index, int scale, int32_t disp) noexcept nogil
cdef void op_reg(Assembler *a, int prefix, int w, int opcode, int reg, int rm) noexcept nogil
cdef void op_mem(Assembler *a, int prefix, int w, int opcode, int reg, int base, int index, int scale,
                 int32_t disp) noexcept nogil
cdef void mov_rr(Assembler *a, int to, int source) noexcept nogil
cdef void mov_rr32(Assembler *a, int to, int source) noexcept nogil
cdef void load(Assembler *a, int reg, int base, int32_t disp) noexcept nogil
cdef void load32(Assembler *a, int reg, int base, int32_t disp) noexcept nogil
cdef void store(Assembler *a, int reg, int base, int32_t disp) noexcept nogil
cdef void store32(Assembler *a, int reg, int base, int32_t disp) noexcept nogil
cdef void lea(Assembler *a, int reg, int base, int index, int scale, int32_t disp) noexcept nogil
cdef void mov_imm(Assembler *a, int reg, uint64_t value) noexcept nogil
cdef void store_imm32(Assembler *a, int base, int32_t disp, uint32_t value) noexcept nogil
cdef void alu_imm(Assembler *a, int w, int digit, int reg, int32_t value) noexcept nogil
cdef void rorx(Assembler *a, int w, int to, int source, int count) noexcept nogil
cdef void pext_mem(Assembler *a, int to, int source, int base, int32_t disp) noexcept nogil
cdef void vex3(Assembler *a, int map, int pp, int w, int l, int vvvv, int r, int x, int b) noexcept nogil
cdef void jmp_to(Assembler *a, uint64_t target) noexcept nogil
cdef void call_to(Assembler *a, uint64_t target) noexcept nogil
cdef void jcc_to(Assembler *a, int cc, uint64_t target) noexcept nogil
cdef void push_imm32(Assembler *a, uint32_t value) noexcept nogil
