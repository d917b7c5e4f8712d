"""VMRUN and its companions as instructions. APM, "SVM Instruction Set" in the general-purpose and system instruction
reference; "Enabling SVM".
"""

import cython
from cython.cimports.vmonty.cpu.paging import physical_to_host
from cython.cimports.vmonty.cpu.segments import protected_mode
from cython.cimports.vmonty.cpu.state import (
    EFER_SVME,
    EXIT_NONE,
    GO_ON,
    LEAVE_JUMP,
    LEAVE_NEXT,
    raise_error,
    raise_exception,
)
from cython.cimports.vmonty.cpu.svm_entry import (
    enter_svm_guest,
    leave_svm_guest,
    load_host,
    load_state,
    save_host,
    save_state,
)
from cython.cimports.vmonty.cpu.svm_exit import SvmState, svm_exit, svm_of, svm_wants
from cython.cimports.vmonty.cpu.tlb import flush_page
from cython.cimports.vmonty.cpu.vmcb import (
    SVM_CLGI,
    SVM_INVLPGA,
    SVM_STGI,
    SVM_VMLOAD,
    SVM_VMMCALL,
    SVM_VMRUN,
    SVM_VMSAVE,
)


def _refused(s, code, length):
    """#UD without EFER.SVME or outside protected mode, #GP outside CPL 0, then the intercept; GO_ON otherwise."""
    if s.svm == cython.NULL or (s.efer & EFER_SVME) == 0 or not protected_mode(s):
        return raise_exception(s, 6)
    if s.cpl:
        return raise_error(s, 13, 0)
    if svm_wants(s, code):
        return svm_exit(s, code, 0, 0, length)
    return GO_ON


def _page(s, address, write):
    """Where the 4 KiB page at a physical address is; NULL when it is no aligned page of RAM."""
    if address & 0xFFF or address >> s.physical_bits:
        return cython.NULL
    if s.direct:
        # A guest of host software that isn't intercepted: its physical addresses mean nothing here.
        return cython.NULL
    return cython.cast(cython.pointer(uint8_t), physical_to_host(s, address, write))


def vmrun(s, address, length):
    """VMRUN."""
    v: cython.pointer(SvmState) = svm_of(s)
    vmcb: cython.pointer(uint8_t)
    area: cython.pointer(uint8_t)
    r: cython.int = _refused(s, SVM_VMRUN, length)
    if r != GO_ON:
        return r
    vmcb = _page(s, address, True)
    area = _page(s, v.hsave, True)
    if vmcb == cython.NULL or area == cython.NULL:
        return raise_error(s, 13, 0)
    v.vmcb = vmcb
    v.vmcb_pointer = address
    v.guest_code = 1
    s.rip += length
    save_host(s, area)
    enter_svm_guest(s)
    return LEAVE_JUMP


def svm_return(s):
    """Store the guest, load the host behind its VMRUN."""
    area: cython.pointer(uint8_t) = _page(s, svm_of(s).hsave, True)
    leave_svm_guest(s)
    s.exit.reason = EXIT_NONE
    if area == cython.NULL:
        s.activity = 2  # the memory with the host's state is gone: shutdown
        return
    load_host(s, area)


def vmload(s, address, length):
    """VMLOAD."""
    vmcb: cython.pointer(uint8_t)
    r: cython.int = _refused(s, SVM_VMLOAD, length)
    if r != GO_ON:
        return r
    vmcb = _page(s, address, False)
    if vmcb == cython.NULL:
        return raise_error(s, 13, 0)
    load_state(s, vmcb)
    return LEAVE_NEXT


def vmsave(s, address, length):
    """VMSAVE."""
    vmcb: cython.pointer(uint8_t)
    r: cython.int = _refused(s, SVM_VMSAVE, length)
    if r != GO_ON:
        return r
    vmcb = _page(s, address, True)
    if vmcb == cython.NULL:
        return raise_error(s, 13, 0)
    save_state(s, vmcb)
    return LEAVE_NEXT


def stgi(s, length):
    """STGI: interrupts, NMIs and their like are taken again. APM, "Global Interrupt Flag, STGI and CLGI
    Instructions".
    """
    r: cython.int = _refused(s, SVM_STGI, length)
    if r == GO_ON:
        svm_of(s).gif = 1
        return LEAVE_NEXT
    return r


def clgi(s, length):
    """CLGI."""
    r: cython.int = _refused(s, SVM_CLGI, length)
    if r == GO_ON:
        svm_of(s).gif = 0
        return LEAVE_NEXT
    return r


def invlpga(s, linear, length):
    """INVLPGA: the TLB holds one address space, so the ASID in ECX doesn't matter."""
    r: cython.int = _refused(s, SVM_INVLPGA, length)
    if r != GO_ON:
        return r
    flush_page(s, linear)
    return LEAVE_NEXT


def vmmcall(s, length):
    """VMMCALL: an exit where the hypervisor wants it, else #UD."""
    if svm_wants(s, SVM_VMMCALL):
        return svm_exit(s, SVM_VMMCALL, 0, 0, length)
    return raise_exception(s, 6)
