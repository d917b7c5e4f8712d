"""Operands that share one TLB check."""

from libc.stdint cimport int64_t

from vmonty.cpu.decode cimport Insn
from vmonty.cpu.translate cimport Work

cdef void find_groups(Work *w) noexcept nogil
# Whether an instruction (copied, or LEA) only moves a 64-bit register by a constant.
cdef int constant_step(Insn *i, int *reg, int64_t *by) noexcept nogil
# Count up the versions of the registers that an instruction writes.
cdef void count_writes(Insn *i, int *version) noexcept nogil
