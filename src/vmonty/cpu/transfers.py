"""Far JMP, CALL, RET and IRET. SDM, "Transferring Control" in "Protection", and the instructions' pages."""

import cython
from cython.cimports.vmonty.cpu.segmentation import linear_address
from cython.cimports.vmonty.cpu.segments import (
    enter_code,
    implicit_read,
    long_mode,
    protected_mode,
    read_descriptor,
    set_accessed,
    set_null,
    set_real,
    stack_holds,
    stack_mask,
    stack_segment,
    unpack,
    virtual_interrupt_due,
)
from cython.cimports.vmonty.cpu.state import (
    ACCESS_IMPLICIT,
    ACCESS_WRITE,
    AR_UNUSABLE,
    BLOCKED_NMI,
    CR4_VME,
    CS,
    DS,
    ES,
    FLAG_IF,
    FLAG_IOPL,
    FLAG_NT,
    FLAG_RF,
    FLAG_TF,
    FLAG_VIF,
    FLAG_VIP,
    FLAG_VM,
    FS,
    GO_ON,
    GS,
    LEAVE_JUMP,
    MODE_LONG64,
    MODE_VM86,
    RSP,
    SS,
    is_canonical,
    raise_error,
)
from cython.cimports.vmonty.cpu.svm_exit import svm_exit, svm_wants
from cython.cimports.vmonty.cpu.tasks import SWITCH_CALL, SWITCH_IRET, SWITCH_JUMP, task_switch
from cython.cimports.vmonty.cpu.tlb import mode_changed, read_value, write_linear
from cython.cimports.vmonty.cpu.vmcb import SVM_IRET
from cython.cimports.vmonty.cpu.vmx_exit import GUEST_VMX, PIN_NMI, PIN_VIRTUAL_NMIS, vmx_of


def _pop(s, rsp, size, value):
    """Read one stack slot and move *rsp; #SS(0) outside the segment."""
    mask: uint64_t = stack_mask(s)
    linear: uint64_t = 0
    r: cython.int = linear_address(s, SS, rsp[0] & mask, size, 0, cython.address(linear))
    if r == GO_ON:
        r = read_value(s, linear, size, 0, value)
    if r == GO_ON:
        rsp[0] = (rsp[0] & ~mask) | ((rsp[0] + size) & mask)
    return r


def _push2(s, first, second, size, rsp):
    """Push two slots (``first`` first); *rsp gets the new pointer, RSP keeps the old one."""
    mask: uint64_t = stack_mask(s)
    frame: uint64_t[2]
    linear: uint64_t = 0
    r: cython.int = linear_address(s, SS, (s.gpr[RSP] - 2 * size) & mask, 2 * size, 1, cython.address(linear))
    if r != GO_ON:
        return r
    frame[0] = second
    frame[1] = first
    if size == 4:
        frame[0] = (second & cython.cast(uint64_t, 0xFFFFFFFF)) | (first << 32)
    elif size == 2:
        frame[0] = (second & 0xFFFF) | ((first & 0xFFFF) << 16)
    r = write_linear(s, linear, cython.address(frame[0]), 2 * size, ACCESS_WRITE)
    rsp[0] = (s.gpr[RSP] & ~mask) | ((s.gpr[RSP] - 2 * size) & mask)
    return r


def _check_offset(s, descriptor, offset):
    """The target must lie in the segment, or be canonical in 64-bit code."""
    segment: Segment
    if long_mode(s) and (descriptor >> 53) & 1:
        if not is_canonical(s, offset):
            return raise_error(s, 13, 0)
        return GO_ON
    unpack(cython.address(segment), 0, descriptor)
    if offset > segment.limit:
        return raise_error(s, 13, 0)
    return GO_ON


def _direct(s, selector, descriptor):
    """Checks of a code segment that JMP or CALL names without a gate."""
    rights: uint32_t = cython.cast(uint32_t, descriptor >> 40) & 0xFF
    dpl: uint32_t = (rights >> 5) & 3
    if rights & 4:
        if dpl > s.cpl:
            return raise_error(s, 13, selector & 0xFFFC)
    elif (selector & 3) > s.cpl or dpl != s.cpl:
        return raise_error(s, 13, selector & 0xFFFC)
    if long_mode(s) and ((descriptor >> 53) & 3) == 3:
        return raise_error(s, 13, selector & 0xFFFC)
    if (rights & 0x80) == 0:
        return raise_error(s, 11, selector & 0xFFFC)
    return GO_ON


def far_jump(s, selector, offset, size, length):
    """JMP ptr16:16, ptr16:32, m16:16, m16:32, m16:64."""
    descriptor: uint64_t
    r: cython.int
    selector &= 0xFFFF
    if size == 2:
        offset &= 0xFFFF
    if not protected_mode(s):
        if offset > s.segs[CS].limit:
            return raise_error(s, 13, 0)
        set_real(s, CS, selector)
        s.rip = offset
        mode_changed(s)
        return LEAVE_JUMP
    if (selector & 0xFFFC) == 0:
        return raise_error(s, 13, 0)
    r = read_descriptor(s, selector, 13, selector & 0xFFFC, cython.address(descriptor))
    if r != GO_ON:
        return r
    if ((descriptor >> 44) & 1) == 0:
        return _system_target(s, selector, descriptor, 0, length)
    if ((descriptor >> 43) & 1) == 0:
        return raise_error(s, 13, selector & 0xFFFC)
    r = _direct(s, selector, descriptor)
    if r == GO_ON:
        r = _check_offset(s, descriptor, offset)
    if r == GO_ON:
        r = enter_code(s, selector, descriptor, s.cpl)
    if r != GO_ON:
        return r
    s.rip = offset
    return LEAVE_JUMP


def far_call(s, selector, offset, size, length):
    """CALL ptr16:16, ptr16:32, m16:16, m16:32, m16:64."""
    descriptor: uint64_t
    rsp: uint64_t
    r: cython.int
    selector &= 0xFFFF
    if size == 2:
        offset &= 0xFFFF
    if not protected_mode(s):
        if offset > s.segs[CS].limit:
            return raise_error(s, 13, 0)
        r = _push2(s, s.segs[CS].selector, s.rip + length, size, cython.address(rsp))
        if r != GO_ON:
            return r
        s.gpr[RSP] = rsp
        set_real(s, CS, selector)
        s.rip = offset
        mode_changed(s)
        return LEAVE_JUMP
    if (selector & 0xFFFC) == 0:
        return raise_error(s, 13, 0)
    r = read_descriptor(s, selector, 13, selector & 0xFFFC, cython.address(descriptor))
    if r != GO_ON:
        return r
    if ((descriptor >> 44) & 1) == 0:
        return _system_target(s, selector, descriptor, 1, length)
    if ((descriptor >> 43) & 1) == 0:
        return raise_error(s, 13, selector & 0xFFFC)
    r = _direct(s, selector, descriptor)
    if r == GO_ON:
        r = _check_offset(s, descriptor, offset)
    if r == GO_ON:
        r = _push2(s, s.segs[CS].selector, s.rip + length, size, cython.address(rsp))
    if r == GO_ON:
        r = enter_code(s, selector, descriptor, s.cpl)
    if r != GO_ON:
        return r
    s.gpr[RSP] = rsp
    s.rip = offset
    return LEAVE_JUMP


def _system_target(s, selector, gate, call, length):
    """Gates and task state segments."""
    kind: uint32_t = cython.cast(uint32_t, gate >> 40) & 0x1F
    dpl: uint32_t = cython.cast(uint32_t, gate >> 45) & 3
    why: uint32_t = SWITCH_CALL if call else SWITCH_JUMP
    r: cython.int
    if dpl < s.cpl or dpl < (selector & 3):
        return raise_error(s, 13, selector & 0xFFFC)
    if kind == 12 or (kind == 4 and not long_mode(s)):
        if (gate >> 47) & 1 == 0:
            return raise_error(s, 11, selector & 0xFFFC)
        return _gate(s, selector, gate, call, length)
    if long_mode(s) or (kind != 5 and kind != 1 and kind != 9):
        return raise_error(s, 13, selector & 0xFFFC)
    if kind == 5:
        if (gate >> 47) & 1 == 0:
            return raise_error(s, 11, selector & 0xFFFC)
        selector = cython.cast(uint32_t, gate >> 16) & 0xFFFF
    r = task_switch(s, selector, why, s.rip + length, s.rflags, 0, 0, 0, length)
    if r != GO_ON:
        return r
    return LEAVE_JUMP


def _gate(s, selector, gate, call, length):
    """Call gates. SDM, "Accessing a Code Segment Through a Call Gate"; in long mode they take 16 bytes."""
    high: uint64_t = 0
    descriptor: uint64_t
    rsp: uint64_t
    offset: uint64_t = (gate & 0xFFFF) | ((gate >> 32) & cython.cast(uint64_t, 0xFFFF0000))
    target: uint32_t = cython.cast(uint32_t, gate >> 16) & 0xFFFF
    size: uint32_t = 4 if gate & (cython.cast(uint64_t, 8) << 40) else 2
    parameters: uint32_t = cython.cast(uint32_t, gate >> 32) & 31
    rights: uint32_t
    dpl: uint32_t
    r: cython.int
    if long_mode(s):
        size = 8
        parameters = 0
        r = read_descriptor(s, selector + 8, 13, selector & 0xFFFC, cython.address(high))
        if r != GO_ON:
            return r
        if (high >> 40) & 0x1F:
            return raise_error(s, 13, selector & 0xFFFC)
        offset |= high << 32
    elif size == 2:
        offset &= 0xFFFF
    if (target & 0xFFFC) == 0:
        return raise_error(s, 13, 0)
    r = read_descriptor(s, target, 13, target & 0xFFFC, cython.address(descriptor))
    if r != GO_ON:
        return r
    rights = cython.cast(uint32_t, descriptor >> 40) & 0xFF
    dpl = (rights >> 5) & 3
    if (rights & 0x18) != 0x18 or dpl > s.cpl or (call == 0 and (rights & 4) == 0 and dpl != s.cpl):
        return raise_error(s, 13, target & 0xFFFC)
    if long_mode(s) and ((descriptor >> 53) & 3) != 1:
        return raise_error(s, 13, target & 0xFFFC)
    if (rights & 0x80) == 0:
        return raise_error(s, 11, target & 0xFFFC)
    r = _check_offset(s, descriptor, offset)
    if r != GO_ON:
        return r
    if call and (rights & 4) == 0 and dpl < s.cpl:
        return _gate_inner(s, target, descriptor, offset, dpl, size, parameters, length)
    rsp = s.gpr[RSP]
    if call:
        r = _push2(s, s.segs[CS].selector, s.rip + length, size, cython.address(rsp))
        if r != GO_ON:
            return r
    r = enter_code(s, target, descriptor, s.cpl)
    if r != GO_ON:
        return r
    s.gpr[RSP] = rsp
    s.rip = offset
    return LEAVE_JUMP


def _gate_inner(s, selector, descriptor, offset, cpl, size, parameters, length):
    """A call to an inner level, with its stack from the TSS. SDM, "Stack Switching"."""
    frame: uint64_t[4]
    narrow: uint8_t[160]
    stack: Segment
    rsp: uint64_t
    value: uint64_t
    at: uint32_t
    mask: uint64_t
    old: uint64_t
    total: uint32_t
    i: uint32_t
    wide_tss: cython.bint = (s.tr.access_rights & 8) != 0
    r: cython.int
    if size == 8:
        at = 4 + cpl * 8
        if at + 7 > s.tr.limit:
            return raise_error(s, 10, s.tr.selector & 0xFFFC)
        r = implicit_read(s, s.tr.base + at, 8, cython.address(rsp))
        if r != GO_ON:
            return r
        frame[0] = s.rip + length
        frame[1] = s.segs[CS].selector
        frame[2] = s.gpr[RSP]
        frame[3] = s.segs[SS].selector
        rsp -= 32
        if not is_canonical(s, rsp):
            return raise_error(s, 12, 0)
        r = write_linear(s, rsp, cython.address(frame[0]), 32, ACCESS_IMPLICIT | ACCESS_WRITE)
        if r == GO_ON:
            r = set_accessed(s, selector, cython.address(descriptor))
        if r != GO_ON:
            return r
        set_null(s, SS, cpl)
    else:
        at = 4 + cpl * 8 if wide_tss else 2 + cpl * 4
        if at + (7 if wide_tss else 3) > s.tr.limit:
            return raise_error(s, 10, s.tr.selector & 0xFFFC)
        r = implicit_read(s, s.tr.base + at, 4 if wide_tss else 2, cython.address(rsp))
        if r == GO_ON:
            r = implicit_read(s, s.tr.base + at + (4 if wide_tss else 2), 2, cython.address(value))
        if r == GO_ON:
            r = stack_segment(s, cython.cast(uint32_t, value), cpl, 10, 0, cython.address(stack))
        if r != GO_ON:
            return r
        total = (4 + parameters) * size
        mask = cython.cast(uint64_t, 0xFFFFFFFF) if stack.access_rights & 0x4000 else 0xFFFF
        old = s.gpr[RSP] & stack_mask(s)
        for i in range(4 + parameters):
            if i == 0:
                value = s.rip + length
            elif i == 1:
                value = s.segs[CS].selector
            elif i == 2 + parameters:
                value = s.gpr[RSP]
            elif i == 3 + parameters:
                value = s.segs[SS].selector
            else:
                r = linear_address(s, SS, (old + (i - 2) * size) & stack_mask(s), size, 0, cython.address(value))
                if r == GO_ON:
                    r = read_value(s, value, size, 0, cython.address(value))
                if r != GO_ON:
                    return r
            if size == 4:
                cython.cast(cython.pointer(uint32_t), cython.address(narrow[4 * i]))[0] = cython.cast(uint32_t, value)
            else:
                narrow[2 * i] = cython.cast(uint8_t, value)
                narrow[2 * i + 1] = cython.cast(uint8_t, value >> 8)
        rsp = (rsp - total) & mask
        if not stack_holds(cython.address(stack), rsp, total):
            return raise_error(s, 12, stack.selector & 0xFFFC)
        r = write_linear(
            s,
            (stack.base + rsp) & cython.cast(uint64_t, 0xFFFFFFFF),
            cython.address(narrow[0]),
            total,
            ACCESS_IMPLICIT | ACCESS_WRITE,
        )
        if r == GO_ON:
            r = set_accessed(s, selector, cython.address(descriptor))
        if r != GO_ON:
            return r
        s.segs[SS] = stack
    r = enter_code(s, selector, descriptor, cpl)
    if r != GO_ON:
        return r
    s.gpr[RSP] = rsp
    s.rip = offset
    return LEAVE_JUMP


# ---- returns -----------------------------------------------------------------------------------------------------


def _return_code(s, selector, descriptor):
    """Checks of the code segment that RET or IRET returns to."""
    rights: uint32_t
    dpl: uint32_t
    r: cython.int
    if (selector & 0xFFFC) == 0:
        return raise_error(s, 13, 0)
    r = read_descriptor(s, selector, 13, selector & 0xFFFC, descriptor)
    if r != GO_ON:
        return r
    rights = cython.cast(uint32_t, descriptor[0] >> 40) & 0xFF
    dpl = (rights >> 5) & 3
    if (rights & 0x18) != 0x18 or (selector & 3) < s.cpl:
        return raise_error(s, 13, selector & 0xFFFC)
    if ((rights & 4) and dpl > (selector & 3)) or ((rights & 4) == 0 and dpl != (selector & 3)):
        return raise_error(s, 13, selector & 0xFFFC)
    if long_mode(s) and ((descriptor[0] >> 53) & 3) == 3:
        return raise_error(s, 13, selector & 0xFFFC)
    if (rights & 0x80) == 0:
        return raise_error(s, 11, selector & 0xFFFC)
    return GO_ON


def _return_stack(s, selector, cpl, to_64, segment):
    """The stack segment of an outer level; null is allowed in 64-bit code below level 3."""
    if (selector & 0xFFFC) == 0 and to_64 and cpl != 3 and (selector & 3) == cpl:
        segment.selector = selector
        segment.base = 0
        segment.limit = 0
        segment.access_rights = AR_UNUSABLE | (cpl << 5)
        return GO_ON
    if (selector & 0xFFFC) == 0:
        return raise_error(s, 13, 0)
    return stack_segment(s, selector, cpl, 13, 0, segment)


def _leave_level(s):
    """Null the data segments that the outer level may not use, and null selectors' RPLs. SDM, "RET—Return From
    Procedure", RETURN-TO-OUTER-PRIVILEGE-LEVEL; the bases stay, which 64-bit code sees of FS and GS.
    """
    i: uint32_t
    rights: uint32_t
    for i in range(6):
        if i in (CS, SS):
            continue
        rights = s.segs[i].access_rights
        if (s.segs[i].selector & 0xFFFC) == 0:
            s.segs[i].selector = 0
        elif (rights & AR_UNUSABLE) == 0 and ((rights >> 5) & 3) < s.cpl and (rights & 0xC) != 0xC:
            s.segs[i].selector = 0
            s.segs[i].access_rights = rights | AR_UNUSABLE


def far_return(s, size, pop_bytes):
    """RET far. SDM, "RET—Return From Procedure"."""
    rsp: uint64_t = s.gpr[RSP]
    rip: uint64_t
    cs: uint64_t
    ss: uint64_t
    outer: uint64_t
    descriptor: uint64_t
    stack: Segment
    selector: uint32_t
    cpl: uint32_t
    mask: uint64_t = stack_mask(s)
    r: cython.int
    r = _pop(s, cython.address(rsp), size, cython.address(rip))
    if r == GO_ON:
        r = _pop(s, cython.address(rsp), size, cython.address(cs))
    if r != GO_ON:
        return r
    selector = cython.cast(uint32_t, cs) & 0xFFFF
    rsp = (rsp & ~mask) | ((rsp + pop_bytes) & mask)
    if not protected_mode(s):
        if rip > s.segs[CS].limit:
            return raise_error(s, 13, 0)
        s.gpr[RSP] = rsp
        set_real(s, CS, selector)
        s.rip = rip
        mode_changed(s)
        return LEAVE_JUMP
    r = _return_code(s, selector, cython.address(descriptor))
    if r == GO_ON:
        r = _check_offset(s, descriptor, rip)
    if r != GO_ON:
        return r
    cpl = selector & 3
    if cpl == s.cpl:
        r = enter_code(s, selector, descriptor, cpl)
        if r != GO_ON:
            return r
        s.gpr[RSP] = rsp
        s.rip = rip
        return LEAVE_JUMP
    r = _pop(s, cython.address(rsp), size, cython.address(outer))
    if r == GO_ON:
        r = _pop(s, cython.address(rsp), size, cython.address(ss))
    if r == GO_ON:
        r = _return_stack(
            s, cython.cast(uint32_t, ss) & 0xFFFF, cpl, long_mode(s) and (descriptor >> 53) & 1, cython.address(stack)
        )
    if r == GO_ON:
        r = set_accessed(s, selector, cython.address(descriptor))
    if r != GO_ON:
        return r
    s.segs[SS] = stack
    enter_code(s, selector, descriptor, cpl)
    mask = stack_mask(s)
    s.gpr[RSP] = (s.gpr[RSP] & ~mask) | ((outer + pop_bytes) & mask)
    s.rip = rip
    _leave_level(s)
    mode_changed(s)
    return LEAVE_JUMP


def _iret_flags(s, flags, size, cpl):
    """Flags that IRET may change; ``cpl`` is the level that executed it."""
    change: uint64_t = 0x254DD5 | FLAG_RF
    if cpl <= (cython.cast(uint32_t, s.rflags >> 12) & 3):
        change |= FLAG_IF
    if cpl == 0:
        change |= FLAG_IOPL | FLAG_VIF | FLAG_VIP
    if size == 2:
        change &= 0xFFFF
    s.rflags = (s.rflags & ~change) | (flags & change) | 2


def _iret_real(s, size):
    """IRET in real mode, and in virtual-8086 mode. SDM, "IRET/IRETD/IRETQ—Interrupt Return"."""
    rsp: uint64_t = s.gpr[RSP]
    rip: uint64_t
    cs: uint64_t
    flags: uint64_t
    change: uint64_t = 0x257FD5 | FLAG_RF
    r: cython.int
    virtual: cython.bint = s.mode == MODE_VM86 and (s.rflags & FLAG_IOPL) != FLAG_IOPL
    if virtual and (size != 2 or (s.cr4 & CR4_VME) == 0):
        return raise_error(s, 13, 0)
    r = _pop(s, cython.address(rsp), size, cython.address(rip))
    if r == GO_ON:
        r = _pop(s, cython.address(rsp), size, cython.address(cs))
    if r == GO_ON:
        r = _pop(s, cython.address(rsp), size, cython.address(flags))
    if r != GO_ON:
        return r
    if rip > s.segs[CS].limit:
        return raise_error(s, 13, 0)
    if s.mode == MODE_VM86:
        change &= ~cython.cast(uint64_t, FLAG_IOPL)
        if virtual:
            if (flags & FLAG_TF) or ((flags & FLAG_IF) and (s.rflags & FLAG_VIP)):
                return raise_error(s, 13, 0)
            change &= ~cython.cast(uint64_t, FLAG_IF)
            s.rflags &= ~cython.cast(uint64_t, FLAG_VIF)
            if flags & FLAG_IF:
                s.rflags |= FLAG_VIF
    if size == 2:
        change &= 0xFFFF
    s.gpr[RSP] = rsp
    s.rip = rip
    set_real(s, CS, cython.cast(uint32_t, cs))
    s.rflags = (s.rflags & ~change) | (flags & change) | 2
    mode_changed(s)
    return GO_ON


def _iret_vm86(s, rip, cs, flags, rsp):
    """Return to virtual-8086 mode: ESP, SS, ES, DS, FS, GS follow on the stack."""
    values: uint64_t[6]
    i: uint32_t
    r: cython.int
    order: uint32_t
    for i in range(6):
        r = _pop(s, cython.address(rsp), 4, cython.address(values[i]))
        if r != GO_ON:
            return r
    s.rflags = (flags & 0x3F7FD5) | 2
    s.cpl = 3
    set_real(s, CS, cython.cast(uint32_t, cs))
    for i in range(1, 6):
        order = SS
        if i == 2:
            order = ES
        elif i == 3:
            order = DS
        elif i == 4:
            order = FS
        elif i == 5:
            order = GS
        set_real(s, order, cython.cast(uint32_t, values[i]))
    for i in range(6):
        s.segs[i].limit = 0xFFFF
        s.segs[i].access_rights = 0xF3
    s.gpr[RSP] = values[0] & cython.cast(uint64_t, 0xFFFFFFFF)
    s.rip = rip & 0xFFFF
    mode_changed(s)
    return GO_ON


def iret(s, size, length):
    """IRET, IRETD, IRETQ. NMIs are unblocked when it ends."""
    rsp: uint64_t = s.gpr[RSP]
    rip: uint64_t
    cs: uint64_t
    flags: uint64_t
    outer: uint64_t = 0
    ss: uint64_t = 0
    link: uint64_t
    descriptor: uint64_t
    stack: Segment
    selector: uint32_t
    old: uint32_t = s.cpl
    cpl: uint32_t
    to_64: cython.bint
    change_stack: cython.bint
    mask: uint64_t
    r: cython.int
    if svm_wants(s, SVM_IRET):
        return svm_exit(s, SVM_IRET, 0, 0, length)
    if not protected_mode(s):
        r = _iret_real(s, size)
    elif s.rflags & FLAG_NT:
        if long_mode(s):
            return raise_error(s, 13, 0)
        r = implicit_read(s, s.tr.base, 2, cython.address(link))
        if r == GO_ON:
            r = task_switch(s, cython.cast(uint32_t, link), SWITCH_IRET, s.rip + length, s.rflags, 0, 0, 0, length)
    else:
        r = _pop(s, cython.address(rsp), size, cython.address(rip))
        if r == GO_ON:
            r = _pop(s, cython.address(rsp), size, cython.address(cs))
        if r == GO_ON:
            r = _pop(s, cython.address(rsp), size, cython.address(flags))
        if r != GO_ON:
            return r
        if (flags & FLAG_VM) and size == 4 and s.cpl == 0 and not long_mode(s):
            r = _iret_vm86(s, rip, cs, flags, rsp)
        else:
            selector = cython.cast(uint32_t, cs) & 0xFFFF
            r = _return_code(s, selector, cython.address(descriptor))
            if r == GO_ON:
                r = _check_offset(s, descriptor, rip)
            if r != GO_ON:
                return r
            cpl = selector & 3
            to_64 = long_mode(s) and ((descriptor >> 53) & 1) != 0
            change_stack = cpl != old or s.mode == MODE_LONG64
            if change_stack:
                r = _pop(s, cython.address(rsp), size, cython.address(outer))
                if r == GO_ON:
                    r = _pop(s, cython.address(rsp), size, cython.address(ss))
                if r == GO_ON:
                    r = _return_stack(s, cython.cast(uint32_t, ss) & 0xFFFF, cpl, to_64, cython.address(stack))
            if r == GO_ON:
                r = set_accessed(s, selector, cython.address(descriptor))
            if r != GO_ON:
                return r
            if change_stack:
                s.segs[SS] = stack
            unpack(cython.address(s.segs[CS]), selector, descriptor)
            s.cpl = cpl
            _iret_flags(s, flags, size, old)
            s.rip = rip
            mode_changed(s)
            if change_stack:
                mask = stack_mask(s)
                if s.mode == MODE_LONG64:
                    s.gpr[RSP] = outer
                else:
                    s.gpr[RSP] = (s.gpr[RSP] & ~mask) | (outer & mask)
            else:
                s.gpr[RSP] = rsp
            if cpl > old:
                _leave_level(s)
                mode_changed(s)
    if r != GO_ON:
        return r
    if s.guest_mode != GUEST_VMX or (vmx_of(s).pin & PIN_NMI) == 0 or (vmx_of(s).pin & PIN_VIRTUAL_NMIS):
        s.interruptibility &= ~cython.cast(uint32_t, BLOCKED_NMI)
    if virtual_interrupt_due(s):
        return raise_error(s, 13, 0)
    return LEAVE_JUMP
