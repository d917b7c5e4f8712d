"""Exits that are handled while the guest stays in the processor: no GIL, and neither VMCS nor VMCB is written.

As in the kernel's handle_fastpath_set_msr_irqoff() and its like, but for more exits, since what costs here is Python.
Whatever is not plain, FAST_NONE leaves to the Python side, which handles everything: nothing may have changed then.
"""

from __future__ import annotations

import cython
from cython.cimports.vmonty.cpu.codecache import put_vectors
from cython.cimports.vmonty.cpu.information import host_tsc
from cython.cimports.vmonty.cpu.state import MODE_LONG64, RAX, RBX, RCX, RDX
from cython.cimports.vmonty.kvm.soft.kvm_host import (
    APIC_LIMIT,
    REQUEST_EVENT,
    REQUEST_HOST,
    SEQUENTIAL,
    KvmArch,
    MsrSlot,
    load64,
    store64,
)
from cython.cimports.vmonty.kvm.soft.lapic_irq import (
    DELIVERY_MODE,
    LVT_MASKED,
    SVR_ENABLED,
    WORD_LVTT,
    WORD_SVR,
    WORD_TPR,
    apic_cr8,
    apic_enabled,
    apic_eoi_is_told,
    apic_set_eoi,
    apic_take_deadline,
    apic_x2apic_mode,
    kvm_apic_has_interrupt,
    kvm_apic_ppr,
    kvm_apic_tpr_threshold,
    kvm_lapic_set_irr,
)
from cython.cimports.vmonty.kvm.soft.msr_table import stored_msr
from cython.cimports.vmonty.kvm.soft.vcpu_arch import (
    kvm_inject_nmi,
    kvm_take_requests,
    kvm_vcpu_kick,
)
from cython.cimports.vmonty.kvm.soft.vcpu_cpuid import kvm_cpuid


def rip_behind(s, length):
    """Where the next instruction is."""
    rip: uint64_t = s.rip + length
    return rip if s.mode == MODE_LONG64 else cython.cast(uint32_t, rip)


def skip_emulated_instruction(s):
    """The one that exited is done, and so is an interrupt shadow."""
    s.rip = rip_behind(s, s.exit.instruction_length)
    s.interruptibility &= ~cython.cast(uint32_t, SHADOWS)


def fastpath_cpuid(a, s):
    """kvm_emulate_cpuid()."""
    out: uint32_t[4]
    function: uint32_t = cython.cast(uint32_t, s.gpr[RAX])
    if function == 1 and a.apic == cython.NULL:
        return FAST_NONE  # Python has the APIC base
    kvm_cpuid(a, function, cython.cast(uint32_t, s.gpr[RCX]), cython.address(out[0]))
    if function == 1:
        out[2] &= ~cython.cast(uint32_t, CPUID_OSXSAVE)
        if s.cr4 & CR4_OSXSAVE:
            out[2] |= CPUID_OSXSAVE
        if a.apic.apic_base & APIC_BASE_ENABLE == 0:
            out[3] &= ~cython.cast(uint32_t, CPUID_APIC)
    s.gpr[RAX] = out[0]
    s.gpr[RBX] = out[1]
    s.gpr[RCX] = out[2]
    s.gpr[RDX] = out[3]
    skip_emulated_instruction(s)
    return FAST_RESUME


# ---- MSRs --------------------------------------------------------------------------------------------------------


def _read_msr(a, index, value):
    """False for MSRs that Python knows, or nobody."""
    l: cython.pointer(KvmLapic) = a.apic
    slot: cython.pointer(MsrSlot)
    if index == MSR_IA32_TSC:
        if a.tsc_scaled:
            return False
        value[0] = host_tsc() + a.tsc_offset
        return True
    if l != cython.NULL:
        if index == MSR_IA32_APICBASE:
            value[0] = l.apic_base
            return True
        if index == MSR_TSC_DEADLINE:
            value[0] = l.tsc_deadline if apic_enabled(l) and l.deadline_mode else 0
            return True
        if (index >> 8) == 8:
            if not apic_x2apic_mode(l):
                return False
            if index == X2APIC_PPR:
                value[0] = kvm_apic_ppr(l)
            elif index in (X2APIC_ID, X2APIC_TPR, X2APIC_LDR, X2APIC_SVR) or X2APIC_ISR <= index <= X2APIC_IRR_LAST:
                value[0] = l.regs[(index & 0xFF) << 2]
            else:
                return False
            return True
    slot = stored_msr(a.msrs, index)
    if slot == cython.NULL:
        return False
    value[0] = slot.value
    return True


def fastpath_rdmsr(a, s):
    """kvm_emulate_rdmsr()."""
    value: uint64_t = 0
    if not a.fast_msrs or not _read_msr(a, cython.cast(uint32_t, s.gpr[RCX]), cython.address(value)):
        return FAST_NONE
    s.gpr[RAX] = cython.cast(uint32_t, value)
    s.gpr[RDX] = value >> 32
    skip_emulated_instruction(s)
    return FAST_RESUME


def _timer_is_plain(l):
    """Whether all that happens when the timer fires is an interrupt, or nothing."""
    entry: uint32_t = l.regs[WORD_LVTT]
    if entry & LVT_MASKED:
        return True
    return (entry & DELIVERY_MODE) == 0 and (entry & 0xFF) >= 16 and (l.regs[WORD_SVR] & SVR_ENABLED) != 0


def _timer_fires(l):
    """apic_timer_expired(), of one that is plain."""
    if (l.regs[WORD_LVTT] & LVT_MASKED) == 0:
        kvm_lapic_set_irr(l, l.regs[WORD_LVTT] & 0xFF, False)


def _write_deadline(a, value):
    """kvm_set_lapic_tscdeadline_msr(), unless the host's timer must be set to an earlier time.

    Where the processor has a timer, the caller sets that.
    """
    l: cython.pointer(KvmLapic) = a.apic
    armed: uint64_t
    if not apic_enabled(l) or not l.deadline_mode:
        return True  # ignored
    if a.tsc_scaled or not _timer_is_plain(l):
        return False
    if value and value <= host_tsc() + a.tsc_offset:
        store64(cython.address(l.tsc_deadline), 0, SEQUENTIAL)
        _timer_fires(l)
        return True
    store64(cython.address(l.tsc_deadline), value, SEQUENTIAL)
    if a.hv_timer:
        return True
    armed = load64(cython.address(l.armed_tsc), SEQUENTIAL)
    return value == 0 or (armed != 0 and armed <= value)


def deliver_ipi(a, target, icr):
    """kvm_apic_set_irq() of an edge. What is off drops it, but an NMI."""
    if target.vcpu != a or icr & ICR_MODE:
        put_vectors(a.processor)  # what comes is the C library's
    if icr & ICR_MODE:
        kvm_inject_nmi(target.vcpu)
    elif not apic_enabled(target) or (target.regs[WORD_SVR] & SVR_ENABLED) == 0:
        return
    else:
        kvm_lapic_set_irr(target, icr & 0xFF, False)
    if target.vcpu != a:
        kvm_vcpu_kick(target.vcpu, REQUEST_EVENT)


def ipi_is_plain(a, icr):
    """Fixed or an NMI, an edge, with a vector that there is."""
    if icr & ICR_LEVEL_TRIGGERED:
        return False
    if icr & ICR_MODE:
        return (icr & ICR_MODE) == ICR_NMI and a.fast_nmi != 0
    return (icr & 0xFF) >= 16


def _send_ipi(a, icr):
    """kvm_irq_delivery_to_apic_fast(): fixed interrupts and NMIs, to one APIC or some of a cluster, in x2APIC mode."""
    k: cython.pointer(KvmArch) = a.kvm
    destination: uint32_t = cython.cast(uint32_t, icr >> 32)
    number: uint32_t
    bits: uint32_t
    if not ipi_is_plain(a, icr):
        return False
    if (icr & ICR_SHORTHAND) == ICR_SELF:
        deliver_ipi(a, a.apic, icr)
        return True
    if icr & ICR_SHORTHAND or k.apics == 0 or k.apics != k.x2apics:
        return False
    # All ones are a broadcast, and so may be 255.
    if destination == cython.cast(uint32_t, 0xFFFFFFFF) or destination == 0xFF:
        return False
    if (icr & ICR_LOGICAL) == 0:
        if destination < APIC_LIMIT and k.apic_map[destination] != cython.NULL:
            deliver_ipi(a, k.apic_map[destination], icr)
        return True
    # SDM, "Logical Destination Mode in x2APIC Mode": a cluster of sixteen, a bit for each.
    bits = destination & 0xFFFF
    number = destination >> 16 << 4
    while bits and number < APIC_LIMIT:
        if bits & 1 and k.apic_map[number] != cython.NULL:
            deliver_ipi(a, k.apic_map[number], icr)
        bits >>= 1
        number += 1
    return True


def _write_msr(a, index, value):
    """False for MSRs that Python knows, and for values that nobody takes."""
    l: cython.pointer(KvmLapic) = a.apic
    slot: cython.pointer(MsrSlot)
    if l != cython.NULL:
        if index == MSR_TSC_DEADLINE:
            return _write_deadline(a, value)
        if (index >> 8) == 8:
            if not apic_x2apic_mode(l):
                return False
            if index == X2APIC_ICR:
                # Bits 63 to 32 are the destination; of the rest what is reserved faults.
                if value & cython.cast(uint64_t, 0xFFF32000) or not _send_ipi(a, value):
                    return False
                l.icr = value & ~cython.cast(uint64_t, ICR_BUSY)
                return True
            if value >> 32:
                return False
            if index == X2APIC_EOI:
                if apic_eoi_is_told(l):
                    return False
                apic_set_eoi(l)
                return True
            if index == X2APIC_TPR:
                l.regs[WORD_TPR] = value & 0xFF
                return True
            return index == X2APIC_SELF_IPI and (value >> 8) == 0 and _send_ipi(a, ICR_SELF | value)
    if index in (MSR_UCODE_REV, MSR_MCG_CAP, MSR_WALL_CLOCK_NEW):
        return False
    slot = stored_msr(a.msrs, index)
    if slot == cython.NULL:
        return False
    slot.value = value
    return True


def fastpath_wrmsr(a, s):
    """kvm_emulate_wrmsr()."""
    value: uint64_t = cython.cast(uint32_t, s.gpr[RAX]) | (s.gpr[RDX] << 32)
    if not a.fast_msrs or not _write_msr(a, cython.cast(uint32_t, s.gpr[RCX]), value):
        return FAST_NONE
    skip_emulated_instruction(s)
    return FAST_RESUME


# ---- interrupts --------------------------------------------------------------------------------------------------


def save_run(a, s):
    """post_kvm_run_save(), of a vCPU for which nothing waits to be injected."""
    l: cython.pointer(KvmLapic) = a.apic
    ready: uint32_t = 1 if not a.user_injects or interrupts_open(s) else 0
    cython.cast(cython.pointer(uint32_t), a.run + RUN_SAVED)[0] = ready | ((s.rflags & 0x200) >> 1)
    if l != cython.NULL:
        cython.cast(cython.pointer(uint64_t), a.run + RUN_SAVED_CR8)[0] = apic_cr8(l)
        cython.cast(cython.pointer(uint64_t), a.run + RUN_SAVED_BASE)[0] = l.apic_base


def _exit_io(a, s, direction, port, size):
    """KVM_EXIT_IO of one access."""
    io: cython.pointer(uint8_t) = a.run + RUN_IO
    cython.cast(cython.pointer(uint32_t), a.run + RUN_EXIT_REASON)[0] = EXIT_IO
    io[0] = direction
    io[1] = size
    cython.cast(cython.pointer(uint16_t), io + 2)[0] = port
    cython.cast(cython.pointer(uint32_t), io + 4)[0] = 1
    cython.cast(cython.pointer(uint64_t), io + 8)[0] = RUN_PIO_PAGE
    a.counters[COUNT_IO_EXITS] += 1
    a.user_exit = 1


def fastpath_out(a, s, port, size):
    """kvm_fast_pio_out(), to user space."""
    if a.run == cython.NULL or (a.kvm.port_map[port >> 3] >> (port & 7)) & 1:
        return FAST_NONE
    cython.cast(cython.pointer(uint32_t), a.run + RUN_PIO_PAGE)[0] = cython.cast(uint32_t, s.gpr[RAX])
    _exit_io(a, s, IO_OUT, port, size)
    skip_emulated_instruction(s)
    save_run(a, s)
    return FAST_USER


def fastpath_in(a, s, port, size):
    """kvm_fast_pio_in(), from user space."""
    if a.run == cython.NULL or (a.kvm.port_map[port >> 3] >> (port & 7)) & 1:
        return FAST_NONE
    cython.cast(cython.pointer(uint32_t), a.run + RUN_PIO_PAGE)[0] = 0
    _exit_io(a, s, IO_IN, port, size)
    save_run(a, s)
    a.input = size
    return FAST_USER


def fastpath_input(a, rax):
    """complete_fast_pio_in()."""
    data: uint32_t = cython.cast(cython.pointer(uint32_t), a.run + RUN_PIO_PAGE)[0]
    mask: uint64_t = (cython.cast(uint64_t, 1) << (8 * a.input)) - 1
    whole: cython.bint = a.input == 4
    a.input = 0
    return data if whole else (rax & ~mask) | (data & mask)


def fastpath_halt(a, s):
    """kvm_emulate_halt(), when what ends the halt is there already."""
    if a.apic == cython.NULL or (s.rflags & 0x200) == 0 or kvm_apic_has_interrupt(a.apic) < 0:
        return FAST_NONE
    a.counters[COUNT_HALT_EXITS] += 1
    skip_emulated_instruction(s)
    return FAST_RESUME


def fastpath_external_interrupt(a, s):
    """A kick: to look for interrupts, or something for Python, such as host memory that was gone."""
    s.interrupt_line = 0
    if a.requests & REQUEST_HOST or s.lost_memory:
        return FAST_NONE
    kvm_take_requests(a, REQUEST_EVENT)
    a.counters[COUNT_IRQ_EXITS] += 1
    return FAST_RESUME


def kvm_lapic_expired_hv_timer(a):
    """False when Python must look: what fires is no plain interrupt. The deadline may also be far away still."""
    if a.apic == cython.NULL:
        return True
    if not _timer_is_plain(a.apic):
        return False
    if apic_take_deadline(a.apic, host_tsc() + a.tsc_offset):
        _timer_fires(a.apic)
    return True


def fastpath_events(a, window):
    """kvm_check_and_inject_events(), as far as it can be told without leaving the guest."""
    l: cython.pointer(KvmLapic) = a.apic
    if l == cython.NULL:
        return FAST_RESUME
    if l.tsc_deadline and not a.tsc_scaled and not a.hv_timer and _timer_is_plain(l):
        if apic_take_deadline(l, host_tsc() + a.tsc_offset):
            _timer_fires(l)
    if window:
        return FAST_RESUME
    if kvm_apic_has_interrupt(l) >= 0 or kvm_apic_tpr_threshold(l) > a.tpr_threshold:
        return FAST_REENTER
    return FAST_RESUME
