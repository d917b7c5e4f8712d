"""The operands of careful blocks."""

from libc.stdint cimport uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState

# Called by translated code, with the words of ``tlb``.
cdef uint64_t careful_access(CpuState *s, uint64_t va, uint32_t what, uint64_t host_rip) noexcept nogil
cdef int careful_commit(CpuState *s) noexcept nogil
