"""What is done about the exits of a block that has just been translated."""

from libc.stdint cimport uint32_t, uint64_t

from vmonty.cpu.codecache cimport Block
from vmonty.cpu.state cimport CpuState, FetchEntry

cdef enum:
    AHEAD = 6                # blocks that are translated at most before the first of them runs

# ``first`` is the block's first link.
cdef void look_ahead(CpuState *s, Block *b, FetchEntry *page, uint32_t first) noexcept nogil
