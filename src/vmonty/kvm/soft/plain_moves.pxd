"""MOVs between a register and memory where the second dimension has none."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from vmonty.cpu.decode cimport Insn
from vmonty.cpu.state cimport CpuState

# Opcodes; those from MOVZX_BYTE on have 0F before them.
cdef enum:
    MOV_STORE_BYTE = 0x88
    MOV_STORE = 0x89
    MOV_LOAD_BYTE = 0x8A
    MOV_LOAD = 0x8B
    MOV_FROM_OFFSET_BYTE = 0xA0
    MOV_FROM_OFFSET = 0xA1
    MOV_TO_OFFSET_BYTE = 0xA2
    MOV_TO_OFFSET = 0xA3
    MOV_IMMEDIATE_BYTE = 0xC6
    MOV_IMMEDIATE = 0xC7
    MOVSXD = 0x63
    MOVZX_BYTE = 0xB6
    MOVZX_WORD = 0xB7
    MOVSX_BYTE = 0xBE
    MOVSX_WORD = 0xBF

cdef enum:
    MAP_0F = 1
    RAX = 0
    RSP = 4


cdef struct PlainMove:
    uint64_t value           # what is stored
    uint32_t size            # bytes of memory
    uint32_t stores
    uint32_t reg             # that is loaded: never RSP, which is not among the others while a guest is left
    uint32_t width           # bytes of it that are written: 1, 2; 4, which clear the rest, too; 8
    uint32_t is_signed       # what is loaded is extended by its sign
    uint32_t length          # of the instruction


# Whether the instruction at rip is one, and all of its operand lies at gpa.
cdef bint plain_move(CpuState *s, uint64_t gpa, PlainMove *m) noexcept nogil
# What the register that held old holds when data has been loaded.
cdef uint64_t loaded(PlainMove *m, uint64_t old, uint64_t data) noexcept nogil

cdef void _decode_here(CpuState *s) noexcept nogil
cdef bint _decoded(CpuState *s, Insn *i) noexcept nogil
cdef bint _has_offset(Insn *i) noexcept nogil
cdef bint _classify(CpuState *s, Insn *i, PlainMove *m) noexcept nogil
cdef uint64_t _low(uint64_t value, uint32_t size) noexcept nogil
cdef uint64_t _stored(CpuState *s, Insn *i, uint32_t size) noexcept nogil
