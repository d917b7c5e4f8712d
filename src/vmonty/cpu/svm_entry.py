"""VMRUN and #VMEXIT: the guest's state between VMCB and processor. APM, "VMRUN Instruction", "#VMEXIT".

Host software that is Python has no processor state to save: then nothing is kept in the host save area, and physical
addresses in nested page tables and permission maps are addresses of this process. Clean bits are allowed to be ignored,
and are.
"""

import cython
from cython.cimports.vmonty.cpu.breakpoints import load_dr7
from cython.cimports.vmonty.cpu.codecache import run_guarded
from cython.cimports.vmonty.cpu.control import load_pdptes
from cython.cimports.vmonty.cpu.cpuid import cr4_allowed, efer_allowed
from cython.cimports.vmonty.cpu.paging import physical_to_host
from cython.cimports.vmonty.cpu.state import (
    AR_UNUSABLE,
    BLOCKED_NMI,
    CR0_CD,
    CR0_NW,
    CR0_PE,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_PCIDE,
    CR4_PGE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    CS,
    DS,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SVME,
    ES,
    EVENT_EXCEPTION,
    EVENT_SOFT_INTERRUPT,
    EXIT_NONE,
    FLAG_IF,
    FLAG_VM,
    FS,
    GO_ON,
    GS,
    RAX,
    RSP,
    SHADOW_MOV_SS,
    SHADOW_STI,
    SS,
    FetchEntry,
    paging_enabled,
)
from cython.cimports.vmonty.cpu.svm_exit import SvmState, svm_of, svm_wants
from cython.cimports.vmonty.cpu.tlb import flush_all, flush_non_global, mode_changed
from cython.cimports.vmonty.cpu.vmcb import (
    SVM_NPF,
    SVM_PAUSE,
    SVM_VMRUN,
    VMCB_ASID,
    VMCB_CPL,
    VMCB_CR0,
    VMCB_CR2,
    VMCB_CR3,
    VMCB_CR4,
    VMCB_CS_ATTRIB,
    VMCB_CS_SELECTOR,
    VMCB_CSTAR,
    VMCB_DR6,
    VMCB_DR7,
    VMCB_DS_SELECTOR,
    VMCB_EFER,
    VMCB_ES_SELECTOR,
    VMCB_EVENTINJ,
    VMCB_EXITCODE,
    VMCB_EXITINFO1,
    VMCB_EXITINFO2,
    VMCB_EXITINTINFO,
    VMCB_FS_SELECTOR,
    VMCB_G_PAT,
    VMCB_GDTR_BASE,
    VMCB_GDTR_LIMIT,
    VMCB_GS_SELECTOR,
    VMCB_IDTR_BASE,
    VMCB_IDTR_LIMIT,
    VMCB_INSTRUCTION_BYTES,
    VMCB_INT_CTL,
    VMCB_INT_STATE,
    VMCB_INT_VECTOR,
    VMCB_INTERCEPT_CR,
    VMCB_IOPM_BASE_PA,
    VMCB_KERNEL_GS_BASE,
    VMCB_LDTR_SELECTOR,
    VMCB_LSTAR,
    VMCB_MSRPM_BASE_PA,
    VMCB_N_CR3,
    VMCB_NP_ENABLE,
    VMCB_NRIP,
    VMCB_PAUSE_FILTER_COUNT,
    VMCB_RAX,
    VMCB_RFLAGS,
    VMCB_RIP,
    VMCB_RSP,
    VMCB_SFMASK,
    VMCB_SS_SELECTOR,
    VMCB_STAR,
    VMCB_SYSENTER_CS,
    VMCB_SYSENTER_EIP,
    VMCB_SYSENTER_ESP,
    VMCB_TLB_CONTROL,
    VMCB_TR_SELECTOR,
    VMCB_TSC_OFFSET,
    get8,
    get16,
    get32,
    get64,
    put8,
    put16,
    put32,
    put64,
)
from cython.cimports.vmonty.cpu.vmx_exit import GUEST_NONE, GUEST_SVM, INTERCEPT_PAUSE


def _load_segment(s, vmcb, segment, offset):
    """Attributes are descriptor bits 55:52 and 47:40 side by side; what is not present can't be used."""
    attributes: uint32_t = get16(vmcb, offset + 2)
    segment.selector = get16(vmcb, offset)
    segment.access_rights = (attributes & 0xFF) | ((attributes & 0xF00) << 4)
    segment.limit = get32(vmcb, offset + 4)
    segment.base = get64(vmcb, offset + 8)
    if (attributes & 0x80) == 0:
        segment.access_rights |= AR_UNUSABLE


def _store_segment(vmcb, segment, offset):
    attributes: uint32_t = (segment.access_rights & 0xFF) | ((segment.access_rights >> 4) & 0xF00)
    if segment.access_rights & AR_UNUSABLE:
        attributes &= ~cython.cast(uint32_t, 0x80)
    put16(vmcb, offset, cython.cast(uint16_t, segment.selector))
    put16(vmcb, offset + 2, cython.cast(uint16_t, attributes))
    put32(vmcb, offset + 4, segment.limit)
    put64(vmcb, offset + 8, segment.base)


def load_state(s, vmcb):
    """VMLOAD."""
    _load_segment(s, vmcb, cython.address(s.segs[FS]), VMCB_FS_SELECTOR)
    _load_segment(s, vmcb, cython.address(s.segs[GS]), VMCB_GS_SELECTOR)
    _load_segment(s, vmcb, cython.address(s.ldtr), VMCB_LDTR_SELECTOR)
    _load_segment(s, vmcb, cython.address(s.tr), VMCB_TR_SELECTOR)
    s.kernel_gs_base = get64(vmcb, VMCB_KERNEL_GS_BASE)
    s.star = get64(vmcb, VMCB_STAR)
    s.lstar = get64(vmcb, VMCB_LSTAR)
    s.cstar = get64(vmcb, VMCB_CSTAR)
    s.fmask = get64(vmcb, VMCB_SFMASK)
    s.sysenter_cs = get64(vmcb, VMCB_SYSENTER_CS)
    s.sysenter_esp = get64(vmcb, VMCB_SYSENTER_ESP)
    s.sysenter_eip = get64(vmcb, VMCB_SYSENTER_EIP)


def save_state(s, vmcb):
    """VMSAVE."""
    _store_segment(vmcb, cython.address(s.segs[FS]), VMCB_FS_SELECTOR)
    _store_segment(vmcb, cython.address(s.segs[GS]), VMCB_GS_SELECTOR)
    _store_segment(vmcb, cython.address(s.ldtr), VMCB_LDTR_SELECTOR)
    _store_segment(vmcb, cython.address(s.tr), VMCB_TR_SELECTOR)
    put64(vmcb, VMCB_KERNEL_GS_BASE, s.kernel_gs_base)
    put64(vmcb, VMCB_STAR, s.star)
    put64(vmcb, VMCB_LSTAR, s.lstar)
    put64(vmcb, VMCB_CSTAR, s.cstar)
    put64(vmcb, VMCB_SFMASK, s.fmask)
    put64(vmcb, VMCB_SYSENTER_CS, s.sysenter_cs)
    put64(vmcb, VMCB_SYSENTER_ESP, s.sysenter_esp)
    put64(vmcb, VMCB_SYSENTER_EIP, s.sysenter_eip)


# ---- checks ------------------------------------------------------------------------------------------------------


def _event_valid(event):
    """APM, "Event Injection": types 0, 2, 3, 4; exceptions have vectors below 32, and 2 is the NMI's."""
    kind: uint32_t = cython.cast(uint32_t, event >> 8) & 7
    vector: uint32_t = cython.cast(uint32_t, event) & 0xFF
    if (event >> 31) & 1 == 0:
        return True
    if kind == EVENT_EXCEPTION:
        return vector < 32 and vector != 2
    return kind in (0, 2, EVENT_SOFT_INTERRUPT)


def _consistent(s, vmcb):
    """APM, "VMRUN Instruction", "Canonicalization and Consistency Checks"."""
    cr0: uint64_t = get64(vmcb, VMCB_CR0)
    cr4: uint64_t = get64(vmcb, VMCB_CR4)
    efer: uint64_t = get64(vmcb, VMCB_EFER)
    cr3: uint64_t = get64(vmcb, VMCB_CR3)
    width: uint64_t = 52 if s.direct else s.physical_bits
    attributes: uint32_t = get16(vmcb, VMCB_CS_ATTRIB)
    if (efer & EFER_SVME) == 0 or efer & ~(efer_allowed(s) | EFER_SVME):
        return False
    if ((cr0 & CR0_CD) == 0 and (cr0 & CR0_NW)) or cr0 >> 32 or cr4 & ~cr4_allowed(s):
        return False
    if get64(vmcb, VMCB_DR6) >> 32 or get64(vmcb, VMCB_DR7) >> 32:
        return False
    if (efer & EFER_LME) and (cr0 >> 31):
        if (cr4 & CR4_PAE) == 0 or (cr0 & CR0_PE) == 0 or (attributes & 0x600) == 0x600 or cr3 >> width:
            return False
    if (get32(vmcb, VMCB_INTERCEPT_CR + 4 * (SVM_VMRUN >> 5)) & 1) == 0 or get32(vmcb, VMCB_ASID) == 0:
        return False
    if (get64(vmcb, VMCB_IOPM_BASE_PA) >> width) or (get64(vmcb, VMCB_MSRPM_BASE_PA) >> width):
        return False
    if (get64(vmcb, VMCB_NP_ENABLE) & 1) and (get64(vmcb, VMCB_N_CR3) >> width):
        return False
    return _event_valid(get64(vmcb, VMCB_EVENTINJ))


# ---- VMRUN -------------------------------------------------------------------------------------------------------


def _load_common(s, vmcb):
    """What VMRUN loads of a guest, and #VMEXIT of a host."""
    _load_segment(s, vmcb, cython.address(s.segs[ES]), VMCB_ES_SELECTOR)
    _load_segment(s, vmcb, cython.address(s.segs[CS]), VMCB_CS_SELECTOR)
    _load_segment(s, vmcb, cython.address(s.segs[SS]), VMCB_SS_SELECTOR)
    _load_segment(s, vmcb, cython.address(s.segs[DS]), VMCB_DS_SELECTOR)
    s.gdtr.base = get64(vmcb, VMCB_GDTR_BASE)
    s.gdtr.limit = get32(vmcb, VMCB_GDTR_LIMIT)
    s.idtr.base = get64(vmcb, VMCB_IDTR_BASE)
    s.idtr.limit = get32(vmcb, VMCB_IDTR_LIMIT)
    s.efer = get64(vmcb, VMCB_EFER)
    s.cr0 = get64(vmcb, VMCB_CR0)
    s.cr3 = get64(vmcb, VMCB_CR3)
    s.cr4 = get64(vmcb, VMCB_CR4)
    load_dr7(s, get64(vmcb, VMCB_DR7))
    s.rflags = get64(vmcb, VMCB_RFLAGS) | 2
    s.rip = get64(vmcb, VMCB_RIP)
    s.gpr[RSP] = get64(vmcb, VMCB_RSP)
    s.gpr[RAX] = get64(vmcb, VMCB_RAX)


def _store_common(s, vmcb):
    _store_segment(vmcb, cython.address(s.segs[ES]), VMCB_ES_SELECTOR)
    _store_segment(vmcb, cython.address(s.segs[CS]), VMCB_CS_SELECTOR)
    _store_segment(vmcb, cython.address(s.segs[SS]), VMCB_SS_SELECTOR)
    _store_segment(vmcb, cython.address(s.segs[DS]), VMCB_DS_SELECTOR)
    put64(vmcb, VMCB_GDTR_BASE, s.gdtr.base)
    put32(vmcb, VMCB_GDTR_LIMIT, s.gdtr.limit)
    put64(vmcb, VMCB_IDTR_BASE, s.idtr.base)
    put32(vmcb, VMCB_IDTR_LIMIT, s.idtr.limit)
    put64(vmcb, VMCB_EFER, s.efer)
    put64(vmcb, VMCB_CR0, s.cr0)
    put64(vmcb, VMCB_CR3, s.cr3)
    put64(vmcb, VMCB_CR4, s.cr4)
    put64(vmcb, VMCB_DR7, s.dr[7])
    put64(vmcb, VMCB_RFLAGS, s.rflags)
    put64(vmcb, VMCB_RIP, s.rip)
    put64(vmcb, VMCB_RSP, s.gpr[RSP])
    put64(vmcb, VMCB_RAX, s.gpr[RAX])


def save_host(s, area):
    """Keep the host's state; the page has the VMCB's layout."""
    _store_common(s, area)


def load_host(s, area):
    """Back to the host, behind its VMRUN: CPL 0, no breakpoints, GIF clear. APM, "#VMEXIT"."""
    _load_common(s, area)
    s.rflags &= ~cython.cast(uint64_t, FLAG_VM)
    s.cr0 |= CR0_PE
    load_dr7(s, 0x400)
    s.cpl = 0
    s.activity = 0
    s.pending_debug = 0
    s.interruptibility &= BLOCKED_NMI
    if paging_enabled(s) and load_pdptes(s, s.cr0, s.cr3, s.cr4) != GO_ON:
        s.event.pending = 0
        s.activity = 2  # shutdown
    flush_all(s)
    mode_changed(s)


def _inject(s):
    """APM, "Event Injection"."""
    v: cython.pointer(SvmState) = svm_of(s)
    event: uint64_t = get64(v.vmcb, VMCB_EVENTINJ)
    nrip: uint64_t = get64(v.vmcb, VMCB_NRIP)
    s.event.pending = 0
    s.vectoring = 0
    if (event >> 31) & 1 == 0:
        return
    s.event.pending = 1
    s.event.vector = cython.cast(uint32_t, event) & 0xFF
    s.event.kind = cython.cast(uint32_t, event >> 8) & 7
    s.event.has_error = cython.cast(uint32_t, event >> 11) & 1
    s.event.error_code = cython.cast(uint32_t, event >> 32)
    s.event.instruction_length = 0
    if s.event.kind == EVENT_SOFT_INTERRUPT and nrip:
        s.event.instruction_length = cython.cast(uint32_t, nrip - s.rip)
    s.event.payload = 0
    s.event.is_fault = 0
    if s.event.kind == EVENT_EXCEPTION and s.event.vector == 14:
        s.event.payload = s.cr2  # an injected page fault leaves CR2 alone
    v.injecting = 1


def _physical(s, physical):
    """Where a physical address of the host is in this process; NULL when there is no RAM."""
    if s.direct:
        return cython.cast(cython.pointer(uint8_t), physical)
    return cython.cast(cython.pointer(uint8_t), physical_to_host(s, physical, 0))


def enter_svm_guest(s):
    """VMRUN up to the guest's first instruction."""
    v: cython.pointer(SvmState) = svm_of(s)
    m: cython.pointer(uint8_t) = v.vmcb
    cr0: uint64_t = s.cr0
    cr3: uint64_t = s.cr3
    cr4: uint64_t = s.cr4
    efer: uint64_t = s.efer
    root: uint64_t = 0
    stale: cython.bint
    i: uint32_t
    s.direct = 0 if v.guest_code else 1
    s.exit.reason = EXIT_NONE
    v.gif = 1
    v.iopm = _physical(s, get64(m, VMCB_IOPM_BASE_PA) & ~cython.cast(uint64_t, 0xFFF))
    v.msrpm = _physical(s, get64(m, VMCB_MSRPM_BASE_PA) & ~cython.cast(uint64_t, 0xFFF))
    if not _consistent(s, m) or v.iopm == cython.NULL or v.msrpm == cython.NULL:
        put64(m, VMCB_EXITCODE, ~cython.cast(uint64_t, 0))
        put64(m, VMCB_EXITINFO1, 0)
        put64(m, VMCB_EXITINFO2, 0)
        put64(m, VMCB_EXITINTINFO, 0)
        s.direct = 0
        v.gif = 0
        return False
    for i in range(6):
        v.intercept[i] = get32(m, VMCB_INTERCEPT_CR + 4 * i)
    v.int_ctl = get32(m, VMCB_INT_CTL)
    v.int_vector = get32(m, VMCB_INT_VECTOR) & 0xFF
    v.host_interrupts = 1
    if v.guest_code:
        v.host_interrupts = s.rflags & FLAG_IF
    v.pause_count = get16(m, VMCB_PAUSE_FILTER_COUNT)
    v.pause_time = 0
    if get64(m, VMCB_NP_ENABLE) & 1:
        root = get64(m, VMCB_N_CR3) | 1
    _load_common(s, m)
    s.cr2 = get64(m, VMCB_CR2)
    s.dr[6] = get64(m, VMCB_DR6)
    s.efer &= ~cython.cast(uint64_t, EFER_LMA)
    if (s.efer & EFER_LME) and paging_enabled(s):
        s.efer |= EFER_LMA
    s.cpl = get8(m, VMCB_CPL) & 3
    if (s.cr0 & CR0_PE) == 0:
        s.cpl = 0
    elif s.rflags & FLAG_VM:
        s.cpl = 3
    s.nested = 2 if root else 0
    s.nested_root = root & ~cython.cast(uint64_t, 0xFFF)
    if root:
        s.pat = get64(m, VMCB_G_PAT)
    # The TLB holds permissions as CR0, CR4 and EFER make them, and no tags.
    stale = v.guest_code or get8(m, VMCB_TLB_CONTROL) != 0 or get32(m, VMCB_ASID) != v.tlb_asid or root != v.tlb_root
    stale = stale or ((cr0 ^ s.cr0) & (cython.cast(uint64_t, 0x80000000) | CR0_WP | CR0_PE)) != 0
    stale = (
        stale
        or ((cr4 ^ s.cr4) & (CR4_PSE | CR4_PAE | CR4_PGE | CR4_PCIDE | CR4_SMEP | CR4_SMAP | CR4_LA57)) != 0
        or ((efer ^ s.efer) & (EFER_NXE | EFER_LMA)) != 0
    )
    v.tlb_asid = get32(m, VMCB_ASID)
    v.tlb_root = root
    s.guest_mode = GUEST_SVM
    if stale:
        flush_all(s)
    elif cr3 != s.cr3:
        flush_non_global(s)
    s.interruptibility = SHADOW_STI if get64(m, VMCB_INT_STATE) & 1 else 0
    s.activity = 0
    s.pending_debug = 0
    v.root_tsc_offset = s.tsc_offset
    s.tsc_offset += get64(m, VMCB_TSC_OFFSET)
    # APM, "TSC Ratio MSR": 32 bits of fraction; ours has 48.
    s.tsc_multiplier = v.tsc_ratio << 16
    v.entries += 1
    s.intercepts = INTERCEPT_PAUSE if svm_wants(s, SVM_PAUSE) else 0
    mode_changed(s)
    _inject(s)
    if load_pdptes(s, s.cr0, s.cr3, s.cr4) != GO_ON:
        # Bad PDPTEs of a guest without nested paging (which has them read when they are used) are bad state.
        s.event.pending = 0
        leave_svm_guest(s)
        put64(m, VMCB_EXITCODE, ~cython.cast(uint64_t, 0))
        return False
    return True


# ---- #VMEXIT -----------------------------------------------------------------------------------------------------


def _fetch_bytes(s):
    """Decode assists: what was fetched of the instruction, as far as its page goes."""
    vmcb: cython.pointer(uint8_t) = svm_of(s).vmcb
    page: cython.pointer(FetchEntry)
    code: cython.pointer(uint8_t)
    linear: uint64_t = s.rip + (s.segs[CS].base if (s.efer & EFER_LMA) == 0 else 0)
    i: uint32_t
    count: uint32_t = 0
    if (s.efer & EFER_LMA) == 0:
        linear &= cython.cast(uint64_t, 0xFFFFFFFF)
    page = cython.address(s.fetch[1 if s.cpl == 3 else 0][(linear >> 12) & 255])
    if page.tag == ((linear & ~cython.cast(uint64_t, 0xFFF)) | 1) and page.host:
        count = 4096 - cython.cast(uint32_t, linear & 0xFFF)
        if count > 15:
            count = 15
        code = cython.cast(cython.pointer(uint8_t), page.host + (linear & 0xFFF))
        for i in range(count):
            put8(vmcb, VMCB_INSTRUCTION_BYTES + 1 + i, code[i])
    put8(vmcb, VMCB_INSTRUCTION_BYTES, cython.cast(uint8_t, count))


def leave_svm_guest(s):
    """Store the guest's state."""
    v: cython.pointer(SvmState) = svm_of(s)
    m: cython.pointer(uint8_t) = v.vmcb
    code: uint64_t = get64(m, VMCB_EXITCODE)
    put8(m, VMCB_INSTRUCTION_BYTES, 0)
    if code == SVM_NPF or code == 0x4E:
        run_guarded(s, _fetch_bytes)
    _store_common(s, m)
    put64(m, VMCB_CR2, s.cr2)
    put64(m, VMCB_DR6, s.dr[6])
    put8(m, VMCB_CPL, cython.cast(uint8_t, s.cpl))
    if s.nested:
        put64(m, VMCB_G_PAT, s.pat)
    put64(m, VMCB_INT_STATE, 1 if s.interruptibility & (SHADOW_STI | SHADOW_MOV_SS) else 0)
    put32(m, VMCB_INT_CTL, v.int_ctl)
    put64(m, VMCB_EVENTINJ, get64(m, VMCB_EVENTINJ) & ~cython.cast(uint64_t, 0x80000000))
    s.tsc_offset = v.root_tsc_offset
    s.tsc_multiplier = 0
    s.intercepts = 0
    s.guest_mode = GUEST_NONE
    s.nested = 0
    s.direct = 0
    v.gif = 0
