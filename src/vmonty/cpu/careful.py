"""The operands of careful blocks: one instruction, whose writes take effect when it is done, whatever they meet."""

import cython
from cython.cimports.vmonty.cpu.breakpoints import watch_access
from cython.cimports.vmonty.cpu.codecache import (
    CodeCache,
    code_written,
    is_code_page,
    string_function,
)
from cython.cimports.vmonty.cpu.exclusive import exclusive_begin, exclusive_end
from cython.cimports.vmonty.cpu.mmio import mmio_read, mmio_write
from cython.cimports.vmonty.cpu.paging import Translation
from cython.cimports.vmonty.cpu.state import (
    ACCESS_USER,
    ACCESS_WRITE,
    LEAVE_EVENT,
    LEAVE_EXIT,
    OBSERVE_MEMORY,
    misaligned,
    raise_error,
)
from cython.cimports.vmonty.cpu.tlb import (
    SLOW_ALIGNED,
    SLOW_LOCK,
    SLOW_READ,
    SLOW_SIZE_SHIFT,
    SLOW_STACK,
    SLOW_WRITE,
    bounce_buffer,
    check_canonical,
    copy_bytes,
    leave_block,
    look,
    note_access,
    refuse,
)


def careful_access(s, va, what, host_rip):
    """Give translated code of a careful block an address for one operand; writes take effect at the commit."""
    size: uint32_t = (what >> SLOW_SIZE_SHIFT) & 0x3FF
    write: cython.int = 1 if what & SLOW_WRITE else 0
    access: cython.int = (ACCESS_WRITE if write else 0) | (ACCESS_USER if s.cpl == 3 else 0)
    k: uint32_t = s.careful_count
    t: Translation
    u: Translation
    r: cython.int
    first: uint32_t = size
    to: cython.p_uchar
    s.slow_host_rip = host_rip
    s.slow_what = what
    if s.careful_late:
        return cython.cast(uint64_t, bounce_buffer(s, 0, 0))
    if k >= 4 or size > 448:  # the last buffer's room behind an aligned start
        return leave_block(s, LEAVE_EXIT, what, host_rip)
    r = 0
    if what & SLOW_ALIGNED and va & (size - 1):
        r = raise_error(s, 13, 0)
    if not r:
        r = check_canonical(s, va, what & SLOW_STACK)
    if not r and misaligned(s, va, size):
        r = raise_error(s, 17, 0)
    if not r:
        r = look(s, va, access, cython.address(t))
    if r:
        return refuse(s, r, what, host_rip)
    u.host = 0
    u.physical = 0
    if (va & 0xFFF) + size > 4096:
        first = 4096 - (va & 0xFFF)
        r = check_canonical(s, va + size - 1, what & SLOW_STACK)
        if not r:
            r = look(s, va + first, access, cython.address(u))
        if r:
            return refuse(s, r, what, host_rip)
    if s.watch:
        watch_access(s, va, size, write)
    if what & SLOW_LOCK and t.host and (first == size or u.host):
        return _locked(s, va, size, first, cython.address(t), cython.address(u))
    if first == size and t.host and not s.observe and not (write and is_code_page(s, t.host)):
        return t.host + (va & 0xFFF)
    to = bounce_buffer(s, k, va)
    if what & SLOW_READ or not write:
        r = 0
        if t.host:
            copy_bytes(to, cython.cast(cython.p_uchar, t.host + (va & 0xFFF)), first)
        else:
            r = mmio_read(s, t.physical | (va & 0xFFF), to, first)
        if not r and first < size:
            if u.host:
                copy_bytes(to + first, cython.cast(cython.p_uchar, u.host), size - first)
            else:
                r = mmio_read(s, u.physical, to + first, size - first)
        if r:
            return leave_block(s, r, what, host_rip)
        if s.observe & OBSERVE_MEMORY:
            note_access(s, va, t.physical | (va & 0xFFF), to, size, 0)
    if write:
        _keep_write(s, va, size, first, cython.address(t), cython.address(u))
    return cython.cast(uint64_t, to)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _locked(s: cython.pointer(CpuState), va: uint64_t, size: uint32_t, first: uint32_t,
            t: cython.pointer(Translation), u: cython.pointer(Translation)) -> uint64_t:  # fmt: skip
    """Give the operand of a locked instruction, its only one: where it is, or a copy while this processor is alone.

    An observer is told what was there just before and just behind the instruction.
    """
    to: cython.p_uchar = cython.cast(cython.p_uchar, t.host + (va & 0xFFF))
    s.careful_locked = 1
    if is_code_page(s, t.host):
        code_written(s, t.host)
    if first < size and is_code_page(s, u.host):
        code_written(s, u.host)
    if first < size and u.host != t.host + 4096:
        exclusive_begin(s)
        s.careful_locked = 0
        to = bounce_buffer(s, s.careful_count, va)
        copy_bytes(to, cython.cast(cython.p_uchar, t.host + (va & 0xFFF)), first)
        copy_bytes(to + first, cython.cast(cython.p_uchar, u.host), size - first)
    elif not s.observe:
        s.careful_locked = 0
        return cython.cast(uint64_t, to)
    if s.observe & OBSERVE_MEMORY:
        note_access(s, va, t.physical | (va & 0xFFF), to, size, 0)
    _keep_write(s, va, size, first, t, u)
    return cython.cast(uint64_t, to)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _keep_write(s: cython.pointer(CpuState), va: uint64_t, size: uint32_t, first: uint32_t,
                t: cython.pointer(Translation), u: cython.pointer(Translation)) -> cython.void:  # fmt: skip
    """Note a write for the commit."""
    k: uint32_t = s.careful_count
    s.careful_va[k] = va
    s.careful_size[k] = size
    s.careful_write[k] = first
    s.careful_host[k] = t.host
    s.careful_physical[k] = t.physical
    s.careful_va2[k] = u.host
    s.careful_physical2[k] = u.physical
    s.careful_count = k + 1


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _commit_part(s: cython.pointer(CpuState), host: uint64_t, physical: uint64_t, offset: uint32_t,
                 data: cython.p_uchar, size: uint32_t) -> cython.void:  # fmt: skip
    if host:
        if is_code_page(s, host):
            code_written(s, host)
        copy_bytes(cython.cast(cython.p_uchar, host + offset), data, size)
    else:
        mmio_write(s, physical | offset, data, size)


def careful_commit(s):
    """Carry out the writes of a careful block; those to device memory are queued.

    An x87 store with an unmasked exception (but that of precision) leaves its operand alone: it is reported by the
    next x87 instruction. Its operand is not even looked at then. SDM, "Overview of x87 FPU Exceptions".
    """
    restore: string_function
    k: uint32_t
    first: uint32_t
    data: cython.p_uchar
    if s.careful_x87:
        s.careful_x87 = 0
        if s.careful_fsw & ~s.careful_fcw & 0x1F:
            s.careful_count = 0
            if s.careful_late:
                s.careful_late = 0
                s.event.pending = 0
    if s.careful_late:
        s.careful_late = 0
        restore = cython.cast(
            string_function,
            cython.cast(cython.p_void, cython.cast(cython.pointer(CodeCache), s.translator).fpu[1]),
        )
        restore(cython.cast(uint64_t, bounce_buffer(s, 1, 0)), 0, 0)
        return LEAVE_EVENT
    for k in range(s.careful_count):
        first = s.careful_write[k]
        data = bounce_buffer(s, k, s.careful_va[k])
        if s.careful_locked:
            data = cython.cast(cython.p_uchar, s.careful_host[k] + (s.careful_va[k] & 0xFFF))
        if s.observe & OBSERVE_MEMORY:
            note_access(
                s, s.careful_va[k], s.careful_physical[k] | (s.careful_va[k] & 0xFFF), data, s.careful_size[k], 1
            )
        if s.careful_locked:
            continue
        _commit_part(s, s.careful_host[k], s.careful_physical[k], s.careful_va[k] & 0xFFF, data, first)
        if first < s.careful_size[k]:
            _commit_part(s, s.careful_va2[k], s.careful_physical2[k], 0, data + first, s.careful_size[k] - first)
    s.careful_count = 0
    s.careful_locked = 0
    if s.exclusive:
        exclusive_end(s)
    return 0
