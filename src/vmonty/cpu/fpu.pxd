"""Saving and restoring the x87, SSE and AVX state for the guest."""

from libc.stdint cimport uint32_t, uint64_t

from vmonty.cpu.decode cimport Insn
from vmonty.cpu.state cimport CpuState

cdef uint64_t components_in_use(CpuState *s) noexcept nogil
cdef int fpu_instruction(CpuState *s, Insn *i) noexcept nogil
