"""Logical to linear addresses: bases, limits, and access checks of segments."""

from libc.stdint cimport uint32_t, uint64_t

from vmonty.cpu.decode cimport Insn
from vmonty.cpu.state cimport CpuState

# write: 0 read, 1 write. GO_ON with the linear address, or LEAVE_EVENT (#GP or #SS).
cdef int linear_address(CpuState *s, int segment, uint64_t offset, uint32_t size, int write,
                        uint64_t *linear) noexcept nogil
# The offset that an instruction's memory operand names, and its linear address after all checks.
cdef uint64_t effective_address(CpuState *s, Insn *i) noexcept nogil
cdef int operand_address(CpuState *s, Insn *i, uint32_t size, int write, uint64_t *linear) noexcept nogil
