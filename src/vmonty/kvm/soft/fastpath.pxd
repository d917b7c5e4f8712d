"""Exits that are handled while the guest stays in the processor, whichever vendor's they are."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState
from vmonty.kvm.soft.kvm_host cimport KvmLapic, KvmVcpuArch

# What a handler says; kernel: enum exit_fastpath_completion.
cdef enum:
    FAST_NONE = 0            # Python must handle it
    FAST_RESUME = 1          # done: on with the guest, whose controls are as they were
    FAST_USER = 3            # done: kvm_run tells user space the rest
    FAST_REENTER = 2         # done: an event waits to be delivered, or a window for it is to be opened

cdef enum:
    MSR_IA32_TSC = 0x10
    MSR_IA32_APICBASE = 0x1B
    MSR_UCODE_REV = 0x8B
    MSR_MCG_CAP = 0x179
    MSR_TSC_DEADLINE = 0x6E0
    X2APIC_ID = 0x802
    X2APIC_TPR = 0x808
    X2APIC_PPR = 0x80A
    X2APIC_EOI = 0x80B
    X2APIC_LDR = 0x80D
    X2APIC_SVR = 0x80F
    X2APIC_ISR = 0x810
    X2APIC_IRR_LAST = 0x827
    X2APIC_ICR = 0x830
    X2APIC_SELF_IPI = 0x83F
    MSR_WALL_CLOCK_NEW = 0x4B564D00

# ICR. SDM, "Interrupt Command Register (ICR)".
cdef enum:
    ICR_MODE = 0x700
    ICR_NMI = 0x400
    ICR_LOGICAL = 0x800
    ICR_BUSY = 0x1000
    ICR_LEVEL_TRIGGERED = 0x8000
    ICR_SELF = 0x40000
    ICR_SHORTHAND = 0xC0000

cdef enum:
    CR4_OSXSAVE = 0x40000
    CPUID_OSXSAVE = 0x8000000
    CPUID_APIC = 0x200
    APIC_BASE_ENABLE = 0x800
    SHADOWS = 3              # STI, MOV SS

# struct kvm_run, and KVM_EXIT_IO; a test compares them with the declaration.
cdef enum:
    RUN_EXIT_REASON = 8
    RUN_SAVED = 12           # ready_for_interrupt_injection, if_flag, flags; cr8; apic_base
    RUN_SAVED_CR8 = 16
    RUN_SAVED_BASE = 24
    RUN_IO = 32
    RUN_PIO_PAGE = 4096
    EXIT_IO = 2
    IO_IN = 0
    IO_OUT = 1

# Where stats.values has what is counted here; a test compares them with stats.py.
cdef enum:
    COUNT_PF_TAKEN = 104
    COUNT_PF_EMULATE = 106
    COUNT_EXITS = 113
    COUNT_IO_EXITS = 114
    COUNT_MMIO_EXITS = 115
    COUNT_IRQ_WINDOW_EXITS = 117
    COUNT_NMI_WINDOW_EXITS = 118
    COUNT_HALT_EXITS = 120
    COUNT_IRQ_EXITS = 122
    COUNT_INSN_EMULATION = 125
    COUNT_IRQ_INJECTIONS = 128
    COUNT_NMI_INJECTIONS = 129
    COUNT_REQ_EVENT = 130

cdef int fastpath_cpuid(KvmVcpuArch *a, CpuState *s) noexcept nogil
cdef int fastpath_rdmsr(KvmVcpuArch *a, CpuState *s) noexcept nogil
cdef int fastpath_wrmsr(KvmVcpuArch *a, CpuState *s) noexcept nogil
# OUT and IN of up to four bytes at a port that no in-kernel device has. IN is completed when user space has answered.
cdef int fastpath_out(KvmVcpuArch *a, CpuState *s, uint32_t port, uint32_t size) noexcept nogil
cdef int fastpath_in(KvmVcpuArch *a, CpuState *s, uint32_t port, uint32_t size) noexcept nogil
# rAX after an IN that begins with rax; there is no more to complete then.
cdef uint64_t fastpath_input(KvmVcpuArch *a, uint64_t rax) noexcept nogil
cdef int fastpath_halt(KvmVcpuArch *a, CpuState *s) noexcept nogil
cdef int fastpath_external_interrupt(KvmVcpuArch *a, CpuState *s) noexcept nogil
# Whether an interrupt waits that the guest does not know of yet. window: it exits anyway when it takes interrupts.
cdef bint kvm_lapic_expired_hv_timer(KvmVcpuArch *a) noexcept nogil
cdef int fastpath_events(KvmVcpuArch *a, bint window) noexcept nogil
cdef uint64_t rip_behind(CpuState *s, uint32_t length) noexcept nogil
cdef void skip_emulated_instruction(CpuState *s) noexcept nogil
cdef void save_run(KvmVcpuArch *a, CpuState *s) noexcept nogil
# Whether nothing of Python's is needed to send it; and one that is, to one APIC.
cdef bint ipi_is_plain(KvmVcpuArch *a, uint64_t icr) noexcept nogil
cdef void deliver_ipi(KvmVcpuArch *a, KvmLapic *target, uint64_t icr) noexcept nogil

cdef inline bint interrupts_open(CpuState *s) noexcept nogil:
    """kvm_arch_interrupt_allowed()."""
    return (s.rflags & 0x200) != 0 and (s.interruptibility & SHADOWS) == 0

cdef void _exit_io(KvmVcpuArch *a, CpuState *s, uint32_t direction, uint32_t port, uint32_t size) noexcept nogil
cdef bint _read_msr(KvmVcpuArch *a, uint32_t index, uint64_t *value) noexcept nogil
cdef bint _write_msr(KvmVcpuArch *a, uint32_t index, uint64_t value) noexcept nogil
cdef bint _write_deadline(KvmVcpuArch *a, uint64_t value) noexcept nogil
cdef bint _timer_is_plain(KvmLapic *l) noexcept nogil
cdef void _timer_fires(KvmLapic *l) noexcept nogil
cdef bint _send_ipi(KvmVcpuArch *a, uint64_t icr) noexcept nogil
