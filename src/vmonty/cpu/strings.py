"""String instructions: MOVS, CMPS, STOS, LODS, SCAS, with and without REP.

A repeated instruction works in stretches that stay within a page on both sides; registers are right after each
stretch, so a fault, an exit or the run flag may stop it anywhere and it resumes by being executed again.
SDM, "REP/REPE/REPZ/REPNE/REPNZ - Repeat String Operation Prefix".
"""

import cython
from cython.cimports.vmonty.cpu.boundary import data_trap
from cython.cimports.vmonty.cpu.codecache import CodeCache, string_function
from cython.cimports.vmonty.cpu.mmio import mmio_done
from cython.cimports.vmonty.cpu.segmentation import linear_address
from cython.cimports.vmonty.cpu.state import (
    ACCESS_READ,
    ACCESS_WRITE,
    AR_DB,
    ARITHMETIC_FLAGS,
    DEBUGCTL_BTF,
    ES,
    FLAG_AF,
    FLAG_CF,
    FLAG_DF,
    FLAG_OF,
    FLAG_PF,
    FLAG_RF,
    FLAG_SF,
    FLAG_TF,
    FLAG_ZF,
    LEAVE_RETRY,
    MODE_LONG64,
    RAX,
    RCX,
    RDI,
    RSI,
)
from cython.cimports.vmonty.cpu.tlb import host_of, read_value, write_value


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _masked(value: uint64_t, size: cython.int) -> uint64_t:
    if size == 8:
        return value
    if size == 4:
        return cython.cast(uint32_t, value)
    if size == 2:
        return value & 0xFFFF
    return value & 0xFF


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _set(s: cython.pointer(CpuState), g: cython.int, value: uint64_t, size: cython.int) -> cython.void:
    """Write a register the way an address-size or operand-size update does."""
    if size == 8:
        s.gpr[g] = value
    elif size == 4:
        s.gpr[g] = cython.cast(uint32_t, value)
    elif size == 2:
        s.gpr[g] = (s.gpr[g] & ~cython.cast(uint64_t, 0xFFFF)) | (value & 0xFFFF)
    else:
        s.gpr[g] = (s.gpr[g] & ~cython.cast(uint64_t, 0xFF)) | (value & 0xFF)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _compare(s: cython.pointer(CpuState), x: uint64_t, y: uint64_t, size: cython.int) -> cython.void:
    """Set the flags of x - y."""
    bits: cython.int = size * 8
    d: uint64_t
    f: uint64_t = 0
    p: uint64_t
    x = _masked(x, size)
    y = _masked(y, size)
    d = _masked(x - y, size)
    if x < y:
        f |= FLAG_CF
    if d == 0:
        f |= FLAG_ZF
    if (d >> (bits - 1)) & 1:
        f |= FLAG_SF
    if (((x ^ y) & (x ^ d)) >> (bits - 1)) & 1:
        f |= FLAG_OF
    if (x ^ y ^ d) & 0x10:
        f |= FLAG_AF
    p = d ^ (d >> 4)
    if not (0x6996 >> (p & 15)) & 1:
        f |= FLAG_PF
    s.rflags = (s.rflags & ~cython.cast(uint64_t, ARITHMETIC_FLAGS)) | f


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _one(s: cython.pointer(CpuState), i: cython.pointer(Insn), kind: cython.int, size: cython.int) -> cython.int:
    """Execute one iteration, count not included."""
    r: cython.int
    step: uint64_t = cython.cast(uint64_t, size)
    source: uint64_t = 0
    target: uint64_t = 0
    x: uint64_t = 0
    y: uint64_t = 0
    if s.rflags & FLAG_DF:
        step = 0 - step
    if kind == 4 or kind == 1:  # CMPS reads ES:rDI first: where both fault, processors report that one
        r = linear_address(s, ES, _masked(s.gpr[RDI], i.address_size), size, 0, cython.address(target))
        if not r:
            r = read_value(s, target, size, ACCESS_READ, cython.address(y))
        if r:
            return r
    if kind == 0 or kind == 1 or kind == 3:
        r = linear_address(s, i.segment, _masked(s.gpr[RSI], i.address_size), size, 0, cython.address(source))
        if r:
            return r
        r = read_value(s, source, size, ACCESS_READ, cython.address(x))
        if r:
            return r
    if kind == 0 or kind == 2:
        r = linear_address(s, ES, _masked(s.gpr[RDI], i.address_size), size, 1, cython.address(target))
        if r:
            return r
    if kind == 0 or kind == 2:
        r = write_value(s, target, size, ACCESS_WRITE, x if kind == 0 else s.gpr[RAX])
        if r:
            return r
    elif kind == 1 or kind == 4:
        _compare(s, x if kind == 1 else s.gpr[RAX], y, size)
    else:
        _set(s, RAX, x, size)
    mmio_done(s)
    if kind != 2 and kind != 4:
        _set(s, RSI, s.gpr[RSI] + step, i.address_size)
    if kind != 3:
        _set(s, RDI, s.gpr[RDI] + step, i.address_size)
    return 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _room(s: cython.pointer(CpuState), segment: cython.int, offset: uint64_t, shift: cython.int,
          address_size: cython.int) -> uint64_t:  # fmt: skip
    """Give how many elements of 1 << ``shift`` bytes lie in the segment from a valid one on, until the address wraps.

    Downwards in an expand-down segment, where that hangs on its limit, only the element itself.
    """
    rights: uint32_t = s.segs[segment].access_rights
    last: uint64_t = ~cython.cast(uint64_t, 0)
    if s.rflags & FLAG_DF:
        if s.mode != MODE_LONG64 and not rights & 8 and rights & 4:
            return 1
        return (offset >> shift) + 1
    if address_size != 8:
        last = cython.cast(uint64_t, 0xFFFF) if address_size == 2 else cython.cast(uint64_t, 0xFFFFFFFF)
    if s.mode != MODE_LONG64:
        if rights & 8 or not rights & 4:
            last = min(last, s.segs[segment].limit)
        elif not rights & AR_DB:  # expand-down
            last = min(last, cython.cast(uint64_t, 0xFFFF))
    if last - offset == ~cython.cast(uint64_t, 0):
        return 4096
    return (last - offset + 1) >> shift


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _side(
    s: cython.pointer(CpuState), segment: cython.int, register: cython.int, shift: cython.int, write: cython.int,
    address_size: cython.int, linear: cython.pointer(uint64_t), n: cython.pointer(uint64_t),
) -> cython.int:  # fmt: skip
    """Find the linear address of a side's next element, and cut ``n`` to the elements in its page and segment.

    0 elements when that one lies in two pages.
    """
    offset: uint64_t = _masked(s.gpr[register], address_size)
    at: uint64_t
    size: cython.int = 1 << shift
    r: cython.int = linear_address(s, segment, offset, size, write, linear)
    if r:
        return r
    at = linear[0] & 0xFFF
    if not s.rflags & FLAG_DF:
        n[0] = min(n[0], (4096 - at) >> shift)
    elif at + size <= 4096:
        n[0] = min(n[0], (at >> shift) + 1)
    else:
        n[0] = 0
    n[0] = min(n[0], _room(s, segment, offset, shift, address_size))
    return 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _element(at: uint64_t, size: cython.int) -> uint64_t:
    if size == 1:
        return cython.cast(cython.p_uchar, at)[0]
    if size == 2:
        return cython.cast(cython.pointer(uint16_t), at)[0]
    if size == 4:
        return cython.cast(cython.pointer(uint32_t), at)[0]
    return cython.cast(cython.pointer(uint64_t), at)[0]


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _move_down(to: uint64_t, from_: uint64_t, n: uint64_t, size: cython.int) -> cython.void:
    """Copy elements from the highest, which is given, to the lowest."""
    while n:
        if size == 1:
            cython.cast(cython.p_uchar, to)[0] = cython.cast(cython.p_uchar, from_)[0]
        elif size == 2:
            cython.cast(cython.pointer(uint16_t), to)[0] = cython.cast(cython.pointer(uint16_t), from_)[0]
        elif size == 4:
            cython.cast(cython.pointer(uint32_t), to)[0] = cython.cast(cython.pointer(uint32_t), from_)[0]
        else:
            cython.cast(cython.pointer(uint64_t), to)[0] = cython.cast(cython.pointer(uint64_t), from_)[0]
        to -= size
        from_ -= size
        n -= 1


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _scan(s: cython.pointer(CpuState), i: cython.pointer(Insn), from_: uint64_t, to: uint64_t, n: uint64_t,
          size: cython.int) -> uint64_t:  # fmt: skip
    """Compare elements until REPE or REPNE ends, or ``n`` are done: gives how many. Without ``from_`` it is SCAS."""
    step: uint64_t = cython.cast(uint64_t, size)
    x: uint64_t = _masked(s.gpr[RAX], size)
    y: uint64_t = 0
    done: uint64_t = 0
    wanted: cython.int = i.rep == 0xF3  # it goes on while they are equal
    if s.rflags & FLAG_DF:
        step = 0 - step
    while done < n:
        if from_:
            x = _element(from_, size)
            from_ += step
        y = _element(to, size)
        to += step
        done += 1
        if (x == y) != wanted:
            break
    _compare(s, x, y, size)
    return done


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _stretch(s: cython.pointer(CpuState), i: cython.pointer(Insn), kind: cython.int, size: cython.int,
             count: uint64_t, done: cython.pointer(uint64_t)) -> cython.int:  # fmt: skip
    """Do as many iterations as fit in the current pages, of all but LODS; ``done`` 0 when it cannot be two or more."""
    r: cython.int
    c: cython.pointer(CodeCache) = cython.cast(cython.pointer(CodeCache), s.translator)
    source: uint64_t = 0
    target: uint64_t = 0
    from_: uint64_t = 0
    to: uint64_t = 0
    n: uint64_t = count
    bytes_: uint64_t
    moved: uint64_t
    f: string_function
    writes: cython.int = kind == 0 or kind == 2
    shift: cython.int = 0 if size == 1 else (1 if size == 2 else (2 if size == 4 else 3))
    done[0] = 0
    r = 0
    if kind == 0:
        r = _side(s, i.segment, RSI, shift, 0, i.address_size, cython.address(source), cython.address(n))
    if not r:
        r = _side(s, ES, RDI, shift, writes, i.address_size, cython.address(target), cython.address(n))
    if not r and kind == 1:
        r = _side(s, i.segment, RSI, shift, 0, i.address_size, cython.address(source), cython.address(n))
    if r or n < 2:
        return r
    if kind == 0:
        r = host_of(s, source, ACCESS_READ, cython.address(from_))
    if not r:
        r = host_of(s, target, ACCESS_WRITE if writes else ACCESS_READ, cython.address(to))
    if not r and kind == 1:
        r = host_of(s, source, ACCESS_READ, cython.address(from_))
    if r or to == 0 or (kind < 2 and from_ == 0):
        return r
    bytes_ = n << shift
    if not writes:
        n = _scan(s, i, from_, to, n, size)
    elif kind == 2:
        f = cython.cast(string_function, cython.cast(cython.p_void, c.fill[shift]))
        f(to - bytes_ + size if s.rflags & FLAG_DF else to, n, s.gpr[RAX])
    elif to - from_ >= bytes_ and from_ - to >= bytes_:  # no overlap: any order does
        f = cython.cast(string_function, cython.cast(cython.p_void, c.copy[0]))
        if s.rflags & FLAG_DF:
            f(to - bytes_ + size, from_ - bytes_ + size, bytes_)
        else:
            f(to, from_, bytes_)
    elif s.rflags & FLAG_DF:
        _move_down(to, from_, n, size)
    else:
        f = cython.cast(string_function, cython.cast(cython.p_void, c.copy[shift]))
        f(to, from_, n)
    moved = 0 - (n << shift) if s.rflags & FLAG_DF else n << shift
    if kind < 2:
        _set(s, RSI, s.gpr[RSI] + moved, i.address_size)
    _set(s, RDI, s.gpr[RDI] + moved, i.address_size)
    done[0] = n
    return 0


def string_instruction(s, i):
    """Execute one string instruction. 0 when it is finished, else LEAVE_*; LEAVE_RETRY when it was interrupted.

    A fault leaves rSI, rDI and rCX as the iterations before it did, and the flags as they were before the first. SDM,
    "REP/REPE/REPZ/REPNE/REPNZ".
    """
    r: cython.int
    kind: cython.int  # 0 MOVS 1 CMPS 2 STOS 3 LODS 4 SCAS
    size: cython.int = i.operand_size if i.opcode & 1 else 1
    code: cython.int = i.opcode & 0xFE
    count: uint64_t
    done: uint64_t = 0
    flags: uint64_t = s.rflags & ARITHMETIC_FLAGS
    if code == 0xA4:
        kind = 0
    elif code == 0xA6:
        kind = 1
    elif code == 0xAA:
        kind = 2
    elif code == 0xAC:
        kind = 3
    else:
        kind = 4
    if not i.rep:
        return _one(s, i, kind, size)
    if i.address_size == 4:  # processors cut these before the first iteration, even when there is none
        _set(s, RCX, s.gpr[RCX], 4)
        if kind == 0 or kind == 2:
            _set(s, RDI, s.gpr[RDI], 4)
        if kind == 0:
            _set(s, RSI, s.gpr[RSI], 4)
    while True:
        count = _masked(s.gpr[RCX], i.address_size)
        if count == 0:
            return 0
        done = 0
        r = 0
        if kind != 3 and not s.rflags & FLAG_TF and not s.monitor_trap:
            r = _stretch(s, i, kind, size, count, cython.address(done))
        if done == 0 and not r:
            r = _one(s, i, kind, size)
            done = 1
        if r:
            s.rflags = (s.rflags & ~cython.cast(uint64_t, ARITHMETIC_FLAGS)) | flags
            return r
        _set(s, RCX, s.gpr[RCX] - done, i.address_size)
        if kind == 1 or kind == 4:
            if i.rep == 0xF3 and not s.rflags & FLAG_ZF:
                return 0
            if i.rep == 0xF2 and s.rflags & FLAG_ZF:
                return 0
        if not s.run or s.watch_hits or s.mmio_writes_count or s.rflags & FLAG_TF or s.monitor_trap or s.observe:
            if _masked(s.gpr[RCX], i.address_size) == 0:
                return 0
            # Traps and interrupts behind any iteration but the last push RF.
            data_trap(s)
            s.observe_again = s.observe
            s.rflags |= FLAG_RF
            if s.rflags & FLAG_TF and not s.debugctl & DEBUGCTL_BTF:
                s.pending_debug |= 0x4000
            if s.monitor_trap:
                s.monitor_trap = 2
            return LEAVE_RETRY
