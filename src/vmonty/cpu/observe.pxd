"""The observer's door."""

from libc.stdint cimport uint32_t, uint64_t

from vmonty.cpu.core cimport Cpu
from vmonty.cpu.decode cimport Insn
from vmonty.cpu.state cimport AccessRecord, CpuState


cdef class Observer:
    cdef CpuState *s
    cdef readonly Cpu cpu
    cdef object _instruction
    cdef object _block
    cdef object _memory
    cdef object _event
    cdef object _error
    cdef bint _stop
    cdef uint64_t _next      # where the next instruction of the same block is
    cdef bint _ended
    cdef uint64_t _began     # CpuState.retired
    cdef int _bytes(self, unsigned char *raw)
    cdef _before(self)
    cdef _after(self)
    cdef _deliver(self)
