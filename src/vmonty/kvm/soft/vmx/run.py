"""vmx_vcpu_run(): the loop around VM entry that handles, without the GIL, the exits which need no Python.

Where an exit changed nothing but general registers and rip, the guest goes on as it stands in the processor; for an
event or a window the VMCS is written, and entered again. Python sees the last exit only.
"""

from __future__ import annotations

import cython
from cython.cimports.vmonty.cpu.codecache import put_vectors
from cython.cimports.vmonty.cpu.hosttraps import prepare_thread
from cython.cimports.vmonty.cpu.information import host_tsc
from cython.cimports.vmonty.cpu.preemption import preemption_arm, preemption_thread
from cython.cimports.vmonty.cpu.state import BLOCKED_NMI, EXIT_NONE, EXIT_VM, FLAG_TF, RAX
from cython.cimports.vmonty.cpu.vmcs import (
    CPU_BASED_VM_EXEC_CONTROL,
    EXIT_QUALIFICATION,
    GUEST_INTERRUPTIBILITY_INFO,
    GUEST_PHYSICAL_ADDRESS,
    GUEST_RFLAGS,
    GUEST_RIP,
    HEADER_LAUNCHED,
    IDT_VECTORING_INFO_FIELD,
    PIN_BASED_VM_EXEC_CONTROL,
    TPR_THRESHOLD,
    VM_ENTRY_INTR_INFO_FIELD,
    VM_EXIT_INSTRUCTION_LEN,
    VM_EXIT_REASON,
    VM_INSTRUCTION_ERROR,
    VMX_PREEMPTION_TIMER_VALUE,
    get,
    put,
)
from cython.cimports.vmonty.cpu.vmx import RUN_STOPPED, Vmx, vmx_run_guest
from cython.cimports.vmonty.cpu.vmx_entry import ENTRY_FAILED, ENTRY_NO_VMCS, enter_guest, leave_guest
from cython.cimports.vmonty.cpu.vmx_exit import (
    PIN_PREEMPTION_TIMER,
    PROC_INTERRUPT_WINDOW,
    PROC_NMI_WINDOW,
    REASON_CPUID,
    REASON_EPT_VIOLATION,
    REASON_EXTERNAL_INTERRUPT,
    REASON_HLT,
    REASON_INTERRUPT_WINDOW,
    REASON_IO,
    REASON_NMI_WINDOW,
    REASON_PREEMPTION_TIMER,
    REASON_RDMSR,
    REASON_TPR_BELOW_THRESHOLD,
    REASON_WRMSR,
    vmx_of,
)
from cython.cimports.vmonty.kvm.soft.fast_mmio import fastpath_loaded, fastpath_mmio
from cython.cimports.vmonty.kvm.soft.fastpath import (
    COUNT_EXITS,
    COUNT_IRQ_INJECTIONS,
    COUNT_IRQ_WINDOW_EXITS,
    COUNT_NMI_INJECTIONS,
    COUNT_NMI_WINDOW_EXITS,
    FAST_NONE,
    FAST_REENTER,
    FAST_RESUME,
    FAST_USER,
    SHADOWS,
    fastpath_cpuid,
    fastpath_events,
    fastpath_external_interrupt,
    fastpath_halt,
    fastpath_in,
    fastpath_input,
    fastpath_out,
    fastpath_rdmsr,
    fastpath_wrmsr,
    kvm_lapic_expired_hv_timer,
)
from cython.cimports.vmonty.kvm.soft.kvm_host import REQUEST_EVENT
from cython.cimports.vmonty.kvm.soft.lapic_irq import (
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
    kvm_limit_nmi,
    kvm_take_nmi,
    kvm_take_requests,
)


def vmx_exit_handlers_fastpath(a, s, v):
    """FAST_*; the guest is still in the processor."""
    reason: uint64_t = get(v.vmcs, VM_EXIT_REASON)
    done: cython.int = FAST_NONE
    if (get(v.vmcs, IDT_VECTORING_INFO_FIELD) >> 31) & 1 or s.rflags & FLAG_TF:
        return FAST_NONE
    if reason not in (REASON_CPUID, REASON_WRMSR, REASON_RDMSR) or a.nmi_pending:
        put_vectors(s)  # the others call the C library
    if reason == REASON_CPUID:
        done = fastpath_cpuid(a, s)
    elif reason == REASON_WRMSR:
        done = fastpath_wrmsr(a, s)
        if a.hv_timer and done == FAST_RESUME:
            vmx_set_hv_timer(a, s, v)
    elif reason == REASON_RDMSR:
        done = fastpath_rdmsr(a, s)
    elif reason == REASON_EXTERNAL_INTERRUPT:
        done = fastpath_external_interrupt(a, s)
    elif reason == REASON_HLT:
        done = fastpath_halt(a, s)
    elif reason == REASON_IO:
        # SDM, "Exit Qualification for I/O Instructions"; no string instructions.
        qualification: uint64_t = get(v.vmcs, EXIT_QUALIFICATION)
        port: uint32_t = (qualification >> 16) & 0xFFFF
        size: uint32_t = (qualification & 7) + 1
        if qualification & 0x10 == 0:
            done = fastpath_ports(a, s, port, size, (qualification & 8) != 0)
            if done == FAST_NONE:
                return fastpath_in(a, s, port, size) if qualification & 8 else fastpath_out(a, s, port, size)
    elif reason == REASON_EPT_VIOLATION:
        # SDM, "Exit Qualification for EPT Violations": the guest's access to data, and not the page walk's.
        access: uint64_t = get(v.vmcs, EXIT_QUALIFICATION)
        if access & (EPT_FINAL | EPT_FETCH) == EPT_FINAL:
            done = fastpath_mmio(a, s, get(v.vmcs, GUEST_PHYSICAL_ADDRESS), (access & EPT_WRITE) != 0)
            if done == FAST_USER:
                return FAST_USER
    elif reason == REASON_INTERRUPT_WINDOW:
        a.counters[COUNT_IRQ_WINDOW_EXITS] += 1
        a.counters[COUNT_EXITS] += 1
        return FAST_REENTER
    elif reason == REASON_NMI_WINDOW:
        a.counters[COUNT_NMI_WINDOW_EXITS] += 1
        a.counters[COUNT_EXITS] += 1
        return FAST_REENTER
    elif reason == REASON_TPR_BELOW_THRESHOLD:
        a.counters[COUNT_EXITS] += 1
        return FAST_REENTER
    elif reason == REASON_PREEMPTION_TIMER:
        # handle_fastpath_preemption_timer()
        if not kvm_lapic_expired_hv_timer(a):
            return FAST_NONE
        a.counters[COUNT_EXITS] += 1
        return FAST_REENTER
    if done == FAST_NONE:
        return FAST_NONE
    a.counters[COUNT_EXITS] += 1
    if a.nmi_pending:
        put_vectors(s)
        if s.interruptibility & BLOCKED_NMI:
            kvm_limit_nmi(a)
        if (v.processor & PROC_NMI_WINDOW) == 0:
            return FAST_REENTER
    return fastpath_events(a, (v.processor & PROC_INTERRUPT_WINDOW) != 0)


def _hv_deadline(a):
    """The guest's TSC at which its timer fires; 0: never, or not by the processor."""
    if a.apic == cython.NULL or a.tsc_scaled:
        return 0
    return a.apic.tsc_deadline


def _switch_hv_timer(a, m, on):
    timer: uint64_t = PIN_PREEMPTION_TIMER
    if a.hv_timer_on != on:
        put(m, PIN_BASED_VM_EXEC_CONTROL, get(m, PIN_BASED_VM_EXEC_CONTROL) & ~timer | (timer if on else 0))
        a.hv_timer_on = on


def vmx_update_hv_timer(a, m):
    """At each entry: how long it is until the deadline, in units of 32 ticks. One far away exits, and is set anew."""
    deadline: uint64_t = _hv_deadline(a)
    now: uint64_t
    left: uint64_t = 0
    if deadline:
        now = host_tsc() + a.tsc_offset
        if now < deadline:
            left = min(((deadline - now) >> 5) + 1, cython.cast(uint64_t, 0xFFFFFFFF))
        put(m, VMX_PREEMPTION_TIMER_VALUE, left)
    _switch_hv_timer(a, m, deadline != 0)


def vmx_set_hv_timer(a, s, v):
    """The guest, which stays in the processor, has set its deadline."""
    deadline: uint64_t = _hv_deadline(a)
    if deadline == 0:
        v.pin &= ~cython.cast(uint32_t, PIN_PREEMPTION_TIMER)
    else:
        v.timer_deadline = deadline - a.tsc_offset
        if not a.hv_timer_on or s.timer_due == 0 or s.timer_due > v.timer_deadline:
            v.pin |= PIN_PREEMPTION_TIMER
            preemption_arm(s, host_tsc(), v.timer_deadline)
    _switch_hv_timer(a, v.vmcs, deadline != 0)


def _window(m, control, on):
    """vmx_enable_irq_window(), vmx_enable_nmi_window(), and their ends."""
    old: uint64_t = get(m, CPU_BASED_VM_EXEC_CONTROL)
    put(m, CPU_BASED_VM_EXEC_CONTROL, old | control if on else old & ~cython.cast(uint64_t, control))


def _inject_nmi(a, m):
    """Whether one that waits goes in; what is left has a window, as what is blocked."""
    blocked: uint64_t = get(m, GUEST_INTERRUPTIBILITY_INFO)
    goes: cython.bint = a.nmi_pending != 0 and (blocked & (SHADOWS | BLOCKED_NMI)) == 0
    if blocked & BLOCKED_NMI:
        kvm_limit_nmi(a)
    if goes:
        kvm_take_nmi(a)
        put(m, VM_ENTRY_INTR_INFO_FIELD, cython.cast(uint64_t, 0x80000202))
        a.counters[COUNT_NMI_INJECTIONS] += 1
    _window(m, PROC_NMI_WINDOW, a.nmi_pending != 0)
    return goes


def _inject_pending_event(a, m):
    """An NMI, or the local APIC's interrupt, or a window for it."""
    injected: cython.bint = False
    if a.nmi_pending or get(m, CPU_BASED_VM_EXEC_CONTROL) & PROC_NMI_WINDOW:
        injected = _inject_nmi(a, m)
    if a.apic == cython.NULL or kvm_apic_has_interrupt(a.apic) < 0:
        _window(m, PROC_INTERRUPT_WINDOW, False)
    elif injected or (get(m, GUEST_RFLAGS) & 0x200) == 0 or get(m, GUEST_INTERRUPTIBILITY_INFO) & SHADOWS:
        _window(m, PROC_INTERRUPT_WINDOW, True)
    else:
        _window(m, PROC_INTERRUPT_WINDOW, False)
        put(
            m,
            VM_ENTRY_INTR_INFO_FIELD,
            cython.cast(uint64_t, 0x80000000) | cython.cast(uint32_t, kvm_get_apic_interrupt(a.apic)),
        )
        a.counters[COUNT_IRQ_INJECTIONS] += 1


def _set_tpr_threshold(a, m, threshold):
    a.tpr_threshold = threshold
    if get(m, TPR_THRESHOLD) != threshold:
        put(m, TPR_THRESHOLD, threshold)


def vmx_vcpu_run(a, s):
    """Until an exit that Python must handle."""
    v: cython.pointer(VmxState) = vmx_of(s)
    error: uint32_t = ENTRY_NO_VMCS
    reason: cython.int
    done: cython.int = FAST_REENTER
    launched: cython.pointer(uint32_t)
    prepare_thread()  # a system call: once, not at each exit
    preemption_thread(s)
    s.stack_ready = 1
    s.keep_vectors = a.fast
    kvm_enter_guest_mode(a, s)
    while True:
        if v.vmcs != cython.NULL:
            launched = cython.cast(cython.pointer(uint32_t), v.vmcs + HEADER_LAUNCHED)
            if a.apic != cython.NULL:
                _set_tpr_threshold(a, v.vmcs, kvm_apic_tpr_threshold(a.apic))
            if a.hv_timer:
                vmx_update_hv_timer(a, v.vmcs)
            error = enter_guest(s, launched[0] == 0)
        if error:
            break
        while True:
            reason = vmx_run_guest(s)
            done = FAST_NONE
            if reason == EXIT_VM and a.fast:
                done = vmx_exit_handlers_fastpath(a, s, v)
            if done != FAST_RESUME:
                put_vectors(s)
                break
            s.exit.reason = EXIT_NONE
        leave_guest(s)
        if done != FAST_REENTER:
            break
        _inject_pending_event(a, v.vmcs)
    kvm_leave_guest_mode(a)
    if v.vmcs != cython.NULL:
        # Python may lower the TPR, and let the emulator enter: no threshold may be above it, nor a timer run out there.
        _set_tpr_threshold(a, v.vmcs, 0)
        _switch_hv_timer(a, v.vmcs, False)
    s.stack_ready = 0
    s.keep_vectors = 0
    if error == ENTRY_FAILED:
        return cython.cast(int64_t, get(v.vmcs, VM_EXIT_REASON))
    if error:
        if error != ENTRY_NO_VMCS:
            put(v.vmcs, VM_INSTRUCTION_ERROR, error)
        return -cython.cast(int64_t, error)
    if reason != EXIT_VM:
        return RUN_STOPPED - reason
    return cython.cast(int64_t, get(v.vmcs, VM_EXIT_REASON))


def _skip(m, rip):
    """vmx_skip_emulated_instruction(), outside of the guest: *rip* is behind it."""
    put(m, GUEST_RIP, rip)
    put(m, GUEST_INTERRUPTIBILITY_INFO, get(m, GUEST_INTERRUPTIBILITY_INFO) & ~cython.cast(uint64_t, SHADOWS))


def vmx_vcpu_reenter(a):
    """vmx_vcpu_run() after an exit that only kvm_run tells of: what was read for the guest, and what is pending."""
    s: cython.pointer(CpuState) = a.processor
    m: cython.pointer(uint8_t) = vmx_of(s).vmcs
    kvm_take_requests(a, REQUEST_EVENT)
    if a.input:
        s.gpr[RAX] = fastpath_input(a, s.gpr[RAX])
        _skip(m, get(m, GUEST_RIP) + get(m, VM_EXIT_INSTRUCTION_LEN))
    elif a.load.size:
        s.gpr[a.load.reg] = fastpath_loaded(a, s.gpr[a.load.reg])
        _skip(m, a.load_next)
    fastpath_events(a, False)
    _inject_pending_event(a, m)
    return vmx_vcpu_run(a, s)


def attach(vmx: Vmx, arch: VcpuArch, seat: Seat) -> None:
    """The vCPU, whose VMCS is current there, is on a processor."""
    arch.a.processor = vmx.s
    arch.a.enter = vmx_vcpu_reenter
    arch.a.fast_nmi = 1
    arch.cpu = vmx.cpu
    arch.seat = seat


def outcome(vmx: Vmx, arch: VcpuArch) -> int:
    """What enter() would give or raise for the run that reentry.reenter() made."""
    return vmx.outcome(arch.a.outcome)


def enter(vmx: Vmx, arch: VcpuArch) -> int:
    """VM entry of the current VMCS, until an exit for Python; see cpu.vmx.Vmx.run(). The GIL is released."""
    result: int64_t
    with cython.nogil:
        result = vmx_vcpu_run(cython.address(arch.a), vmx.s)
    return vmx.outcome(result)
