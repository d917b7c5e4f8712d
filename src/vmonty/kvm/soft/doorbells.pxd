"""Writes to ioeventfds in guest-physical memory."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from vmonty.cpu.decode cimport Insn
from vmonty.cpu.state cimport CpuState
from vmonty.kvm.soft.kvm_host cimport KvmArch, KvmDoorbell, KvmVcpuArch

cdef extern from "<poll.h>" nogil:
    cdef struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long count, int timeout)
    int POLLOUT

# Of the opcodes that store: MOV, one byte or as wide as the operand.
cdef enum:
    MOV_STORE_BYTE = 0x88
    MOV_STORE = 0x89
    MOV_IMMEDIATE_BYTE = 0xC6
    MOV_IMMEDIATE = 0xC7

# A write to gpa, where the second dimension has nothing: FAST_NONE unless an eventfd waits there for just that.
cdef int fastpath_doorbell(KvmVcpuArch *a, CpuState *s, uint64_t gpa) noexcept nogil
cdef bint _is_hung(KvmArch *k, uint64_t gpa) noexcept nogil
cdef bint _ring(KvmVcpuArch *a, uint64_t gpa, uint32_t size, uint64_t value) noexcept nogil
cdef bint _store_of(CpuState *s, Insn *i) noexcept nogil
cdef uint64_t _stored(CpuState *s, Insn *i, uint32_t size) noexcept nogil
