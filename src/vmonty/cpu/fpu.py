"""Saving and restoring the x87, SSE and AVX state for the guest: FXSAVE, XSAVE, FNSTENV, FNSAVE and their reverse.

The guest's state is live in the host's registers, so the host's own instruction does the work on a buffer of ours,
through a stub of the code cache. The last-instruction and last-operand pointers would show where our code lies: they
are stored as zero. What the host's instruction would fault on is checked first. SDM, "XSAVE-Supported Features and
State-Component Bitmaps", "Operation of XRSTOR".
"""

import cython
from cython.cimports.vmonty.cpu.codecache import CodeCache, string_function
from cython.cimports.vmonty.cpu.segmentation import operand_address
from cython.cimports.vmonty.cpu.state import (
    ACCESS_READ,
    ACCESS_WRITE,
    CR4_OSXSAVE,
    MODE_LONG64,
    RAX,
    RDX,
    has_feature,
    misaligned,
    raise_error,
    raise_exception,
)
from cython.cimports.vmonty.cpu.tlb import probe_write, read_linear, write_linear
from cython.cimports.vmonty.cpu.vmx_exit import SECOND_XSAVES, vmx_lacks

from vmonty.cpu import opcodes

HIGH_XMM = cython.declare(cython.int, 288)  # xmm8 and the upper half of ymm8 in an XSAVE area
HIGH_YMM = cython.declare(cython.int, 704)
_XSAVEC = cython.declare(cython.int, opcodes.FEATURES.index("xsavec"))


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _check_area(s: cython.pointer(CpuState), linear: uint64_t, mask: uint64_t) -> cython.int:
    """#GP(0) for an area that is not aligned; before that #AC, for less than four bytes (Intel's processors)."""
    if misaligned(s, linear, 4):
        return raise_error(s, 17, 0)
    return raise_error(s, 13, 0) if linear & mask else 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _host(s: cython.pointer(CpuState), operation: cython.int, buffer: cython.p_uchar, mask: uint64_t) -> cython.void:
    c: cython.pointer(CodeCache) = cython.cast(cython.pointer(CodeCache), s.translator)
    f: string_function = cython.cast(string_function, cython.cast(cython.p_void, c.fpu[operation]))
    f(cython.cast(uint64_t, buffer), mask, 0)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _aligned(memory: cython.p_uchar) -> cython.p_uchar:
    return cython.cast(cython.p_uchar, (cython.cast(uint64_t, memory) + 63) & ~cython.cast(uint64_t, 63))


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _buffer(s: cython.pointer(CpuState)) -> cython.p_uchar:
    return _aligned(cython.cast(cython.p_uchar, cython.address(s.bounce[0][0])))


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _zero(at: cython.p_uchar, size: cython.int) -> cython.void:
    k: cython.int
    for k in range(size):
        at[k] = 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _copy(to: cython.p_uchar, source: cython.p_uchar, size: cython.int) -> cython.void:
    k: cython.int
    for k in range(size):
        to[k] = source[k]


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _save(s: cython.pointer(CpuState), operation: cython.int, b: cython.p_uchar, mask: uint64_t) -> cython.void:
    """Save into a buffer that holds the guest's bytes; outside 64-bit mode those of xmm8 to ymm15 stay."""
    kept: cython.uchar[256]
    if s.mode == MODE_LONG64:
        _host(s, operation, b, mask)
        return
    _copy(cython.address(kept[0]), b + HIGH_XMM, 128)
    _copy(cython.address(kept[128]), b + HIGH_YMM, 128)
    _host(s, operation, b, mask)
    _copy(b + HIGH_XMM, cython.address(kept[0]), 128)
    _copy(b + HIGH_YMM, cython.address(kept[128]), 128)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _restore(s: cython.pointer(CpuState), operation: cython.int, b: cython.p_uchar, mask: uint64_t) -> cython.void:
    """Restore from a buffer; outside 64-bit mode the registers xmm8 to ymm15 stay as they are."""
    memory: cython.uchar[1792]
    before: cython.p_uchar = _aligned(cython.address(memory[0]))
    after: cython.p_uchar = before + 832
    if s.mode == MODE_LONG64:
        _host(s, operation, b, mask)
        return
    _zero(before + 512, 64)
    _zero(after + 512, 64)
    _host(s, 2, before, 6)
    _host(s, operation, b, mask)
    _host(s, 2, after, 6)
    _copy(after + HIGH_XMM, before + HIGH_XMM, 128)
    _copy(after + HIGH_YMM, before + HIGH_YMM, 128)
    after[512] |= before[512]
    _host(s, 3, after, 6)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _xsave(s: cython.pointer(CpuState), linear: uint64_t, compact: cython.int) -> cython.int:
    """XSAVE, or XSAVEC: with no more than x87, SSE and AVX both have each component at the same place."""
    b: cython.p_uchar = _buffer(s)
    mask: uint64_t = ((s.gpr[RDX] << 32) | cython.cast(uint32_t, s.gpr[RAX])) & s.xcr0
    size: uint32_t = 832 if mask & 4 else 576
    r: cython.int
    r = _check_area(s, linear, 63)
    if r:
        return r
    r = probe_write(s, linear, size, ACCESS_WRITE)
    if not r:
        r = read_linear(s, linear, b, size, ACCESS_READ)
    if r:
        return r
    _save(s, 12 if compact else 2, b, mask)
    if mask & 1 and (not compact or b[512] & 1):
        _zero(b + 6, 18)
    return write_linear(s, linear, b, size, ACCESS_WRITE)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _xrstor(s: cython.pointer(CpuState), linear: uint64_t, compact_only: cython.int) -> cython.int:
    """XRSTOR of either format, or XRSTORS, which takes the compacted one alone."""
    b: cython.p_uchar = _buffer(s)
    mask: uint64_t = ((s.gpr[RDX] << 32) | cython.cast(uint32_t, s.gpr[RAX])) & s.xcr0
    header: cython.pointer(uint64_t) = cython.cast(cython.pointer(uint64_t), b + 512)
    k: cython.int
    r: cython.int
    r = _check_area(s, linear, 63)
    if r:
        return r
    r = read_linear(s, linear, b, 576, ACCESS_READ)
    if r:
        return r
    if header[1] >> 63:
        if not has_feature(s, _XSAVEC):
            return raise_error(s, 13, 0)
        if (header[1] << 1) >> 1 & ~s.xcr0 or header[0] & ~header[1] or header[0] >> 63:
            return raise_error(s, 13, 0)
        for k in range(2, 8):
            if header[k]:
                return raise_error(s, 13, 0)
    elif compact_only or header[0] & ~s.xcr0 or header[1] or header[2]:
        return raise_error(s, 13, 0)
    if header[0] & mask & 4:
        r = read_linear(s, linear + 576, b + 576, 256, ACCESS_READ)
        if r:
            return r
    # MXCSR is loaded with the SSE state; in the standard format also with AVX, and from an area in its initial state.
    if mask & 6 if not header[1] else mask & header[0] & 2:
        if cython.cast(cython.pointer(uint32_t), b + 24)[0] >> 16:
            return raise_error(s, 13, 0)
    _restore(s, 3, b, mask)
    return 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _fxsave(s: cython.pointer(CpuState), i: cython.pointer(Insn), linear: uint64_t) -> cython.int:
    b: cython.p_uchar = _buffer(s)
    r: cython.int
    r = _check_area(s, linear, 15)
    if r:
        return r
    r = probe_write(s, linear, 512, ACCESS_WRITE)
    if not r:
        r = read_linear(s, linear, b, 512, ACCESS_READ)
    if r:
        return r
    _save(s, 0, b, 0)
    _zero(b + 6, 18)
    return write_linear(s, linear, b, 512, ACCESS_WRITE)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _fxrstor(s: cython.pointer(CpuState), linear: uint64_t) -> cython.int:
    b: cython.p_uchar = _buffer(s)
    r: cython.int
    r = _check_area(s, linear, 15)
    if r:
        return r
    r = read_linear(s, linear, b, 512, ACCESS_READ)
    if r:
        return r
    if cython.cast(cython.pointer(uint32_t), b + 24)[0] >> 16:
        return raise_error(s, 13, 0)
    _restore(s, 1, b, 0)
    return 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _environment(s: cython.pointer(CpuState), i: cython.pointer(Insn), linear: uint64_t) -> cython.int:
    """FNSTENV, FNSAVE, FLDENV, FRSTOR by opcode D9 or DD and /4 or /6."""
    b: cython.p_uchar = _buffer(s)
    narrow: cython.int = 1 if i.operand_size == 2 else 0
    whole: cython.int = 1 if i.opcode == 0xDD else 0
    size: uint32_t = (14 if narrow else 28) + (80 if whole else 0)
    r: cython.int
    operation: cython.int = 4 + narrow + (4 if whole else 0)
    if i.modrm >> 3 & 7 == 4:
        r = read_linear(s, linear, b, size, ACCESS_READ)
        if not r:
            _host(s, operation + 2, b, 0)
        return r
    r = probe_write(s, linear, size, ACCESS_WRITE)
    if r:
        return r
    _host(s, operation, b, 0)
    if narrow:
        _zero(b + 6, 8)
    else:
        _zero(b + 12, 16)
    return write_linear(s, linear, b, size, ACCESS_WRITE)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _exception_waits(s: cython.pointer(CpuState)) -> cython.int:
    """Is there an unmasked x87 exception, which instructions that wait for it report?"""
    b: cython.p_uchar = _buffer(s)
    _host(s, 0, b, 0)
    return (b[2] & ~b[0] & 0x3F) != 0


def fpu_instruction(s, i):
    """Execute one of the instructions of class ``fpu``."""
    linear: uint64_t = 0
    r: cython.int
    reg: cython.int = i.modrm >> 3 & 7
    if i.map == 0:
        if s.cr0 & 0xC:
            return raise_exception(s, 7)
        if reg == 4 and _exception_waits(s):  # FLDENV and FRSTOR; the host's own would raise it in the middle of us
            return raise_exception(s, 16)
        r = operand_address(s, i, 28, 0, cython.address(linear))
        if r:
            return r
        return _environment(s, i, linear)
    if reg >= 4 or i.opcode == 0xC7:
        if not s.cr4 & CR4_OSXSAVE:
            return raise_exception(s, 6)
    elif s.cr0 & 4:
        return raise_exception(s, 7)
    if i.opcode == 0xC7 and reg != 4:  # XSAVES, XRSTORS: there are no supervisor components, IA32_XSS is 0
        if vmx_lacks(s, SECOND_XSAVES):
            return raise_exception(s, 6)
        if s.cpl:
            return raise_error(s, 13, 0)
    if s.cr0 & 8:
        return raise_exception(s, 7)
    r = operand_address(s, i, 512, 0, cython.address(linear))
    if r:
        return r
    if reg == 0:
        return _fxsave(s, i, linear)
    if reg == 1:
        return _fxrstor(s, linear)
    if i.opcode == 0xC7:
        return _xrstor(s, linear, 1) if reg == 3 else _xsave(s, linear, 1)
    if reg == 5:
        return _xrstor(s, linear, 0)
    return _xsave(s, linear, 0)


def components_in_use(s):
    """XINUSE: which components are not in their initial state. SDM, "Processor Tracking of XSAVE-Managed State"."""
    b: cython.p_uchar = _buffer(s)
    _zero(b + 512, 64)
    _host(s, 2, b, s.xcr0)
    return cython.cast(cython.pointer(uint64_t), b + 512)[0]
