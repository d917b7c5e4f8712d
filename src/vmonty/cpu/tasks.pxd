"""Hardware task switches. (Owner: system side.)"""

from libc.stdint cimport uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState, Segment

# Why a task switch happens (the encoding of the exit qualification).
cdef enum:
    SWITCH_CALL = 0
    SWITCH_IRET = 1
    SWITCH_JUMP = 2
    SWITCH_GATE = 3          # an event through a task gate

# An event through a task gate of the IDT. GO_ON when the new task is in place.
cdef int task_gate(CpuState *s, uint32_t selector, uint32_t external, uint64_t rip, uint64_t flags,
                   uint32_t has_error, uint32_t error_code) noexcept nogil
# Switch to the TSS ``selector`` (checked here); rip: where the old task goes on. GO_ON, LEAVE_EVENT, LEAVE_EXIT.
cdef int task_switch(CpuState *s, uint32_t selector, uint32_t why, uint64_t rip, uint64_t flags, uint32_t has_error,
                     uint32_t error_code, uint32_t external, uint32_t length) noexcept nogil

cdef int _busy(CpuState *s, uint32_t selector, uint64_t descriptor, bint on) noexcept nogil
cdef int _save(CpuState *s, uint64_t rip, uint64_t flags) noexcept nogil
cdef int _restore(CpuState *s, uint64_t *cr3) noexcept nogil
cdef int _load_segments(CpuState *s, uint32_t external) noexcept nogil
cdef int _present(CpuState *s, Segment *new, uint32_t why) noexcept nogil
