"""One processor alone: the others wait between instructions."""

from vmonty.cpu.state cimport CpuState

cdef extern from "<sched.h>" nogil:
    int sched_yield()

# Held by the processor that is alone, or that waits until it is.
cdef int exclusive_lock

cdef void exclusive_begin(CpuState *s) noexcept nogil
cdef void exclusive_end(CpuState *s) noexcept nogil
# Around what may take long and leaves guest memory to others: an observer's Python code.
cdef void exclusive_aside(CpuState *s) noexcept nogil
cdef void exclusive_back(CpuState *s) noexcept nogil
# The dispatcher's, when the run flag went 0.
cdef void exclusive_wait(CpuState *s) noexcept nogil
