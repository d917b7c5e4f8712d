"""The processor's state for observers and tests."""

from libc.stdint cimport uint32_t, uint64_t

from vmonty.cpu.core cimport Cpu
from vmonty.cpu.state cimport CpuState, Segment

cdef uint64_t *_field(CpuState *s, str name)
cdef uint32_t *_short_field(CpuState *s, str name)
cdef Segment *_segment(CpuState *s, str name)
