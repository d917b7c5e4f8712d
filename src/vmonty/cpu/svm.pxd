"""SVM as host software uses it."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from vmonty.cpu.core cimport Cpu
from vmonty.cpu.state cimport CpuState
from vmonty.cpu.svm_exit cimport SvmState

# VMRUN until the #VMEXIT; EXIT_VM, or EXIT_* when the processor stopped without one.
cdef int svm_run(CpuState *s, uint64_t vmcb) noexcept nogil
# The middle of it, between enter_svm_guest and leave_svm_guest; see vmx_run_guest.
cdef int svm_run_guest(CpuState *s) noexcept nogil
# Execute instructions of the guest one by one, with missing memory as MMIO.
cdef int svm_emulate(CpuState *s, uint64_t vmcb, bint resume, uint64_t instructions, bint mmio) noexcept nogil


cdef class Svm:
    cdef CpuState *s
    cdef SvmState *v
    cdef readonly Cpu cpu
