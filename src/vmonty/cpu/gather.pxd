"""Gathers and masked moves: vector instructions that reach memory element by element."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from vmonty.cpu.codecache cimport CodeCache
from vmonty.cpu.decode cimport Insn
from vmonty.cpu.state cimport CpuState

cdef int masked_instruction(CpuState *s, Insn *i) noexcept nogil
cdef int gather_instruction(CpuState *s, Insn *i) noexcept nogil
cdef int masked_bytes(CpuState *s, Insn *i) noexcept nogil
