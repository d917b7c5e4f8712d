"""The checks of VM entry. SDM, "Checks on VMX Controls and Host-State Area" and "Checks on the Guest State Area"."""

import cython
from cython.cimports.vmonty.cpu.cpuid import cr4_allowed, efer_allowed
from cython.cimports.vmonty.cpu.state import (
    BLOCKED_NMI,
    BLOCKED_SMI,
    CR4_PAE,
    CR4_PCIDE,
    CR4_VMXE,
    DEBUGCTL_BTF,
    EFER_LMA,
    EFER_LME,
    EVENT_EXCEPTION,
    EVENT_EXTERNAL,
    EVENT_NMI,
    EVENT_SOFT_INTERRUPT,
    FLAG_IF,
    FLAG_TF,
    FLAG_VM,
    SHADOW_MOV_SS,
    SHADOW_STI,
    is_register_canonical,
)
from cython.cimports.vmonty.cpu.vmcs import (
    EPT_POINTER,
    GUEST_ACTIVITY_STATE,
    GUEST_CR0,
    GUEST_CR3,
    GUEST_CR4,
    GUEST_CS_AR_BYTES,
    GUEST_CS_BASE,
    GUEST_CS_LIMIT,
    GUEST_CS_SELECTOR,
    GUEST_DR7,
    GUEST_ES_AR_BYTES,
    GUEST_ES_BASE,
    GUEST_ES_LIMIT,
    GUEST_ES_SELECTOR,
    GUEST_FS_BASE,
    GUEST_GDTR_BASE,
    GUEST_GDTR_LIMIT,
    GUEST_GS_BASE,
    GUEST_IA32_DEBUGCTL,
    GUEST_IA32_EFER,
    GUEST_IA32_PAT,
    GUEST_IDTR_BASE,
    GUEST_IDTR_LIMIT,
    GUEST_INTERRUPTIBILITY_INFO,
    GUEST_LDTR_AR_BYTES,
    GUEST_LDTR_BASE,
    GUEST_LDTR_LIMIT,
    GUEST_LDTR_SELECTOR,
    GUEST_PENDING_DBG_EXCEPTIONS,
    GUEST_RFLAGS,
    GUEST_RIP,
    GUEST_SS_AR_BYTES,
    GUEST_SS_SELECTOR,
    GUEST_SYSENTER_EIP,
    GUEST_SYSENTER_ESP,
    GUEST_TR_AR_BYTES,
    GUEST_TR_BASE,
    GUEST_TR_LIMIT,
    GUEST_TR_SELECTOR,
    VIRTUAL_PROCESSOR_ID,
    VM_ENTRY_EXCEPTION_ERROR_CODE,
    VM_ENTRY_INSTRUCTION_LEN,
    VM_ENTRY_INTR_INFO_FIELD,
    VM_ENTRY_MSR_LOAD_ADDR,
    VM_ENTRY_MSR_LOAD_COUNT,
    VM_EXIT_MSR_LOAD_ADDR,
    VM_EXIT_MSR_LOAD_COUNT,
    VM_EXIT_MSR_STORE_ADDR,
    VM_EXIT_MSR_STORE_COUNT,
    VMCS_LINK_POINTER,
    get,
)
from cython.cimports.vmonty.cpu.vmx_capabilities import controls_allowed
from cython.cimports.vmonty.cpu.vmx_entry import ERROR_ENTRY_CONTROLS
from cython.cimports.vmonty.cpu.vmx_exit import (
    ENTRY_IA32E,
    ENTRY_LOAD_DEBUG,
    ENTRY_LOAD_EFER,
    ENTRY_LOAD_PAT,
    EXIT_SAVE_TIMER,
    PIN_NMI,
    PIN_PREEMPTION_TIMER,
    PIN_VIRTUAL_NMIS,
    PROC_IO_BITMAPS,
    PROC_MSR_BITMAPS,
    PROC_NMI_WINDOW,
    PROC_TPR_SHADOW,
    SECOND_EPT,
    SECOND_UNRESTRICTED,
    SECOND_VPID,
    vmx_of,
)


def _injection_valid(s):
    """SDM, "VM-Entry Control Fields": the event to inject."""
    v: cython.pointer(VmxState) = vmx_of(s)
    m: cython.pointer(uint8_t) = v.vmcs
    information: uint32_t = cython.cast(uint32_t, get(m, VM_ENTRY_INTR_INFO_FIELD))
    vector: uint32_t = information & 0xFF
    kind: uint32_t = (information >> 8) & 7
    has_error: cython.bint
    length: uint64_t
    if (information >> 31) == 0:
        return True
    if (information & 0x7FFFF000) or kind == 1 or (kind == 7 and vector):  # 7 with 0: the monitor trap flag
        return False
    if kind == 7:
        return ((information >> 11) & 1) == 0
    if (kind == EVENT_NMI and vector != 2) or (kind == EVENT_EXCEPTION and vector > 31):
        return False
    has_error = kind == EVENT_EXCEPTION and (vector == 8 or (10 <= vector <= 14) or vector == 17)
    if (v.secondary & SECOND_UNRESTRICTED) and (get(m, GUEST_CR0) & 1) == 0:
        has_error = False
    if ((information >> 11) & 1) != has_error:
        return False
    if has_error and get(m, VM_ENTRY_EXCEPTION_ERROR_CODE) >> 16:
        return False
    if kind >= EVENT_SOFT_INTERRUPT:
        length = get(m, VM_ENTRY_INSTRUCTION_LEN)
        return 1 <= length <= 15
    return True


def check_controls(s):
    """Execution, exit and entry controls."""
    v: cython.pointer(VmxState) = vmx_of(s)
    m: cython.pointer(uint8_t) = v.vmcs
    eptp: uint64_t = get(m, EPT_POINTER)
    good: cython.bint = (
        controls_allowed(s, 0x48D, v.pin)
        and controls_allowed(s, 0x48E, v.processor)
        and controls_allowed(s, 0x48B, v.secondary)
        and controls_allowed(s, 0x48F, v.exit_controls)
        and controls_allowed(s, 0x490, v.entry_controls)
        and v.cr3_targets <= 4
    )
    if v.processor & PROC_IO_BITMAPS:
        good = good and ((cython.cast(uint64_t, v.io_bitmap_a) | cython.cast(uint64_t, v.io_bitmap_b)) & 0xFFF) == 0
        good = good and v.io_bitmap_a != cython.NULL and v.io_bitmap_b != cython.NULL
    if v.processor & PROC_MSR_BITMAPS:
        good = good and (cython.cast(uint64_t, v.msr_bitmap) & 0xFFF) == 0 and v.msr_bitmap != cython.NULL
    if v.processor & PROC_TPR_SHADOW:
        good = good and (cython.cast(uint64_t, v.virtual_apic) & 0xFFF) == 0 and v.virtual_apic != cython.NULL
        good = good and (v.tpr_threshold >> 4) == 0 and v.tpr_threshold <= (v.virtual_apic[0x80] >> 4)
    if (v.pin & PIN_NMI) == 0:
        good = good and (v.pin & PIN_VIRTUAL_NMIS) == 0
    if (v.pin & PIN_VIRTUAL_NMIS) == 0:
        good = good and (v.processor & PROC_NMI_WINDOW) == 0
    if v.secondary & SECOND_VPID:
        good = good and get(m, VIRTUAL_PROCESSOR_ID) != 0
    if v.secondary & SECOND_EPT:
        good = good and ((eptp & 7) == 0 or (eptp & 7) == 6) and ((eptp >> 3) & 7) == 3 and (eptp & 0xF80) == 0
        good = good and (eptp >> 12) != 0
    elif v.secondary & SECOND_UNRESTRICTED:
        good = False
    if (v.pin & PIN_PREEMPTION_TIMER) == 0:
        good = good and (v.exit_controls & EXIT_SAVE_TIMER) == 0
    if get(m, VM_EXIT_MSR_STORE_COUNT):
        good = good and (get(m, VM_EXIT_MSR_STORE_ADDR) & 15) == 0
    if get(m, VM_EXIT_MSR_LOAD_COUNT):
        good = good and (get(m, VM_EXIT_MSR_LOAD_ADDR) & 15) == 0
    if get(m, VM_ENTRY_MSR_LOAD_COUNT):
        good = good and (get(m, VM_ENTRY_MSR_LOAD_ADDR) & 15) == 0
    if good and _injection_valid(s):
        return 0
    return ERROR_ENTRY_CONTROLS


def _registers_valid(s):
    """SDM, "Checks on Guest Control Registers, Debug Registers, and MSRs"."""
    v: cython.pointer(VmxState) = vmx_of(s)
    m: cython.pointer(uint8_t) = v.vmcs
    cr0: uint64_t = get(m, GUEST_CR0)
    cr4: uint64_t = get(m, GUEST_CR4)
    efer: uint64_t = get(m, GUEST_IA32_EFER)
    pat: uint64_t
    kind: uint64_t
    i: uint32_t
    long_guest: cython.bint = (v.entry_controls & ENTRY_IA32E) != 0
    paging: cython.bint = (cr0 >> 31) & 1
    fixed: uint64_t = cython.cast(uint64_t, 0x80000021)
    if v.secondary & SECOND_UNRESTRICTED:
        fixed = 0x20
    if cr0 >> 32 or (cr0 & fixed) != fixed or (paging and (cr0 & 1) == 0):
        return False
    if (cr4 & ~cr4_allowed(s)) or (cr4 & CR4_VMXE) == 0:
        return False
    if long_guest and (not paging or (cr4 & CR4_PAE) == 0):
        return False
    if not long_guest and (cr4 & CR4_PCIDE):
        return False
    if (v.secondary & SECOND_EPT) and get(m, GUEST_CR3) >> s.physical_bits:
        return False
    if (v.entry_controls & ENTRY_LOAD_DEBUG) and (get(m, GUEST_DR7) >> 32 or get(m, GUEST_IA32_DEBUGCTL) >> 16):
        return False
    if not is_register_canonical(s, get(m, GUEST_SYSENTER_ESP)) or not is_register_canonical(
        s, get(m, GUEST_SYSENTER_EIP)
    ):
        return False
    if v.entry_controls & ENTRY_LOAD_PAT:
        pat = get(m, GUEST_IA32_PAT)
        for i in range(0, 64, 8):
            kind = (pat >> i) & 0xFF
            if kind > 7 or kind == 2 or kind == 3:
                return False
    if v.entry_controls & ENTRY_LOAD_EFER:
        if efer & ~efer_allowed(s) or ((efer & EFER_LMA) != 0) != long_guest:
            return False
        if paging and ((efer & EFER_LME) != 0) != long_guest:
            return False
    return True


def _segment_valid(limit, rights):
    """Reserved bits and granularity of a usable segment."""
    if rights & cython.cast(uint64_t, 0xFFFE0F00):
        return False
    if (limit & 0xFFF) != 0xFFF and (rights & 0x8000):
        return False
    return limit >> 20 == 0 or (rights & 0x8000) != 0


def _vm86_valid(m):
    """In virtual-8086 mode every segment is as 8086 code expects it."""
    i: uint32_t
    for i in range(6):
        if get(m, GUEST_ES_BASE + 2 * i) != get(m, GUEST_ES_SELECTOR + 2 * i) << 4:
            return False
        if get(m, GUEST_ES_LIMIT + 2 * i) != 0xFFFF or get(m, GUEST_ES_AR_BYTES + 2 * i) != 0xF3:
            return False
    return True


def _code_valid(s):
    """CS against SS. SDM, "Checks on Guest Segment Registers"."""
    v: cython.pointer(VmxState) = vmx_of(s)
    m: cython.pointer(uint8_t) = v.vmcs
    cs: uint64_t = get(m, GUEST_CS_AR_BYTES)
    ss: uint64_t = get(m, GUEST_SS_AR_BYTES)
    kind: uint64_t = cs & 15
    unrestricted: cython.bint = (v.secondary & SECOND_UNRESTRICTED) != 0
    if (cs & 0x90) != 0x90 or not _segment_valid(get(m, GUEST_CS_LIMIT), cs):
        return False
    if kind == 3:
        if not unrestricted or (cs & 0x60):
            return False
    elif kind == 9 or kind == 11:
        if (cs & 0x60) != (ss & 0x60):
            return False
    elif kind == 13 or kind == 15:
        if (cs & 0x60) > (ss & 0x60):
            return False
    else:
        return False
    if (v.entry_controls & ENTRY_IA32E) and (cs & 0x6000) == 0x6000:
        return False
    if not unrestricted and ((get(m, GUEST_SS_SELECTOR) ^ get(m, GUEST_CS_SELECTOR)) & 3):
        return False
    if (get(m, GUEST_CR0) & 1) == 0 or kind == 3:
        return (ss & 0x60) == 0
    return unrestricted or ((ss >> 5) & 3) == (get(m, GUEST_SS_SELECTOR) & 3)


def _segments_valid(s):
    """Segment registers, TR, LDTR, GDTR, IDTR."""
    v: cython.pointer(VmxState) = vmx_of(s)
    m: cython.pointer(uint8_t) = v.vmcs
    rights: uint64_t
    i: uint32_t
    if get(m, GUEST_RFLAGS) & FLAG_VM:
        if not _vm86_valid(m):
            return False
    else:
        if not _code_valid(s):
            return False
        for i in range(6):
            rights = get(m, GUEST_ES_AR_BYTES + 2 * i)
            if i == 1 or (rights & 0x10000):
                continue
            if (rights & 0x91) != 0x91 or not _segment_valid(get(m, GUEST_ES_LIMIT + 2 * i), rights):
                return False
            if i == 2 and (rights & 15) != 3 and (rights & 15) != 7:
                return False
            if (rights & 0xA) == 8:  # code that can't be read
                return False
    rights = get(m, GUEST_TR_AR_BYTES)
    if (rights & 0x10000) or (rights & 0x90) != 0x80 or (get(m, GUEST_TR_SELECTOR) & 4):
        return False
    if (rights & 15) != 11 and ((v.entry_controls & ENTRY_IA32E) or (rights & 15) != 3):
        return False
    if not _segment_valid(get(m, GUEST_TR_LIMIT), rights):
        return False
    rights = get(m, GUEST_LDTR_AR_BYTES)
    if (rights & 0x10000) == 0:
        if (rights & 0x9F) != 0x82 or (get(m, GUEST_LDTR_SELECTOR) & 4):
            return False
        if not _segment_valid(get(m, GUEST_LDTR_LIMIT), rights) or not is_register_canonical(
            s, get(m, GUEST_LDTR_BASE)
        ):
            return False
    if not is_register_canonical(s, get(m, GUEST_TR_BASE)) or not is_register_canonical(s, get(m, GUEST_FS_BASE)):
        return False
    if not is_register_canonical(s, get(m, GUEST_GS_BASE)) or get(m, GUEST_CS_BASE) >> 32:
        return False
    if not is_register_canonical(s, get(m, GUEST_GDTR_BASE)) or not is_register_canonical(s, get(m, GUEST_IDTR_BASE)):
        return False
    return get(m, GUEST_GDTR_LIMIT) >> 16 == 0 and get(m, GUEST_IDTR_LIMIT) >> 16 == 0


def _state_valid(s):
    """RIP, RFLAGS, activity, interruptibility, link pointer: 0, or 8 + qualification."""
    v: cython.pointer(VmxState) = vmx_of(s)
    m: cython.pointer(uint8_t) = v.vmcs
    flags: uint64_t = get(m, GUEST_RFLAGS)
    activity: uint64_t = get(m, GUEST_ACTIVITY_STATE)
    blocked: uint64_t = get(m, GUEST_INTERRUPTIBILITY_INFO)
    information: uint64_t = get(m, VM_ENTRY_INTR_INFO_FIELD)
    kind: uint64_t = (information >> 8) & 7
    debug: uint64_t = get(m, GUEST_PENDING_DBG_EXCEPTIONS)
    long_guest: cython.bint = (v.entry_controls & ENTRY_IA32E) != 0
    good: cython.bint = True
    step: cython.bint
    high: uint64_t
    if long_guest and (get(m, GUEST_CS_AR_BYTES) & 0x2000):
        # Bits above the linear address's are alike; its highest may differ: code that runs off the canonical half
        # faults in the guest.
        high = get(m, GUEST_RIP) >> s.linear_bits
        good = high == 0 or high == (~cython.cast(uint64_t, 0)) >> s.linear_bits
    else:
        good = get(m, GUEST_RIP) >> 32 == 0
    good = good and (flags & 2) != 0 and (flags & ~cython.cast(uint64_t, 0x3F7FD7)) == 0
    if flags & FLAG_VM:
        good = good and not long_guest and (get(m, GUEST_CR0) & 1) != 0
    good = good and activity <= 3
    if activity == 1:
        good = good and (get(m, GUEST_SS_AR_BYTES) & 0x60) == 0
    if activity and (blocked & (SHADOW_STI | SHADOW_MOV_SS)):
        good = False
    good = good and (blocked >> 5) == 0 and (blocked & BLOCKED_SMI) == 0
    good = good and (blocked & (SHADOW_STI | SHADOW_MOV_SS)) != (SHADOW_STI | SHADOW_MOV_SS)
    if blocked & SHADOW_STI:
        good = good and (flags & FLAG_IF) != 0
    # SDM, "Checks on Guest Non-Register State": pending debug exceptions.
    good = good and (debug & ~cython.cast(uint64_t, 0x1500F)) == 0
    if blocked & (SHADOW_STI | SHADOW_MOV_SS) or activity == 1:
        step = (flags & FLAG_TF) != 0 and (get(m, GUEST_IA32_DEBUGCTL) & DEBUGCTL_BTF) == 0
        good = good and ((debug >> 14) & 1) == step
    if information >> 31:
        if kind == EVENT_EXTERNAL:
            good = good and (flags & FLAG_IF) != 0 and (blocked & (SHADOW_STI | SHADOW_MOV_SS)) == 0
        elif kind == EVENT_NMI:
            if blocked & SHADOW_MOV_SS:
                return 8 + 3
            if (v.pin & PIN_VIRTUAL_NMIS) and (blocked & BLOCKED_NMI):
                good = False
        if activity >= 2 and not (activity == 2 and kind == EVENT_NMI):
            good = False
    if not good:
        return 8
    if get(m, VMCS_LINK_POINTER) != ~cython.cast(uint64_t, 0):
        return 8 + 4
    return 0


def check_guest(s):
    """The guest-state area."""
    if not _registers_valid(s) or not _segments_valid(s):
        return 8
    return _state_valid(s)
