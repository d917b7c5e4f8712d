"""Accesses of the current instruction to where no memory is."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState

# Read: 0 when the answers are at hand, else LEAVE_EXIT with the next part asked for in exit.
cdef int mmio_read(CpuState *s, uint64_t physical, uint8_t *data, uint32_t size) noexcept nogil
# Write: queued until the instruction (or one iteration of it) is done.
cdef void mmio_write(CpuState *s, uint64_t physical, uint8_t *data, uint32_t size) noexcept nogil
# Move the next queued write into exit; 0 when there is none.
cdef bint mmio_report(CpuState *s) noexcept nogil
# It ends: whether it is done, and where the next one is.
cdef void mmio_end(CpuState *s) noexcept nogil
# An instruction that host software has executed begins, or goes on: EXIT_NONE, or what there is to say of it at once.
cdef int mmio_begin(CpuState *s, bint resume) noexcept nogil
# The caller's answer to the read in exit.
cdef void mmio_answer(CpuState *s) noexcept nogil
# The instruction, or one iteration of it, is done with its reads.
cdef inline void mmio_done(CpuState *s) noexcept nogil:
    s.mmio_at = 0
    s.mmio_count = 0
