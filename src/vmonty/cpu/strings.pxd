"""String instructions, one iteration or a page at a time."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vmonty.cpu.decode cimport Insn
from vmonty.cpu.state cimport CpuState

cdef int string_instruction(CpuState *s, Insn *i) noexcept nogil
