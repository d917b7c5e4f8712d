"""One logical processor as Python sees it."""

from libc.stdint cimport uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState


cdef class Cpu:
    cdef CpuState *s
    cdef object _regions
    cdef public object observer    # of the observe module
