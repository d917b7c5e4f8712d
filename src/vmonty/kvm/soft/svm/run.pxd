"""The run loop of an SVM guest without Python."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState
from vmonty.cpu.svm_exit cimport SvmState
from vmonty.kvm.soft.kvm_host cimport KvmVcpuArch

# INT_CTL. APM, "VMCB Layout, Control Area"
cdef enum:
    V_IRQ = 0x100
    V_PRIO_MASK = 0xF0000
    V_IGN_TPR = 0x100000

# EXITINFO1 of NPF: the final address, and a write
cdef enum:
    NPF_WRITE = 2
    NPF_FETCH = 0x10
    NPF_FINAL = 0x100000000

# As cpu.svm.svm_run, but exits that need no Python are handled, and the guest entered again. VMLOAD and VMSAVE too.
cdef int svm_vcpu_run(KvmVcpuArch *a, CpuState *s, uint64_t vmcb) noexcept nogil
cdef int64_t svm_vcpu_reenter(KvmVcpuArch *a) noexcept nogil
cdef int svm_exit_handlers_fastpath(KvmVcpuArch *a, CpuState *s, SvmState *v) noexcept nogil
cdef void _inject_pending_event(KvmVcpuArch *a, uint8_t *m) noexcept nogil
cdef void _sync_lapic_to_cr8(KvmVcpuArch *a, uint8_t *m) noexcept nogil
cdef void _sync_cr8_to_lapic(KvmVcpuArch *a, uint32_t int_ctl) noexcept nogil
cdef void _window(uint8_t *m, bint on) noexcept nogil
