"""Hardware task switches. SDM, "Task Switching"; 32-bit and 16-bit TSS. Not in long mode.

32-bit TSS  00 link | 04 ESP0 SS0 ESP1 SS1 ESP2 SS2 | 1C CR3 | 20 EIP | 24 EFLAGS | 28 EAX ECX EDX EBX ESP EBP ESI EDI
            48 ES CS SS DS FS GS | 60 LDT | 64 T, I/O map base
16-bit TSS  00 link | 02 SP0 SS0 SP1 SS1 SP2 SS2 | 0E IP | 10 FLAGS | 12 AX CX DX BX SP BP SI DI | 22 ES CS SS DS | 2A
LDT
"""

import cython
from cython.cimports.vmonty.cpu.breakpoints import debug_changed
from cython.cimports.vmonty.cpu.control import load_pdptes
from cython.cimports.vmonty.cpu.segmentation import linear_address
from cython.cimports.vmonty.cpu.segments import (
    enter_code,
    implicit_read,
    load_segment,
    read_descriptor,
    set_null,
    set_real,
    stack_mask,
    stack_segment,
    unpack,
    virtual_interrupt_due,
)
from cython.cimports.vmonty.cpu.state import (
    ACCESS_IMPLICIT,
    ACCESS_WRITE,
    AR_UNUSABLE,
    CR0_TS,
    CS,
    DR6_BT,
    FLAG_NT,
    FLAG_RF,
    FLAG_VM,
    GO_ON,
    RSP,
    SS,
    Segment,
    paging_enabled,
    raise_error,
)
from cython.cimports.vmonty.cpu.svm_exit import svm_exit, svm_wants
from cython.cimports.vmonty.cpu.tlb import flush_non_global, mode_changed, probe_write, write_value
from cython.cimports.vmonty.cpu.vmcb import SVM_TASK_SWITCH
from cython.cimports.vmonty.cpu.vmx_exit import GUEST_VMX, REASON_TASK_SWITCH, vm_exit


def _busy(s, selector, descriptor, on):
    """Set or clear the busy bit of a TSS descriptor."""
    kind: uint64_t = (descriptor >> 40) & 0xFF
    kind = (kind | 2) if on else (kind & 0xFD)
    return write_value(s, s.gdtr.base + (selector & 0xFFF8) + 5, 1, ACCESS_IMPLICIT | ACCESS_WRITE, kind)


def _save(s, rip, flags):
    """Store the old task's state in its TSS."""
    wide: cython.bint = (s.tr.access_rights & 8) != 0
    size: uint32_t = 4 if wide else 2
    at: uint64_t = s.tr.base + (0x20 if wide else 0x0E)
    access: cython.int = ACCESS_IMPLICIT | ACCESS_WRITE
    i: uint32_t
    r: cython.int
    r = probe_write(s, at, 0x40 if wide else 0x1C, access)
    if r != GO_ON:
        return r
    write_value(s, at, size, access, rip)
    write_value(s, at + size, size, access, flags)
    for i in range(8):
        write_value(s, at + (2 + i) * size, size, access, s.gpr[i])
    for i in range(6 if wide else 4):
        write_value(s, at + (10 + i) * size, size, access, s.segs[i].selector)
    return GO_ON


def _restore(s, cr3):
    """Load the new task's registers from its TSS (TR is already the new one); segment selectors without descriptors."""
    wide: cython.bint = (s.tr.access_rights & 8) != 0
    size: uint32_t = 4 if wide else 2
    at: uint64_t = s.tr.base + (0x20 if wide else 0x0E)
    values: uint64_t[17]
    count: uint32_t = 17 if wide else 15
    i: uint32_t
    r: cython.int
    cr3[0] = s.cr3
    if wide:
        r = implicit_read(s, s.tr.base + 0x1C, 4, cr3)
        if r != GO_ON:
            return r
    for i in range(count):
        r = implicit_read(s, at + i * size, size, cython.address(values[i]))
        if r != GO_ON:
            return r
    s.rip = values[0]
    s.rflags = (values[1] & 0x3F7FD5) | 2
    if not wide:
        s.rflags &= 0xFFFF
    for i in range(8):
        s.gpr[i] = values[2 + i] if wide else (s.gpr[i] & cython.cast(uint64_t, 0xFFFF0000)) | values[2 + i]
    for i in range(6):
        set_null(s, i, 0)
        if wide or i < 4:
            s.segs[i].selector = cython.cast(uint32_t, values[10 + i]) & 0xFFFF
    s.ldtr.selector = cython.cast(uint32_t, values[count - 1]) & 0xFFFF
    return GO_ON


def _present(s, new, why):
    """Look for page faults while the old task's state is whole: both TSSs, and the descriptors' busy bits.

    SDM, "Task Switching", the check that everything used in the task switch is paged in.
    """
    ignored: uint64_t
    write: cython.int = ACCESS_IMPLICIT | ACCESS_WRITE
    r: cython.int
    if s.tr.access_rights & 8:
        r = probe_write(s, s.tr.base + 0x20, 0x40, write)
    else:
        r = probe_write(s, s.tr.base + 0x0E, 0x1C, write)
    if r == GO_ON and why in (SWITCH_IRET, SWITCH_JUMP):
        r = probe_write(s, s.gdtr.base + (s.tr.selector & 0xFFF8) + 5, 1, write)
    if r == GO_ON and why != SWITCH_IRET:
        r = probe_write(s, s.gdtr.base + (new.selector & 0xFFF8) + 5, 1, write)
    if r == GO_ON and why in (SWITCH_CALL, SWITCH_GATE):
        r = probe_write(s, new.base, 2, write)
    if r == GO_ON:
        r = implicit_read(s, new.base, 2, cython.address(ignored))
    if r == GO_ON:
        r = implicit_read(s, new.base + (0x64 if new.access_rights & 8 else 0x2A), 2, cython.address(ignored))
    return r


def _load_segments(s, external):
    """Load LDTR and the segment descriptors of the new task; faults happen in its context."""
    descriptor: uint64_t
    segment: Segment
    selector: uint32_t = s.ldtr.selector
    i: uint32_t
    rights: uint32_t
    error: uint32_t
    r: cython.int
    s.ldtr.access_rights = AR_UNUSABLE
    if selector & 0xFFFC:
        if selector & 4:
            return raise_error(s, 10, (selector & 0xFFFC) | external)
        r = read_descriptor(s, selector, 10, (selector & 0xFFFC) | external, cython.address(descriptor))
        if r != GO_ON:
            return r
        if ((descriptor >> 40) & 0x9F) != 0x82:
            return raise_error(s, 10, (selector & 0xFFFC) | external)
        unpack(cython.address(s.ldtr), selector, descriptor)
    if s.rflags & FLAG_VM:
        for i in range(6):
            set_real(s, i, s.segs[i].selector)
            s.segs[i].limit = 0xFFFF
            s.segs[i].access_rights = 0xF3
        s.cpl = 3
        return GO_ON
    selector = s.segs[CS].selector
    error = (selector & 0xFFFC) | external
    if (selector & 0xFFFC) == 0:
        return raise_error(s, 10, error)
    r = read_descriptor(s, selector, 10, error, cython.address(descriptor))
    if r != GO_ON:
        return r
    rights = cython.cast(uint32_t, descriptor >> 40) & 0xFF
    if (rights & 0x18) != 0x18:
        return raise_error(s, 10, error)
    if ((rights & 4) and ((rights >> 5) & 3) > (selector & 3)) or (
        (rights & 4) == 0 and ((rights >> 5) & 3) != (selector & 3)
    ):
        return raise_error(s, 10, error)
    if (rights & 0x80) == 0:
        return raise_error(s, 11, error)
    r = enter_code(s, selector, descriptor, selector & 3)
    if r != GO_ON:
        return r
    selector = s.segs[SS].selector
    r = stack_segment(s, selector, s.cpl, 10, external, cython.address(segment))
    if r != GO_ON:
        return r
    s.segs[SS] = segment
    for i in range(6):
        if i in (CS, SS):
            continue
        r = load_segment(s, i, s.segs[i].selector)
        if r != GO_ON:
            if s.event.vector == 13:
                s.event.vector = 10
            if s.event.vector == 10 or s.event.vector == 11:
                s.event.error_code |= external
            return r
    return GO_ON


def task_switch(s, selector, why, rip, flags, has_error, error_code, external, length):
    """Switch tasks. The switch is committed once TR is loaded; later faults belong to the new task.

    SDM, "Task Switching"; "Exception Conditions Checked During a Task Switch".
    """
    new: Segment
    trap: uint64_t = 0
    linear: uint64_t
    descriptor: uint64_t
    old_descriptor: uint64_t = 0
    link: uint32_t = s.tr.selector
    kind: uint32_t
    cr3: uint64_t
    esp: uint64_t
    size: uint32_t
    error: uint32_t = (selector & 0xFFFC) | external
    bad: uint32_t = 10 if why == SWITCH_IRET else 13
    r: cython.int
    if s.guest_mode == GUEST_VMX:
        # Always exits. SDM, "Exit Qualification for Task Switches"
        return vm_exit(s, REASON_TASK_SWITCH, (selector & 0xFFFF) | (cython.cast(uint64_t, why) << 30), length)
    if svm_wants(s, SVM_TASK_SWITCH):
        # APM, "Task Switch Intercept": EXITINFO2 has the error code, 36 IRET, 38 jump, 44 error code valid, 48 RF.
        cr3 = cython.cast(uint64_t, error_code) | (cython.cast(uint64_t, has_error & 1) << 44)
        cr3 |= (flags & FLAG_RF) << 32
        if why == SWITCH_IRET:
            cr3 |= cython.cast(uint64_t, 1) << 36
        elif why == SWITCH_JUMP:
            cr3 |= cython.cast(uint64_t, 1) << 38
        return svm_exit(s, SVM_TASK_SWITCH, selector & 0xFFFF, cr3, 0)
    if selector & 4:
        return raise_error(s, bad, error)
    r = read_descriptor(s, selector, bad, error, cython.address(descriptor))
    if r != GO_ON:
        return r
    kind = cython.cast(uint32_t, descriptor >> 40) & 0x1F
    if (kind & ~cython.cast(uint32_t, 8)) != (3 if why == SWITCH_IRET else 1):
        return raise_error(s, bad, error)
    if (descriptor >> 47) & 1 == 0:
        return raise_error(s, 11, error)
    unpack(cython.address(new), selector, descriptor)
    if new.limit < (0x67 if kind & 8 else 0x2B):
        return raise_error(s, 10, error)
    r = read_descriptor(s, s.tr.selector, 13, 0, cython.address(old_descriptor))
    if r == GO_ON:
        r = _present(s, cython.address(new), why)
    if r != GO_ON:
        return r
    if why == SWITCH_IRET:
        flags &= ~cython.cast(uint64_t, FLAG_NT)
    r = _save(s, rip, flags)
    if r != GO_ON:
        return r
    if why in (SWITCH_IRET, SWITCH_JUMP):
        _busy(s, s.tr.selector, old_descriptor, False)
    s.tr = new
    if why != SWITCH_IRET:
        _busy(s, selector, descriptor, True)
    s.tr.access_rights |= 2
    if why in (SWITCH_CALL, SWITCH_GATE):
        write_value(s, s.tr.base, 2, ACCESS_IMPLICIT | ACCESS_WRITE, link)
    r = _restore(s, cython.address(cr3))
    if r != GO_ON:
        return r
    if why in (SWITCH_CALL, SWITCH_GATE):
        s.rflags |= FLAG_NT
    s.cr0 |= CR0_TS
    s.dr[7] &= ~cython.cast(uint64_t, 0x155)
    debug_changed(s)
    if paging_enabled(s) and cr3 != s.cr3:
        r = load_pdptes(s, s.cr0, cr3, s.cr4)
        if r != GO_ON:
            return r
        s.cr3 = cr3
        flush_non_global(s)
    if kind & 8:
        implicit_read(s, s.tr.base + 0x64, 2, cython.address(trap))
    r = _load_segments(s, external)
    mode_changed(s)
    if r != GO_ON:
        return r
    if has_error:
        size = 4 if kind & 8 else 2
        esp = s.gpr[RSP] - size
        esp = (s.gpr[RSP] & ~stack_mask(s)) | (esp & stack_mask(s))
        r = linear_address(s, SS, esp & stack_mask(s), size, 1, cython.address(linear))
        if r == GO_ON:
            r = write_value(s, linear, size, ACCESS_WRITE, error_code)
        if r != GO_ON:
            return r
        s.gpr[RSP] = esp
    if trap & 1:
        s.pending_debug |= DR6_BT
    if virtual_interrupt_due(s):
        return raise_error(s, 13, 0)
    return GO_ON


def task_gate(s, selector, external, rip, flags, has_error, error_code):
    """An event whose IDT entry is a task gate."""
    return task_switch(
        s, selector, SWITCH_GATE, rip, flags, has_error, error_code, external, s.event.instruction_length
    )
