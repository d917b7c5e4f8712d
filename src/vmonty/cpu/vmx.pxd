"""VMX as host software uses it: the instructions as functions, for Python and for compiled callers."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from vmonty.cpu.core cimport Cpu
from vmonty.cpu.state cimport CpuState
from vmonty.cpu.vmx_exit cimport VmxState

# VMLAUNCH or VMRESUME until the VM exit: the exit reason (bit 31: entry failure), or a negative number:
# -error for VMfail, -ENTRY_NO_VMCS for VMfailInvalid, RUN_STOPPED - EXIT_* when it stopped without a VM exit.
cdef enum:
    RUN_STOPPED = -0x1000

cdef int64_t vmx_run(CpuState *s, uint32_t launch) noexcept nogil
# The middle of it, between enter_guest and leave_guest: EXIT_VM, or EXIT_* when it stopped without a VM exit. A
# hypervisor that can answer an exit from the processor's own state may call it again at once, with exit.reason cleared.
cdef int vmx_run_guest(CpuState *s) noexcept nogil
cdef int64_t vmx_emulate(CpuState *s, bint resume, uint64_t instructions, bint mmio) noexcept nogil
cdef VmxState *vmx_new(CpuState *s) noexcept nogil
cdef void vmx_free(CpuState *s) noexcept nogil


cdef class Vmx:
    cdef CpuState *s
    cdef VmxState *v
    cdef readonly Cpu cpu
    cdef object _region
