"""DR0 to DR3: which breakpoints are armed, and what touches them."""

from libc.stdint cimport uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState

# To be called after DR0 to DR3 or DR7 changed.
cdef void debug_changed(CpuState *s) noexcept nogil
cdef void load_dr7(CpuState *s, uint64_t value) noexcept nogil
# Note in watch_hits the data breakpoints that an access meets; only worth calling while s.watch is not 0.
cdef bint watch_access(CpuState *s, uint64_t va, uint32_t size, bint write) noexcept nogil
cdef bint watched_page(CpuState *s, uint64_t page) noexcept nogil
# Would an access meet one? Notes nothing.
cdef bint watch_meets(CpuState *s, uint64_t va, uint32_t size, bint write) noexcept nogil
# The breakpoints on I/O ports that an access meets wait in pending_debug for the end of the instruction.
cdef void port_access(CpuState *s, uint32_t port, uint32_t size) noexcept nogil
# Before an instruction: 1 when an instruction breakpoint at rip recorded #DB.
cdef bint breakpoint_fault(CpuState *s) noexcept nogil

cdef void _forget(CpuState *s, uint64_t va) noexcept nogil
cdef uint32_t _length(CpuState *s, uint32_t number) noexcept nogil
