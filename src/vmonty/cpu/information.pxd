"""Time, identification, model-specific registers, and waiting: what a hypervisor answers in the processor's place.

As in ``control``: registers are read and written here, and intercepts asked for. GO_ON or LEAVE_NEXT when done.
"""

from libc.stdint cimport uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState

cdef extern from *:
    # Compiler built-ins.
    ctypedef unsigned long long uint128_t "unsigned __int128"
    uint64_t host_tsc "__builtin_ia32_rdtsc" () noexcept nogil

cdef int rdtsc(CpuState *s, uint32_t length) noexcept nogil
cdef int rdtscp(CpuState *s, uint32_t length) noexcept nogil
cdef int rdpid(CpuState *s, uint32_t register) noexcept nogil
cdef int rdpmc(CpuState *s, uint32_t length) noexcept nogil
cdef int pause(CpuState *s, uint32_t length) noexcept nogil
cdef int random(CpuState *s, bint seed, uint32_t register, uint32_t size, uint32_t length) noexcept nogil
cdef int monitor(CpuState *s, uint64_t linear, uint32_t length) noexcept nogil
cdef int mwait(CpuState *s, uint32_t length) noexcept nogil
cdef int cpuid(CpuState *s, uint32_t length) noexcept nogil
cdef int rdmsr(CpuState *s, uint32_t length) noexcept nogil
cdef int wrmsr(CpuState *s, uint32_t length) noexcept nogil
cdef int vmcall(CpuState *s, uint32_t length) noexcept nogil
cdef uint64_t tsc(CpuState *s) noexcept nogil

cdef bint _msr_intercepted(CpuState *s, uint32_t index, uint32_t write) noexcept nogil
cdef int _give_tsc(CpuState *s) noexcept nogil
