"""SVM guests as the rest of the processor sees them: intercepts in force, and how a #VMEXIT is recorded.

The inline functions are what an instruction asks first; outside a guest they cost one comparison.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState
from vmonty.cpu.vmx_exit cimport GUEST_SVM

# INT_CTL
cdef enum:
    V_TPR = 0xFF
    V_IRQ = 0x100
    V_INTR_PRIO_SHIFT = 16
    V_IGN_TPR = 0x100000
    V_INTR_MASKING = 0x1000000

# VM_CR. APM, "VM_CR MSR (C001_0114h)"
cdef enum:
    VM_CR_R_INIT = 0x2
    VM_CR_LOCK = 0x8
    VM_CR_SVMDIS = 0x10


cdef struct SvmState:
    uint8_t *vmcb            # of the guest that runs, in this process
    uint64_t vmcb_pointer    # what the host's rAX had
    uint64_t hsave           # VM_HSAVE_PA
    uint64_t vm_cr
    uint64_t tsc_ratio       # MSR_TSC_RATIO: 8 bits, then 32 of fraction; 0 stands for 1
    uint32_t gif             # global interrupt flag; matters to code that is a host itself
    uint32_t guest_code      # the host is code of this processor: exits load its state
    uint32_t intercept[6]    # copied at VMRUN: a bit of word n is exit code 32 n + bit
    uint32_t int_ctl
    uint32_t int_vector
    uint8_t *iopm
    uint8_t *msrpm
    uint64_t host_interrupts     # RFLAGS.IF of the host
    uint64_t root_tsc_offset
    uint64_t pause_count
    uint64_t pause_time
    uint32_t injecting       # the event to deliver came from EVENTINJ: no intercept applies
    uint32_t emulating       # host software executes one instruction for the guest: no memory is MMIO, not an exit
    uint32_t entries         # VMRUNs on this processor
    uint32_t tlb_asid        # what the TLB holds: ASID and nCR3 of the last guest
    uint64_t tlb_root


cdef inline SvmState *svm_of(CpuState *s) noexcept nogil:
    """The SVM side of the state."""
    return <SvmState *> s.svm


cdef inline bint svm_wants(CpuState *s, uint32_t code) noexcept nogil:
    """Is this a guest whose intercept with that exit code is set?"""
    return s.guest_mode == GUEST_SVM and ((svm_of(s).intercept[code >> 5] >> (code & 31)) & 1) != 0


# Record a #VMEXIT; gives LEAVE_EXIT. rip stays where it is. length: of the intercepted instruction, for nRIP; 0 for
# everything that isn't the intercept of an instruction.
cdef int svm_exit(CpuState *s, uint64_t code, uint64_t info1, uint64_t info2, uint32_t length) noexcept nogil
cdef bint svm_port_intercepted(CpuState *s, uint32_t port, uint32_t size) noexcept nogil
cdef bint svm_msr_intercepted(CpuState *s, uint32_t index, uint32_t write) noexcept nogil
# PAUSE with the filter: does this one exit? APM, "Pause Intercept Filtering"
cdef bint svm_pause_exits(CpuState *s, uint64_t now) noexcept nogil
# A vectoring or injection word: VMX interruption types in, EVENTINJ's out.
cdef uint64_t svm_event(uint32_t information, uint32_t error_code) noexcept nogil
