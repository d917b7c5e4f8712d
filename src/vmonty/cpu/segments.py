"""Segment registers and descriptor tables. SDM, "Protected-Mode Memory Management", "Segment Descriptors".

A descriptor::

    63..56 base 31:24 | 55 G | 54 D/B | 53 L | 52 AVL | 51..48 limit 19:16 | 47 P | 46..45 DPL | 44 S | 43..40 type
    39..16 base 23:0 | 15..0 limit 15:0
"""

import cython
from cython.cimports.vmonty.cpu.state import (
    ACCESS_IMPLICIT,
    ACCESS_WRITE,
    AR_DB,
    AR_UNUSABLE,
    CR4_UMIP,
    CS,
    FLAG_ZF,
    GO_ON,
    LEAVE_EVENT,
    LEAVE_EXIT,
    MODE_LONG64,
    SS,
    is_register_canonical,
    raise_error,
    raise_exception,
)
from cython.cimports.vmonty.cpu.svm_exit import svm_exit, svm_wants
from cython.cimports.vmonty.cpu.tlb import mode_changed, write_value
from cython.cimports.vmonty.cpu.vmcb import (
    SVM_GDTR_READ,
    SVM_GDTR_WRITE,
    SVM_IDTR_READ,
    SVM_IDTR_WRITE,
    SVM_LDTR_READ,
    SVM_LDTR_WRITE,
    SVM_TR_READ,
    SVM_TR_WRITE,
)
from cython.cimports.vmonty.cpu.vmx_exit import (
    REASON_GDTR_IDTR,
    REASON_LDTR_TR,
    SECOND_DESCRIPTOR_TABLE,
    vm_exit_information,
    vmx_second,
)


def stack_mask(s):
    """The bits of RSP that the stack uses."""
    if s.mode == MODE_LONG64:
        return ~cython.cast(uint64_t, 0)
    if s.segs[SS].access_rights & 0x4000:
        return cython.cast(uint64_t, 0xFFFFFFFF)
    return 0xFFFF


def stack_holds(segment, low, size):
    """Do these bytes lie within a stack segment? SDM, "Limit Checking"; expand-down ones end where B says."""
    top: uint64_t = cython.cast(uint64_t, 0xFFFFFFFF) if segment.access_rights & AR_DB else 0xFFFF
    if (segment.access_rights & 0xC) == 4:
        return low > segment.limit and low + size - 1 <= top
    return low + size - 1 <= segment.limit


def read_descriptor(s, selector, vector, error, descriptor):
    """Read a descriptor through GDTR or LDTR."""
    offset: uint32_t = selector & 0xFFF8
    if selector & 4:
        if (s.ldtr.access_rights & AR_UNUSABLE) or offset + 7 > s.ldtr.limit:
            return raise_error(s, vector, error)
        return implicit_read(s, s.ldtr.base + offset, 8, descriptor)
    if offset + 7 > s.gdtr.limit:
        return raise_error(s, vector, error)
    return implicit_read(s, s.gdtr.base + offset, 8, descriptor)


def unpack(segment, selector, descriptor):
    """Fill a segment register's hidden part from a descriptor."""
    limit: uint32_t = cython.cast(uint32_t, (descriptor & 0xFFFF) | ((descriptor >> 32) & 0xF0000))
    segment.selector = selector
    segment.base = ((descriptor >> 16) & 0xFFFFFF) | ((descriptor >> 32) & cython.cast(uint64_t, 0xFF000000))
    segment.access_rights = cython.cast(uint32_t, (descriptor >> 40) & 0xF0FF)
    if segment.access_rights & 0x8000:
        limit = (limit << 12) | 0xFFF
    segment.limit = limit


def set_accessed(s, selector, descriptor):
    """Set the accessed bit of a code or data descriptor. SDM, "Code- and Data-Segment Descriptor Types"."""
    table: uint64_t = s.ldtr.base if selector & 4 else s.gdtr.base
    if (descriptor[0] >> 40) & 1:
        return GO_ON
    descriptor[0] |= cython.cast(uint64_t, 1) << 40
    return write_value(
        s, table + (selector & 0xFFF8) + 5, 1, ACCESS_IMPLICIT | ACCESS_WRITE, (descriptor[0] >> 40) & 0xFF
    )


def set_real(s, index, selector):
    """Load a segment register in real or virtual-8086 mode."""
    s.segs[index].selector = selector & 0xFFFF
    s.segs[index].base = cython.cast(uint64_t, selector & 0xFFFF) << 4
    if cython.cast(uint32_t, s.segs[index].limit + 1) == 0:
        # Firmware keeps limits of 4 GiB in real mode: only the base decides then whether a segment is flat.
        mode_changed(s)


def set_null(s, index, selector):
    """Load a null selector: the segment can't be used."""
    s.segs[index].selector = selector & 0xFFFF
    s.segs[index].base = 0
    s.segs[index].limit = 0
    s.segs[index].access_rights = AR_UNUSABLE | ((selector & 3) << 5 if index == SS else 0)


def enter_code(s, selector, descriptor, cpl):
    """Load CS and CPL."""
    r: cython.int = set_accessed(s, selector, cython.address(descriptor))
    if r != GO_ON:
        return r
    unpack(cython.address(s.segs[CS]), (selector & 0xFFFC) | cpl, descriptor)
    s.cpl = cpl
    mode_changed(s)
    return GO_ON


def stack_segment(s, selector, cpl, vector, external, segment):
    """Check a stack segment for an outer or inner level. SDM, "Stack Switching"."""
    descriptor: uint64_t
    rights: uint32_t
    error: uint32_t = (selector & 0xFFFC) | external
    r: cython.int
    if (selector & 0xFFFC) == 0:
        return raise_error(s, vector, error)
    r = read_descriptor(s, selector, vector, error, cython.address(descriptor))
    if r != GO_ON:
        return r
    rights = cython.cast(uint32_t, descriptor >> 40) & 0xFF
    if (selector & 3) != cpl or ((rights >> 5) & 3) != cpl or (rights & 0x1A) != 0x12:
        return raise_error(s, vector, error)
    if (rights & 0x80) == 0:
        return raise_error(s, 12, error)
    r = set_accessed(s, selector, cython.address(descriptor))
    if r != GO_ON:
        return r
    unpack(segment, selector, descriptor)
    return GO_ON


def load_segment(s, index, selector):
    """Load a data or stack segment register. SDM, "MOV—Move", protected-mode exceptions."""
    descriptor: uint64_t
    rights: uint32_t
    dpl: uint32_t
    error: uint32_t
    r: cython.int
    selector &= 0xFFFF
    error = selector & 0xFFFC
    if not protected_mode(s):
        set_real(s, index, selector)
        return GO_ON
    if error == 0:
        if index == SS and (s.mode != MODE_LONG64 or s.cpl == 3 or (selector & 3) != s.cpl):
            return raise_error(s, 13, 0)
        set_null(s, index, selector)
        if s.mode != MODE_LONG64:
            mode_changed(s)
        return GO_ON
    if index == SS:
        r = stack_segment(s, selector, s.cpl, 13, 0, cython.address(s.segs[SS]))
        if r == GO_ON:
            mode_changed(s)
        return r
    r = read_descriptor(s, selector, 13, error, cython.address(descriptor))
    if r != GO_ON:
        return r
    rights = cython.cast(uint32_t, descriptor >> 40) & 0xFF
    dpl = (rights >> 5) & 3
    if (rights & 0x10) == 0 or (rights & 0xA) == 8:  # system, or code that can't be read
        return raise_error(s, 13, error)
    if (rights & 0xC) != 0xC and ((selector & 3) > dpl or s.cpl > dpl):
        return raise_error(s, 13, error)
    if (rights & 0x80) == 0:
        return raise_error(s, 11, error)
    r = set_accessed(s, selector, cython.address(descriptor))
    if r != GO_ON:
        return r
    unpack(cython.address(s.segs[index]), selector, descriptor)
    if s.mode != MODE_LONG64:
        mode_changed(s)
    return GO_ON


def _system_descriptor(s, selector, descriptor, high):
    """Read a system descriptor of the GDT (16 bytes in long mode); False with #GP(selector) or a page fault
    recorded.
    """
    high[0] = 0
    if selector & 4:
        raise_error(s, 13, selector & 0xFFFC)
        return False
    if read_descriptor(s, selector, 13, selector & 0xFFFC, descriptor) != GO_ON:
        return False
    if long_mode(s):
        if (selector & 0xFFF8) + 15 > s.gdtr.limit:
            raise_error(s, 13, selector & 0xFFFC)
            return False
        if implicit_read(s, s.gdtr.base + (selector & 0xFFF8) + 8, 8, high) != GO_ON:
            return False
        if (high[0] >> 40) & 0x1F:
            raise_error(s, 13, selector & 0xFFFC)
            return False
    return True


def lldt(s, selector, length, info, displacement):
    """LLDT. SDM, "LLDT—Load Local Descriptor Table Register"."""
    descriptor: uint64_t
    high: uint64_t
    table: Segment
    selector &= 0xFFFF
    if not protected_mode(s):
        return raise_exception(s, 6)
    if s.cpl:
        return raise_error(s, 13, 0)
    if vmx_second(s, SECOND_DESCRIPTOR_TABLE):
        return vm_exit_information(s, REASON_LDTR_TR, displacement, length, info)
    if svm_wants(s, SVM_LDTR_WRITE):
        return svm_exit(s, SVM_LDTR_WRITE, 0, 0, length)
    if (selector & 0xFFFC) == 0:
        s.ldtr.selector = selector
        s.ldtr.access_rights = AR_UNUSABLE
        s.ldtr.base = 0
        s.ldtr.limit = 0
        return GO_ON
    if not _system_descriptor(s, selector, cython.address(descriptor), cython.address(high)):
        return LEAVE_EVENT if s.event.pending else LEAVE_EXIT
    if ((descriptor >> 40) & 0x1F) != 2:
        return raise_error(s, 13, selector & 0xFFFC)
    if (descriptor >> 47) & 1 == 0:
        return raise_error(s, 11, selector & 0xFFFC)
    unpack(cython.address(table), selector, descriptor)
    table.base |= high << 32
    if long_mode(s) and not is_register_canonical(s, table.base):
        return raise_error(s, 13, selector & 0xFFFC)
    s.ldtr = table
    return GO_ON


def ltr(s, selector, length, info, displacement):
    """LTR. SDM, "LTR—Load Task Register"."""
    descriptor: uint64_t
    high: uint64_t
    kind: uint64_t
    task: Segment
    r: cython.int
    selector &= 0xFFFF
    if not protected_mode(s):
        return raise_exception(s, 6)
    if s.cpl:
        return raise_error(s, 13, 0)
    if vmx_second(s, SECOND_DESCRIPTOR_TABLE):
        return vm_exit_information(s, REASON_LDTR_TR, displacement, length, info)
    if svm_wants(s, SVM_TR_WRITE):
        return svm_exit(s, SVM_TR_WRITE, 0, 0, length)
    if (selector & 0xFFFC) == 0:
        return raise_error(s, 13, 0)
    if not _system_descriptor(s, selector, cython.address(descriptor), cython.address(high)):
        return LEAVE_EVENT if s.event.pending else LEAVE_EXIT
    kind = (descriptor >> 40) & 0x1F
    if kind != 9 and (kind != 1 or long_mode(s)):
        return raise_error(s, 13, selector & 0xFFFC)
    if (descriptor >> 47) & 1 == 0:
        return raise_error(s, 11, selector & 0xFFFC)
    descriptor |= cython.cast(uint64_t, 2) << 40
    unpack(cython.address(task), selector, descriptor)
    task.base |= high << 32
    if long_mode(s) and not is_register_canonical(s, task.base):
        return raise_error(s, 13, selector & 0xFFFC)
    r = write_value(
        s, s.gdtr.base + (selector & 0xFFF8) + 5, 1, ACCESS_IMPLICIT | ACCESS_WRITE, (descriptor >> 40) & 0xFF
    )
    if r != GO_ON:
        return r
    s.tr = task
    return GO_ON


def store_selector(s, task, value, length, info, displacement):
    """SLDT and STR."""
    if not protected_mode(s):
        return raise_exception(s, 6)
    if s.cpl and (s.cr4 & CR4_UMIP):
        return raise_error(s, 13, 0)
    if vmx_second(s, SECOND_DESCRIPTOR_TABLE):
        return vm_exit_information(s, REASON_LDTR_TR, displacement, length, info)
    if svm_wants(s, SVM_TR_READ if task else SVM_LDTR_READ):
        return svm_exit(s, SVM_TR_READ if task else SVM_LDTR_READ, 0, 0, length)
    value[0] = s.tr.selector if task else s.ldtr.selector
    return GO_ON


def load_table(s, interrupts, linear, size, length, info, displacement):
    """LGDT and LIDT. SDM, "LGDT/LIDT—Load Global/Interrupt Descriptor Table Register"."""
    limit: uint64_t
    base: uint64_t
    r: cython.int
    if s.cpl:
        return raise_error(s, 13, 0)
    if vmx_second(s, SECOND_DESCRIPTOR_TABLE):
        return vm_exit_information(s, REASON_GDTR_IDTR, displacement, length, info)
    if svm_wants(s, SVM_IDTR_WRITE if interrupts else SVM_GDTR_WRITE):
        return svm_exit(s, SVM_IDTR_WRITE if interrupts else SVM_GDTR_WRITE, 0, 0, length)
    r = read_value(s, linear, 2, 0, cython.address(limit))
    if r == GO_ON:
        r = read_value(s, linear + 2, 8 if s.mode == MODE_LONG64 else 4, 0, cython.address(base))
    if r != GO_ON:
        return r
    if s.mode == MODE_LONG64:
        if not is_register_canonical(s, base):
            return raise_error(s, 13, 0)
    elif size == 2:
        base &= 0xFFFFFF
    if interrupts:
        s.idtr.base = base
        s.idtr.limit = cython.cast(uint32_t, limit)
    else:
        s.gdtr.base = base
        s.gdtr.limit = cython.cast(uint32_t, limit)
    return GO_ON


def store_table(s, interrupts, linear, length, info, displacement):
    """SGDT and SIDT."""
    wide: uint32_t = 8 if s.mode == MODE_LONG64 else 4
    r: cython.int
    if s.cpl and (s.cr4 & CR4_UMIP):
        return raise_error(s, 13, 0)
    if vmx_second(s, SECOND_DESCRIPTOR_TABLE):
        return vm_exit_information(s, REASON_GDTR_IDTR, displacement, length, info)
    if svm_wants(s, SVM_IDTR_READ if interrupts else SVM_GDTR_READ):
        return svm_exit(s, SVM_IDTR_READ if interrupts else SVM_GDTR_READ, 0, 0, length)
    r = write_value(s, linear + 2, wide, ACCESS_WRITE, s.idtr.base if interrupts else s.gdtr.base)
    if r == GO_ON:
        r = write_value(s, linear, 2, ACCESS_WRITE, s.idtr.limit if interrupts else s.gdtr.limit)
    return r


# ---- VERR, VERW, LAR, LSL ----------------------------------------------------------------------------------------


def _zero_flag(s, on):
    s.rflags &= ~cython.cast(uint64_t, FLAG_ZF)
    if on:
        s.rflags |= FLAG_ZF
    return GO_ON


def _peek(s, selector, descriptor, why):
    """Read a descriptor without #GP for a bad selector; False then, or with *why set by a page fault."""
    offset: uint32_t = selector & 0xFFF8
    why[0] = GO_ON
    if (selector & 0xFFFC) == 0:
        return False
    if selector & 4:
        if (s.ldtr.access_rights & AR_UNUSABLE) or offset + 7 > s.ldtr.limit:
            return False
    elif offset + 7 > s.gdtr.limit:
        return False
    why[0] = read_descriptor(s, selector, 13, 0, descriptor)
    return why[0] == GO_ON


def _visible(s, selector, descriptor):
    """May this privilege see the descriptor? Conforming code is visible to all."""
    rights: uint32_t = cython.cast(uint32_t, descriptor >> 40) & 0xFF
    if (rights & 0x1C) == 0x1C:
        return True
    return s.cpl <= ((rights >> 5) & 3) and (selector & 3) <= ((rights >> 5) & 3)


def verify(s, selector, write):
    """VERR and VERW."""
    descriptor: uint64_t
    why: cython.int
    rights: uint32_t
    if not protected_mode(s):
        return raise_exception(s, 6)
    if not _peek(s, selector, cython.address(descriptor), cython.address(why)):
        if why != GO_ON:
            return why
        return _zero_flag(s, False)
    rights = cython.cast(uint32_t, descriptor >> 40) & 0xFF
    if (rights & 0x10) == 0 or not _visible(s, selector, descriptor):
        return _zero_flag(s, False)
    if write:
        return _zero_flag(s, (rights & 0xA) == 2)
    return _zero_flag(s, (rights & 0xA) != 8)


def lar(s, selector, value):
    """LAR: 1, 2, 3, 4, 5, 9, B, C are the system types that it shows (2, 9, B, C in long mode)."""
    descriptor: uint64_t
    why: cython.int
    kind: uint32_t
    if not protected_mode(s):
        return raise_exception(s, 6)
    if not _peek(s, selector, cython.address(descriptor), cython.address(why)):
        if why != GO_ON:
            return why
        return _zero_flag(s, False)
    kind = cython.cast(uint32_t, descriptor >> 40) & 0x1F
    if not _visible(s, selector, descriptor):
        return _zero_flag(s, False)
    if (kind & 0x10) == 0 and ((0x1A04 if long_mode(s) else 0x1A3E) >> kind) & 1 == 0:
        return _zero_flag(s, False)
    value[0] = (descriptor >> 32) & 0xFFFF00
    return _zero_flag(s, True)


def lsl(s, selector, value):
    """LSL: the limit in bytes; of system types 1, 2, 3, 9, B (2, 9, B in long mode)."""
    descriptor: uint64_t
    why: cython.int
    kind: uint32_t
    segment: Segment
    if not protected_mode(s):
        return raise_exception(s, 6)
    if not _peek(s, selector, cython.address(descriptor), cython.address(why)):
        if why != GO_ON:
            return why
        return _zero_flag(s, False)
    kind = cython.cast(uint32_t, descriptor >> 40) & 0x1F
    if not _visible(s, selector, descriptor):
        return _zero_flag(s, False)
    if (kind & 0x10) == 0 and ((0xA04 if long_mode(s) else 0xA0E) >> kind) & 1 == 0:
        return _zero_flag(s, False)
    unpack(cython.address(segment), selector, descriptor)
    value[0] = segment.limit
    return _zero_flag(s, True)
