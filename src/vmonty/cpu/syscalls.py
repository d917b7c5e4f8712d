"""SYSCALL, SYSRET, SYSENTER, SYSEXIT, SWAPGS. SDM, "Performing Fast Calls to System Procedures"."""

import cython
from cython.cimports.vmonty.cpu.segments import long_mode, protected_mode
from cython.cimports.vmonty.cpu.state import (
    CS,
    EFER_LMA,
    EFER_SCE,
    FLAG_IF,
    FLAG_RF,
    FLAG_VM,
    GO_ON,
    GS,
    LEAVE_JUMP,
    MODE_LONG64,
    MODE_PROT16,
    RCX,
    RDX,
    RSP,
    SS,
    is_canonical,
    raise_error,
    raise_exception,
)
from cython.cimports.vmonty.cpu.tlb import mode_changed


def _flat(s, index, selector, rights):
    s.segs[index].selector = selector & 0xFFFF
    s.segs[index].base = 0
    s.segs[index].limit = cython.cast(uint64_t, 0xFFFFFFFF)
    s.segs[index].access_rights = rights


def syscall(s, length):
    """SYSCALL. SDM, "SYSCALL—Fast System Call"; outside long mode as the APM has it (EIP from STAR)."""
    selector: uint32_t = cython.cast(uint32_t, s.star >> 32) & 0xFFFC
    if (s.efer & EFER_SCE) == 0 or not protected_mode(s):
        return raise_exception(s, 6)
    if long_mode(s):
        s.gpr[RCX] = s.rip + length
        s.gpr[11] = s.rflags & ~cython.cast(uint64_t, FLAG_RF)
        s.rip = s.lstar if s.mode == MODE_LONG64 else s.cstar
        s.rflags = (s.rflags & ~(s.fmask | FLAG_RF)) | 2
        _flat(s, CS, selector, 0xA09B)
    else:
        s.gpr[RCX] = (s.rip + length) & cython.cast(uint64_t, 0xFFFFFFFF)
        s.rip = s.star & cython.cast(uint64_t, 0xFFFFFFFF)
        s.rflags &= ~cython.cast(uint64_t, FLAG_IF | FLAG_VM | FLAG_RF)
        _flat(s, CS, selector, 0xC09B)
    _flat(s, SS, selector + 8, 0xC093)
    s.cpl = 0
    mode_changed(s)
    return LEAVE_JUMP


def sysret(s, size):
    """SYSRET. SDM, "SYSRET—Return From Fast System Call"."""
    selector: uint32_t = cython.cast(uint32_t, s.star >> 48) & 0xFFFF
    if (s.efer & EFER_SCE) == 0 or not protected_mode(s):
        return raise_exception(s, 6)
    if s.cpl:
        return raise_error(s, 13, 0)
    if s.efer & EFER_LMA:
        if size == 8 and not is_canonical(s, s.gpr[RCX]):
            return raise_error(s, 13, 0)
        s.rflags = (s.gpr[11] & 0x3C7FD7) | 2
    else:
        s.rflags |= FLAG_IF
    if size == 8:
        s.rip = s.gpr[RCX]
        _flat(s, CS, (selector + 16) | 3, 0xA0FB)
    else:
        s.rip = s.gpr[RCX] & cython.cast(uint64_t, 0xFFFFFFFF)
        _flat(s, CS, selector | 3, 0xC0FB)
    _flat(s, SS, (selector + 8) | 3, 0xC0F3)
    s.cpl = 3
    mode_changed(s)
    return LEAVE_JUMP


def sysenter(s):
    """SYSENTER. SDM, "SYSENTER—Fast System Call"."""
    selector: uint32_t = cython.cast(uint32_t, s.sysenter_cs) & 0xFFFC
    if s.mode < MODE_PROT16 and (s.rflags & FLAG_VM) == 0:
        return raise_error(s, 13, 0)
    if selector == 0:
        return raise_error(s, 13, 0)
    s.rflags &= ~cython.cast(uint64_t, FLAG_VM | FLAG_IF | FLAG_RF)
    if long_mode(s):
        s.gpr[RSP] = s.sysenter_esp
        s.rip = s.sysenter_eip
        _flat(s, CS, selector, 0xA09B)
    else:
        s.gpr[RSP] = s.sysenter_esp & cython.cast(uint64_t, 0xFFFFFFFF)
        s.rip = s.sysenter_eip & cython.cast(uint64_t, 0xFFFFFFFF)
        _flat(s, CS, selector, 0xC09B)
    _flat(s, SS, selector + 8, 0xC093)
    s.cpl = 0
    mode_changed(s)
    return LEAVE_JUMP


def sysexit(s, size):
    """SYSEXIT. SDM, "SYSEXIT—Fast Return from Fast System Call"."""
    selector: uint32_t = cython.cast(uint32_t, s.sysenter_cs) & 0xFFFC
    if not protected_mode(s) or selector == 0 or s.cpl:
        return raise_error(s, 13, 0)
    if size == 8:
        if not is_canonical(s, s.gpr[RCX]) or not is_canonical(s, s.gpr[RDX]):
            return raise_error(s, 13, 0)
        s.gpr[RSP] = s.gpr[RCX]
        s.rip = s.gpr[RDX]
        _flat(s, CS, (selector + 32) | 3, 0xA0FB)
        _flat(s, SS, (selector + 40) | 3, 0xC0F3)
    else:
        s.gpr[RSP] = s.gpr[RCX] & cython.cast(uint64_t, 0xFFFFFFFF)
        s.rip = s.gpr[RDX] & cython.cast(uint64_t, 0xFFFFFFFF)
        _flat(s, CS, (selector + 16) | 3, 0xC0FB)
        _flat(s, SS, (selector + 24) | 3, 0xC0F3)
    s.cpl = 3
    mode_changed(s)
    return LEAVE_JUMP


def swapgs(s):
    """SWAPGS."""
    base: uint64_t = s.segs[GS].base
    if s.mode != MODE_LONG64:
        return raise_exception(s, 6)
    if s.cpl:
        return raise_error(s, 13, 0)
    s.segs[GS].base = s.kernel_gs_base
    s.kernel_gs_base = base
    return GO_ON
