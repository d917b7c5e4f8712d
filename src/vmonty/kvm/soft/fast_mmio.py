"""MMIO by plain moves without Python around it: ioeventfds, the local APIC's page, and exits to user space.

A page is the APIC's or user space's from here when it was before (kvm.soft.user_exits), and neither slots nor the bus
have changed since: so nobody looks for it (vcpu_match_mmio_gpa()).
"""

from __future__ import annotations

import cython
from cython.cimports.vmonty.kvm.soft.doorbells import doorbell_hangs, doorbell_ring
from cython.cimports.vmonty.kvm.soft.fastpath import (
    COUNT_INSN_EMULATION,
    COUNT_MMIO_EXITS,
    COUNT_PF_EMULATE,
    COUNT_PF_TAKEN,
    FAST_NONE,
    FAST_RESUME,
    FAST_USER,
    RUN_EXIT_REASON,
    rip_behind,
    save_run,
    skip_emulated_instruction,
)
from cython.cimports.vmonty.kvm.soft.kvm_host import MMIO_PAGES
from cython.cimports.vmonty.kvm.soft.lapic_irq import apic_enabled, apic_x2apic_mode
from cython.cimports.vmonty.kvm.soft.plain_moves import loaded, plain_move
from cython.cimports.vmonty.kvm.soft.xapic import xapic_read, xapic_write


def _is_users(a, gpa):
    """Whether user space answers for the page."""
    n: uint32_t
    if a.mmio_generation != a.kvm.mmio_generation or a.run == cython.NULL:
        return False
    for n in range(cython.cast(uint32_t, MMIO_PAGES)):
        if a.mmio_gfns[n] == gpa >> 12:
            return True
    return False


def _count(a):
    a.counters[COUNT_PF_TAKEN] += 1
    a.counters[COUNT_PF_EMULATE] += 1
    a.counters[COUNT_INSN_EMULATION] += 1


def _exit_mmio(a, s, gpa, m):
    """KVM_EXIT_MMIO. A write is done; a read is completed when user space has answered."""
    run: cython.pointer(uint8_t) = a.run
    cython.cast(cython.pointer(uint32_t), run + RUN_EXIT_REASON)[0] = EXIT_MMIO
    cython.cast(cython.pointer(uint64_t), run + RUN_MMIO_ADDRESS)[0] = gpa
    cython.cast(cython.pointer(uint64_t), run + RUN_MMIO_DATA)[0] = m.value if m.stores else 0
    cython.cast(cython.pointer(uint32_t), run + RUN_MMIO_LEN)[0] = m.size
    run[RUN_MMIO_IS_WRITE] = m.stores
    a.counters[COUNT_MMIO_EXITS] += 1
    _count(a)
    a.user_exit = 1
    if m.stores:
        s.exit.instruction_length = m.length
        skip_emulated_instruction(s)
    else:
        a.load = m[0]
        a.load_gpa = gpa
        a.load_next = rip_behind(s, m.length)
    save_run(a, s)
    return FAST_USER


def fastpath_mmio(a, s, gpa, writes):
    """kvm_mmu_page_fault() and x86_emulate_instruction(), of what needs no look at memory slots."""
    m: PlainMove
    value: uint32_t = 0
    apic: cython.bint = a.apic != cython.NULL and apic_enabled(a.apic) and (a.apic.apic_base ^ gpa) >> 12 == 0
    bell: cython.bint = not apic and writes and doorbell_hangs(a.kvm, gpa)
    if apic and (apic_x2apic_mode(a.apic) or a.apic_gfn != gpa >> 12 or a.apic_generation != a.kvm.mmio_generation):
        return FAST_NONE
    if not (apic or bell or _is_users(a, gpa)):
        return FAST_NONE
    if not plain_move(s, gpa, cython.address(m)) or m.stores != cython.cast(uint32_t, writes):
        return FAST_NONE
    if apic:
        if m.size != 4:
            return FAST_NONE
        if writes:
            if not xapic_write(a, gpa & 0xFFF, m.value):
                return FAST_NONE
        elif xapic_read(a.apic, gpa & 0xFFF, cython.address(value)):
            s.gpr[m.reg] = loaded(cython.address(m), s.gpr[m.reg], value)
        else:
            return FAST_NONE
        _count(a)
    elif not bell:
        return _exit_mmio(a, s, gpa, cython.address(m))
    elif not doorbell_ring(a, gpa, m.size, m.value):
        return FAST_NONE
    s.exit.instruction_length = m.length
    skip_emulated_instruction(s)
    return FAST_RESUME if a.rung < 0 else FAST_USER


def fastpath_loaded(a, old):
    """complete_emulated_mmio(), of a read."""
    data: uint64_t = cython.cast(cython.pointer(uint64_t), a.run + RUN_MMIO_DATA)[0]
    value: uint64_t = loaded(cython.address(a.load), old, data)
    a.load.size = 0
    return value
