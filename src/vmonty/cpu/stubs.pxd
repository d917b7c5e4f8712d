"""Code that all blocks of a cache share, made once for each processor."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t

from vmonty.cpu.assembler cimport Assembler
from vmonty.cpu.codecache cimport CodeCache
from vmonty.cpu.state cimport CpuState


cdef inline int32_t displacement(CpuState *s, void *field) noexcept nogil:
    """Give the way from rbp, which is the state + 128, to a field of it."""
    return <int32_t>(<int64_t>field - <int64_t>s - 128)


# At the beginning of an empty cache. host_xsave holds the functions that they call: see cache_new.
cdef void make_stubs(CodeCache *c, CpuState *s) noexcept nogil
