"""Instructions that 64-bit mode dropped: BCD arithmetic, PUSHA, POPA, BOUND, SALC. (Owner: system side.)"""

from libc.stdint cimport int16_t, int32_t, int64_t, int8_t, uint8_t, uint32_t, uint64_t

from vmonty.cpu.decode cimport Insn
from vmonty.cpu.state cimport CpuState

cdef int legacy_instruction(CpuState *s, Insn *i) noexcept nogil

cdef void _result_flags(CpuState *s, uint8_t value) noexcept nogil
cdef int _decimal(CpuState *s, bint subtract) noexcept nogil
cdef int _ascii(CpuState *s, bint subtract) noexcept nogil
cdef int _push_all(CpuState *s, uint32_t size) noexcept nogil
cdef int _pop_all(CpuState *s, uint32_t size) noexcept nogil
cdef int _bound(CpuState *s, Insn *i) noexcept nogil
