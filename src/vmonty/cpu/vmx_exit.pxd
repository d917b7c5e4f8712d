"""VMX non-root operation as the rest of the processor sees it: controls in force, and how a VM exit is recorded.

The inline functions are what an instruction asks first; outside non-root operation they cost one comparison.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState

# CpuState.guest_mode
cdef enum:
    GUEST_NONE = 0
    GUEST_VMX = 1
    GUEST_SVM = 2

# Pin-based controls.
cdef enum:
    PIN_EXTERNAL_INTERRUPT = 0x1
    PIN_NMI = 0x8
    PIN_VIRTUAL_NMIS = 0x20
    PIN_PREEMPTION_TIMER = 0x40

# Primary processor-based controls.
cdef enum:
    PROC_INTERRUPT_WINDOW = 0x4
    PROC_TSC_OFFSETTING = 0x8
    PROC_HLT = 0x80
    PROC_INVLPG = 0x200
    PROC_MWAIT = 0x400
    PROC_RDPMC = 0x800
    PROC_RDTSC = 0x1000
    PROC_CR3_LOAD = 0x8000
    PROC_CR3_STORE = 0x10000
    PROC_CR8_LOAD = 0x80000
    PROC_CR8_STORE = 0x100000
    PROC_TPR_SHADOW = 0x200000
    PROC_NMI_WINDOW = 0x400000
    PROC_MOV_DR = 0x800000
    PROC_UNCONDITIONAL_IO = 0x1000000
    PROC_IO_BITMAPS = 0x2000000
    PROC_MONITOR_TRAP = 0x8000000
    PROC_MSR_BITMAPS = 0x10000000
    PROC_MONITOR = 0x20000000
    PROC_PAUSE = 0x40000000
    # bit 31, activate secondary controls: too large for a C int; see secondary_active()

# Secondary processor-based controls.
cdef enum:
    SECOND_EPT = 0x2
    SECOND_DESCRIPTOR_TABLE = 0x4
    SECOND_RDTSCP = 0x8
    SECOND_VPID = 0x20
    SECOND_WBINVD = 0x40
    SECOND_UNRESTRICTED = 0x80
    SECOND_PAUSE_LOOP = 0x400
    SECOND_RDRAND = 0x800
    SECOND_INVPCID = 0x1000
    SECOND_RDSEED = 0x10000
    SECOND_XSAVES = 0x100000
    SECOND_TSC_SCALING = 0x2000000

# VM-exit and VM-entry controls.
cdef enum:
    EXIT_SAVE_DEBUG = 0x4
    EXIT_HOST_64 = 0x200
    EXIT_ACKNOWLEDGE = 0x8000
    EXIT_SAVE_PAT = 0x40000
    EXIT_LOAD_PAT = 0x80000
    EXIT_SAVE_EFER = 0x100000
    EXIT_LOAD_EFER = 0x200000
    EXIT_SAVE_TIMER = 0x400000
    ENTRY_LOAD_DEBUG = 0x4
    ENTRY_IA32E = 0x200
    ENTRY_LOAD_PAT = 0x4000
    ENTRY_LOAD_EFER = 0x8000

# Basic exit reasons. SDM, "VMX Basic Exit Reasons".
cdef enum:
    REASON_EXCEPTION_NMI = 0
    REASON_EXTERNAL_INTERRUPT = 1
    REASON_TRIPLE_FAULT = 2
    REASON_INIT = 3
    REASON_SIPI = 4
    REASON_INTERRUPT_WINDOW = 7
    REASON_NMI_WINDOW = 8
    REASON_TASK_SWITCH = 9
    REASON_CPUID = 10
    REASON_HLT = 12
    REASON_INVD = 13
    REASON_INVLPG = 14
    REASON_RDPMC = 15
    REASON_RDTSC = 16
    REASON_VMCALL = 18
    REASON_VMCLEAR = 19
    REASON_VMLAUNCH = 20
    REASON_VMPTRLD = 21
    REASON_VMPTRST = 22
    REASON_VMREAD = 23
    REASON_VMRESUME = 24
    REASON_VMWRITE = 25
    REASON_VMXOFF = 26
    REASON_VMXON = 27
    REASON_CR_ACCESS = 28
    REASON_DR_ACCESS = 29
    REASON_IO = 30
    REASON_RDMSR = 31
    REASON_WRMSR = 32
    REASON_INVALID_GUEST_STATE = 33
    REASON_MSR_LOADING = 34
    REASON_MWAIT = 36
    REASON_MONITOR_TRAP = 37
    REASON_MONITOR = 39
    REASON_PAUSE = 40
    REASON_TPR_BELOW_THRESHOLD = 43
    REASON_GDTR_IDTR = 46
    REASON_LDTR_TR = 47
    REASON_EPT_VIOLATION = 48
    REASON_EPT_MISCONFIG = 49
    REASON_INVEPT = 50
    REASON_RDTSCP = 51
    REASON_PREEMPTION_TIMER = 52
    REASON_INVVPID = 53
    REASON_WBINVD = 54
    REASON_XSETBV = 55
    REASON_RDRAND = 57
    REASON_INVPCID = 58
    REASON_RDSEED = 61


# CpuState.intercepts, and bits of block_key.
cdef enum:
    INTERCEPT_PAUSE = 0x10000    # a helper decides
    INTERCEPT_RDRAND = 0x20000
    INTERCEPT_RDSEED = 0x40000

cdef struct VmxState:
    uint8_t *vmcs            # current VMCS, in this process; NULL: none
    uint64_t vmcs_pointer    # what VMPTRST stores
    uint64_t vmxon_pointer
    uint32_t on              # between VMXON and VMXOFF
    uint32_t guest_code      # VMX operation belongs to code that this processor executes: exits load the host state
    # Controls of the guest that runs, copied at VM entry (no secondary controls: 0).
    uint32_t pin
    uint32_t processor
    uint32_t secondary
    uint32_t exit_controls
    uint32_t entry_controls
    uint32_t exception_bitmap
    uint32_t page_fault_mask
    uint32_t page_fault_match
    uint32_t cr3_targets
    uint32_t tpr_threshold
    uint64_t cr3_target[4]
    uint64_t cr0_mask
    uint64_t cr0_shadow
    uint64_t cr4_mask
    uint64_t cr4_shadow
    uint8_t *io_bitmap_a
    uint8_t *io_bitmap_b
    uint8_t *msr_bitmap
    uint8_t *virtual_apic
    uint64_t timer_deadline  # host TSC at which the preemption timer reaches zero
    uint32_t emulating       # host software executes one instruction for the guest: no memory is MMIO, not an exit
    uint32_t injecting       # the event to deliver came from VM entry: no intercept applies
    uint64_t first_pause     # of the loop that pause-loop exiting sees; TSC
    uint64_t last_pause
    uint32_t entries         # VM entries on this processor
    uint64_t tlb_vpid        # what the TLB holds: VPID and EPTP of the last guest
    uint64_t tlb_eptp
    uint64_t root_tsc_offset
    uint64_t error           # VM-instruction error of the last failed instruction without a current VMCS


cdef inline VmxState *vmx_of(CpuState *s) noexcept nogil:
    """The VMX side of the state."""
    return <VmxState *> s.vmx


cdef inline bint vmx_wants(CpuState *s, uint32_t processor_control) noexcept nogil:
    """Is this a guest whose primary control is set?"""
    return s.guest_mode == GUEST_VMX and (vmx_of(s).processor & processor_control) != 0


cdef inline bint vmx_second(CpuState *s, uint32_t secondary_control) noexcept nogil:
    """Is this a guest whose secondary control is set?"""
    return s.guest_mode == GUEST_VMX and (vmx_of(s).secondary & secondary_control) != 0


cdef inline bint vmx_lacks(CpuState *s, uint32_t secondary_control) noexcept nogil:
    """Is this a guest whose control that enables an instruction is clear (#UD)?"""
    return s.guest_mode == GUEST_VMX and (vmx_of(s).secondary & secondary_control) == 0


# Record a VM exit. All return LEAVE_EXIT, or LEAVE_JUMP when the host is code of this processor.
# rip stays where it is: at the instruction for fault-like exits; trap-like callers advance it first.
cdef int vm_exit(CpuState *s, uint32_t reason, uint64_t qualification, uint32_t length) noexcept nogil
# with VMX instruction information (descriptor tables, INS/OUTS, VMX instructions)
cdef int vm_exit_information(CpuState *s, uint32_t reason, uint64_t qualification, uint32_t length,
                             uint32_t information) noexcept nogil
# exceptions and NMIs: interruption information in VMX format without the valid bit
cdef int vm_exit_event(CpuState *s, uint32_t information, uint32_t error_code, uint64_t qualification,
                       uint32_t length) noexcept nogil
cdef int nested_page_fault(CpuState *s, uint32_t fault, uint64_t qualification, uint64_t physical,
                           uint64_t linear) noexcept nogil
# Does the exception bitmap (with the #PF mask and match) select this exception?
cdef bint exception_intercepted(CpuState *s, uint32_t vector, uint32_t error_code) noexcept nogil
