"""The dispatcher of one logical processor."""

from libc.stdint cimport uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState

cdef int run_cpu(CpuState *s) noexcept nogil
cdef CpuState *cpu_new(uint64_t cache_size) noexcept
cdef void cpu_free(CpuState *s) noexcept
