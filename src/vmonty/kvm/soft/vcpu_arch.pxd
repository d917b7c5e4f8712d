"""A vCPU as compiled code and other threads see it: kicks, requests, sleep, and its tables."""

from vmonty.cpu.state cimport CpuState
from vmonty.kvm.soft.kvm_host cimport KvmArch, KvmLapic, KvmVcpuArch
from vmonty.kvm.soft.port_window cimport PortCell, PortWindow
from vmonty.kvm.soft.msr_table cimport StoredMsrs
from vmonty.kvm.soft.seats cimport Seat

from libc.stdint cimport uint8_t, uint32_t, uint64_t

# kvm_make_request() and kvm_vcpu_kick(): REQUEST_* for the vCPU, which leaves the guest or wakes up. Any thread.
cdef void kvm_vcpu_kick(KvmVcpuArch *a, uint32_t requests) noexcept nogil
# From here to kvm_leave_guest_mode() kicks reach the processor; those that came before do, too.
cdef void kvm_enter_guest_mode(KvmVcpuArch *a, CpuState *s) noexcept nogil
cdef void kvm_leave_guest_mode(KvmVcpuArch *a) noexcept nogil
# What was asked for since the last time.
cdef uint32_t kvm_take_requests(KvmVcpuArch *a, uint32_t which) noexcept nogil
# An NMI more; one less; no more than one, behind one that is in progress.
cdef void kvm_inject_nmi(KvmVcpuArch *a) noexcept nogil
cdef void kvm_take_nmi(KvmVcpuArch *a) noexcept nogil
cdef void kvm_limit_nmi(KvmVcpuArch *a) noexcept nogil


cdef class VmArch:
    cdef KvmArch k
    cdef list _apics
    cdef PortWindow _window
    cdef list _cells
    cdef int add_apic(self, KvmLapic *apic, object owner) except -1


cdef class VcpuArch:
    cdef KvmVcpuArch a
    cdef readonly VmArch vm
    cdef object _counters
    cdef object _page
    cdef object _msrs
    cdef object _apic
    # The processor that holds the vCPU.
    cdef Seat seat
    cdef object cpu
