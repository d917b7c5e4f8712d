"""SYSCALL, SYSRET, SYSENTER, SYSEXIT and SWAPGS. (Owner: system side.)"""

from libc.stdint cimport uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState

# All but swapgs return LEAVE_JUMP when done; size 8 for REX.W forms.
cdef int syscall(CpuState *s, uint32_t length) noexcept nogil
cdef int sysret(CpuState *s, uint32_t size) noexcept nogil
cdef int sysenter(CpuState *s) noexcept nogil
cdef int sysexit(CpuState *s, uint32_t size) noexcept nogil
cdef int swapgs(CpuState *s) noexcept nogil

cdef void _flat(CpuState *s, uint32_t index, uint32_t selector, uint32_t rights) noexcept nogil
