# cython: cdivision=True
"""Instructions that 64-bit mode dropped. SDM, "DAA—Decimal Adjust AL After Addition" and their like."""

import cython
from cython.cimports.vmonty.cpu.segmentation import effective_address, linear_address, operand_address
from cython.cimports.vmonty.cpu.segments import stack_mask
from cython.cimports.vmonty.cpu.state import (
    ACCESS_WRITE,
    FLAG_AF,
    FLAG_CF,
    FLAG_PF,
    FLAG_SF,
    FLAG_ZF,
    GO_ON,
    RAX,
    RSP,
    SS,
    raise_exception,
)
from cython.cimports.vmonty.cpu.tlb import probe_write, read_value, write_linear


def _result_flags(s, value):
    """SF, ZF, PF of a byte."""
    parity: uint32_t = value ^ (value >> 4)
    parity ^= parity >> 2
    parity ^= parity >> 1
    s.rflags &= ~cython.cast(uint64_t, FLAG_SF | FLAG_ZF | FLAG_PF)
    if value & 0x80:
        s.rflags |= FLAG_SF
    if value == 0:
        s.rflags |= FLAG_ZF
    if (parity & 1) == 0:
        s.rflags |= FLAG_PF


def _decimal(s, subtract):
    """DAA and DAS."""
    al: uint32_t = cython.cast(uint32_t, s.gpr[RAX]) & 0xFF
    old: uint32_t = al
    carry: cython.bint = (s.rflags & FLAG_CF) != 0
    out: cython.bint = False
    if (al & 15) > 9 or (s.rflags & FLAG_AF):
        if subtract:
            out = carry or al < 6
            al -= 6
        else:
            out = carry or al > 0xF9
            al += 6
        s.rflags |= FLAG_AF
    else:
        s.rflags &= ~cython.cast(uint64_t, FLAG_AF)
    if old > 0x99 or carry:
        al = al - 0x60 if subtract else al + 0x60
        out = True
    elif not subtract:
        out = False
    s.rflags &= ~cython.cast(uint64_t, FLAG_CF)
    if out:
        s.rflags |= FLAG_CF
    s.gpr[RAX] = (s.gpr[RAX] & ~cython.cast(uint64_t, 0xFF)) | (al & 0xFF)
    _result_flags(s, cython.cast(uint8_t, al))
    return GO_ON


def _ascii(s, subtract):
    """AAA and AAS."""
    ax: uint64_t = s.gpr[RAX] & 0xFFFF
    s.rflags &= ~cython.cast(uint64_t, FLAG_CF)
    if (ax & 15) > 9 or (s.rflags & FLAG_AF):
        ax = (ax - 0x106) if subtract else (ax + 0x106)
        s.rflags |= FLAG_AF | FLAG_CF
    else:
        s.rflags &= ~cython.cast(uint64_t, FLAG_AF)
    s.gpr[RAX] = (s.gpr[RAX] & ~cython.cast(uint64_t, 0xFFFF)) | (ax & 0xFF0F)
    return GO_ON


def _push_all(s, size):
    """PUSHA."""
    frame: uint8_t[32]
    linear: uint64_t
    mask: uint64_t = stack_mask(s)
    at: uint64_t = (s.gpr[RSP] - 8 * size) & mask
    k: uint32_t
    r: cython.int = linear_address(s, SS, at, 8 * size, 1, cython.address(linear))
    if r != GO_ON:
        return r
    for k in range(8):
        if size == 4:
            cython.cast(cython.pointer(uint32_t), cython.address(frame[4 * (7 - k)]))[0] = cython.cast(
                uint32_t, s.gpr[k]
            )
        else:
            frame[2 * (7 - k)] = cython.cast(uint8_t, s.gpr[k])
            frame[2 * (7 - k) + 1] = cython.cast(uint8_t, s.gpr[k] >> 8)
    for k in range(8):  # a fault is that of the first push
        r = probe_write(s, linear + (7 - k) * size, size, ACCESS_WRITE)
        if r != GO_ON:
            return r
    r = write_linear(s, linear, cython.address(frame[0]), 8 * size, ACCESS_WRITE)
    if r == GO_ON:
        s.gpr[RSP] = (s.gpr[RSP] & ~mask) | at
    return r


def _pop_all(s, size):
    """POPA; the stored stack pointer is skipped."""
    values: uint64_t[8]
    linear: uint64_t
    mask: uint64_t = stack_mask(s)
    at: uint64_t = s.gpr[RSP] & mask
    k: uint32_t
    r: cython.int = linear_address(s, SS, at, 8 * size, 0, cython.address(linear))
    for k in range(8):
        if r == GO_ON:
            r = read_value(s, linear + k * size, size, 0, cython.address(values[7 - k]))
    if r != GO_ON:
        return r
    for k in range(8):
        if k == RSP:
            continue
        if size == 4:
            s.gpr[k] = values[k]
        else:
            s.gpr[k] = (s.gpr[k] & ~cython.cast(uint64_t, 0xFFFF)) | values[k]
    s.gpr[RSP] = (s.gpr[RSP] & ~mask) | ((at + 8 * size) & mask)
    return GO_ON


def _bound(s, i):
    """BOUND: #BR outside the two limits in memory."""
    linear: uint64_t
    low: uint64_t
    high: uint64_t
    size: uint32_t = i.operand_size
    value: int64_t
    r: cython.int = operand_address(s, i, size, 0, cython.address(linear))
    if r == GO_ON:
        r = read_value(s, linear, size, 0, cython.address(low))
    if r != GO_ON:
        return r
    value = cython.cast(int16_t, s.gpr[i.reg]) if size == 2 else cython.cast(int32_t, s.gpr[i.reg])
    if value < (cython.cast(int16_t, low) if size == 2 else cython.cast(int32_t, low)):
        return raise_exception(s, 5)  # before the upper limit is read
    r = linear_address(s, i.segment, effective_address(s, i) + size, size, 0, cython.address(linear))
    if r == GO_ON:
        r = read_value(s, linear, size, 0, cython.address(high))
    if r != GO_ON:
        return r
    if value > (cython.cast(int16_t, high) if size == 2 else cython.cast(int32_t, high)):
        return raise_exception(s, 5)
    return GO_ON


def legacy_instruction(s, i):
    """Execute one, or raise #UD."""
    o: uint32_t = i.opcode
    al: uint32_t = cython.cast(uint32_t, s.gpr[RAX]) & 0xFF
    base: uint32_t = cython.cast(uint32_t, i.immediate) & 0xFF
    if o == 0x27 or o == 0x2F:
        return _decimal(s, o == 0x2F)
    if o == 0x37 or o == 0x3F:
        return _ascii(s, o == 0x3F)
    if o == 0x60:
        return _push_all(s, i.operand_size)
    if o == 0x61:
        return _pop_all(s, i.operand_size)
    if o == 0x62:
        return _bound(s, i)
    if o == 0xD4:
        if base == 0:
            return raise_exception(s, 0)
        s.gpr[RAX] = (s.gpr[RAX] & ~cython.cast(uint64_t, 0xFFFF)) | ((al // base) << 8) | (al % base)
        _result_flags(s, cython.cast(uint8_t, al % base))
        return GO_ON
    if o == 0xD5:
        al += base * (cython.cast(uint32_t, s.gpr[RAX] >> 8) & 0xFF)
        s.gpr[RAX] = (s.gpr[RAX] & ~cython.cast(uint64_t, 0xFFFF)) | (al & 0xFF)
        _result_flags(s, cython.cast(uint8_t, al))
        return GO_ON
    if o == 0xD6:
        s.gpr[RAX] |= 0xFF
        if (s.rflags & FLAG_CF) == 0:
            s.gpr[RAX] &= ~cython.cast(uint64_t, 0xFF)
        return GO_ON
    return raise_exception(s, 6)
