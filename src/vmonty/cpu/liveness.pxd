"""Which arithmetic flags are needed where, inside a block and just past its end."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vmonty.cpu.decode cimport F_ALL, Insn


cdef inline int flags_read(Insn *i) noexcept nogil:
    """Give the flags whose values the instruction uses, the ones it may leave unchanged included."""
    return F_ALL if i.fault else i.reads


# Whether the code of an instruction hangs on the flags that are needed behind the block.
cdef int open_at_end(Insn *block, int count) noexcept nogil
cdef int live_at(uint8_t *code, int available, uint64_t rip, int code_size, uint64_t *features) noexcept nogil
cdef void analyse(Insn *block, int count, int live_out) noexcept nogil
