"""What instructions of 64-bit code are that begin as an earlier one did."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from vmonty.cpu.decode cimport Insn

cdef enum:
    KNOWN_BITS = 10


cdef struct Shape:
    uint64_t word[6]


# What a simple instruction of certain first bytes is, but for rip, displacement and immediate.
cdef struct Known:
    uint64_t key             # REX, map, opcode, ModRM and SIB; 0: nothing
    Shape shape              # of Insn from row on
    uint64_t immediate_mask
    uint64_t immediate_sign
    uint32_t displacement_mask
    uint32_t displacement_sign
    uint8_t displacement_at
    uint8_t immediate_at


# Of an opcode (map 0 or 1) and what follows it, the bytes that tell what the instruction is; and the same by ModRM.
cdef uint32_t OPCODE_MASK[2][256]
cdef uint32_t MODRM_MASK[256]

# decode() of 64-bit code of which 24 bytes are there; ``known`` has 1 << KNOWN_BITS entries.
cdef int decode_known(Known *known, uint8_t *code, uint64_t rip, Insn *i) noexcept nogil
