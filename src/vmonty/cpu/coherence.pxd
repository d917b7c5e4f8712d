"""Code that was written unseen."""

from libc.stdint cimport uint32_t, uint64_t

from vmonty.cpu.codecache cimport Block
from vmonty.cpu.state cimport CpuState

cdef void block_digest(Block *b) noexcept nogil
cdef void page_verify(CpuState *s, uint64_t host_page) noexcept nogil
