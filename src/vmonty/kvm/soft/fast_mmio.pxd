"""MMIO by plain moves: ioeventfds, the local APIC's page, and exits to user space."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState
from vmonty.kvm.soft.kvm_host cimport KvmVcpuArch
from vmonty.kvm.soft.plain_moves cimport PlainMove

# struct kvm_run, and KVM_EXIT_MMIO; a test compares them with the declaration.
cdef enum:
    RUN_MMIO_ADDRESS = 32
    RUN_MMIO_DATA = 40
    RUN_MMIO_LEN = 48
    RUN_MMIO_IS_WRITE = 52
    EXIT_MMIO = 6

# An access of the guest's own to gpa, where the second dimension has nothing, with all of the guest in the processor.
cdef int fastpath_mmio(KvmVcpuArch *a, CpuState *s, uint64_t gpa, bint writes) noexcept nogil
# The register of a read that user space has answered, which held old; there is no more to complete then.
cdef uint64_t fastpath_loaded(KvmVcpuArch *a, uint64_t old) noexcept nogil

cdef bint _is_users(KvmVcpuArch *a, uint64_t gpa) noexcept nogil
cdef int _exit_mmio(KvmVcpuArch *a, CpuState *s, uint64_t gpa, PlainMove *m) noexcept nogil
cdef void _count(KvmVcpuArch *a) noexcept nogil
