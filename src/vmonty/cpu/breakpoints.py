"""Breakpoints of DR0 to DR3. SDM, "Debug Registers" and "Debug Exceptions".

What DR7 arms is kept in three masks, so that nothing is paid for while they are 0. The page of a data breakpoint never
enters the data TLBs: every access to it comes to the slow path, which knows the bytes. Instruction breakpoints make
the dispatcher go through instructions one by one; those on ports are asked by IN and OUT. GE and LE are ignored, as
processors have done since the P6 family.
"""

import cython
from cython.cimports.vmonty.cpu.state import (
    CR4_DE,
    CS,
    FLAG_RF,
    MODE_LONG64,
    SHADOW_MOV_SS,
    TLB_ENTRIES,
    TLB_SETS,
    forget_windows,
    raise_exception,
)


def _length(s, number):
    """LEN: 1, 2, 8 or 4 bytes."""
    length: uint32_t = cython.cast(uint32_t, s.dr[7] >> (18 + 4 * number)) & 3
    return 8 if length == 2 else length + 1


def _forget(s, va):
    """Take a page out of the data TLBs."""
    k: uint32_t = cython.cast(uint32_t, va >> 12) & (TLB_ENTRIES - 1)
    n: uint32_t
    for n in range(TLB_SETS):
        s.tlb_read[n][k].negated_tag = cython.cast(uint64_t, 1) << 62
        s.tlb_write[n][k].negated_tag = cython.cast(uint64_t, 1) << 62
    forget_windows(s)


def load_dr7(s, value):
    """Give DR7 a value, as entries to and exits from guests do."""
    if s.dr[7] != value:
        s.dr[7] = value
        debug_changed(s)


def debug_changed(s):
    """Recompute what is armed. SDM, "Debug Control Register (DR7)"."""
    k: uint32_t
    kind: uint32_t
    length: uint32_t
    address: uint64_t
    before: uint32_t = s.watch
    s.watch = 0
    s.breakpoints = 0
    s.port_watch = 0
    if s.dr[7] & 0xFF == 0:
        return
    for k in range(4):
        if (s.dr[7] >> (2 * k)) & 3 == 0:
            continue
        kind = cython.cast(uint32_t, s.dr[7] >> (16 + 4 * k)) & 3
        if kind == 0:
            s.breakpoints |= cython.cast(uint32_t, 1) << k
        elif kind == 2:
            s.port_watch |= cython.cast(uint32_t, 1) << k
        else:
            length = _length(s, k)
            address = s.dr[k] & ~cython.cast(uint64_t, length - 1)
            if (before >> k) & 1 == 0 or (address ^ s.watch_address[k]) >> 12:
                _forget(s, address)
            s.watch |= cython.cast(uint32_t, 1) << k
            s.watch_address[k] = address
            s.watch_size[k] = length
            s.watch_reads[k] = kind == 3


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _meets(s: cython.pointer(CpuState), va: uint64_t, size: uint32_t, write: cython.bint) -> uint32_t:
    k: uint32_t
    hits: uint32_t = 0
    for k in range(4):
        if (
            (s.watch >> k) & 1
            and (write or s.watch_reads[k])
            and (va - s.watch_address[k] < s.watch_size[k] or s.watch_address[k] - va < size)
        ):
            hits |= cython.cast(uint32_t, 1) << k
    return hits


def watched_page(s, page):
    """Does the page hold a data breakpoint?"""
    return _meets(s, page, 4096, 1) != 0


def watch_meets(s, va, size, write):
    """Would an access meet a data breakpoint?"""
    return _meets(s, va, size, write) != 0


def watch_access(s, va, size, write):
    """Note the data breakpoints that an access meets, until its instruction ends."""
    s.watch_hits |= _meets(s, va, size, write)
    return s.watch_hits != 0


def port_access(s, port, size):
    """SDM, "Data Memory and I/O Breakpoint Exception Conditions": with CR4.DE only."""
    k: uint32_t
    length: uint32_t
    at: uint32_t
    if (s.cr4 & CR4_DE) == 0:
        return
    for k in range(4):
        if (s.port_watch >> k) & 1:
            length = _length(s, k)
            at = cython.cast(uint32_t, s.dr[k]) & ~(length - 1)
            if port - at < length or at - port < size:
                s.pending_debug |= cython.cast(uint32_t, 1) << k


def breakpoint_fault(s):
    """SDM, "Instruction-Breakpoint Exception Condition": a fault before the instruction.

    Not with RF set, and not behind MOV SS or POP SS, which act as if it were.
    """
    i: uint32_t
    linear: uint64_t = s.rip
    hit: uint64_t = 0
    if s.rflags & FLAG_RF or s.interruptibility & SHADOW_MOV_SS:
        return False
    if s.mode != MODE_LONG64:
        linear = (linear + s.segs[CS].base) & cython.cast(uint64_t, 0xFFFFFFFF)
    for i in range(4):
        if (s.breakpoints >> i) & 1 and (s.dr[7] >> (18 + 4 * i)) & 3 == 0 and s.dr[i] == linear:
            hit |= cython.cast(uint64_t, 1) << i
    if hit == 0:
        return False
    raise_exception(s, 1)
    s.event.payload = hit
    s.event.is_fault = 1
    return True
