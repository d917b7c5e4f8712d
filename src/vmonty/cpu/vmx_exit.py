"""VM exits: recording why, in the exit-information fields of the current VMCS. SDM, "VM Exits".

The guest's registers stay in the processor's state; whoever entered the guest stores them when it sees EXIT_VM
(``vmx_entry.leave_guest``).
"""

import cython
from cython.cimports.vmonty.cpu.paging import WALK_EPT_MISCONFIG
from cython.cimports.vmonty.cpu.state import EVENT_SOFT_INTERRUPT, EXIT_VM, LEAVE_EXIT
from cython.cimports.vmonty.cpu.svm_exit import svm_exit, svm_wants
from cython.cimports.vmonty.cpu.vmcb import SVM_EXCEPTION_DE, SVM_NPF
from cython.cimports.vmonty.cpu.vmcs import (
    EXIT_QUALIFICATION,
    GUEST_LINEAR_ADDRESS,
    GUEST_PHYSICAL_ADDRESS,
    IDT_VECTORING_ERROR_CODE,
    IDT_VECTORING_INFO_FIELD,
    VM_EXIT_INSTRUCTION_LEN,
    VM_EXIT_INTR_ERROR_CODE,
    VM_EXIT_INTR_INFO,
    VM_EXIT_REASON,
    VMX_INSTRUCTION_INFO,
    put,
)


def vm_exit(s, reason, qualification, length):
    """Record an exit without interruption information."""
    v: cython.pointer(VmxState) = vmx_of(s)
    kind: uint32_t
    if s.vectoring >> 31:
        # SDM, "Information for VM Exits That Occur During Event Delivery"
        kind = (s.vectoring >> 8) & 7
        put(v.vmcs, IDT_VECTORING_INFO_FIELD, s.vectoring)
        put(v.vmcs, IDT_VECTORING_ERROR_CODE, s.vectoring_error)
        if kind >= EVENT_SOFT_INTERRUPT:
            length = s.vectoring_length
        s.vectoring = 0
    else:
        put(v.vmcs, IDT_VECTORING_INFO_FIELD, 0)
    put(v.vmcs, VM_EXIT_REASON, reason)
    put(v.vmcs, EXIT_QUALIFICATION, qualification)
    put(v.vmcs, VM_EXIT_INSTRUCTION_LEN, length)
    put(v.vmcs, VM_EXIT_INTR_INFO, 0)
    v.injecting = 0
    s.event.pending = 0
    s.exit.reason = EXIT_VM
    s.exit.instruction_length = length
    return LEAVE_EXIT


def vm_exit_information(s, reason, qualification, length, information):
    """Record an exit with VM-exit instruction information."""
    put(vmx_of(s).vmcs, VMX_INSTRUCTION_INFO, information)
    return vm_exit(s, reason, qualification, length)


def vm_exit_event(s, information, error_code, qualification, length):
    """Record exit reason 0. SDM, "Information for VM Exits Due to Vectored Events"."""
    r: int32_t = vm_exit(s, REASON_EXCEPTION_NMI, qualification, length)
    put(vmx_of(s).vmcs, VM_EXIT_INTR_INFO, information | cython.cast(uint64_t, 0x80000000))
    put(vmx_of(s).vmcs, VM_EXIT_INTR_ERROR_CODE, error_code)
    return r


def nested_page_fault(s, fault, qualification, physical, linear):
    """Record what the second dimension of a page walk refused."""
    v: cython.pointer(VmxState) = vmx_of(s)
    if s.guest_mode == GUEST_SVM:
        return svm_exit(s, SVM_NPF, qualification, physical, 0)
    put(v.vmcs, GUEST_PHYSICAL_ADDRESS, physical)
    if fault == WALK_EPT_MISCONFIG:
        return vm_exit(s, REASON_EPT_MISCONFIG, 0, 0)
    put(v.vmcs, GUEST_LINEAR_ADDRESS, linear)
    return vm_exit(s, REASON_EPT_VIOLATION, qualification, 0)


def exception_intercepted(s, vector, error_code):
    """SDM, "Exception Bitmap" and "Page-Fault Error-Code Mask and Match"."""
    v: cython.pointer(VmxState) = vmx_of(s)
    bit: uint32_t
    if s.guest_mode != GUEST_VMX:
        return svm_wants(s, SVM_EXCEPTION_DE + vector)
    bit = (v.exception_bitmap >> vector) & 1
    if vector == 14 and (error_code & v.page_fault_mask) != v.page_fault_match:
        return bit == 0
    return bit != 0
