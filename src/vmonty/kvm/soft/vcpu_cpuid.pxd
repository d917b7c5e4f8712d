"""The guest's CPUID leaves."""

from vmonty.kvm.soft.kvm_host cimport KvmVcpuArch

from libc.stdint cimport uint32_t

cdef void kvm_cpuid(KvmVcpuArch *a, uint32_t function, uint32_t index, uint32_t *out) noexcept nogil

cdef int _find_cpuid(KvmVcpuArch *a, uint32_t function, uint32_t index) noexcept nogil
