"""Control and debug registers, and the other privileged instructions that change or show the processor.

Each function asks first whether the guest's hypervisor intercepts the instruction. SDM, "Instructions That Cause VM
Exits".
"""

import cython
from cython.cimports.vmonty.cpu.breakpoints import debug_changed
from cython.cimports.vmonty.cpu.cpuid import cr4_allowed, xcr0_allowed
from cython.cimports.vmonty.cpu.fpu import components_in_use
from cython.cimports.vmonty.cpu.paging import NESTED_READ, Translation, nested_host, record_fault
from cython.cimports.vmonty.cpu.state import (
    AR_L,
    CR0_CD,
    CR0_EM,
    CR0_ET,
    CR0_MP,
    CR0_NE,
    CR0_NW,
    CR0_PE,
    CR0_TS,
    CR0_WP,
    CR4_DE,
    CR4_LA57,
    CR4_OSXSAVE,
    CR4_PAE,
    CR4_PCIDE,
    CR4_PGE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    CR4_UMIP,
    CR4_VMXE,
    CS,
    EFER_LMA,
    EFER_LME,
    GO_ON,
    LEAVE_EVENT,
    LEAVE_NEXT,
    MODE_LONG64,
    RAX,
    RCX,
    RDX,
    has_feature,
    is_register_canonical,
    paging_enabled,
    raise_error,
    raise_exception,
)
from cython.cimports.vmonty.cpu.svm_exit import (
    V_INTR_MASKING,
    V_TPR,
    svm_exit,
    svm_of,
    svm_wants,
)
from cython.cimports.vmonty.cpu.tlb import flush_all, flush_non_global, flush_page, mode_changed, read_value
from cython.cimports.vmonty.cpu.vmcb import (
    SVM_CR0_SEL_WRITE,
    SVM_INVD,
    SVM_INVLPG,
    SVM_INVPCID,
    SVM_READ_CR0,
    SVM_READ_DR0,
    SVM_WBINVD,
    SVM_WRITE_CR0,
    SVM_WRITE_DR0,
    SVM_XSETBV,
)
from cython.cimports.vmonty.cpu.vmcs import GUEST_LINEAR_ADDRESS, put
from cython.cimports.vmonty.cpu.vmx_exit import (
    GUEST_SVM,
    GUEST_VMX,
    PROC_CR3_LOAD,
    PROC_CR3_STORE,
    PROC_CR8_LOAD,
    PROC_CR8_STORE,
    PROC_INVLPG,
    PROC_MOV_DR,
    PROC_TPR_SHADOW,
    REASON_CR_ACCESS,
    REASON_DR_ACCESS,
    REASON_INVD,
    REASON_INVLPG,
    REASON_INVPCID,
    REASON_TPR_BELOW_THRESHOLD,
    REASON_WBINVD,
    REASON_XSETBV,
    SECOND_INVPCID,
    SECOND_UNRESTRICTED,
    SECOND_WBINVD,
    VmxState,
    vm_exit,
    vm_exit_information,
    vmx_lacks,
    vmx_of,
    vmx_second,
    vmx_wants,
)

from vmonty.cpu import opcodes

_XGETBV1 = cython.declare(cython.int, opcodes.FEATURES.index("xgetbv1"))


def _operand(s, register):
    """The value of a register operand that is 64 bits wide in 64-bit mode and 32 bits elsewhere."""
    if s.mode == MODE_LONG64:
        return s.gpr[register]
    return s.gpr[register] & cython.cast(uint64_t, 0xFFFFFFFF)


def _result(s, register, value):
    s.gpr[register] = value if s.mode == MODE_LONG64 else value & cython.cast(uint64_t, 0xFFFFFFFF)


# ---- control registers -------------------------------------------------------------------------------------------


def _cr_exit(s, cr, kind, register, length):
    """SDM, "Exit Qualification for Control-Register Accesses"."""
    return vm_exit(s, REASON_CR_ACCESS, cr | (kind << 4) | (register << 8), length)


def check_cr0(s, value):
    """GO_ON, or #GP(0) recorded. SDM, "MOV—Move to/from Control Registers"."""
    bad: cython.bint = (value >> 32) != 0
    fixed: uint64_t = 0
    if (value >> 31) & 1:
        bad = bad or (value & CR0_PE) == 0
        if not paging_enabled(s) and (s.efer & EFER_LME):
            bad = bad or (s.cr4 & CR4_PAE) == 0 or (s.segs[CS].access_rights & AR_L) != 0
    elif paging_enabled(s):
        bad = bad or (s.mode == MODE_LONG64) or (s.cr4 & CR4_PCIDE) != 0
    bad = bad or ((value & CR0_NW) != 0 and (value & CR0_CD) == 0)
    if s.vmx != cython.NULL and vmx_of(s).on:
        # SDM, "Restrictions on VMX Operation"
        fixed = CR0_NE | cython.cast(uint64_t, 0x80000001)
        if vmx_second(s, SECOND_UNRESTRICTED):
            fixed = CR0_NE
        bad = bad or (value & fixed) != fixed
    if bad:
        return raise_error(s, 13, 0)
    return GO_ON


def _pdpte_fault(s):
    """#GP(0) for bad PDPTEs."""
    return raise_error(s, 13, 0)


def load_pdptes(s, cr0, cr3, cr4):
    """Load the PDPTE registers when PAE paging will be in force. SDM, "PDPTE Registers"."""
    t: Translation
    size: uint64_t
    granted: uint32_t
    host: uint64_t
    values: uint64_t[4]
    table: uint64_t
    i: uint32_t
    reserved: uint64_t
    if (cr0 >> 31) == 0 or (cr4 & CR4_PAE) == 0 or (s.efer & EFER_LME) or s.nested == 2:
        return GO_ON  # under NPT the walker reads them when it needs them
    t.fault = 0
    t.linear = 0
    table = cr3 & cython.cast(uint64_t, 0xFFFFFFE0)
    if s.direct and s.nested == 0:
        table = cr3 & cython.cast(uint64_t, 0xFFFFFFFFFFFE0)  # a shadow table of host software, in this process
    host = nested_host(
        s,
        table,
        NESTED_READ,
        cython.address(t),
        cython.address(size),
        cython.address(granted),
    )
    if host == 0:
        if t.fault:
            return record_fault(s, cython.address(t))
        return _pdpte_fault(s)
    reserved = ~((cython.cast(uint64_t, 1) << s.physical_bits) - 1) | 0x1E6
    if s.direct and s.nested == 0:
        reserved = 0x1E6
    for i in range(4):
        values[i] = cython.cast(cython.pointer(uint64_t), host)[i]
        if (values[i] & 1) and (values[i] & reserved):
            return _pdpte_fault(s)
    for i in range(4):
        s.pdpte[i] = values[i]
    return GO_ON


def apply_cr0(s, value):
    """Write CR0 after all checks: paging on and off, TLB, mode."""
    changed: uint64_t = (value ^ s.cr0) | 0
    value |= CR0_ET
    s.cr0 = value
    if (changed >> 31) & 1:
        if (value >> 31) & 1:
            if s.efer & EFER_LME:
                s.efer |= EFER_LMA
        else:
            s.efer &= ~cython.cast(uint64_t, EFER_LMA)
    if changed & (cython.cast(uint64_t, 0x80000000) | CR0_WP | CR0_PE):
        flush_all(s)
    mode_changed(s)
    return LEAVE_NEXT


def set_cr0(s, value):
    """Write CR0 with checks and effects, no intercepts. SDM, "Control Registers"."""
    r: cython.int
    value = (value & cython.cast(uint64_t, 0xE005003F)) | CR0_ET | (value & ~cython.cast(uint64_t, 0xFFFFFFFF))
    r = check_cr0(s, value)
    if r != GO_ON:
        return r
    if (value ^ s.cr0) & (cython.cast(uint64_t, 0x80000000) | CR0_CD | CR0_NW):
        r = load_pdptes(s, value, s.cr3, s.cr4)
        if r != GO_ON:
            return r
    return apply_cr0(s, value)


def check_cr4(s, value):
    """GO_ON, or #GP(0) recorded."""
    changed: uint64_t = value ^ s.cr4
    bad: cython.bint = (value & ~cr4_allowed(s)) != 0
    if s.efer & EFER_LMA:
        bad = bad or (value & CR4_PAE) == 0 or (changed & CR4_LA57) != 0
    if (changed & value) & CR4_PCIDE:
        bad = bad or (s.efer & EFER_LMA) == 0 or (s.cr3 & 0xFFF) != 0
    if s.vmx != cython.NULL and vmx_of(s).on:
        bad = bad or (value & CR4_VMXE) == 0
    if bad:
        return raise_error(s, 13, 0)
    return GO_ON


def apply_cr4(s, value):
    """Write CR4 after all checks."""
    changed: uint64_t = value ^ s.cr4
    s.cr4 = value
    if changed & (CR4_PSE | CR4_PAE | CR4_PGE | CR4_PCIDE | CR4_SMEP | CR4_SMAP | CR4_LA57):
        flush_all(s)
    mode_changed(s)
    return LEAVE_NEXT


def set_cr4(s, value):
    """Write CR4 with checks and effects, no intercepts."""
    r: cython.int = check_cr4(s, value)
    if r != GO_ON:
        return r
    if (value ^ s.cr4) & (CR4_PAE | CR4_PGE | CR4_PSE | CR4_SMEP):
        r = load_pdptes(s, s.cr0, s.cr3, value)
        if r != GO_ON:
            return r
    return apply_cr4(s, value)


def set_cr3(s, value):
    """Write CR3. The TLB has no PCID tags: a load with bit 63 still forgets what isn't global."""
    r: cython.int
    keep: uint64_t = value >> 63
    if s.mode == MODE_LONG64:
        if s.cr4 & CR4_PCIDE:
            value &= cython.cast(uint64_t, 0x7FFFFFFFFFFFFFFF)
        if value >> (52 if s.direct and s.nested == 0 else s.physical_bits):
            return raise_error(s, 13, 0)
    else:
        r = load_pdptes(s, s.cr0, value, s.cr4)
        if r != GO_ON:
            return r
    if keep and (s.cr4 & CR4_PCIDE) and value == s.cr3:
        return LEAVE_NEXT
    s.cr3 = value
    flush_non_global(s)
    return LEAVE_NEXT


def _guest_cr0(s, value):
    """A write that no intercept caught: bits owned by the host keep their values."""
    mask: uint64_t = 0
    if s.guest_mode == GUEST_VMX:
        mask = vmx_of(s).cr0_mask
    return set_cr0(s, (s.cr0 & mask) | (value & ~mask))


def _write_cr8(s, value, length):
    v: cython.pointer(VmxState) = vmx_of(s)
    if value >> 4:
        return raise_error(s, 13, 0)
    if s.guest_mode == GUEST_SVM and (svm_of(s).int_ctl & V_INTR_MASKING):
        svm_of(s).int_ctl = (svm_of(s).int_ctl & ~cython.cast(uint32_t, V_TPR)) | cython.cast(uint32_t, value)
        return LEAVE_NEXT
    if vmx_wants(s, PROC_TPR_SHADOW):
        # SDM, "TPR Virtualization"
        cython.cast(cython.pointer(uint32_t), v.virtual_apic + 0x80)[0] = cython.cast(uint32_t, value << 4)
        if value < (v.tpr_threshold & 15):
            s.rip += length
            return vm_exit(s, REASON_TPR_BELOW_THRESHOLD, 0, length)
        return GO_ON
    s.cr8 = value
    return LEAVE_NEXT


def mov_to_cr(s, cr, register, length):
    """MOV CRn, reg."""
    v: cython.pointer(VmxState) = vmx_of(s)
    value: uint64_t = _operand(s, register)
    guest: cython.bint = s.guest_mode == GUEST_VMX
    i: uint32_t
    if cr != 0 and cr != 2 and cr != 3 and cr != 4 and cr != 8:
        return raise_exception(s, 6)
    if not privileged(s):
        return raise_error(s, 13, 0)
    if s.guest_mode == GUEST_SVM:
        if svm_wants(s, SVM_WRITE_CR0 + cr):
            return svm_exit(s, SVM_WRITE_CR0 + cr, (cython.cast(uint64_t, 1) << 63) | register, 0, length)
        if cr == 0 and _selective(s, value):
            return svm_exit(s, SVM_CR0_SEL_WRITE, (cython.cast(uint64_t, 1) << 63) | register, 0, length)
    if cr == 0:
        if guest and ((value ^ v.cr0_shadow) & v.cr0_mask):
            return _cr_exit(s, 0, 0, register, length)
        return _guest_cr0(s, value)
    if cr == 2:
        s.cr2 = value
        return GO_ON
    if cr == 3:
        if guest and (v.processor & PROC_CR3_LOAD):
            for i in range(v.cr3_targets):
                if value == v.cr3_target[i]:
                    return set_cr3(s, value)
            return _cr_exit(s, 3, 0, register, length)
        return set_cr3(s, value)
    if cr == 4:
        if guest:
            if (value ^ v.cr4_shadow) & v.cr4_mask:
                return _cr_exit(s, 4, 0, register, length)
            value = (s.cr4 & v.cr4_mask) | (value & ~v.cr4_mask)
        return set_cr4(s, value)
    if guest and (v.processor & PROC_CR8_LOAD):
        return _cr_exit(s, 8, 0, register, length)
    return _write_cr8(s, value, length)


def mov_from_cr(s, cr, register, length):
    """MOV reg, CRn. SDM, "Changes to Instruction Behavior in VMX Non-Root Operation"."""
    v: cython.pointer(VmxState) = vmx_of(s)
    guest: cython.bint = s.guest_mode == GUEST_VMX
    value: uint64_t
    if cr != 0 and cr != 2 and cr != 3 and cr != 4 and cr != 8:
        return raise_exception(s, 6)
    if not privileged(s):
        return raise_error(s, 13, 0)
    if svm_wants(s, SVM_READ_CR0 + cr):
        return svm_exit(s, SVM_READ_CR0 + cr, (cython.cast(uint64_t, 1) << 63) | register, 0, length)
    if cr == 0:
        smsw(s, length, cython.address(value))
    elif cr == 2:
        value = s.cr2
    elif cr == 3:
        if guest and (v.processor & PROC_CR3_STORE):
            return _cr_exit(s, 3, 1, register, length)
        value = s.cr3
    elif cr == 4:
        value = s.cr4
        if guest:
            value = (s.cr4 & ~v.cr4_mask) | (v.cr4_shadow & v.cr4_mask)
    elif guest and (v.processor & PROC_CR8_STORE):
        return _cr_exit(s, 8, 1, register, length)
    elif guest and (v.processor & PROC_TPR_SHADOW):
        value = (v.virtual_apic[0x80] >> 4) & 15
    elif s.guest_mode == GUEST_SVM and (svm_of(s).int_ctl & V_INTR_MASKING):
        value = svm_of(s).int_ctl & 15
    else:
        value = s.cr8
    _result(s, register, value)
    return GO_ON


def _selective(s, value):
    """APM, "CR0 Selective Write": a write that changes more than TS and MP."""
    return svm_wants(s, SVM_CR0_SEL_WRITE) and ((value ^ s.cr0) & ~cython.cast(uint64_t, CR0_TS | CR0_MP)) != 0


def clts(s, length):
    """CLTS. SDM, "CLTS—Clear Task-Switched Flag in CR0"."""
    v: cython.pointer(VmxState) = vmx_of(s)
    if not privileged(s):
        return raise_error(s, 13, 0)
    if s.guest_mode == GUEST_VMX and (v.cr0_mask & CR0_TS):
        if v.cr0_shadow & CR0_TS:
            return _cr_exit(s, 0, 2, 0, length)
        return GO_ON
    if svm_wants(s, SVM_WRITE_CR0):
        return svm_exit(s, SVM_WRITE_CR0, 0, 0, length)
    return apply_cr0(s, s.cr0 & ~cython.cast(uint64_t, CR0_TS))


def lmsw(s, value, is_memory, linear, length):
    """LMSW: bits 3..0 of CR0; PE can only be set."""
    v: cython.pointer(VmxState) = vmx_of(s)
    relevant: uint64_t = CR0_MP | CR0_EM | CR0_TS
    if not privileged(s):
        return raise_error(s, 13, 0)
    if s.guest_mode == GUEST_VMX:
        if value & CR0_PE:
            relevant |= CR0_PE
        if (value ^ v.cr0_shadow) & v.cr0_mask & relevant:
            if is_memory:
                put(v.vmcs, GUEST_LINEAR_ADDRESS, linear)
            return vm_exit(
                s,
                REASON_CR_ACCESS,
                (3 << 4) | (cython.cast(uint64_t, is_memory) << 6) | (cython.cast(uint64_t, value & 0xFFFF) << 16),
                length,
            )
        relevant &= ~v.cr0_mask
    else:
        relevant |= value & CR0_PE
        if svm_wants(s, SVM_WRITE_CR0):
            return svm_exit(s, SVM_WRITE_CR0, 0, 0, length)
        if _selective(s, (s.cr0 & ~relevant) | (value & relevant)):
            return svm_exit(s, SVM_CR0_SEL_WRITE, 0, 0, length)
    return set_cr0(s, (s.cr0 & ~relevant) | (value & relevant))


def smsw(s, length, value):
    """CR0 as the guest may see it."""
    if (s.cr4 & CR4_UMIP) and s.cpl > 0:
        return raise_error(s, 13, 0)
    if svm_wants(s, SVM_READ_CR0):
        return svm_exit(s, SVM_READ_CR0, 0, 0, length)
    value[0] = s.cr0
    if s.guest_mode == GUEST_VMX:
        value[0] = (s.cr0 & ~vmx_of(s).cr0_mask) | (vmx_of(s).cr0_shadow & vmx_of(s).cr0_mask)
    return GO_ON


def xgetbv(s):
    """XGETBV: XCR0, or which of its components are in use, into EDX:EAX."""
    value: uint64_t = s.xcr0
    if (s.cr4 & CR4_OSXSAVE) == 0:
        return raise_exception(s, 6)
    if cython.cast(uint32_t, s.gpr[RCX]) == 1 and has_feature(s, _XGETBV1):
        value &= components_in_use(s)
    elif cython.cast(uint32_t, s.gpr[RCX]):
        return raise_error(s, 13, 0)
    s.gpr[RAX] = value & cython.cast(uint64_t, 0xFFFFFFFF)
    s.gpr[RDX] = value >> 32
    return GO_ON


def xsetbv(s, length):
    """XSETBV. SDM, "XSETBV—Set Extended Control Register"; always exits from VMX non-root operation."""
    value: uint64_t = (s.gpr[RDX] << 32) | (s.gpr[RAX] & cython.cast(uint64_t, 0xFFFFFFFF))
    if (s.cr4 & CR4_OSXSAVE) == 0:
        return raise_exception(s, 6)
    if s.guest_mode == GUEST_VMX:
        return vm_exit(s, REASON_XSETBV, 0, length)
    if s.cpl == 0 and svm_wants(s, SVM_XSETBV):
        return svm_exit(s, SVM_XSETBV, 0, 0, length)
    if (
        not privileged(s)
        or (s.gpr[RCX] & cython.cast(uint64_t, 0xFFFFFFFF))
        or (value & 1) == 0
        or (value & 6) == 4
        or (value & ~xcr0_allowed(s))
    ):
        return raise_error(s, 13, 0)
    s.xcr0 = value
    mode_changed(s)
    return LEAVE_NEXT


# ---- debug registers ---------------------------------------------------------------------------------------------


def _debug_checks(s, dr, register, load, length):
    """Common checks of both directions; the register number after aliasing is the caller's to compute."""
    if not privileged(s):
        return raise_error(s, 13, 0)
    if (dr == 4 or dr == 5) and (s.cr4 & CR4_DE):
        return raise_exception(s, 6)
    if vmx_wants(s, PROC_MOV_DR):
        return vm_exit(s, REASON_DR_ACCESS, dr | (load << 4) | (register << 8), length)
    if svm_wants(s, (SVM_READ_DR0 if load else SVM_WRITE_DR0) + dr):
        return svm_exit(s, (SVM_READ_DR0 if load else SVM_WRITE_DR0) + dr, register, 0, length)
    if s.dr[7] & 0x2000:
        # General detect. SDM, "Debug Status Register (DR6)": BD. The delivery clears GD.
        raise_exception(s, 1)
        s.event.payload = 0x2000
        s.event.is_fault = 1
        return LEAVE_EVENT
    return GO_ON


def mov_to_dr(s, dr, register, length):
    """MOV DRn, reg. SDM, "Debug Registers"."""
    value: uint64_t = _operand(s, register)
    r: cython.int = _debug_checks(s, dr, register, 0, length)
    if r != GO_ON:
        return r
    if dr == 4 or dr == 5:
        dr += 2
    if dr >= 6 and value >> 32:
        return raise_error(s, 13, 0)
    if dr == 6:
        value = (value & 0xE00F) | cython.cast(uint64_t, 0xFFFF0FF0)
    elif dr == 7:
        value = (value & cython.cast(uint64_t, 0xFFFF2BFF)) | 0x400
    s.dr[dr] = value
    debug_changed(s)
    return LEAVE_NEXT


def mov_from_dr(s, dr, register, length):
    """MOV reg, DRn."""
    r: cython.int = _debug_checks(s, dr, register, 1, length)
    if r != GO_ON:
        return r
    if dr == 4 or dr == 5:
        dr += 2
    _result(s, register, s.dr[dr])
    return GO_ON


# ---- caches and TLB ----------------------------------------------------------------------------------------------


def invlpg(s, linear, length):
    """INVLPG of a linear address."""
    if not privileged(s):
        return raise_error(s, 13, 0)
    if vmx_wants(s, PROC_INVLPG):
        return vm_exit(s, REASON_INVLPG, linear, length)
    if svm_wants(s, SVM_INVLPG):
        return svm_exit(s, SVM_INVLPG, linear, 0, length)
    flush_page(s, linear)
    return LEAVE_NEXT


def invpcid(s, kind, linear, length, info, displacement):
    """INVPCID: the descriptor lies at a linear address. SDM, "INVPCID—Invalidate Process-Context Identifier"."""
    low: uint64_t
    address: uint64_t
    r: cython.int
    if vmx_lacks(s, SECOND_INVPCID):
        return raise_exception(s, 6)
    if not privileged(s):
        return raise_error(s, 13, 0)
    if vmx_wants(s, PROC_INVLPG):
        return vm_exit_information(s, REASON_INVPCID, displacement, length, info)
    if svm_wants(s, SVM_INVPCID):
        return svm_exit(s, SVM_INVPCID, linear, kind, length)
    r = read_value(s, linear, 8, 0, cython.address(low))
    if r == GO_ON:
        r = read_value(s, linear + 8, 8, 0, cython.address(address))
    if r != GO_ON:
        return r
    if kind > 3 or (kind < 2 and (low >> 12 or ((low & 0xFFF) and (s.cr4 & CR4_PCIDE) == 0))):
        return raise_error(s, 13, 0)
    if kind == 0:
        if not is_register_canonical(s, address):
            return raise_error(s, 13, 0)
        flush_page(s, address)
    elif kind == 2:
        flush_all(s)
    else:
        flush_non_global(s)
    return LEAVE_NEXT


def wbinvd(s, length):
    """WBINVD: memory is always coherent here."""
    if not privileged(s):
        return raise_error(s, 13, 0)
    if vmx_second(s, SECOND_WBINVD):
        return vm_exit(s, REASON_WBINVD, 0, length)
    if svm_wants(s, SVM_WBINVD):
        return svm_exit(s, SVM_WBINVD, 0, 0, length)
    return GO_ON


def invd(s, length):
    """INVD."""
    if not privileged(s):
        return raise_error(s, 13, 0)
    if s.guest_mode == GUEST_VMX:
        return vm_exit(s, REASON_INVD, 0, length)
    if svm_wants(s, SVM_INVD):
        return svm_exit(s, SVM_INVD, 0, 0, length)
    return GO_ON
