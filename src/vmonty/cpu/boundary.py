"""What happens between instructions: traps, exits and interrupts that wait. SDM, "Priority Among Concurrent Events"."""

import cython
from cython.cimports.vmonty.cpu.codecache import Block, CodeCache, block_at_host
from cython.cimports.vmonty.cpu.decode import C_CALL, C_CALLI, C_JMP, C_JMPI, C_RET, ROW, Insn, decode
from cython.cimports.vmonty.cpu.events import deliver
from cython.cimports.vmonty.cpu.information import host_tsc
from cython.cimports.vmonty.cpu.preemption import preemption_arm
from cython.cimports.vmonty.cpu.startup import take_startup
from cython.cimports.vmonty.cpu.state import (
    BLOCKED_NMI,
    DEBUGCTL_BTF,
    EVENT_EXTERNAL,
    EVENT_NMI,
    EXIT_HALT,
    EXIT_SHUTDOWN,
    FLAG_IF,
    FLAG_RF,
    FLAG_TF,
    GO_ON,
    LEAVE_EXIT,
    LEAVE_NEXT,
    MODE_COMPAT32,
    MODE_LONG64,
    MODE_PROT32,
    SHADOW_MOV_SS,
    SHADOW_STI,
    raise_exception,
)
from cython.cimports.vmonty.cpu.svm_exit import (
    V_IGN_TPR,
    V_INTR_MASKING,
    V_INTR_PRIO_SHIFT,
    V_IRQ,
    SvmState,
    svm_exit,
    svm_of,
    svm_wants,
)
from cython.cimports.vmonty.cpu.vmcb import (
    SVM_INTR,
    SVM_NMI,
    SVM_VINTR,
)
from cython.cimports.vmonty.cpu.vmcs import VM_EXIT_INTR_INFO, put
from cython.cimports.vmonty.cpu.vmx_exit import (
    EXIT_ACKNOWLEDGE,
    GUEST_SVM,
    GUEST_VMX,
    PIN_EXTERNAL_INTERRUPT,
    PIN_NMI,
    PIN_PREEMPTION_TIMER,
    PROC_INTERRUPT_WINDOW,
    PROC_NMI_WINDOW,
    REASON_EXTERNAL_INTERRUPT,
    REASON_INTERRUPT_WINDOW,
    REASON_MONITOR_TRAP,
    REASON_NMI_WINDOW,
    REASON_PREEMPTION_TIMER,
    VmxState,
    vm_exit,
    vm_exit_event,
    vmx_of,
)


def _debug_trap(s):
    """#DB for what the finished instruction left. SDM, "Debug Exceptions"."""
    raise_exception(s, 1)
    s.event.payload = s.pending_debug & 0xE00F
    s.pending_debug = 0
    return deliver(s)


def instruction_in(s, b, offset, i):
    """Decode the instruction of a block that begins ``offset`` bytes behind its start; 0 when it is gone."""
    code: uint8_t[16]
    k: cython.int
    at: uint64_t
    mode: uint32_t = b.key & 7
    for k in range(16):
        at = (b.linear & 0xFFF) + offset + k
        code[k] = 0
        if at < 4096:
            code[k] = cython.cast(cython.p_uchar, b.host_page + at)[0]
        elif b.host_page2:
            code[k] = cython.cast(cython.p_uchar, b.host_page2 + at - 4096)[0]
    k = 2
    if mode == MODE_LONG64:
        k = 8
    elif mode in (MODE_PROT32, MODE_COMPAT32):
        k = 4
    return decode(cython.address(code[0]), 16, b.rip + offset, k, i) > 0


def note_step(s, code):
    """Before an instruction with TF set: does it trap whatever it does, or, with BTF, only if it branches?

    SDM, "Single-Stepping on Branches". A conditional branch to what follows it anyway counts as not taken.
    """
    b: cython.pointer(Block) = block_at_host(cython.cast(cython.pointer(CodeCache), s.translator), code)
    i: Insn
    s.step_always = 1
    if s.debugctl & DEBUGCTL_BTF == 0 or b == cython.NULL or not instruction_in(s, b, 0, cython.address(i)):
        return
    if ROW[i.row].cls in (C_JMP, C_CALL, C_JMPI, C_CALLI, C_RET):
        return
    if i.map == 0 and i.opcode in (0x9A, 0xCA, 0xCB, 0xCF, 0xEA, 0xFF):  # FF: its far forms
        return
    if i.map == 1 and i.opcode in (0x05, 0x07, 0x34, 0x35):
        return
    s.step_always = 0
    s.step_next = b.rip + b.length
    if b.key & 7 != MODE_LONG64:
        s.step_next &= cython.cast(uint64_t, 0xFFFFFFFF)


def instruction_done(s, before):
    """RF lasts for one instruction (the one that IRET sets it for); TF traps behind it. SDM, "Debug Exceptions"."""
    s.retired += 1
    if before & FLAG_RF:
        s.rflags &= ~cython.cast(uint64_t, FLAG_RF)
    if before & FLAG_TF and (s.step_always or s.step_next != s.rip):
        s.pending_debug |= 0x4000
    if s.monitor_trap:
        s.monitor_trap = 2


def _interrupts_open(s):
    return (s.rflags & FLAG_IF) != 0 and (s.interruptibility & (SHADOW_STI | SHADOW_MOV_SS)) == 0


def _poll_svm(s):
    """What an SVM guest leaves for, and its virtual interrupt. APM, "Interrupt Support"; LEAVE_NEXT: nothing waits."""
    v: cython.pointer(SvmState) = svm_of(s)
    if s.pending_debug and (s.interruptibility & SHADOW_MOV_SS) == 0 and s.activity == 0:
        return _debug_trap(s)
    if s.nmi_line and svm_wants(s, SVM_NMI):
        if v.guest_code == 0:
            s.nmi_line = 0  # the host takes it
        return svm_exit(s, SVM_NMI, 0, 0, 0)
    open_: cython.bint = _interrupts_open(s)
    if v.int_ctl & V_INTR_MASKING:
        open_ = v.host_interrupts != 0
    if s.interrupt_line and open_ and svm_wants(s, SVM_INTR):
        return svm_exit(s, SVM_INTR, 0, 0, 0)
    if (
        (v.int_ctl & V_IRQ)
        and s.activity < 2
        and _interrupts_open(s)
        and ((v.int_ctl & V_IGN_TPR) or ((v.int_ctl >> V_INTR_PRIO_SHIFT) & 15) > (v.int_ctl & 15))
    ):
        if svm_wants(s, SVM_VINTR):
            return svm_exit(s, SVM_VINTR, 0, 0, 0)
        v.int_ctl &= ~cython.cast(uint32_t, V_IRQ)
        raise_exception(s, v.int_vector)
        s.event.kind = EVENT_EXTERNAL
        return deliver(s)
    return LEAVE_NEXT


def _exits(s, pin, code):
    """Does the guest's hypervisor intercept these events?"""
    if s.guest_mode == GUEST_VMX:
        return (vmx_of(s).pin & pin) != 0
    return svm_wants(s, code)


def poll(s):
    """Take what waits, in order of priority. SDM, "Priority Among Concurrent Events"."""
    v: cython.pointer(VmxState)
    r: cython.int
    if s.init_line | s.startup_line:
        r = take_startup(s)
        if r != LEAVE_NEXT:
            return r
    if s.guest_mode == GUEST_VMX:
        v = vmx_of(s)
        if s.monitor_trap == 2:
            return vm_exit(s, REASON_MONITOR_TRAP, 0, 0)
        if s.pending_debug and (s.interruptibility & SHADOW_MOV_SS) == 0 and s.activity < 2:
            return _debug_trap(s)
        if v.pin & PIN_PREEMPTION_TIMER:
            now: uint64_t = host_tsc()
            if now >= v.timer_deadline:
                return vm_exit(s, REASON_PREEMPTION_TIMER, 0, 0)
            preemption_arm(s, now, v.timer_deadline)
        if (
            (v.processor & PROC_NMI_WINDOW)
            and (s.interruptibility & (BLOCKED_NMI | SHADOW_MOV_SS | SHADOW_STI)) == 0
            and s.activity != 3
        ):
            return vm_exit(s, REASON_NMI_WINDOW, 0, 0)
        if s.nmi_line and (v.pin & PIN_NMI):
            s.nmi_line = 0
            return vm_exit_event(s, 2 | (EVENT_NMI << 8), 0, 0, 0)
        if (v.processor & PROC_INTERRUPT_WINDOW) and s.activity < 2 and _interrupts_open(s):
            return vm_exit(s, REASON_INTERRUPT_WINDOW, 0, 0)
        if s.interrupt_line and (v.pin & PIN_EXTERNAL_INTERRUPT):
            vm_exit(s, REASON_EXTERNAL_INTERRUPT, 0, 0)
            if v.exit_controls & EXIT_ACKNOWLEDGE:
                put(v.vmcs, VM_EXIT_INTR_INFO, s.interrupt_vector | cython.cast(uint64_t, 0x80000000))
            return LEAVE_EXIT
    elif s.guest_mode == GUEST_SVM:
        r = _poll_svm(s)
        if r != LEAVE_NEXT:
            return r
    elif s.pending_debug and (s.interruptibility & SHADOW_MOV_SS) == 0:
        return _debug_trap(s)
    if s.svm != cython.NULL and svm_of(s).gif == 0 and s.activity < 2:
        # APM, "Global Interrupt Flag": interrupts and NMIs wait.
        if s.activity == 0:
            return GO_ON
        s.exit.reason = EXIT_HALT
        return LEAVE_EXIT
    # Asked again, since other threads assert the lines at any moment: what exits is never delivered.
    if (
        s.nmi_line
        and not _exits(s, PIN_NMI, SVM_NMI)
        and (s.interruptibility & (BLOCKED_NMI | SHADOW_MOV_SS)) == 0
        and s.activity < 2
    ):
        s.nmi_line = 0
        raise_exception(s, 2)
        s.event.kind = EVENT_NMI
        return deliver(s)
    if s.interrupt_line and not _exits(s, PIN_EXTERNAL_INTERRUPT, SVM_INTR) and s.activity < 2 and _interrupts_open(s):
        s.interrupt_line = 0
        raise_exception(s, s.interrupt_vector)
        s.event.kind = EVENT_EXTERNAL
        return deliver(s)
    if s.activity:
        s.exit.reason = EXIT_HALT
        if s.activity == 2:
            s.exit.reason = EXIT_SHUTDOWN
        return LEAVE_EXIT
    return GO_ON
