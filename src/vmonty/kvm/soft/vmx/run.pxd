"""The run loop of a VMX guest without Python."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState
from vmonty.cpu.vmx_exit cimport VmxState
from vmonty.kvm.soft.kvm_host cimport KvmVcpuArch

# SDM, "Exit Qualification for EPT Violations".
cdef enum:
    EPT_WRITE = 2
    EPT_FETCH = 4
    EPT_FINAL = 0x100

# As cpu.vmx.vmx_run, but exits that need no Python are handled, and the guest entered again.
cdef int64_t vmx_vcpu_run(KvmVcpuArch *a, CpuState *s) noexcept nogil
cdef int64_t vmx_vcpu_reenter(KvmVcpuArch *a) noexcept nogil
cdef int vmx_exit_handlers_fastpath(KvmVcpuArch *a, CpuState *s, VmxState *v) noexcept nogil
cdef void _inject_pending_event(KvmVcpuArch *a, uint8_t *m) noexcept nogil
cdef void _set_tpr_threshold(KvmVcpuArch *a, uint8_t *m, uint32_t threshold) noexcept nogil
cdef bint _inject_nmi(KvmVcpuArch *a, uint8_t *m) noexcept nogil
cdef uint64_t _hv_deadline(KvmVcpuArch *a) noexcept nogil
cdef void _switch_hv_timer(KvmVcpuArch *a, uint8_t *m, uint32_t on) noexcept nogil
cdef void vmx_update_hv_timer(KvmVcpuArch *a, uint8_t *m) noexcept nogil
cdef void vmx_set_hv_timer(KvmVcpuArch *a, CpuState *s, VmxState *v) noexcept nogil
cdef void _skip(uint8_t *m, uint64_t rip) noexcept nogil
cdef void _window(uint8_t *m, uint32_t control, bint on) noexcept nogil
