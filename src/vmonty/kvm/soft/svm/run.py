"""svm_vcpu_run(): the loop around VMRUN that handles, without the GIL, the exits which need no Python.

As vmx/run.py: what changed only registers goes on in the processor; for an event or a window the VMCB is written.
"""

from __future__ import annotations

import cython
from cython.cimports.vmonty.cpu.codecache import put_vectors
from cython.cimports.vmonty.cpu.hosttraps import prepare_thread
from cython.cimports.vmonty.cpu.state import EXIT_NONE, EXIT_VM, FLAG_TF, RAX
from cython.cimports.vmonty.cpu.svm import Svm, svm_run_guest
from cython.cimports.vmonty.cpu.svm_entry import enter_svm_guest, leave_svm_guest, load_state, save_state
from cython.cimports.vmonty.cpu.svm_exit import V_TPR, svm_of
from cython.cimports.vmonty.cpu.vmcb import (
    SVM_CPUID,
    SVM_HLT,
    SVM_INTR,
    SVM_IOIO,
    SVM_MSR,
    SVM_NPF,
    SVM_VINTR,
    SVM_WRITE_CR0,
    VMCB_EVENTINJ,
    VMCB_EXITCODE,
    VMCB_EXITINFO1,
    VMCB_EXITINFO2,
    VMCB_EXITINTINFO,
    VMCB_INT_CTL,
    VMCB_INT_STATE,
    VMCB_INTERCEPT_CR,
    VMCB_NRIP,
    VMCB_RAX,
    VMCB_RFLAGS,
    VMCB_RIP,
    get32,
    get64,
    put32,
    put64,
)
from cython.cimports.vmonty.kvm.soft.fast_mmio import fastpath_loaded, fastpath_mmio
from cython.cimports.vmonty.kvm.soft.fastpath import (
    COUNT_EXITS,
    COUNT_IRQ_INJECTIONS,
    COUNT_IRQ_WINDOW_EXITS,
    FAST_NONE,
    FAST_REENTER,
    FAST_RESUME,
    FAST_USER,
    fastpath_cpuid,
    fastpath_events,
    fastpath_external_interrupt,
    fastpath_halt,
    fastpath_in,
    fastpath_input,
    fastpath_out,
    fastpath_rdmsr,
    fastpath_wrmsr,
)
from cython.cimports.vmonty.kvm.soft.kvm_host import REQUEST_EVENT
from cython.cimports.vmonty.kvm.soft.lapic_irq import (
    WORD_TPR,
    apic_cr8,
    kvm_apic_has_interrupt,
    kvm_apic_tpr_threshold,
    kvm_get_apic_interrupt,
)
from cython.cimports.vmonty.kvm.soft.port_window import fastpath_ports
from cython.cimports.vmonty.kvm.soft.seats import Seat
from cython.cimports.vmonty.kvm.soft.vcpu_arch import (
    VcpuArch,
    kvm_enter_guest_mode,
    kvm_leave_guest_mode,
    kvm_take_requests,
)


def svm_exit_handlers_fastpath(a, s, v):
    """FAST_*; the guest is still in the processor."""
    code: uint64_t = get64(v.vmcb, VMCB_EXITCODE)
    done: cython.int = FAST_NONE
    if (get64(v.vmcb, VMCB_EXITINTINFO) >> 31) & 1 or s.rflags & FLAG_TF:
        return FAST_NONE
    if code not in (SVM_CPUID, SVM_MSR):
        put_vectors(s)  # the others call the C library
    if code == SVM_CPUID:
        done = fastpath_cpuid(a, s)
    elif code == SVM_MSR:
        if get64(v.vmcb, VMCB_EXITINFO1) & 1:
            done = fastpath_wrmsr(a, s)
        else:
            done = fastpath_rdmsr(a, s)
    elif code == SVM_INTR:
        done = fastpath_external_interrupt(a, s)
    elif code == SVM_HLT:
        done = fastpath_halt(a, s)
    elif code == SVM_IOIO:
        # APM, "IN and OUT Behavior"; no string instructions.
        information: uint64_t = get64(v.vmcb, VMCB_EXITINFO1)
        port: uint32_t = (information >> 16) & 0xFFFF
        size: uint32_t = (information >> 4) & 7
        if information & 4 == 0:
            done = fastpath_ports(a, s, port, size, (information & 1) != 0)
            if done == FAST_NONE:
                return fastpath_in(a, s, port, size) if information & 1 else fastpath_out(a, s, port, size)
    elif code == SVM_NPF:
        # APM, "Nested versus Guest Page Faults, Fault Ordering": the guest's access to data, and not the page walk's.
        access: uint64_t = get64(v.vmcb, VMCB_EXITINFO1)
        if access & (NPF_FINAL | NPF_FETCH) == NPF_FINAL:
            done = fastpath_mmio(a, s, get64(v.vmcb, VMCB_EXITINFO2), (access & NPF_WRITE) != 0)
            if done == FAST_USER:
                return FAST_USER
    elif code == SVM_VINTR:
        a.counters[COUNT_IRQ_WINDOW_EXITS] += 1
        a.counters[COUNT_EXITS] += 1
        return FAST_REENTER
    if done == FAST_NONE:
        return FAST_NONE
    a.counters[COUNT_EXITS] += 1
    if a.apic != cython.NULL and apic_cr8(a.apic) != v.int_ctl & V_TPR:
        return FAST_REENTER  # it was set by way of the APIC
    return fastpath_events(a, (v.int_ctl & V_IRQ) != 0)


def _window(m, on):
    """svm_enable_irq_window(): a virtual interrupt of the highest priority, which exits when it would be taken."""
    at: uint32_t = VMCB_INTERCEPT_CR + 4 * (SVM_VINTR >> 5)
    bit: uint32_t = cython.cast(uint32_t, 1) << (SVM_VINTR & 31)
    bits: uint32_t = V_IRQ | V_PRIO_MASK | V_IGN_TPR
    if on:
        put32(m, VMCB_INT_CTL, get32(m, VMCB_INT_CTL) | bits)
        put32(m, at, get32(m, at) | bit)
    else:
        put32(m, VMCB_INT_CTL, get32(m, VMCB_INT_CTL) & ~bits)
        put32(m, at, get32(m, at) & ~bit)


def _inject_pending_event(a, m):
    """The local APIC's interrupt, or a window for it."""
    if a.apic == cython.NULL or kvm_apic_has_interrupt(a.apic) < 0:
        _window(m, False)
    elif (get64(m, VMCB_RFLAGS) & 0x200) == 0 or get64(m, VMCB_INT_STATE) & 1:
        _window(m, True)
    else:
        _window(m, False)
        put64(
            m,
            VMCB_EVENTINJ,
            cython.cast(uint64_t, 0x80000000) | cython.cast(uint32_t, kvm_get_apic_interrupt(a.apic)),
        )
        a.counters[COUNT_IRQ_INJECTIONS] += 1


def _sync_lapic_to_cr8(a, m):
    """sync_lapic_to_cr8(), svm_update_cr8_intercept(): the guest has CR8, whose writes exit while it holds one back."""
    bit: uint32_t = cython.cast(uint32_t, 1) << (SVM_WRITE_CR0 + 8)
    on: uint32_t
    if a.apic == cython.NULL:
        put32(m, VMCB_INT_CTL, (get32(m, VMCB_INT_CTL) & ~cython.cast(uint32_t, V_TPR)) | cython.cast(uint32_t, a.cr8))
        return
    put32(m, VMCB_INT_CTL, (get32(m, VMCB_INT_CTL) & ~cython.cast(uint32_t, V_TPR)) | apic_cr8(a.apic))
    a.tpr_threshold = kvm_apic_tpr_threshold(a.apic)
    on = get32(m, VMCB_INTERCEPT_CR) & ~bit
    put32(m, VMCB_INTERCEPT_CR, on | bit if a.tpr_threshold else on)


def _sync_cr8_to_lapic(a, int_ctl):
    """sync_cr8_to_lapic()"""
    if a.apic != cython.NULL and apic_cr8(a.apic) != int_ctl & V_TPR:
        a.apic.regs[WORD_TPR] = (int_ctl & 15) << 4


def give_cr8(vmcb: cython.ulonglong, arch: VcpuArch) -> None:
    """Before the processor executes some of the guest's instructions outside of enter()."""
    _sync_lapic_to_cr8(cython.address(arch.a), cython.cast(cython.pointer(uint8_t), vmcb))


def take_cr8(vmcb: cython.ulonglong, arch: VcpuArch) -> None:
    """Behind them."""
    _sync_cr8_to_lapic(cython.address(arch.a), get32(cython.cast(cython.pointer(uint8_t), vmcb), VMCB_INT_CTL))


def svm_vcpu_run(a, s, vmcb):
    """Until an exit that Python must handle; EXIT_VM, or EXIT_* when the processor stopped without one."""
    v: cython.pointer(SvmState) = svm_of(s)
    m: cython.pointer(uint8_t) = cython.cast(cython.pointer(uint8_t), vmcb)
    reason: cython.int = EXIT_VM
    done: cython.int
    prepare_thread()  # a system call: once, not at each exit
    s.stack_ready = 1
    s.keep_vectors = a.fast
    kvm_enter_guest_mode(a, s)
    load_state(s, m)
    while True:
        v.vmcb = m
        v.vmcb_pointer = vmcb
        v.guest_code = 0
        _sync_lapic_to_cr8(a, m)
        if not enter_svm_guest(s):
            break
        if s.exit.reason == EXIT_VM:
            leave_svm_guest(s)
            break
        while True:
            reason = svm_run_guest(s)
            _sync_cr8_to_lapic(a, v.int_ctl)
            done = FAST_NONE
            if reason == EXIT_VM and a.fast:
                done = svm_exit_handlers_fastpath(a, s, v)
            if done != FAST_RESUME:
                put_vectors(s)
                break
            s.exit.reason = EXIT_NONE
        leave_svm_guest(s)
        if done != FAST_REENTER:
            break
        _inject_pending_event(a, m)
    save_state(s, m)
    kvm_leave_guest_mode(a)
    s.stack_ready = 0
    s.keep_vectors = 0
    return reason


def svm_vcpu_reenter(a):
    """svm_vcpu_run() after an exit that only kvm_run tells of: what was read for the guest, and what is pending."""
    m: cython.pointer(uint8_t) = cython.cast(cython.pointer(uint8_t), a.control_block)
    kvm_take_requests(a, REQUEST_EVENT)
    if a.input:
        put64(m, VMCB_RAX, fastpath_input(a, get64(m, VMCB_RAX)))
        put64(m, VMCB_RIP, get64(m, VMCB_NRIP))
        put64(m, VMCB_INT_STATE, 0)
    elif a.load.size:
        if a.load.reg == RAX:
            put64(m, VMCB_RAX, fastpath_loaded(a, get64(m, VMCB_RAX)))
        else:
            a.processor.gpr[a.load.reg] = fastpath_loaded(a, a.processor.gpr[a.load.reg])
        put64(m, VMCB_RIP, a.load_next)
        put64(m, VMCB_INT_STATE, 0)
    fastpath_events(a, False)
    _inject_pending_event(a, m)
    return svm_vcpu_run(a, a.processor, a.control_block)


def attach(svm: Svm, vmcb: cython.ulonglong, arch: VcpuArch, seat: Seat) -> None:
    """The vCPU is on a processor."""
    arch.a.processor = svm.s
    arch.a.control_block = vmcb
    arch.a.enter = svm_vcpu_reenter
    arch.cpu = svm.cpu
    arch.seat = seat


def outcome(svm: Svm, arch: VcpuArch) -> int:
    """What enter() would give or raise for the run that reentry.reenter() made."""
    return svm.outcome(cython.cast(cython.int, arch.a.outcome))


def enter(svm: Svm, vmcb: cython.ulonglong, arch: VcpuArch) -> int:
    """VMLOAD, VMRUN and VMSAVE, until an exit for Python; see cpu.svm.Svm.enter(). The GIL is released."""
    reason: cython.int
    if vmcb == 0 or vmcb & 0xFFF:
        raise ValueError(f"VMRUN takes the address of a page, not {vmcb:#x}: it would raise #GP")
    with cython.nogil:
        reason = svm_vcpu_run(cython.address(arch.a), svm.s, vmcb)
    return svm.outcome(reason)
