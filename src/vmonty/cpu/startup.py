"""How a processor begins: reset, INIT, start-up IPI.

SDM, "Processor State After Reset", "Multiple-Processor Initialization"; for VMX "Other Causes of VM Exits" and
"Changes to Instruction Behavior in VMX Non-Root Operation"; for SVM APM, "INIT Support".
"""

import cython
from cython.cimports.libc.stdint import uint64_t
from cython.cimports.vmonty.cpu.breakpoints import debug_changed
from cython.cimports.vmonty.cpu.codecache import shadow_reset
from cython.cimports.vmonty.cpu.events import deliver
from cython.cimports.vmonty.cpu.state import (
    CS,
    LEAVE_JUMP,
    LEAVE_NEXT,
    raise_error,
)
from cython.cimports.vmonty.cpu.svm_exit import GUEST_SVM, VM_CR_R_INIT, svm_exit, svm_of, svm_wants
from cython.cimports.vmonty.cpu.tlb import flush_all, mode_changed
from cython.cimports.vmonty.cpu.vmcb import SVM_INIT
from cython.cimports.vmonty.cpu.vmx_exit import GUEST_VMX, REASON_INIT, REASON_SIPI, vm_exit, vmx_of

APIC_BASE_BSP = cython.declare(cython.int, 0x100)
WAIT_FOR_SIPI = cython.declare(cython.uint, 3)
SX = cython.declare(cython.uint, 30)
SX_INIT = cython.declare(cython.uint, 1)


def reset_registers(s):
    """Set the registers; CR0.CD and NW, vector state and MSRs stay as they are."""
    k: cython.int
    for k in range(16):
        s.gpr[k] = 0
    s.gpr[2] = 0x600
    s.rip = 0xFFF0
    s.rflags = 2
    s.cr0 = (s.cr0 & 0x60000000) | 0x10
    s.cr2 = 0
    s.cr3 = 0
    s.cr4 = 0
    s.efer = 0
    s.cpl = 0
    for k in range(6):
        s.segs[k].selector = 0
        s.segs[k].base = 0
        s.segs[k].limit = 0xFFFF
        s.segs[k].access_rights = 0x9B if k == CS else 0x93
    s.segs[CS].base = 0xFFFF0000
    s.segs[CS].selector = 0xF000
    s.gdtr.base = 0
    s.gdtr.limit = 0xFFFF
    s.idtr.base = 0
    s.idtr.limit = 0xFFFF
    s.ldtr.selector = 0
    s.ldtr.base = 0
    s.ldtr.limit = 0xFFFF
    s.ldtr.access_rights = 0x82
    s.tr.selector = 0
    s.tr.base = 0
    s.tr.limit = 0xFFFF
    s.tr.access_rights = 0x8B
    for k in range(4):
        s.dr[k] = 0
    s.dr[6] = cython.cast(uint64_t, 0xFFFF0FF0)
    s.dr[7] = 0x400


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _blocked(s: cython.pointer(CpuState)) -> cython.bint:
    """Does INIT wait: in VMX root operation, in wait-for-SIPI, while GIF is 0, in a guest of SVM that keeps it?"""
    if s.guest_mode == GUEST_SVM:
        return not svm_wants(s, SVM_INIT)
    if s.svm != cython.NULL and svm_of(s).gif == 0:
        return True
    if s.activity == WAIT_FOR_SIPI:
        return True
    return s.guest_mode != GUEST_VMX and s.vmx != cython.NULL and vmx_of(s).on != 0


def take_startup(s):
    """Take INIT, then SIPI."""
    if s.init_line and not _blocked(s):
        if s.guest_mode == GUEST_SVM:
            return svm_exit(s, SVM_INIT, 0, 0, 0)  # it goes on waiting, for GIF
        s.init_line = 0
        if s.guest_mode == GUEST_VMX:
            return vm_exit(s, REASON_INIT, 0, 0)
        if s.svm != cython.NULL and svm_of(s).vm_cr & VM_CR_R_INIT:
            raise_error(s, SX, SX_INIT)
            return deliver(s)
        reset_registers(s)
        s.event.pending = 0
        s.interruptibility = 0
        s.pending_debug = 0
        # The boot processor begins at the reset vector.
        s.activity = 0 if s.apic_base & APIC_BASE_BSP else WAIT_FOR_SIPI
        debug_changed(s)
        flush_all(s)
        mode_changed(s)
        shadow_reset(s)
        return LEAVE_JUMP
    if s.startup_line:
        s.startup_line = 0
        if s.activity == WAIT_FOR_SIPI:
            if s.guest_mode == GUEST_VMX:
                return vm_exit(s, REASON_SIPI, s.startup_vector & 0xFF, 0)
            s.segs[CS].selector = (s.startup_vector & 0xFF) << 8
            s.segs[CS].base = (s.startup_vector & 0xFF) << 12
            s.rip = 0
            s.activity = 0
            mode_changed(s)
            shadow_reset(s)
            return LEAVE_JUMP
    return LEAVE_NEXT
