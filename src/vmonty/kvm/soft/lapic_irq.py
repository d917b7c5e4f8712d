"""What is done with the local APIC's registers on every interrupt.

In C, so that a vCPU, and those that send it interrupts, need neither the GIL nor a lock: IRR and TMR change by atomic
operations, ISR and TPR on the vCPU's thread only. Without vector registers, which may be the guest's.
"""

from __future__ import annotations

import cython
from cython.cimports.vmonty.kvm.soft.kvm_host import (
    SEQUENTIAL,
    fetch_and32,
    fetch_or32,
    load32,
    load64,
    swap64,
)


def apic_find_highest(l, word):
    """apic_find_highest_vector()."""
    k: cython.int
    bits: uint32_t
    for k in range(7, -1, -1):
        bits = load32(cython.address(l.regs[word + 4 * k]), SEQUENTIAL)
        if bits:
            return 32 * k + 31 - leading_zeros(bits)
    return -1


def kvm_apic_ppr(l):
    """The processor priority. SDM, "Task and Processor Priorities"."""
    in_service: cython.int = apic_find_highest(l, WORD_ISR)
    tpr: uint32_t = l.regs[WORD_TPR] & 0xFF
    if in_service < 0 or (tpr & 0xF0) >= cython.cast(uint32_t, in_service & 0xF0):
        return tpr
    return in_service & 0xF0


def kvm_apic_has_interrupt(l):
    """Of what is pending the highest, if its class is above the processor priority."""
    vector: cython.int = apic_find_highest(l, WORD_IRR)
    if vector < 0 or not apic_enabled(l):
        return -1
    return vector if cython.cast(uint32_t, vector & 0xF0) > (kvm_apic_ppr(l) & 0xF0) else -1


def kvm_apic_tpr_threshold(l):
    """kvm_update_cr8_intercept(), vmx_update_cr8_intercept()."""
    cr8: uint32_t = apic_cr8(l)
    vector: cython.int
    if cr8 == 0 or not apic_enabled(l):
        return 0
    vector = apic_find_highest(l, WORD_IRR)
    return vector >> 4 if vector >= 0 and cython.cast(uint32_t, vector >> 4) <= cr8 else 0


def kvm_get_apic_interrupt(l):
    """The vCPU's thread."""
    vector: cython.int = kvm_apic_has_interrupt(l)
    bit: uint32_t
    if vector >= 0:
        bit = cython.cast(uint32_t, 1) << (vector & 31)
        fetch_and32(cython.address(l.regs[WORD_IRR + 4 * (vector >> 5)]), ~bit)
        fetch_or32(cython.address(l.regs[WORD_ISR + 4 * (vector >> 5)]), bit)
    return vector


def kvm_lapic_set_irr(l, vector, level_triggered):
    """First how it was triggered, then that it is pending."""
    word: uint32_t = 4 * (vector >> 5)
    bit: uint32_t = cython.cast(uint32_t, 1) << (vector & 31)
    if level_triggered:
        fetch_or32(cython.address(l.regs[WORD_TMR + word]), bit)
    else:
        fetch_and32(cython.address(l.regs[WORD_TMR + word]), ~bit)
    fetch_or32(cython.address(l.regs[WORD_IRR + word]), bit)


def apic_set_eoi(l):
    """The vCPU's thread."""
    vector: cython.int = apic_find_highest(l, WORD_ISR)
    if vector >= 0:
        fetch_and32(cython.address(l.regs[WORD_ISR + 4 * (vector >> 5)]), ~(cython.cast(uint32_t, 1) << (vector & 31)))
    return vector


def apic_eoi_is_told(l):
    """kvm_ioapic_handles_vector(), as far as it can be told without asking."""
    vector: cython.int = apic_find_highest(l, WORD_ISR)
    told: uint32_t
    if vector < 0:
        return False
    told = l.regs[WORD_TMR + 4 * (vector >> 5)] | l.kvm.eoi_vectors[vector >> 5]
    return (told >> (vector & 31)) & 1


def apic_take_deadline(l, tsc):
    """Whether the deadline has come by *tsc*; then it is disarmed, and the caller, only, lets the timer fire."""
    deadline: uint64_t = load64(cython.address(l.tsc_deadline), SEQUENTIAL)
    return deadline != 0 and deadline <= tsc and swap64(cython.address(l.tsc_deadline), deadline, 0)
