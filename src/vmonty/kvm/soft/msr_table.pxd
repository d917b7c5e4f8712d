"""MSRs that are only kept: a hash table by index."""

from libc.stdint cimport uint32_t, uint64_t

from vmonty.kvm.soft.kvm_host cimport MsrSlot

# NULL: it is not among them.
cdef MsrSlot *stored_msr(MsrSlot *slots, uint32_t index) noexcept nogil
cdef uint32_t _first(uint32_t index) noexcept nogil


cdef class StoredMsrs:
    cdef MsrSlot slots[1024]
    cdef int _count
