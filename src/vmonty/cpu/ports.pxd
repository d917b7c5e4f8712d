"""IN, OUT, INS, OUTS: permission, interception, and the bare processor's port exits. (Owner: system side.)"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState

# size 1, 2, 4; immediate: 1 when the port came from the instruction (goes into the VM exit qualification).
# On the bare processor both leave with EXIT_PIO and rip behind the instruction; complete() puts a read's data into rAX.
cdef int port_in(CpuState *s, uint32_t port, uint32_t size, uint32_t immediate, uint32_t length) noexcept nogil
cdef int port_out(CpuState *s, uint32_t port, uint32_t size, uint32_t immediate, uint32_t length) noexcept nogil
# INS/OUTS, one iteration at a time (LEAVE_RETRY while a REP count is left).
# address_size 2, 4, 8; segment: of OUTS' source.
cdef int string_in(CpuState *s, uint32_t size, uint32_t address_size, uint32_t rep, uint32_t length) noexcept nogil
cdef int string_out(CpuState *s, uint32_t size, uint32_t address_size, uint32_t rep, uint32_t segment,
                    uint32_t length) noexcept nogil
# Called by run() first when the last exit was EXIT_PIO: puts exit.data where the instruction wants it.
cdef int complete(CpuState *s) noexcept nogil

cdef int _allowed(CpuState *s, uint32_t port, uint32_t size) noexcept nogil
cdef bint _intercepted(CpuState *s, uint32_t port, uint32_t size) noexcept nogil
cdef int _leave(CpuState *s, uint32_t port, uint32_t size, uint32_t write, uint64_t data) noexcept nogil
cdef uint64_t _masked(uint64_t value, uint32_t address_size) noexcept nogil
cdef void _advance(CpuState *s, uint32_t register, uint32_t size, uint32_t address_size) noexcept nogil
cdef void _trap(CpuState *s, uint32_t port, uint32_t size, bint repeats) noexcept nogil
cdef uint64_t _svm_information(uint32_t port, uint32_t size, uint64_t rest) noexcept nogil
