"""Time, identification, model-specific registers, and waiting: what a hypervisor answers in the processor's place.

Each function asks first whether the guest's hypervisor intercepts the instruction. SDM, "Instructions That Cause VM
Exits".
"""

import cython
from cython.cimports.vmonty.cpu.control import privileged
from cython.cimports.vmonty.cpu.cpuid import lookup
from cython.cimports.vmonty.cpu.msr import read_msr, write_msr
from cython.cimports.vmonty.cpu.state import (
    CR4_PCE,
    CR4_TSD,
    GO_ON,
    LEAVE_NEXT,
    RAX,
    RBX,
    RCX,
    RDX,
    raise_error,
    raise_exception,
)
from cython.cimports.vmonty.cpu.svm_exit import (
    svm_exit,
    svm_msr_intercepted,
    svm_pause_exits,
    svm_wants,
)
from cython.cimports.vmonty.cpu.tlb import read_value
from cython.cimports.vmonty.cpu.vmcb import (
    SVM_CPUID,
    SVM_MONITOR,
    SVM_MSR,
    SVM_MWAIT,
    SVM_MWAIT_CONDITIONAL,
    SVM_PAUSE,
    SVM_RDPMC,
    SVM_RDTSC,
    SVM_RDTSCP,
)
from cython.cimports.vmonty.cpu.vmcs import PLE_GAP, PLE_WINDOW, get
from cython.cimports.vmonty.cpu.vmx_exit import (
    GUEST_VMX,
    PROC_MONITOR,
    PROC_MSR_BITMAPS,
    PROC_MWAIT,
    PROC_PAUSE,
    PROC_RDPMC,
    PROC_RDTSC,
    REASON_CPUID,
    REASON_MONITOR,
    REASON_MWAIT,
    REASON_PAUSE,
    REASON_RDMSR,
    REASON_RDPMC,
    REASON_RDRAND,
    REASON_RDSEED,
    REASON_RDTSC,
    REASON_RDTSCP,
    REASON_VMCALL,
    REASON_WRMSR,
    SECOND_PAUSE_LOOP,
    SECOND_RDTSCP,
    VmxState,
    vm_exit,
    vm_exit_information,
    vmx_lacks,
    vmx_of,
    vmx_second,
    vmx_wants,
)


def tsc(s):
    """The time-stamp counter as software on this processor reads it. SDM, "Time-Stamp Counter Multiplier"."""
    now: uint64_t = host_tsc()
    if s.tsc_multiplier:
        now = cython.cast(uint64_t, cython.cast(uint128_t, now) * s.tsc_multiplier >> 48)
    return now + s.tsc_offset


def rdtsc(s, length):
    """RDTSC. SDM, "RDTSC—Read Time-Stamp Counter"."""
    if (s.cr4 & CR4_TSD) and s.cpl > 0:
        return raise_error(s, 13, 0)
    if vmx_wants(s, PROC_RDTSC):
        return vm_exit(s, REASON_RDTSC, 0, length)
    if svm_wants(s, SVM_RDTSC):
        return svm_exit(s, SVM_RDTSC, 0, 0, length)
    return _give_tsc(s)


def _give_tsc(s):
    """EDX:EAX."""
    value: uint64_t
    value = tsc(s)
    s.gpr[RAX] = value & cython.cast(uint64_t, 0xFFFFFFFF)
    s.gpr[RDX] = value >> 32
    return GO_ON


def rdtscp(s, length):
    """RDTSCP."""
    r: cython.int
    if vmx_lacks(s, SECOND_RDTSCP):
        return raise_exception(s, 6)
    if vmx_wants(s, PROC_RDTSC) and ((s.cr4 & CR4_TSD) == 0 or s.cpl == 0):
        return vm_exit(s, REASON_RDTSCP, 0, length)
    if (s.cr4 & CR4_TSD) and s.cpl > 0:
        return raise_error(s, 13, 0)
    if svm_wants(s, SVM_RDTSCP):
        return svm_exit(s, SVM_RDTSCP, 0, 0, length)
    r = _give_tsc(s)
    if r == GO_ON:
        s.gpr[RCX] = s.tsc_aux & cython.cast(uint64_t, 0xFFFFFFFF)
    return r


def rdpid(s, register):
    """RDPID."""
    if vmx_lacks(s, SECOND_RDTSCP):
        return raise_exception(s, 6)
    s.gpr[register] = s.tsc_aux & cython.cast(uint64_t, 0xFFFFFFFF)
    return GO_ON


def rdpmc(s, length):
    """RDPMC: there are no counters."""
    if s.cpl > 0 and (s.cr4 & CR4_PCE) == 0:
        return raise_error(s, 13, 0)
    if vmx_wants(s, PROC_RDPMC):
        return vm_exit(s, REASON_RDPMC, 0, length)
    if svm_wants(s, SVM_RDPMC):
        return svm_exit(s, SVM_RDPMC, 0, 0, length)
    return raise_error(s, 13, 0)


def cpuid(s, length):
    """CPUID; always exits from VMX non-root operation."""
    out: uint32_t[4]
    if s.guest_mode == GUEST_VMX:
        return vm_exit(s, REASON_CPUID, 0, length)
    if svm_wants(s, SVM_CPUID):
        return svm_exit(s, SVM_CPUID, 0, 0, length)
    lookup(
        s,
        cython.cast(uint32_t, s.gpr[RAX]),
        cython.cast(uint32_t, s.gpr[RCX]),
        cython.cast(cython.pointer(uint32_t), out),
    )
    s.gpr[RAX] = out[0]
    s.gpr[RBX] = out[1]
    s.gpr[RCX] = out[2]
    s.gpr[RDX] = out[3]
    return GO_ON


def _msr_intercepted(s, index, write):
    """SDM, "MSR-Bitmap Address": read low, read high, write low, write high, 1 KByte each."""
    v: cython.pointer(VmxState) = vmx_of(s)
    at: uint32_t
    if s.guest_mode != GUEST_VMX:
        return False
    if (v.processor & PROC_MSR_BITMAPS) == 0:
        return True
    if index < 0x2000:
        at = index
    elif index - cython.cast(uint64_t, 0xC0000000) < 0x2000:
        at = (index - cython.cast(uint64_t, 0xC0000000)) + 0x2000
    else:
        return True
    if write:
        at += 0x4000
    return (v.msr_bitmap[at >> 3] >> (at & 7)) & 1


def rdmsr(s, length):
    """RDMSR of ECX into EDX:EAX."""
    value: uint64_t
    index: uint32_t = cython.cast(uint32_t, s.gpr[RCX])
    if not privileged(s):
        return raise_error(s, 13, 0)
    if _msr_intercepted(s, index, 0):
        return vm_exit(s, REASON_RDMSR, 0, length)
    if svm_msr_intercepted(s, index, 0):
        return svm_exit(s, SVM_MSR, 0, 0, length)
    if not read_msr(s, index, cython.address(value)):
        return raise_error(s, 13, 0)
    s.gpr[RAX] = value & cython.cast(uint64_t, 0xFFFFFFFF)
    s.gpr[RDX] = value >> 32
    return GO_ON


def wrmsr(s, length):
    """WRMSR of EDX:EAX."""
    index: uint32_t = cython.cast(uint32_t, s.gpr[RCX])
    value: uint64_t = (s.gpr[RDX] << 32) | (s.gpr[RAX] & cython.cast(uint64_t, 0xFFFFFFFF))
    if not privileged(s):
        return raise_error(s, 13, 0)
    if _msr_intercepted(s, index, 1):
        return vm_exit(s, REASON_WRMSR, 0, length)
    if svm_msr_intercepted(s, index, 1):
        return svm_exit(s, SVM_MSR, 1, 0, length)
    if not write_msr(s, index, value):
        return raise_error(s, 13, 0)
    return LEAVE_NEXT


def vmcall(s, length):
    """VMCALL: an exit from non-root operation; #UD elsewhere (no SMM monitor)."""
    if s.guest_mode == GUEST_VMX:
        return vm_exit(s, REASON_VMCALL, 0, length)
    return raise_exception(s, 6)


def pause(s, length):
    """PAUSE. SDM, "Changes to Instruction Behavior in VMX Non-Root Operation"."""
    v: cython.pointer(VmxState) = vmx_of(s)
    now: uint64_t
    if vmx_wants(s, PROC_PAUSE):
        return vm_exit(s, REASON_PAUSE, 0, length)
    if svm_wants(s, SVM_PAUSE) and svm_pause_exits(s, host_tsc()):
        return svm_exit(s, SVM_PAUSE, 0, 0, length)
    if s.cpl == 0 and vmx_second(s, SECOND_PAUSE_LOOP):
        now = host_tsc()
        if now - v.last_pause > get(v.vmcs, PLE_GAP):
            v.first_pause = now
        elif now - v.first_pause > get(v.vmcs, PLE_WINDOW):
            v.last_pause = 0
            return vm_exit(s, REASON_PAUSE, 0, length)
        v.last_pause = now
    return GO_ON


def random(s, seed, register, size, length):
    """RDRAND and RDSEED where they exit; translated code executes them itself elsewhere.

    SDM, "Format of the VM-Exit Instruction-Information Field as Used for RDRAND and RDSEED".
    """
    return vm_exit_information(
        s, REASON_RDSEED if seed else REASON_RDRAND, 0, length, (register << 3) | ((size >> 2) << 11)
    )


def monitor(s, linear, length):
    """MONITOR: the range is not watched; MWAIT returns at once, as it may at any time."""
    value: uint64_t
    if not privileged(s):
        return raise_exception(s, 6)
    if s.gpr[RCX] & cython.cast(uint64_t, 0xFFFFFFFF):
        return raise_error(s, 13, 0)
    if vmx_wants(s, PROC_MONITOR):
        return vm_exit(s, REASON_MONITOR, 0, length)
    if svm_wants(s, SVM_MONITOR):
        return svm_exit(s, SVM_MONITOR, 0, 0, length)
    return read_value(s, linear, 1, 0, cython.address(value))


def mwait(s, length):
    """MWAIT: wakes at once. SDM, "MWAIT—Monitor Wait"."""
    if not privileged(s):
        return raise_exception(s, 6)
    if s.gpr[RCX] & cython.cast(uint64_t, 0xFFFFFFFE):
        return raise_error(s, 13, 0)
    if vmx_wants(s, PROC_MWAIT):
        return vm_exit(s, REASON_MWAIT, 0, length)
    if svm_wants(s, SVM_MWAIT_CONDITIONAL):  # the monitor is never armed: MWAIT would not wait
        return svm_exit(s, SVM_MWAIT_CONDITIONAL, 0, 0, length)
    if svm_wants(s, SVM_MWAIT):
        return svm_exit(s, SVM_MWAIT, 0, 0, length)
    return LEAVE_NEXT
