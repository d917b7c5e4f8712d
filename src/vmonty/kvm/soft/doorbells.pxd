"""Writes to ioeventfds in guest-physical memory."""

from libc.stdint cimport uint32_t, uint64_t

from vmonty.kvm.soft.kvm_host cimport KvmArch, KvmDoorbell, KvmVcpuArch

cdef extern from "<poll.h>" nogil:
    cdef struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long count, int timeout)
    int POLLOUT

cdef bint doorbell_hangs(KvmArch *k, uint64_t gpa) noexcept nogil
# A write of size bytes; False when no eventfd waits for just that. Where a.rung says so, Python answers it.
cdef bint doorbell_ring(KvmVcpuArch *a, uint64_t gpa, uint32_t size, uint64_t value) noexcept nogil
cdef bint _ring(KvmVcpuArch *a, uint64_t gpa, uint32_t size, uint64_t value) noexcept nogil
