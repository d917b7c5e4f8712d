"""Port registers whose plain accesses a VM answers in place of user space."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState
from vmonty.kvm.soft.kvm_host cimport KvmPortCell, KvmPortWindow, KvmVcpuArch

# IN or OUT, neither string nor repeated; FAST_NONE when user space must see it.
cdef int fastpath_ports(KvmVcpuArch *a, CpuState *s, uint32_t port, uint32_t size, bint reads) noexcept nogil
cdef bint _window(KvmPortWindow *w, CpuState *s, uint32_t port, uint32_t size, bint reads) noexcept nogil
cdef bint _cell(KvmVcpuArch *a, CpuState *s, uint32_t port, uint32_t size, bint reads) noexcept nogil
cdef bint _access(KvmPortWindow *w, CpuState *s, uint32_t register, bint reads) noexcept nogil


cdef class PortWindow:
    cdef KvmPortWindow w
    cdef readonly int event


cdef class PortCell:
    cdef KvmPortCell c
