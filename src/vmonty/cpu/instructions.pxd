"""What each class of instructions becomes, and the instructions that fit nowhere else."""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from vmonty.cpu.decode cimport Insn
from vmonty.cpu.translate cimport Ea, Work

cdef void emit_instruction(Work *w, Insn *i) noexcept nogil
