"""VM entry and the way back. SDM, "VM Entries" and "Saving Guest State".

Host software that is Python has no processor state to load: the host-state area is kept but neither checked nor
loaded. While its guest
runs, physical addresses in EPT entries, bitmaps and MSR areas are addresses of this process.
"""

import cython
from cython.cimports.vmonty.cpu.breakpoints import load_dr7
from cython.cimports.vmonty.cpu.control import load_pdptes
from cython.cimports.vmonty.cpu.information import host_tsc
from cython.cimports.vmonty.cpu.msr import read_msr, write_msr
from cython.cimports.vmonty.cpu.paging import physical_to_host
from cython.cimports.vmonty.cpu.preemption import preemption_arm
from cython.cimports.vmonty.cpu.state import (
    CR0_PE,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_PCIDE,
    CR4_PGE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    DEBUGCTL_BTF,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EVENT_EXCEPTION,
    EXIT_NONE,
    GO_ON,
    RSP,
    SHADOW_MOV_SS,
    SS,
)
from cython.cimports.vmonty.cpu.tlb import flush_all, flush_non_global, mode_changed
from cython.cimports.vmonty.cpu.vmcs import (
    CPU_BASED_VM_EXEC_CONTROL,
    CR0_GUEST_HOST_MASK,
    CR0_READ_SHADOW,
    CR3_TARGET_COUNT,
    CR3_TARGET_VALUE0,
    CR3_TARGET_VALUE1,
    CR3_TARGET_VALUE2,
    CR3_TARGET_VALUE3,
    CR4_GUEST_HOST_MASK,
    CR4_READ_SHADOW,
    EPT_POINTER,
    EXCEPTION_BITMAP,
    EXIT_QUALIFICATION,
    GUEST_ACTIVITY_STATE,
    GUEST_CR0,
    GUEST_CR3,
    GUEST_CR4,
    GUEST_DR7,
    GUEST_ES_AR_BYTES,
    GUEST_ES_BASE,
    GUEST_ES_LIMIT,
    GUEST_ES_SELECTOR,
    GUEST_GDTR_BASE,
    GUEST_GDTR_LIMIT,
    GUEST_IA32_DEBUGCTL,
    GUEST_IA32_EFER,
    GUEST_IA32_PAT,
    GUEST_IDTR_BASE,
    GUEST_IDTR_LIMIT,
    GUEST_INTERRUPTIBILITY_INFO,
    GUEST_PDPTR0,
    GUEST_PENDING_DBG_EXCEPTIONS,
    GUEST_RFLAGS,
    GUEST_RIP,
    GUEST_RSP,
    GUEST_SYSENTER_CS,
    GUEST_SYSENTER_EIP,
    GUEST_SYSENTER_ESP,
    HEADER_LAUNCHED,
    IDT_VECTORING_INFO_FIELD,
    IO_BITMAP_A,
    IO_BITMAP_B,
    MSR_BITMAP,
    PAGE_FAULT_ERROR_CODE_MASK,
    PAGE_FAULT_ERROR_CODE_MATCH,
    PIN_BASED_VM_EXEC_CONTROL,
    SECONDARY_VM_EXEC_CONTROL,
    TPR_THRESHOLD,
    TSC_MULTIPLIER,
    TSC_OFFSET,
    VIRTUAL_APIC_PAGE_ADDR,
    VIRTUAL_PROCESSOR_ID,
    VM_ENTRY_CONTROLS,
    VM_ENTRY_EXCEPTION_ERROR_CODE,
    VM_ENTRY_INSTRUCTION_LEN,
    VM_ENTRY_INTR_INFO_FIELD,
    VM_ENTRY_MSR_LOAD_ADDR,
    VM_ENTRY_MSR_LOAD_COUNT,
    VM_EXIT_CONTROLS,
    VM_EXIT_INTR_INFO,
    VM_EXIT_MSR_LOAD_ADDR,
    VM_EXIT_MSR_LOAD_COUNT,
    VM_EXIT_MSR_STORE_ADDR,
    VM_EXIT_MSR_STORE_COUNT,
    VM_EXIT_REASON,
    VMX_PREEMPTION_TIMER_VALUE,
    get,
    put,
)
from cython.cimports.vmonty.cpu.vmx_checks import check_controls, check_guest
from cython.cimports.vmonty.cpu.vmx_code import host_refused
from cython.cimports.vmonty.cpu.vmx_exit import (
    ENTRY_IA32E,
    ENTRY_LOAD_DEBUG,
    ENTRY_LOAD_EFER,
    ENTRY_LOAD_PAT,
    EXIT_SAVE_DEBUG,
    EXIT_SAVE_EFER,
    EXIT_SAVE_PAT,
    EXIT_SAVE_TIMER,
    GUEST_NONE,
    GUEST_VMX,
    INTERCEPT_PAUSE,
    INTERCEPT_RDRAND,
    INTERCEPT_RDSEED,
    PIN_PREEMPTION_TIMER,
    PROC_MONITOR_TRAP,
    PROC_PAUSE,
    PROC_TSC_OFFSETTING,
    REASON_EXTERNAL_INTERRUPT,
    REASON_INVALID_GUEST_STATE,
    REASON_MSR_LOADING,
    SECOND_EPT,
    SECOND_PAUSE_LOOP,
    SECOND_RDRAND,
    SECOND_RDSEED,
    SECOND_TSC_SCALING,
    SECOND_VPID,
    vmx_of,
)


def _read_controls(s):
    """Copy the controls to where instructions look for them."""
    v: cython.pointer(VmxState) = vmx_of(s)
    m: cython.pointer(uint8_t) = v.vmcs
    v.pin = cython.cast(uint32_t, get(m, PIN_BASED_VM_EXEC_CONTROL))
    v.processor = cython.cast(uint32_t, get(m, CPU_BASED_VM_EXEC_CONTROL))
    v.secondary = 0
    if v.processor >> 31:
        v.secondary = cython.cast(uint32_t, get(m, SECONDARY_VM_EXEC_CONTROL))
    v.exit_controls = cython.cast(uint32_t, get(m, VM_EXIT_CONTROLS))
    v.entry_controls = cython.cast(uint32_t, get(m, VM_ENTRY_CONTROLS))
    v.exception_bitmap = cython.cast(uint32_t, get(m, EXCEPTION_BITMAP))
    v.page_fault_mask = cython.cast(uint32_t, get(m, PAGE_FAULT_ERROR_CODE_MASK))
    v.page_fault_match = cython.cast(uint32_t, get(m, PAGE_FAULT_ERROR_CODE_MATCH))
    v.cr0_mask = get(m, CR0_GUEST_HOST_MASK)
    v.cr0_shadow = get(m, CR0_READ_SHADOW)
    v.cr4_mask = get(m, CR4_GUEST_HOST_MASK)
    v.cr4_shadow = get(m, CR4_READ_SHADOW)
    v.cr3_targets = cython.cast(uint32_t, get(m, CR3_TARGET_COUNT))
    if v.cr3_targets:
        v.cr3_target[0] = get(m, CR3_TARGET_VALUE0)
        v.cr3_target[1] = get(m, CR3_TARGET_VALUE1)
        v.cr3_target[2] = get(m, CR3_TARGET_VALUE2)
        v.cr3_target[3] = get(m, CR3_TARGET_VALUE3)
    v.io_bitmap_a = _page(s, get(m, IO_BITMAP_A))
    v.io_bitmap_b = _page(s, get(m, IO_BITMAP_B))
    v.msr_bitmap = _page(s, get(m, MSR_BITMAP))
    v.virtual_apic = _page(s, get(m, VIRTUAL_APIC_PAGE_ADDR))
    v.tpr_threshold = cython.cast(uint32_t, get(m, TPR_THRESHOLD))


def _page(s, physical):
    """Where a host-physical address is in this process: for host software it is one of ours."""
    if vmx_of(s).guest_code:
        return cython.cast(cython.pointer(uint8_t), physical_to_host(s, physical, 1))
    return cython.cast(cython.pointer(uint8_t), physical)


def _load_segment(v, segment, index):
    """Fields of ES, CS, SS, DS, FS, GS, LDTR, TR lie in this order, two apart."""
    segment.selector = cython.cast(uint32_t, get(v, GUEST_ES_SELECTOR + 2 * index))
    segment.base = get(v, GUEST_ES_BASE + 2 * index)
    segment.limit = cython.cast(uint32_t, get(v, GUEST_ES_LIMIT + 2 * index))
    segment.access_rights = cython.cast(uint32_t, get(v, GUEST_ES_AR_BYTES + 2 * index))


def _store_segment(v, segment, index):
    put(v, GUEST_ES_SELECTOR + 2 * index, segment.selector)
    put(v, GUEST_ES_BASE + 2 * index, segment.base)
    put(v, GUEST_ES_LIMIT + 2 * index, segment.limit)
    put(v, GUEST_ES_AR_BYTES + 2 * index, segment.access_rights)


def _load_guest(s):
    """Load the guest-state area; 0, or the qualification of an entry failure for bad PDPTEs."""
    v: cython.pointer(VmxState) = vmx_of(s)
    m: cython.pointer(uint8_t) = v.vmcs
    cr0: uint64_t = get(m, GUEST_CR0)
    cr3: uint64_t = get(m, GUEST_CR3)
    cr4: uint64_t = get(m, GUEST_CR4)
    efer: uint64_t = s.efer
    vpid: uint64_t = 0
    eptp: uint64_t = 0
    stale: cython.bint
    i: uint32_t
    if v.secondary & SECOND_VPID:
        vpid = get(m, VIRTUAL_PROCESSOR_ID)
    if v.secondary & SECOND_EPT:
        eptp = get(m, EPT_POINTER)
    if v.entry_controls & ENTRY_LOAD_EFER:
        efer = get(m, GUEST_IA32_EFER)
    else:
        efer &= ~cython.cast(uint64_t, EFER_LMA | EFER_LME)
        if v.entry_controls & ENTRY_IA32E:
            efer |= EFER_LMA | EFER_LME
    # The TLB holds permissions as CR0, CR4 and EFER make them, and no tags: SDM, "Caching Translation Information".
    stale = v.guest_code != 0 or vpid == 0 or vpid != v.tlb_vpid or eptp != v.tlb_eptp
    stale = stale or ((cr0 ^ s.cr0) & (cython.cast(uint64_t, 0x80000000) | CR0_WP | CR0_PE)) != 0
    stale = (
        stale
        or ((cr4 ^ s.cr4) & (CR4_PSE | CR4_PAE | CR4_PGE | CR4_PCIDE | CR4_SMEP | CR4_SMAP | CR4_LA57)) != 0
        or ((efer ^ s.efer) & (EFER_NXE | EFER_LMA)) != 0
    )
    v.tlb_vpid = vpid
    v.tlb_eptp = eptp
    s.nested = 1 if v.secondary & SECOND_EPT else 0
    s.nested_root = eptp
    s.direct = 0 if v.guest_code else 1
    s.efer = efer
    s.cr0 = cr0
    s.cr4 = cr4
    if stale:
        s.cr3 = cr3
        flush_all(s)
    elif cr3 != s.cr3:
        s.cr3 = cr3
        flush_non_global(s)
    if (cr0 >> 31) and (cr4 & CR4_PAE) and (efer & EFER_LMA) == 0:
        if s.nested:
            for i in range(4):
                s.pdpte[i] = get(m, GUEST_PDPTR0 + 2 * i)
        elif load_pdptes(s, cr0, cr3, cr4) != GO_ON:
            s.event.pending = 0
            return 2
    if v.entry_controls & ENTRY_LOAD_DEBUG:
        load_dr7(s, get(m, GUEST_DR7))
        s.debugctl = get(m, GUEST_IA32_DEBUGCTL) & DEBUGCTL_BTF
    if v.entry_controls & ENTRY_LOAD_PAT:
        s.pat = get(m, GUEST_IA32_PAT)
    for i in range(6):
        _load_segment(m, cython.address(s.segs[i]), i)
    _load_segment(m, cython.address(s.ldtr), 6)
    _load_segment(m, cython.address(s.tr), 7)
    s.gdtr.base = get(m, GUEST_GDTR_BASE)
    s.gdtr.limit = cython.cast(uint32_t, get(m, GUEST_GDTR_LIMIT))
    s.idtr.base = get(m, GUEST_IDTR_BASE)
    s.idtr.limit = cython.cast(uint32_t, get(m, GUEST_IDTR_LIMIT))
    s.sysenter_cs = get(m, GUEST_SYSENTER_CS)
    s.sysenter_esp = get(m, GUEST_SYSENTER_ESP)
    s.sysenter_eip = get(m, GUEST_SYSENTER_EIP)
    s.gpr[RSP] = get(m, GUEST_RSP)
    s.rip = get(m, GUEST_RIP)
    s.rflags = get(m, GUEST_RFLAGS)
    s.interruptibility = cython.cast(uint32_t, get(m, GUEST_INTERRUPTIBILITY_INFO))
    s.activity = cython.cast(uint32_t, get(m, GUEST_ACTIVITY_STATE))
    s.pending_debug = cython.cast(uint32_t, get(m, GUEST_PENDING_DBG_EXCEPTIONS))
    s.pending_debug = s.pending_debug & 0x400F if s.pending_debug & 0x5000 else 0
    s.monitor_trap = 1 if v.processor & PROC_MONITOR_TRAP else 0
    s.intercepts = 0
    if v.processor & PROC_PAUSE or v.secondary & SECOND_PAUSE_LOOP:
        s.intercepts |= INTERCEPT_PAUSE
    if v.secondary & SECOND_RDRAND:
        s.intercepts |= INTERCEPT_RDRAND
    if v.secondary & SECOND_RDSEED:
        s.intercepts |= INTERCEPT_RDSEED
    s.cpl = (s.segs[SS].access_rights >> 5) & 3
    return 0


def _inject(s):
    """SDM, "Event Injection"."""
    m: cython.pointer(uint8_t) = vmx_of(s).vmcs
    information: uint32_t = cython.cast(uint32_t, get(m, VM_ENTRY_INTR_INFO_FIELD))
    s.event.pending = 0
    s.vectoring = 0
    if (information >> 31) == 0:
        return
    if s.monitor_trap or ((information >> 8) & 7) == 7:
        s.monitor_trap = 2  # SDM, "Monitor Trap Flag": behind the delivery
    if ((information >> 8) & 7) == 7:
        return
    # SDM, "Delivery of Pending Debug Exceptions after VM Entry"
    if ((information >> 8) & 7) <= EVENT_EXCEPTION or (s.interruptibility & SHADOW_MOV_SS) == 0:
        s.pending_debug = 0
    s.event.pending = 1
    s.event.vector = information & 0xFF
    s.event.kind = (information >> 8) & 7
    s.event.has_error = (information >> 11) & 1
    s.event.error_code = cython.cast(uint32_t, get(m, VM_ENTRY_EXCEPTION_ERROR_CODE))
    s.event.instruction_length = 0
    if s.event.kind > EVENT_EXCEPTION:
        s.event.instruction_length = cython.cast(uint32_t, get(m, VM_ENTRY_INSTRUCTION_LEN))
    s.event.payload = 0
    s.event.is_fault = 0
    if s.event.kind == EVENT_EXCEPTION and s.event.vector == 14:
        s.event.payload = s.cr2  # an injected page fault leaves CR2 alone
    vmx_of(s).injecting = 1
    s.activity = 0


def _fail(s, reason, qualification):
    """An entry failure: an exit that saves no guest state. SDM, "VM-Entry Failures During or After Loading
    Guest State".
    """
    v: cython.pointer(VmxState) = vmx_of(s)
    put(v.vmcs, VM_EXIT_REASON, reason | cython.cast(uint64_t, 0x80000000))
    put(v.vmcs, EXIT_QUALIFICATION, qualification)
    put(v.vmcs, VM_EXIT_INTR_INFO, 0)
    put(v.vmcs, IDT_VECTORING_INFO_FIELD, 0)
    v.injecting = 0
    s.event.pending = 0
    s.guest_mode = GUEST_NONE
    s.nested = 0
    s.direct = 0
    return ENTRY_FAILED


def _load_msrs(s, area, count):
    """Load an MSR area: 0, or the number of the entry that failed. SDM, "Loading MSRs"."""
    i: uint32_t
    entry: cython.pointer(uint32_t)
    index: uint32_t
    for i in range(count):
        entry = cython.cast(cython.pointer(uint32_t), _page(s, area + 16 * i))
        if entry == cython.NULL:
            return i + 1
        index = entry[0]
        if (
            index == cython.cast(uint64_t, 0xC0000100)
            or index == cython.cast(uint64_t, 0xC0000101)
            or (index >> 8) == 8
            or entry[1]
        ):
            return i + 1
        if not write_msr(s, index, cython.cast(cython.pointer(uint64_t), entry)[1]):
            return i + 1
    return 0


def _store_msrs(s, area, count):
    i: uint32_t
    value: uint64_t
    entry: cython.pointer(uint32_t)
    for i in range(count):
        entry = cython.cast(cython.pointer(uint32_t), _page(s, area + 16 * i))
        if entry != cython.NULL and read_msr(s, entry[0], cython.address(value)):
            cython.cast(cython.pointer(uint64_t), entry)[1] = value


def enter_guest(s, launch):
    """VMLAUNCH (1) or VMRESUME (0) up to the guest's first instruction; 0 or an error."""
    v: cython.pointer(VmxState) = vmx_of(s)
    m: cython.pointer(uint8_t) = v.vmcs
    launched: cython.pointer(uint32_t)
    error: uint32_t
    if m == cython.NULL:
        return ENTRY_NO_VMCS
    launched = cython.cast(cython.pointer(uint32_t), m + HEADER_LAUNCHED)
    if s.interruptibility & SHADOW_MOV_SS and v.guest_code:
        return ERROR_MOV_SS
    if launch and launched[0]:
        return ERROR_VMLAUNCH_NOT_CLEAR
    if not launch and not launched[0]:
        return ERROR_VMRESUME_NOT_LAUNCHED
    _read_controls(s)
    error = check_controls(s)
    if not error and v.guest_code:
        error = host_refused(s)
    if error:
        return error
    s.guest_mode = GUEST_VMX
    error = check_guest(s)
    if error:
        return _fail(s, REASON_INVALID_GUEST_STATE, error & 7)
    v.root_tsc_offset = s.tsc_offset
    error = _load_guest(s)
    if error:
        return _fail(s, REASON_INVALID_GUEST_STATE, error)
    error = cython.cast(uint32_t, get(m, VM_ENTRY_MSR_LOAD_COUNT))
    if error:
        error = _load_msrs(s, get(m, VM_ENTRY_MSR_LOAD_ADDR), error)
        if error:
            return _fail(s, REASON_MSR_LOADING, error)
    if v.processor & PROC_TSC_OFFSETTING:
        s.tsc_offset += get(m, TSC_OFFSET)
        if v.secondary & SECOND_TSC_SCALING:
            s.tsc_multiplier = get(m, TSC_MULTIPLIER)
    if v.pin & PIN_PREEMPTION_TIMER:
        now: uint64_t = host_tsc()
        v.timer_deadline = now + (get(m, VMX_PREEMPTION_TIMER_VALUE) << 5)
        if v.timer_deadline != now:
            preemption_arm(s, now, v.timer_deadline)
    launched[0] = 1
    v.entries += 1
    s.exit.reason = EXIT_NONE
    mode_changed(s)
    _inject(s)
    return 0


def leave_guest(s):
    """Store the guest state after an exit."""
    v: cython.pointer(VmxState) = vmx_of(s)
    m: cython.pointer(uint8_t) = v.vmcs
    controls: uint64_t
    now: uint64_t
    count: uint32_t
    i: uint32_t
    if (get(m, VM_EXIT_REASON) & 0xFFFF) == REASON_EXTERNAL_INTERRUPT:
        s.interrupt_line = 0  # the host takes it
    put(m, GUEST_CR0, s.cr0)
    put(m, GUEST_CR3, s.cr3)
    put(m, GUEST_CR4, s.cr4)
    if v.exit_controls & EXIT_SAVE_DEBUG:
        put(m, GUEST_DR7, s.dr[7])
        put(m, GUEST_IA32_DEBUGCTL, s.debugctl)
    s.debugctl = 0
    put(m, GUEST_RSP, s.gpr[RSP])
    put(m, GUEST_RIP, s.rip)
    put(m, GUEST_RFLAGS, s.rflags)
    for i in range(6):
        _store_segment(m, cython.address(s.segs[i]), i)
    _store_segment(m, cython.address(s.ldtr), 6)
    _store_segment(m, cython.address(s.tr), 7)
    put(m, GUEST_GDTR_BASE, s.gdtr.base)
    put(m, GUEST_GDTR_LIMIT, s.gdtr.limit)
    put(m, GUEST_IDTR_BASE, s.idtr.base)
    put(m, GUEST_IDTR_LIMIT, s.idtr.limit)
    put(m, GUEST_SYSENTER_CS, s.sysenter_cs)
    put(m, GUEST_SYSENTER_ESP, s.sysenter_esp)
    put(m, GUEST_SYSENTER_EIP, s.sysenter_eip)
    put(m, GUEST_INTERRUPTIBILITY_INFO, s.interruptibility)
    put(m, GUEST_ACTIVITY_STATE, s.activity)
    put(m, GUEST_PENDING_DBG_EXCEPTIONS, (s.pending_debug & 0x400F) | (0x1000 if s.pending_debug & 0xF else 0))
    s.pending_debug = 0
    s.monitor_trap = 0
    if s.intercepts:
        s.intercepts = 0
        mode_changed(s)
    controls = v.entry_controls & ~cython.cast(uint32_t, ENTRY_IA32E)
    if s.efer & EFER_LMA:
        controls |= ENTRY_IA32E
    put(m, VM_ENTRY_CONTROLS, controls)
    put(m, VM_ENTRY_INTR_INFO_FIELD, get(m, VM_ENTRY_INTR_INFO_FIELD) & 0x7FFFFFFF)
    if v.exit_controls & EXIT_SAVE_EFER:
        put(m, GUEST_IA32_EFER, s.efer)
    if v.exit_controls & EXIT_SAVE_PAT:
        put(m, GUEST_IA32_PAT, s.pat)
    if s.nested and (s.cr4 & CR4_PAE) and (s.efer & EFER_LMA) == 0:
        for i in range(4):
            put(m, GUEST_PDPTR0 + 2 * i, s.pdpte[i])
    if v.exit_controls & EXIT_SAVE_TIMER:
        now = host_tsc()
        put(m, VMX_PREEMPTION_TIMER_VALUE, (v.timer_deadline - now) >> 5 if now < v.timer_deadline else 0)
    s.tsc_offset = v.root_tsc_offset
    s.tsc_multiplier = 0
    count = cython.cast(uint32_t, get(m, VM_EXIT_MSR_STORE_COUNT))
    if count:
        _store_msrs(s, get(m, VM_EXIT_MSR_STORE_ADDR), count)
    s.guest_mode = GUEST_NONE
    count = cython.cast(uint32_t, get(m, VM_EXIT_MSR_LOAD_COUNT))
    if count:
        _load_msrs(s, get(m, VM_EXIT_MSR_LOAD_ADDR), count)
    s.nested = 0
    s.direct = 0
