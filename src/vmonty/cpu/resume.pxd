"""How a processor goes on behind an instruction that ended its block."""

from libc.stdint cimport uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState

# What translated code calls, with the number of the instruction: where to go on, or 0 and leave_code.
cdef uint64_t execute_system(CpuState *s, uint64_t number) noexcept nogil
# Where the translation of rip is, as far as the jump cache knows; else 0.
cdef uint64_t cached_code(CpuState *s) noexcept nogil
# Drop what the old mode's predictions say.
cdef void new_key(CpuState *s) noexcept nogil
cdef bint _undisturbed(CpuState *s) noexcept nogil
