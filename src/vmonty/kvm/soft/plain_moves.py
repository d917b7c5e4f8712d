"""MOVs between a register and memory where the second dimension has none: what drivers use for their devices.

KVM emulates each (x86_emulate_instruction()). Here those that are plain are decoded where the guest stands, in
protected and in 64-bit mode, so that what answers them needs no Python; all others are left to the emulator.
"""

from __future__ import annotations

import cython
from cython.cimports.vmonty.cpu.codecache import run_guarded
from cython.cimports.vmonty.cpu.decode import decode
from cython.cimports.vmonty.cpu.segmentation import effective_address
from cython.cimports.vmonty.cpu.state import CS, FETCH_ENTRIES, FS, MODE_COMPAT32, MODE_LONG64, MODE_PROT32
from cython.cimports.vmonty.cpu.tlb import fetch_ahead


def _decoded(s, i):
    """Decode the instruction at rip; outside of 64-bit mode only from a page that is in the fetch TLB."""
    long: cython.bint = s.mode == MODE_LONG64
    if not long and s.mode != MODE_PROT32 and s.mode != MODE_COMPAT32:
        return False
    va: uint64_t = s.rip if long else cython.cast(uint32_t, s.segs[CS].base + s.rip)
    room: cython.int = 4096 - cython.cast(cython.int, va & 0xFFF)
    page = cython.address(s.fetch[1 if s.cpl == 3 else 0][(va >> 12) & (FETCH_ENTRIES - 1)])
    if page.tag != (va & ~cython.cast(uint64_t, 0xFFF) | 1) or page.host == 0:
        # Blocks of it are found without, after a flush.
        if not long or fetch_ahead(s, va) == cython.NULL or page.host == 0:
            return False
    code: cython.pointer(uint8_t) = cython.cast(cython.pointer(uint8_t), page.host + (va & 0xFFF))
    if decode(code, min(room, 15), s.rip, 8 if long else 4, i) <= 0:
        return False
    return not (i.vex or i.fault or i.rep or i.lock) and (i.has_memory or _has_offset(i))


def _decode_here(s):
    """The same behind a guard, as the guest's code may be in memory that is gone; no length: it is no plain move."""
    i: cython.pointer(Insn) = cython.cast(cython.pointer(Insn), s.guarded)
    if not _decoded(s, i):
        i.length = 0


def _has_offset(i):
    return i.map == 0 and MOV_FROM_OFFSET_BYTE <= i.opcode <= MOV_TO_OFFSET


def _low(value, size):
    """Its lowest *size* bytes."""
    return value if size == 8 else value & ((cython.cast(uint64_t, 1) << (8 * size)) - 1)


def _stored(s, i, size):
    """What it stores, in *size* bytes."""
    value: uint64_t
    if i.opcode == MOV_IMMEDIATE_BYTE or i.opcode == MOV_IMMEDIATE:
        value = i.immediate
        if size == 8:
            value = cython.cast(uint64_t, cython.cast(int64_t, cython.cast(int32_t, value)))
    elif size == 1 and i.rex == 0 and i.reg >= 4:
        value = s.gpr[i.reg - 4] >> 8  # AH, CH, DH, BH
    else:
        value = s.gpr[i.reg]
    return _low(value, size)


def _classify(s, i, m):
    """What it moves, and where to."""
    opcode: uint32_t = i.opcode
    m.length = i.length
    m.stores = False
    m.is_signed = False
    m.reg = i.reg
    # A register of 32 bits is one of 64 whose upper half is cleared.
    m.width = 8 if i.operand_size >= 4 else 2
    if _has_offset(i):
        m.reg = RAX
        m.stores = i.opcode >= MOV_TO_OFFSET_BYTE
        m.size = i.operand_size if i.opcode & 1 else 1
        m.width = m.width if i.opcode & 1 else 1
        m.value = _low(s.gpr[RAX], m.size)
        return True
    if i.map == MAP_0F:
        if opcode not in (MOVZX_BYTE, MOVZX_WORD, MOVSX_BYTE, MOVSX_WORD):
            return False
        m.size = 1 if opcode in (MOVZX_BYTE, MOVSX_BYTE) else 2
        m.is_signed = opcode in (MOVSX_BYTE, MOVSX_WORD)
    elif i.map:
        return False
    elif opcode in (MOV_STORE_BYTE, MOV_STORE, MOV_IMMEDIATE_BYTE, MOV_IMMEDIATE):
        m.size = 1 if opcode in (MOV_STORE_BYTE, MOV_IMMEDIATE_BYTE) else i.operand_size
        m.stores = True
        m.value = _stored(s, i, m.size)
        return True
    elif opcode == MOV_LOAD:
        m.size = i.operand_size
    elif opcode == MOV_LOAD_BYTE:
        m.size = m.width = 1
        if i.rex == 0 and i.reg >= 4:
            return False  # AH, CH, DH, BH
    elif opcode == MOVSXD and s.mode == MODE_LONG64 and i.operand_size == 8:
        m.size = 4
        m.is_signed = True
    else:
        return False
    # Signs reach as far as the operand: not into what a 32-bit register clears.
    if m.is_signed and i.operand_size == 4:
        m.width = 4
    return m.reg != RSP


def plain_move(s, gpa, m):
    i: Insn
    linear: uint64_t
    # A data breakpoint of the guest's own may be there.
    if s.dr[7] & 0xFF:
        return False
    s.guarded = cython.address(i)
    if not run_guarded(s, _decode_here) or i.length == 0 or not _classify(s, cython.address(i), m):
        return False
    linear = i.immediate if _has_offset(cython.address(i)) else effective_address(s, cython.address(i))
    if s.mode != MODE_LONG64:
        linear = cython.cast(uint32_t, linear + s.segs[i.segment].base)
    elif i.segment >= FS:
        linear += s.segs[i.segment].base
    # It is no part of one that crosses into the page.
    return (linear ^ gpa) & 0xFFF == 0 and (gpa & 0xFFF) + m.size <= 4096


def loaded(m, old, data):
    value: uint64_t = _low(data, m.size)
    if m.is_signed and (value >> (8 * m.size - 1)) & 1:
        value |= ~_low(~cython.cast(uint64_t, 0), m.size)
    if m.width >= 4:
        return _low(value, m.width)
    return (old ^ _low(old, m.width)) | _low(value, m.width)
