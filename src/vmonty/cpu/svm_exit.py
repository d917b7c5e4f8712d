"""#VMEXIT: recording why, in the control area of the VMCB. APM, "#VMEXIT" and "Intercept Operation".

The guest's registers stay in the processor's state; ``svm_entry.leave_svm_guest`` stores them when the dispatcher has
come to an end.
"""

import cython
from cython.cimports.vmonty.cpu.state import EVENT_SOFT_EXCEPTION, EXIT_VM, LEAVE_EXIT
from cython.cimports.vmonty.cpu.vmcb import (
    SVM_IOIO,
    SVM_MSR,
    VMCB_EXITCODE,
    VMCB_EXITINFO1,
    VMCB_EXITINFO2,
    VMCB_EXITINTINFO,
    VMCB_NRIP,
    VMCB_PAUSE_FILTER_COUNT,
    VMCB_PAUSE_FILTER_THRESHOLD,
    get16,
    put64,
)


def svm_event(information, error_code):
    """APM, "EXITINTINFO": INT1, INT3 and INTO count as exceptions."""
    kind: uint32_t = (information >> 8) & 7
    if kind == EVENT_SOFT_EXCEPTION or kind == 5:
        kind = 3
    return (information & cython.cast(uint64_t, 0x800008FF)) | (kind << 8) | (cython.cast(uint64_t, error_code) << 32)


def svm_exit(s, code, info1, info2, length):
    """Record a #VMEXIT."""
    v: cython.pointer(SvmState) = svm_of(s)
    put64(v.vmcb, VMCB_EXITCODE, code)
    put64(v.vmcb, VMCB_EXITINFO1, info1)
    put64(v.vmcb, VMCB_EXITINFO2, info2)
    put64(v.vmcb, VMCB_EXITINTINFO, svm_event(s.vectoring, s.vectoring_error) if s.vectoring >> 31 else 0)
    put64(v.vmcb, VMCB_NRIP, s.rip + length if length else 0)
    s.vectoring = 0
    v.injecting = 0
    s.event.pending = 0
    s.exit.reason = EXIT_VM
    s.exit.instruction_length = length
    return LEAVE_EXIT


def svm_port_intercepted(s, port, size):
    """APM, "I/O Intercepts": any port of the access; the map has three bits behind port FFFFh."""
    at: uint32_t = port >> 3
    bits: uint32_t
    if not svm_wants(s, SVM_IOIO):
        return False
    bits = svm_of(s).iopm[at] | (cython.cast(uint32_t, svm_of(s).iopm[at + 1]) << 8)
    return ((bits >> (port & 7)) & ((cython.cast(uint32_t, 1) << size) - 1)) != 0


def svm_msr_intercepted(s, index, write):
    """APM, "MSR Intercepts": two bits for each MSR of three ranges; what is outside them is always intercepted."""
    at: uint32_t
    if not svm_wants(s, SVM_MSR):
        return False
    if index < 0x2000:
        at = index
    elif index - cython.cast(uint32_t, 0xC0000000) < 0x2000:
        at = 0x2000 + (index & 0x1FFF)
    elif index - cython.cast(uint32_t, 0xC0010000) < 0x2000:
        at = 0x4000 + (index & 0x1FFF)
    else:
        return True
    at = 2 * at + write
    return (svm_of(s).msrpm[at >> 3] >> (at & 7)) & 1


def svm_pause_exits(s, now):
    """The count starts again when the last PAUSE lies farther back than the threshold."""
    v: cython.pointer(SvmState) = svm_of(s)
    threshold: uint64_t = get16(v.vmcb, VMCB_PAUSE_FILTER_THRESHOLD)
    if threshold and now - v.pause_time > threshold:
        v.pause_count = get16(v.vmcb, VMCB_PAUSE_FILTER_COUNT)
    v.pause_time = now
    if v.pause_count:
        v.pause_count -= 1
        return False
    return True
