"""The local APIC's registers as an object; see lapic_irq."""

from libc.stdint cimport uint32_t, uint64_t

from vmonty.kvm.soft.kvm_host cimport KvmLapic
from vmonty.kvm.soft.vcpu_arch cimport VcpuArch, VmArch

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t size)


cdef class LapicRegs:
    cdef KvmLapic l
    cdef VcpuArch _vcpu
    cdef VmArch _vm
    cdef object _vectors(self, uint32_t word)
    cdef int _set_vectors(self, uint32_t word, object value) except -1
