"""VMXON to VMXOFF as instructions, and the exits of a guest whose hypervisor is code of this processor.

SDM, "VMX Instruction Reference"; "Conventions": VMsucceed, VMfailInvalid, VMfailValid; "Loading Host State". A VMCS
lies in the guest-physical memory of the bare processor, in the format of our own that ``vmcs`` describes.
"""

import cython
from cython.cimports.vmonty.cpu.breakpoints import load_dr7
from cython.cimports.vmonty.cpu.cpuid import cr4_allowed, efer_allowed
from cython.cimports.vmonty.cpu.paging import physical_to_host
from cython.cimports.vmonty.cpu.state import (
    AR_UNUSABLE,
    ARITHMETIC_FLAGS,
    BLOCKED_NMI,
    CR0_NE,
    CR4_LA57,
    CR4_PAE,
    CR4_VMXE,
    CS,
    DS,
    EFER_LMA,
    EFER_LME,
    ES,
    EXIT_NONE,
    FLAG_CF,
    FLAG_ZF,
    FS,
    GO_ON,
    GS,
    LEAVE_JUMP,
    LEAVE_NEXT,
    MODE_COMPAT16,
    MODE_COMPAT32,
    RSP,
    SS,
    is_register_canonical,
    raise_error,
    raise_exception,
)
from cython.cimports.vmonty.cpu.tlb import flush_all, mode_changed
from cython.cimports.vmonty.cpu.vmcs import (
    HEADER_LAUNCHED,
    HOST_CR0,
    HOST_CR3,
    HOST_CR4,
    HOST_CS_SELECTOR,
    HOST_DS_SELECTOR,
    HOST_ES_SELECTOR,
    HOST_FS_BASE,
    HOST_FS_SELECTOR,
    HOST_GDTR_BASE,
    HOST_GS_BASE,
    HOST_GS_SELECTOR,
    HOST_IA32_EFER,
    HOST_IA32_PAT,
    HOST_IA32_SYSENTER_CS,
    HOST_IA32_SYSENTER_EIP,
    HOST_IA32_SYSENTER_ESP,
    HOST_IDTR_BASE,
    HOST_RIP,
    HOST_RSP,
    HOST_SS_SELECTOR,
    HOST_TR_BASE,
    HOST_TR_SELECTOR,
    VM_EXIT_CONTROLS,
    VM_EXIT_INTR_INFO,
    VM_EXIT_REASON,
    VM_INSTRUCTION_ERROR,
    VMCS_REVISION,
    get,
    put,
    slot,
)
from cython.cimports.vmonty.cpu.vmx_capabilities import field_exists
from cython.cimports.vmonty.cpu.vmx_entry import (
    ENTRY_FAILED,
    ERROR_ENTRY_HOST,
    ERROR_INVALID_OPERAND,
    ERROR_READ_ONLY_FIELD,
    ERROR_UNSUPPORTED_FIELD,
    ERROR_VMCALL_ROOT,
    ERROR_VMCLEAR_ADDRESS,
    ERROR_VMCLEAR_VMXON,
    ERROR_VMPTRLD_ADDRESS,
    ERROR_VMPTRLD_REVISION,
    ERROR_VMPTRLD_VMXON,
    ERROR_VMXON_IN_ROOT,
    enter_guest,
    leave_guest,
)
from cython.cimports.vmonty.cpu.vmx_exit import (
    EXIT_ACKNOWLEDGE,
    EXIT_HOST_64,
    EXIT_LOAD_EFER,
    EXIT_LOAD_PAT,
    GUEST_VMX,
    REASON_EXCEPTION_NMI,
    REASON_EXTERNAL_INTERRUPT,
    REASON_VMXON,
    VmxState,
    vm_exit_information,
    vmx_of,
)


def refused(s, reason, length, info, displacement):
    """#UD outside VMX operation (VMXON: without CR4.VMXE) and outside protected and 64-bit mode; exits; #GP."""
    v: cython.pointer(VmxState) = vmx_of(s)
    if v == cython.NULL or s.mode < 2 or s.mode == MODE_COMPAT16 or s.mode == MODE_COMPAT32:
        return raise_exception(s, 6)
    if s.guest_mode == GUEST_VMX:
        return vm_exit_information(s, reason, displacement, length, info)
    if reason == REASON_VMXON:
        if (s.cr4 & CR4_VMXE) == 0:
            return raise_exception(s, 6)
    elif not v.on:
        return raise_exception(s, 6)
    if s.cpl:
        return raise_error(s, 13, 0)
    return GO_ON


def succeed(s):
    """VMsucceed."""
    s.rflags &= ~cython.cast(uint64_t, ARITHMETIC_FLAGS)


def _fail(s, error):
    """VMfailValid, or VMfailInvalid without a current VMCS (and always for error 0)."""
    v: cython.pointer(VmxState) = vmx_of(s)
    succeed(s)
    if error == 0 or v.vmcs == cython.NULL:
        s.rflags |= FLAG_CF
    else:
        put(v.vmcs, VM_INSTRUCTION_ERROR, error)
        s.rflags |= FLAG_ZF
    return LEAVE_NEXT


def _region(s, region):
    """Where a page of RAM is; NULL when the address is none."""
    if region & 0xFFF or region >> s.physical_bits or s.direct:
        return cython.NULL
    return cython.cast(cython.pointer(uint8_t), physical_to_host(s, region, 1))


def vmxon(s, region):
    """VMXON."""
    v: cython.pointer(VmxState) = vmx_of(s)
    at: cython.pointer(uint8_t)
    fixed: uint64_t = CR0_NE | cython.cast(uint64_t, 0x80000001)
    if v.on:
        return _fail(s, ERROR_VMXON_IN_ROOT)
    if (s.cr0 & fixed) != fixed:
        return raise_error(s, 13, 0)
    at = _region(s, region)
    if at == cython.NULL or cython.cast(cython.pointer(uint32_t), at)[0] != VMCS_REVISION:
        return _fail(s, 0)
    v.on = 1
    v.guest_code = 1
    v.vmxon_pointer = region
    v.vmcs = cython.NULL
    v.vmcs_pointer = 0
    succeed(s)
    return LEAVE_NEXT


def vmxoff(s):
    """VMXOFF."""
    v: cython.pointer(VmxState) = vmx_of(s)
    v.on = 0
    v.guest_code = 0
    v.vmcs = cython.NULL
    v.vmcs_pointer = 0
    succeed(s)
    return LEAVE_NEXT


def vmclear(s, region):
    """VMCLEAR."""
    v: cython.pointer(VmxState) = vmx_of(s)
    at: cython.pointer(uint8_t) = _region(s, region)
    if at == cython.NULL:
        return _fail(s, ERROR_VMCLEAR_ADDRESS)
    if region == v.vmxon_pointer:
        return _fail(s, ERROR_VMCLEAR_VMXON)
    cython.cast(cython.pointer(uint32_t), at + HEADER_LAUNCHED)[0] = 0
    if region == v.vmcs_pointer:
        v.vmcs = cython.NULL
        v.vmcs_pointer = 0
    succeed(s)
    return LEAVE_NEXT


def vmptrld(s, region):
    """VMPTRLD."""
    v: cython.pointer(VmxState) = vmx_of(s)
    at: cython.pointer(uint8_t) = _region(s, region)
    if at == cython.NULL:
        return _fail(s, ERROR_VMPTRLD_ADDRESS)
    if region == v.vmxon_pointer:
        return _fail(s, ERROR_VMPTRLD_VMXON)
    if cython.cast(cython.pointer(uint32_t), at)[0] != VMCS_REVISION:
        return _fail(s, ERROR_VMPTRLD_REVISION)
    v.vmcs = at
    v.vmcs_pointer = region
    succeed(s)
    return LEAVE_NEXT


def vmptrst(s):
    """VMPTRST: the current VMCS, all ones when there is none."""
    if vmx_of(s).vmcs == cython.NULL:
        return ~cython.cast(uint64_t, 0)
    return vmx_of(s).vmcs_pointer


def vmread(s, field, value):
    """VMREAD; bit 0 of the encoding gives the high half of a 64-bit field."""
    m: cython.pointer(uint8_t) = vmx_of(s).vmcs
    encoding: uint32_t = cython.cast(uint32_t, field)
    if m == cython.NULL:
        _fail(s, 0)
        return False
    if field >> 15 or not field_exists(encoding & 0x7FFE) or (encoding & 1 and (encoding >> 13) & 3 != 1):
        _fail(s, ERROR_UNSUPPORTED_FIELD)
        return False
    value[0] = slot(m, encoding)[0]
    if encoding & 1:
        value[0] >>= 32
    return True


def vmwrite(s, field, value):
    """VMWRITE; bits beyond the field's width are ignored."""
    m: cython.pointer(uint8_t) = vmx_of(s).vmcs
    encoding: uint32_t = cython.cast(uint32_t, field)
    width: uint32_t = (encoding >> 13) & 3
    at: cython.pointer(uint64_t)
    if m == cython.NULL:
        return _fail(s, 0)
    if field >> 15 or not field_exists(encoding & 0x7FFE) or (encoding & 1 and width != 1):
        return _fail(s, ERROR_UNSUPPORTED_FIELD)
    if (encoding >> 10) & 3 == 1:
        return _fail(s, ERROR_READ_ONLY_FIELD)
    at = slot(m, encoding)
    if encoding & 1:
        at[0] = (at[0] & cython.cast(uint64_t, 0xFFFFFFFF)) | (value << 32)
    elif width == 0:
        at[0] = value & 0xFFFF
    elif width == 2:
        at[0] = value & cython.cast(uint64_t, 0xFFFFFFFF)
    else:
        at[0] = value
    succeed(s)
    return LEAVE_NEXT


def invalidate(s, kind, limit, low, high):
    """INVEPT and INVVPID: the TLB holds one guest at most, so everything goes."""
    if kind > limit or (limit == 2 and kind == 0) or (limit == 3 and kind == 0 and not is_register_canonical(s, high)):
        return _fail(s, ERROR_INVALID_OPERAND)
    if limit == 3 and kind != 2 and (low == 0 or low >> 16):
        return _fail(s, ERROR_INVALID_OPERAND)
    flush_all(s)
    vmx_of(s).tlb_vpid = 0
    succeed(s)
    return LEAVE_NEXT


def vmcall_root(s):
    """VMCALL in root operation: there is no SMM monitor."""
    return _fail(s, ERROR_VMCALL_ROOT)


# ---- entry, and the way back -----------------------------------------------------------------------------------


def host_refused(s):
    """SDM, "Checks on Host Control Registers, MSRs, and SSP" and "Checks on Host Segment and Descriptor-Table
    Registers".
    """
    v: cython.pointer(VmxState) = vmx_of(s)
    m: cython.pointer(uint8_t) = v.vmcs
    controls: uint64_t = get(m, VM_EXIT_CONTROLS)
    fixed: uint64_t = CR0_NE | cython.cast(uint64_t, 0x80000001)
    cr4: uint64_t = get(m, HOST_CR4)
    wide: cython.bint = (controls & EXIT_HOST_64) != 0
    i: uint32_t
    selectors: uint64_t = get(m, HOST_TR_SELECTOR)
    good: cython.bint = (get(m, HOST_CR0) & fixed) == fixed and get(m, HOST_CR0) >> 32 == 0
    good = good and (cr4 & ~cr4_allowed(s)) == 0 and (cr4 & CR4_VMXE) != 0
    good = good and get(m, HOST_CR3) >> s.physical_bits == 0
    good = good and is_register_canonical(s, get(m, HOST_IA32_SYSENTER_ESP))
    good = good and is_register_canonical(s, get(m, HOST_IA32_SYSENTER_EIP))
    for i in range(6):
        selectors |= get(m, HOST_ES_SELECTOR + 2 * i)
    good = good and (selectors & 7) == 0 and get(m, HOST_CS_SELECTOR) != 0 and get(m, HOST_TR_SELECTOR) != 0
    for i in range(5):  # FS, GS, TR, GDTR, IDTR
        good = good and is_register_canonical(s, get(m, HOST_FS_BASE + 2 * i))
    good = good and wide == ((s.efer & EFER_LMA) != 0)
    if wide:
        good = good and (cr4 & CR4_PAE) != 0
        i = 57 if cr4 & CR4_LA57 else 48
        good = good and (get(m, HOST_RIP) + (cython.cast(uint64_t, 1) << (i - 1))) >> i == 0
    else:
        good = good and get(m, HOST_RIP) >> 32 == 0 and get(m, HOST_SS_SELECTOR) != 0
    if controls & EXIT_LOAD_EFER:
        good = good and (get(m, HOST_IA32_EFER) & ~efer_allowed(s)) == 0
        good = good and ((get(m, HOST_IA32_EFER) & EFER_LMA) != 0) == wide
        good = good and ((get(m, HOST_IA32_EFER) & EFER_LME) != 0) == wide
    return 0 if good else ERROR_ENTRY_HOST


def vmenter(s, launch, length):
    """VMLAUNCH (1) and VMRESUME (0)."""
    v: cython.pointer(VmxState) = vmx_of(s)
    error: uint32_t
    if v.vmcs == cython.NULL:
        return _fail(s, 0)
    v.guest_code = 1
    error = enter_guest(s, launch)
    if error == ENTRY_FAILED:
        _load_host(s)
        return LEAVE_JUMP
    if error:
        return _fail(s, error)
    return LEAVE_JUMP


def _host_segment(segment, selector, base, rights):
    segment.selector = cython.cast(uint32_t, selector)
    segment.base = base
    segment.limit = cython.cast(uint32_t, 0xFFFFFFFF)
    segment.access_rights = rights
    if selector == 0:
        segment.access_rights = AR_UNUSABLE


def _load_host(s):
    """SDM, "Loading Host State"."""
    v: cython.pointer(VmxState) = vmx_of(s)
    m: cython.pointer(uint8_t) = v.vmcs
    wide: cython.bint = (v.exit_controls & EXIT_HOST_64) != 0
    s.cr0 = get(m, HOST_CR0)
    s.cr3 = get(m, HOST_CR3)
    s.cr4 = get(m, HOST_CR4)
    load_dr7(s, 0x400)
    s.sysenter_cs = get(m, HOST_IA32_SYSENTER_CS)
    s.sysenter_esp = get(m, HOST_IA32_SYSENTER_ESP)
    s.sysenter_eip = get(m, HOST_IA32_SYSENTER_EIP)
    if v.exit_controls & EXIT_LOAD_EFER:
        s.efer = get(m, HOST_IA32_EFER)
    else:
        s.efer &= ~cython.cast(uint64_t, EFER_LMA | EFER_LME)
        if wide:
            s.efer |= EFER_LMA | EFER_LME
    if v.exit_controls & EXIT_LOAD_PAT:
        s.pat = get(m, HOST_IA32_PAT)
    _host_segment(cython.address(s.segs[CS]), get(m, HOST_CS_SELECTOR), 0, 0xA09B if wide else 0xC09B)
    _host_segment(cython.address(s.segs[SS]), get(m, HOST_SS_SELECTOR), 0, 0xC093)
    _host_segment(cython.address(s.segs[DS]), get(m, HOST_DS_SELECTOR), 0, 0xC093)
    _host_segment(cython.address(s.segs[ES]), get(m, HOST_ES_SELECTOR), 0, 0xC093)
    _host_segment(cython.address(s.segs[FS]), get(m, HOST_FS_SELECTOR), get(m, HOST_FS_BASE), 0xC093)
    _host_segment(cython.address(s.segs[GS]), get(m, HOST_GS_SELECTOR), get(m, HOST_GS_BASE), 0xC093)
    _host_segment(cython.address(s.tr), get(m, HOST_TR_SELECTOR), get(m, HOST_TR_BASE), 0x8B)
    s.tr.limit = 0x67
    _host_segment(cython.address(s.ldtr), 0, 0, 0)
    s.gdtr.base = get(m, HOST_GDTR_BASE)
    s.gdtr.limit = 0xFFFF
    s.idtr.base = get(m, HOST_IDTR_BASE)
    s.idtr.limit = 0xFFFF
    s.gpr[RSP] = get(m, HOST_RSP)
    s.rip = get(m, HOST_RIP)
    s.rflags = 2
    s.cpl = 0
    s.activity = 0
    s.pending_debug = 0
    s.interruptibility &= BLOCKED_NMI
    flush_all(s)
    mode_changed(s)


def vmx_return(s):
    """Store the guest and load the host, whatever it was that ended the guest's run."""
    v: cython.pointer(VmxState) = vmx_of(s)
    m: cython.pointer(uint8_t) = v.vmcs
    reason: uint32_t = cython.cast(uint32_t, get(m, VM_EXIT_REASON)) & 0xFFFF
    blocked: uint32_t = s.interruptibility & BLOCKED_NMI
    line: uint32_t = s.interrupt_line
    leave_guest(s)
    if reason == REASON_EXTERNAL_INTERRUPT:
        if v.exit_controls & EXIT_ACKNOWLEDGE:
            put(m, VM_EXIT_INTR_INFO, s.interrupt_vector | cython.cast(uint64_t, 0x80000000))
        else:
            s.interrupt_line = line  # the host's own IDT takes it
    elif reason == REASON_EXCEPTION_NMI and (get(m, VM_EXIT_INTR_INFO) & 0x700) == 0x200:
        blocked = BLOCKED_NMI
    s.exit.reason = EXIT_NONE
    s.interruptibility = blocked
    _load_host(s)
