"""The registers of a local APIC in xAPIC mode, as far as they need nothing of lapic.py: EOI, IPIs, plain reads.

Source: SDM, "Local APIC Register Address Map", "Interrupt Command Register (ICR)", "Determining IPI Destination".
"""

from __future__ import annotations

import cython
from cython.cimports.vmonty.kvm.soft.fastpath import (
    ICR_BUSY,
    ICR_LOGICAL,
    ICR_SELF,
    ICR_SHORTHAND,
    deliver_ipi,
    ipi_is_plain,
)
from cython.cimports.vmonty.kvm.soft.kvm_host import APIC_LIMIT
from cython.cimports.vmonty.kvm.soft.lapic_irq import apic_enabled, apic_eoi_is_told, apic_set_eoi, kvm_apic_ppr


def xapic_read(l, offset, value):
    """kvm_lapic_reg_read(), of registers that hold what they say."""
    if offset == XAPIC_PPR:
        value[0] = kvm_apic_ppr(l)
    elif offset in (XAPIC_ID, XAPIC_LVR, XAPIC_LDR, XAPIC_DFR, XAPIC_SVR, XAPIC_ICR, XAPIC_ICR2, XAPIC_LVTT) or (
        XAPIC_ISR <= offset <= XAPIC_IRR_LAST and offset & 15 == 0
    ):
        value[0] = l.regs[offset >> 2]
    else:
        return False
    return True


def _is_for(l, icr, destination):
    """kvm_apic_match_dest(), of an APIC in xAPIC mode whose logical ID is flat."""
    if destination == BROADCAST:
        return True
    if icr & ICR_LOGICAL:
        return (l.regs[XAPIC_LDR >> 2] >> 24) & destination != 0
    return l.regs[XAPIC_ID >> 2] >> 24 == destination


def _send_ipi(a, icr, destination):
    """kvm_irq_delivery_to_apic(), of fixed interrupts and NMIs, where there are few APICs and all are in xAPIC mode."""
    k: cython.pointer(KvmArch) = a.kvm
    l: cython.pointer(KvmLapic)
    found: cython.uint[8]
    count: uint32_t = 0
    seen: uint32_t = 0
    number: uint32_t
    shorthand: uint32_t = icr & ICR_SHORTHAND
    if not ipi_is_plain(a, icr):
        return False
    if shorthand == ICR_SELF:
        deliver_ipi(a, a.apic, icr)
        return True
    if k.x2apics or k.apics == 0 or k.apics > FLAT_TARGETS:
        return False
    for number in range(cython.cast(uint32_t, APIC_LIMIT)):
        if seen == k.apics:
            break
        l = k.apic_map[number]
        if l == cython.NULL:
            continue
        seen += 1
        if not apic_enabled(l):
            continue
        if icr & ICR_LOGICAL and shorthand == 0 and l.regs[XAPIC_DFR >> 2] >> 28 != 15:
            return False
        if l != a.apic or shorthand != ICR_SHORTHAND:
            if shorthand or _is_for(l, icr, destination):
                found[count] = number
                count += 1
    for number in range(count):
        deliver_ipi(a, k.apic_map[found[number]], icr)
    return True


def xapic_write(a, offset, value):
    """kvm_lapic_reg_write()."""
    l: cython.pointer(KvmLapic) = a.apic
    if offset == XAPIC_EOI:
        if apic_eoi_is_told(l):
            return False
        apic_set_eoi(l)
    elif offset == XAPIC_ICR:
        if not _send_ipi(a, value & ~cython.cast(uint32_t, ICR_BUSY), l.regs[XAPIC_ICR2 >> 2] >> 24):
            return False
        l.regs[XAPIC_ICR >> 2] = value & ~cython.cast(uint32_t, ICR_BUSY)
    elif offset == XAPIC_ICR2:
        l.regs[XAPIC_ICR2 >> 2] = value >> 24 << 24
    else:
        return False
    return True
