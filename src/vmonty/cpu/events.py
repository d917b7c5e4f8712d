"""Exceptions, interrupts and INT n. SDM, "Interrupt and Exception Handling"; under VMX, "VM Exits" and "Event
Injection".

``deliver`` takes the event recorded in ``s.event`` to its handler. While it does, ``s.vectoring`` describes the event
in VMX format:
a fault on the way combines with it (double fault, triple fault), and a VM exit on the way reports it.
"""

import cython
from cython.cimports.vmonty.cpu.mmio import mmio_done
from cython.cimports.vmonty.cpu.segments import (
    enter_code,
    implicit_read,
    long_mode,
    read_descriptor,
    set_accessed,
    set_null,
    set_real,
    stack_holds,
    stack_segment,
    unpack,
)
from cython.cimports.vmonty.cpu.state import (
    ACCESS_IMPLICIT,
    ACCESS_WRITE,
    AR_DB,
    BLOCKED_NMI,
    CR0_NE,
    CR4_PVI,
    CR4_VME,
    CS,
    DR6_BT,
    DS,
    ES,
    EVENT_EXCEPTION,
    EVENT_NMI,
    EVENT_PRIVILEGED,
    EVENT_SOFT_EXCEPTION,
    EVENT_SOFT_INTERRUPT,
    EXIT_MMIO,
    EXIT_SHUTDOWN,
    FLAG_AC,
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
    LEAVE_EVENT,
    LEAVE_EXIT,
    LEAVE_JUMP,
    LEAVE_NEXT,
    MODE_LONG64,
    MODE_REAL,
    MODE_VM86,
    RSP,
    SHADOW_MOV_SS,
    SHADOW_STI,
    SS,
    is_canonical,
    raise_error,
    raise_exception,
)
from cython.cimports.vmonty.cpu.svm_exit import (
    svm_exit,
    svm_of,
    svm_wants,
)
from cython.cimports.vmonty.cpu.tasks import task_gate
from cython.cimports.vmonty.cpu.tlb import mode_changed, write_linear
from cython.cimports.vmonty.cpu.vmcb import (
    SVM_EXCEPTION_DE,
    SVM_FERR_FREEZE,
    SVM_HLT,
    SVM_ICEBP,
    SVM_SHUTDOWN,
    SVM_SWINT,
)
from cython.cimports.vmonty.cpu.vmx_exit import (
    GUEST_SVM,
    GUEST_VMX,
    PROC_HLT,
    REASON_HLT,
    REASON_TRIPLE_FAULT,
    exception_intercepted,
    vm_exit,
    vm_exit_event,
    vmx_of,
    vmx_wants,
)


def _class(vector):
    """0 benign, 1 contributory, 2 page fault. SDM, "Interrupt 8—Double Fault Exception (#DF)"."""
    if vector == 14:
        return 2
    if vector == 0 or 10 <= vector <= 13:
        return 1
    return 0


def _triple_fault(s):
    """Shutdown, or VM exit 2."""
    s.event.pending = 0
    s.vectoring = 0
    if s.guest_mode == GUEST_VMX:
        return vm_exit(s, REASON_TRIPLE_FAULT, 0, 0)
    if svm_wants(s, SVM_SHUTDOWN):
        return svm_exit(s, SVM_SHUTDOWN, 0, 0, 0)
    s.exit.reason = EXIT_SHUTDOWN
    return LEAVE_EXIT


def _exception_exit(s):
    """The VM exit of an intercepted exception; CR2 and DR6 keep their values."""
    information: uint32_t = s.event.vector | (s.event.kind << 8) | (s.event.has_error << 11)
    qualification: uint64_t = 0
    if s.guest_mode == GUEST_SVM:
        if s.event.vector == 14:
            qualification = s.event.payload
        elif s.event.vector == 1:
            # APM, "#DB (Debug)": the intercept comes after DR6 and DR7 are written.
            s.dr[6] = (s.dr[6] & ~cython.cast(uint64_t, 0xF)) | s.event.payload
            s.dr[7] &= ~cython.cast(uint64_t, 0x2000)
        return svm_exit(
            s, SVM_EXCEPTION_DE + s.event.vector, s.event.error_code, qualification, s.event.instruction_length
        )
    if s.event.vector == 14 or s.event.vector == 1:
        qualification = s.event.payload
    if s.event.vector == 1:
        s.pending_debug = 0  # SDM, "Saving Non-Register State": MOV SS holds back what other exits report
    return vm_exit_event(s, information, s.event.error_code, qualification, s.event.instruction_length)


def deliver(s):
    """Deliver the recorded event, with whatever faults its delivery meets.

    A bare processor that shuts down keeps the event that began it, pending, for its observer.
    """
    first: Event = s.event
    now: Event
    vectoring: uint32_t
    r: cython.int
    while s.event.pending:
        now = s.event
        vectoring = s.vectoring
        r = _deliver_one(s)
        if r == GO_ON:
            s.vectoring = 0
            mmio_done(s)
            if s.monitor_trap:
                s.monitor_trap = 2
            return LEAVE_JUMP
        if r != LEAVE_EVENT:
            if s.exit.reason == EXIT_SHUTDOWN and r == LEAVE_EXIT:
                s.event = first
                s.exit.data = first.vector
            elif s.exit.reason == EXIT_MMIO:  # a table in device memory: it begins again with the answer
                s.event = now
                s.vectoring = vectoring
            return r
    return LEAVE_JUMP


def _deliver_one(s):
    """One event: intercepts, double faults, then the table."""
    first: uint32_t = s.vectoring
    first_class: cython.int
    second_class: cython.int
    injected: cython.bint = False
    external: uint32_t
    if s.guest_mode == GUEST_VMX and vmx_of(s).injecting:
        injected = True
        vmx_of(s).injecting = 0
    elif s.guest_mode == GUEST_SVM and svm_of(s).injecting:
        injected = True
        svm_of(s).injecting = 0
    s.event.pending = 0
    if s.event.kind >= EVENT_EXCEPTION and s.event.kind != EVENT_SOFT_INTERRUPT and not injected:
        if s.guest_mode == GUEST_SVM:
            if s.event.kind == EVENT_PRIVILEGED and svm_wants(s, SVM_ICEBP):
                return svm_exit(s, SVM_ICEBP, 0, 0, s.event.instruction_length)
            if s.event.vector == 16 and (s.cr0 & CR0_NE) == 0 and svm_wants(s, SVM_FERR_FREEZE):
                return svm_exit(s, SVM_FERR_FREEZE, 0, 0, 0)
        if exception_intercepted(s, s.event.vector, s.event.error_code):
            return _exception_exit(s)
        if (first >> 31) and s.event.kind == EVENT_EXCEPTION and ((first >> 8) & 7) == EVENT_EXCEPTION:
            first_class = _class(first & 0xFF)
            second_class = _class(s.event.vector)
            if (first & 0xFF) == 8 and second_class:
                return _triple_fault(s)
            if (first_class == 1 and second_class == 1) or (first_class == 2 and second_class):
                s.vectoring = 0
                raise_error(s, 8, 0)
                s.event.pending = 0
                if exception_intercepted(s, 8, 0):
                    return _exception_exit(s)
    if s.event.kind >= EVENT_SOFT_INTERRUPT and not injected:
        s.retired += 1
    if s.event.kind == EVENT_EXCEPTION and s.event.vector == 14:
        s.cr2 = s.event.payload  # before the delivery: who injects it again after an exit on the way relies on it
    s.vectoring = s.event.vector | (s.event.kind << 8) | (s.event.has_error << 11) | cython.cast(uint64_t, 0x80000000)
    s.vectoring_error = s.event.error_code
    s.vectoring_length = s.event.instruction_length
    external = 1
    if s.event.kind >= EVENT_SOFT_INTERRUPT:
        external = 0
    return _through_idt(s, external)


def _through_idt(s, external):
    """Find the handler in the mode's table. ``external`` is the EXT bit of error codes."""
    flags: uint64_t = s.rflags
    rip: uint64_t = s.rip
    vector: uint32_t = s.event.vector
    payload: uint64_t = s.event.payload
    kind: uint32_t = s.event.kind
    r: cython.int
    if kind >= EVENT_SOFT_INTERRUPT:
        rip += s.event.instruction_length
        flags &= ~cython.cast(uint64_t, FLAG_RF)
        if s.mode != MODE_LONG64:
            rip &= cython.cast(uint64_t, 0xFFFFFFFF)
    elif kind == EVENT_EXCEPTION and (vector != 1 or (s.event.is_fault and s.event.payload & 0x2000)):
        # SDM, "Instruction-Breakpoint Exception Condition": all faults but that of an instruction breakpoint
        flags |= FLAG_RF
    if long_mode(s):
        r = _long(s, external, flags, rip)
    elif s.mode == MODE_REAL:
        r = _real(s, flags, rip)
    else:
        r = _protected(s, external, flags, rip)
    if r != GO_ON:
        return r
    if vector == 1 and (kind in (EVENT_EXCEPTION, EVENT_PRIVILEGED)):
        s.dr[6] = (s.dr[6] & ~cython.cast(uint64_t, 0xF)) | payload
        s.dr[7] &= ~cython.cast(uint64_t, 0x2000)
        s.debugctl = 0  # SDM, "Single-Stepping on Branches": to be set again for the next one
    elif kind == EVENT_NMI:
        s.interruptibility |= BLOCKED_NMI
    if kind != EVENT_SOFT_INTERRUPT and kind != EVENT_SOFT_EXCEPTION:
        # What MOV SS held back: delivered behind INT n, INT3 and INTO, lost to all other events. SDM, "Delivery of
        # Pending Debug Exceptions after VM Entry", has the rule. What a task switch leaves is the new task's.
        s.pending_debug &= DR6_BT
    s.interruptibility &= ~cython.cast(uint32_t, SHADOW_STI | SHADOW_MOV_SS)
    s.activity = 0
    return GO_ON


def _enter_handler(s, interrupt_gate):
    """Flags on entry to a handler. SDM, "Flag Usage By Exception- or Interrupt-Handler Procedure"."""
    s.rflags &= ~cython.cast(uint64_t, FLAG_TF | FLAG_NT | FLAG_RF | FLAG_VM)
    if interrupt_gate:
        s.rflags &= ~cython.cast(uint64_t, FLAG_IF)
    mode_changed(s)


def _gate_checks(s, gate, external):
    """DPL for software interrupts, then present."""
    error: uint32_t = s.event.vector * 8 + 2
    if (s.event.kind == EVENT_SOFT_INTERRUPT or s.event.kind == EVENT_SOFT_EXCEPTION) and ((gate >> 45) & 3) < s.cpl:
        return raise_error(s, 13, error)
    if (gate >> 47) & 1 == 0:
        return raise_error(s, 11, error + external)
    return GO_ON


def _target(s, selector, external, descriptor, cpl):
    """The handler's code segment, and the privilege that it runs at."""
    rights: uint32_t
    dpl: uint32_t
    r: cython.int
    if (selector & 0xFFFC) == 0:
        return raise_error(s, 13, external)
    r = read_descriptor(s, selector, 13, (selector & 0xFFFC) + external, descriptor)
    if r != GO_ON:
        return r
    rights = cython.cast(uint32_t, descriptor[0] >> 40) & 0xFF
    dpl = (rights >> 5) & 3
    if (rights & 0x18) != 0x18 or dpl > s.cpl:
        return raise_error(s, 13, (selector & 0xFFFC) + external)
    if (rights & 0x80) == 0:
        return raise_error(s, 11, (selector & 0xFFFC) + external)
    cpl[0] = s.cpl
    if (rights & 4) == 0:
        cpl[0] = dpl
    return GO_ON


# ---- long mode ---------------------------------------------------------------------------------------------------


def _inner_stack_long(s, offset, external, rsp):
    """A stack pointer from the 64-bit TSS. SDM, "Task Management in 64-bit Mode"."""
    r: cython.int
    if offset + 7 > s.tr.limit:
        return raise_error(s, 10, (s.tr.selector & 0xFFFC) + external)
    r = implicit_read(s, s.tr.base + offset, 8, rsp)
    if r != GO_ON:
        return r
    if not is_canonical(s, rsp[0]):
        return raise_error(s, 12, external)
    return GO_ON


def _long(s, external, flags, rip):
    """SDM, "64-Bit Mode Interrupt/Exception Handling"."""
    vector: uint32_t = s.event.vector
    low: uint64_t
    high: uint64_t
    descriptor: uint64_t
    offset: uint64_t
    rsp: uint64_t = s.gpr[RSP]
    frame: uint64_t[6]
    at: uint32_t = 0
    selector: uint32_t
    stack: uint32_t
    cpl: uint32_t
    has_error: uint32_t = s.event.has_error
    error_code: uint32_t = s.event.error_code
    r: cython.int
    if vector * 16 + 15 > s.idtr.limit:
        return raise_error(s, 13, vector * 8 + 2 + external)
    r = implicit_read(s, s.idtr.base + vector * 16, 8, cython.address(low))
    if r == GO_ON:
        r = implicit_read(s, s.idtr.base + vector * 16 + 8, 8, cython.address(high))
    if r != GO_ON:
        return r
    if ((low >> 40) & 0x1E) != 0xE:
        return raise_error(s, 13, vector * 8 + 2 + external)
    r = _gate_checks(s, low, external)
    if r != GO_ON:
        return r
    selector = cython.cast(uint32_t, low >> 16) & 0xFFFF
    r = _target(s, selector, external, cython.address(descriptor), cython.address(cpl))
    if r != GO_ON:
        return r
    if (descriptor >> 53) & 3 != 1:  # L = 1 and D = 0
        return raise_error(s, 13, (selector & 0xFFFC) + external)
    stack = cython.cast(uint32_t, low >> 32) & 7
    if stack:
        r = _inner_stack_long(s, 0x24 + (stack - 1) * 8, external, cython.address(rsp))
    elif cpl != s.cpl:
        r = _inner_stack_long(s, 4 + cpl * 8, external, cython.address(rsp))
    if r != GO_ON:
        return r
    offset = (low & 0xFFFF) | ((low >> 32) & cython.cast(uint64_t, 0xFFFF0000)) | (high << 32)
    if not is_canonical(s, offset):
        return raise_error(s, 13, external)
    rsp &= ~cython.cast(uint64_t, 15)
    if not is_canonical(s, rsp - 48) or not is_canonical(s, rsp - 1):
        return raise_error(s, 12, external)
    if has_error:
        frame[0] = error_code
        at = 1
    frame[at] = rip
    frame[at + 1] = s.segs[CS].selector
    frame[at + 2] = flags
    frame[at + 3] = s.gpr[RSP]
    frame[at + 4] = s.segs[SS].selector
    at += 5
    rsp -= 8 * at
    r = set_accessed(s, selector, cython.address(descriptor))
    if r != GO_ON:
        return r
    if cpl < 3:
        r = write_linear(s, rsp, cython.address(frame[0]), 8 * at, ACCESS_IMPLICIT | ACCESS_WRITE)
    else:
        r = write_linear(s, rsp, cython.address(frame[0]), 8 * at, ACCESS_WRITE)
    if r != GO_ON:
        return r
    if cpl != s.cpl:
        set_null(s, SS, cpl)
    r = enter_code(s, selector, descriptor, cpl)
    if r != GO_ON:
        return r
    s.gpr[RSP] = rsp
    s.rip = offset
    _enter_handler(s, ((low >> 40) & 1) == 0)
    return GO_ON


# ---- protected and virtual-8086 mode -----------------------------------------------------------------------------


def _inner_stack(s, cpl, external, stack, esp):
    """SS:ESP of an inner level from the TSS. SDM, "Exception- or Interrupt-Handler Procedures"."""
    offset: uint32_t
    size: uint32_t
    selector: uint64_t
    r: cython.int
    if s.tr.access_rights & 8:
        size = 4
        offset = 4 + cpl * 8
    else:
        size = 2
        offset = 2 + cpl * 4
    if offset + 2 * size - 1 > s.tr.limit:
        return raise_error(s, 10, (s.tr.selector & 0xFFFC) + external)
    r = implicit_read(s, s.tr.base + offset, size, esp)
    if r == GO_ON:
        r = implicit_read(s, s.tr.base + offset + size, 2, cython.address(selector))
    if r != GO_ON:
        return r
    return stack_segment(s, cython.cast(uint32_t, selector), cpl, 10, external, stack)


def _push(s, stack, esp, values, count, size, cpl, error):
    """Push ``count`` values (the last one first) on a stack segment; *esp moves only when all went well."""
    mask: uint64_t = cython.cast(uint64_t, 0xFFFFFFFF) if stack.access_rights & AR_DB else 0xFFFF
    total: uint64_t = count * size
    low: uint64_t = (esp[0] - total) & mask
    i: uint32_t
    r: cython.int
    buffer: uint8_t[64]
    cell: cython.pointer(uint8_t)
    if not stack_holds(stack, low, total):
        return raise_error(s, 12, error)
    for i in range(count):
        cell = cython.address(buffer[0]) + i * size
        if size == 2:
            cell[0] = cython.cast(uint8_t, values[i])
            cell[1] = cython.cast(uint8_t, values[i] >> 8)
        else:
            cython.cast(cython.pointer(uint32_t), cell)[0] = cython.cast(uint32_t, values[i])
    r = write_linear(
        s,
        (stack.base + low) & cython.cast(uint64_t, 0xFFFFFFFF),
        cython.address(buffer[0]),
        cython.cast(uint32_t, total),
        ACCESS_WRITE | (ACCESS_IMPLICIT if cpl < 3 else 0),
    )
    if r != GO_ON:
        return r
    esp[0] = (esp[0] & ~mask) | low
    return GO_ON


def _protected(s, external, flags, rip):
    """Through interrupt, trap or task gates of the protected-mode IDT."""
    vector: uint32_t = s.event.vector
    has_error: uint32_t = s.event.has_error
    error_code: uint32_t = s.event.error_code
    gate: uint64_t
    descriptor: uint64_t
    offset: uint64_t
    esp: uint64_t = s.gpr[RSP]
    frame: uint64_t[10]
    stack: Segment
    code: Segment
    at: uint32_t = 0
    selector: uint32_t
    kind: uint32_t
    size: uint32_t
    cpl: uint32_t
    from_vm86: cython.bint = s.mode == MODE_VM86
    r: cython.int
    if vector * 8 + 7 > s.idtr.limit:
        return raise_error(s, 13, vector * 8 + 2 + external)
    r = implicit_read(s, s.idtr.base + vector * 8, 8, cython.address(gate))
    if r != GO_ON:
        return r
    kind = cython.cast(uint32_t, gate >> 40) & 0x1F
    if kind != 5 and kind != 6 and kind != 7 and kind != 14 and kind != 15:
        return raise_error(s, 13, vector * 8 + 2 + external)
    r = _gate_checks(s, gate, external)
    if r != GO_ON:
        return r
    selector = cython.cast(uint32_t, gate >> 16) & 0xFFFF
    if kind == 5:
        return task_gate(s, selector, external, rip, flags, has_error, error_code)
    r = _target(s, selector, external, cython.address(descriptor), cython.address(cpl))
    if r != GO_ON:
        return r
    if from_vm86 and cpl != 0:
        return raise_error(s, 13, (selector & 0xFFFC) + external)
    size = 4 if kind >= 14 else 2
    offset = (gate & 0xFFFF) | ((gate >> 32) & cython.cast(uint64_t, 0xFFFF0000))
    if size == 2:
        offset &= 0xFFFF
    unpack(cython.address(code), selector, descriptor)
    if has_error:
        frame[0] = error_code
        at = 1
    frame[at] = rip
    frame[at + 1] = s.segs[CS].selector
    frame[at + 2] = flags
    at += 3
    stack = s.segs[SS]
    if cpl != s.cpl:
        r = _inner_stack(s, cpl, external, cython.address(stack), cython.address(esp))
        if r != GO_ON:
            return r
        frame[at] = s.gpr[RSP]
        frame[at + 1] = s.segs[SS].selector
        at += 2
        if from_vm86:
            frame[at] = s.segs[ES].selector
            frame[at + 1] = s.segs[DS].selector
            frame[at + 2] = s.segs[FS].selector
            frame[at + 3] = s.segs[GS].selector
            at += 4
    if offset > code.limit:
        return raise_error(s, 13, external)
    r = set_accessed(s, selector, cython.address(descriptor))
    if r != GO_ON:
        return r
    r = _push(
        s, cython.address(stack), cython.address(esp), cython.address(frame[0]), at, size, cpl,
        ((stack.selector & 0xFFFC) + external) if cpl != s.cpl else external,
    )  # fmt: skip
    if r != GO_ON:
        return r
    if from_vm86:
        s.rflags &= ~cython.cast(uint64_t, FLAG_VM)
        set_null(s, ES, 0)
        set_null(s, DS, 0)
        set_null(s, FS, 0)
        set_null(s, GS, 0)
    s.segs[SS] = stack
    r = enter_code(s, selector, descriptor, cpl)
    if r != GO_ON:
        return r
    s.gpr[RSP] = esp
    s.rip = offset
    _enter_handler(s, (kind & 1) == 0)
    return GO_ON


def _real(s, flags, rip):
    """Through the interrupt vector table. SDM, "Real-Address Mode Operation"."""
    vector: uint32_t = s.event.vector
    entry: uint64_t
    frame: uint64_t[3]
    esp: uint64_t = s.gpr[RSP]
    r: cython.int
    if vector * 4 + 3 > s.idtr.limit:
        return raise_error(s, 13, vector * 8 + 2)
    r = implicit_read(s, s.idtr.base + vector * 4, 4, cython.address(entry))
    if r != GO_ON:
        return r
    frame[0] = rip
    frame[1] = s.segs[CS].selector
    frame[2] = flags
    r = _push(s, cython.address(s.segs[SS]), cython.address(esp), cython.address(frame[0]), 3, 2, 0, 0)
    if r != GO_ON:
        return r
    s.gpr[RSP] = esp
    set_real(s, CS, cython.cast(uint32_t, entry >> 16))
    s.rip = entry & 0xFFFF
    s.rflags &= ~cython.cast(uint64_t, FLAG_IF | FLAG_TF | FLAG_AC | FLAG_RF)
    mode_changed(s)
    return GO_ON


# ---- instructions ------------------------------------------------------------------------------------------------


def _vm86_interrupt(s, vector, length):
    """INT n in virtual-8086 mode with CR4.VME: through the interrupt vector table when the redirection bitmap says so.

    SDM, "Software Interrupt Handling Methods While Operating in Virtual-8086 Mode". GO_ON: not redirected.
    """
    base: uint64_t
    byte: uint64_t
    entry: uint64_t
    frame: uint64_t[3]
    esp: uint64_t = s.gpr[RSP]
    flags: uint64_t = s.rflags
    r: cython.int
    if (s.cr4 & CR4_VME) == 0 or s.tr.limit < 0x67:
        return GO_ON
    r = implicit_read(s, s.tr.base + 0x66, 2, cython.address(base))
    if r != GO_ON:
        return r
    if base < 32 or base - 32 + (vector >> 3) > s.tr.limit:
        return GO_ON
    r = implicit_read(s, s.tr.base + base - 32 + (vector >> 3), 1, cython.address(byte))
    if r != GO_ON:
        return r
    if (byte >> (vector & 7)) & 1:
        return GO_ON
    r = implicit_read(s, vector * 4, 4, cython.address(entry))
    if r != GO_ON:
        return r
    if (flags & FLAG_IOPL) != FLAG_IOPL:
        flags = (flags & ~cython.cast(uint64_t, FLAG_IF)) | FLAG_IOPL | (FLAG_IF if flags & FLAG_VIF else 0)
    frame[0] = s.rip + length
    frame[1] = s.segs[CS].selector
    frame[2] = flags
    r = _push(s, cython.address(s.segs[SS]), cython.address(esp), cython.address(frame[0]), 3, 2, 3, 0)
    if r != GO_ON:
        return r
    s.gpr[RSP] = esp
    set_real(s, CS, cython.cast(uint32_t, entry >> 16))
    s.rip = entry & 0xFFFF
    s.rflags &= ~cython.cast(uint64_t, FLAG_TF | (FLAG_IF if (s.rflags & FLAG_IOPL) == FLAG_IOPL else FLAG_VIF))
    mode_changed(s)
    return LEAVE_JUMP


def software_interrupt(s, vector, kind, length):
    """INT n, INT3, INTO, INT1: recorded for the dispatcher to deliver."""
    r: cython.int
    if s.mode == MODE_VM86 and kind == EVENT_SOFT_INTERRUPT:
        r = _vm86_interrupt(s, vector, length)
        if r != GO_ON:
            return r
        if (s.rflags & FLAG_IOPL) != FLAG_IOPL:
            return raise_error(s, 13, 0)
    if kind == EVENT_SOFT_INTERRUPT and svm_wants(s, SVM_SWINT):
        return svm_exit(s, SVM_SWINT, vector, 0, length)
    raise_exception(s, vector)
    s.event.kind = kind
    s.event.instruction_length = length
    return LEAVE_EVENT


def hlt(s, length):
    """HLT: run() returns EXIT_HALT; the next run() goes on when an interrupt or NMI has come."""
    if s.cpl:
        return raise_error(s, 13, 0)
    if vmx_wants(s, PROC_HLT):
        return vm_exit(s, REASON_HLT, 0, length)
    if svm_wants(s, SVM_HLT):
        return svm_exit(s, SVM_HLT, 0, 0, length)
    s.rip += length
    s.activity = 1
    return LEAVE_JUMP


def cli(s):
    """CLI. SDM, "CLI—Clear Interrupt Flag"."""
    iopl: uint32_t = cython.cast(uint32_t, s.rflags >> 12) & 3
    if s.mode == MODE_REAL or s.cpl <= iopl:
        s.rflags &= ~cython.cast(uint64_t, FLAG_IF)
    elif (s.mode == MODE_VM86 and (s.cr4 & CR4_VME)) or (s.mode != MODE_VM86 and s.cpl == 3 and (s.cr4 & CR4_PVI)):
        s.rflags &= ~cython.cast(uint64_t, FLAG_VIF)
    else:
        return raise_error(s, 13, 0)
    return GO_ON


def sti(s):
    """STI: interrupts stay blocked for one more instruction. SDM, "STI—Set Interrupt Flag"."""
    iopl: uint32_t = cython.cast(uint32_t, s.rflags >> 12) & 3
    if s.mode == MODE_REAL or s.cpl <= iopl:
        if (s.rflags & FLAG_IF) == 0:
            s.rflags |= FLAG_IF
            s.interruptibility |= SHADOW_STI
        return LEAVE_NEXT
    if (s.mode == MODE_VM86 and (s.cr4 & CR4_VME)) or (s.mode != MODE_VM86 and s.cpl == 3 and (s.cr4 & CR4_PVI)):
        if s.rflags & FLAG_VIP:
            return raise_error(s, 13, 0)
        s.rflags |= FLAG_VIF
        return LEAVE_NEXT
    return raise_error(s, 13, 0)


def popf(s, value, size):
    """SDM, "POPF/POPFD/POPFQ—Pop Stack Into EFLAGS Register"."""
    change: uint64_t = 0x254DD5  # ID AC NT DF TF and the arithmetic flags
    iopl: uint32_t = cython.cast(uint32_t, s.rflags >> 12) & 3
    if s.mode == MODE_VM86:
        if iopl < 3:
            if size != 2 or (s.cr4 & CR4_VME) == 0:
                return raise_error(s, 13, 0)
            if (value & FLAG_TF) or ((value & FLAG_IF) and (s.rflags & FLAG_VIP)):
                return raise_error(s, 13, 0)
            s.rflags &= ~cython.cast(uint64_t, FLAG_VIF)
            if value & FLAG_IF:
                s.rflags |= FLAG_VIF
        else:
            change |= FLAG_IF
    else:
        if s.cpl <= iopl:
            change |= FLAG_IF
        if s.cpl == 0:
            change |= FLAG_IOPL
    if size == 2:
        change &= 0xFFFF
    s.rflags = (s.rflags & ~(change | FLAG_RF)) | (value & change) | 2
    mode_changed(s)
    return LEAVE_NEXT


def pushf(s, size, value):
    """SDM, "PUSHF/PUSHFD/PUSHFQ—Push EFLAGS Register Onto the Stack"."""
    value[0] = s.rflags & 0xFCFFFF
    if s.mode == MODE_VM86 and (s.rflags & FLAG_IOPL) != FLAG_IOPL:
        if size != 2 or (s.cr4 & CR4_VME) == 0:
            return raise_error(s, 13, 0)
        value[0] = (value[0] & ~cython.cast(uint64_t, FLAG_IF)) | FLAG_IOPL
        if s.rflags & FLAG_VIF:
            value[0] |= FLAG_IF
    return GO_ON
