"""What is done with the local APIC's registers on every interrupt. No lock: see kvm_host's KvmLapic."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vmonty.kvm.soft.kvm_host cimport KvmLapic

# Word numbers: a register's offset / 4.
cdef enum:
    WORD_ID = 0x8
    WORD_LVR = 0xC
    WORD_TPR = 0x20
    WORD_PPR = 0x28
    WORD_LDR = 0x34
    WORD_SVR = 0x3C
    WORD_ISR = 0x40
    WORD_TMR = 0x60
    WORD_IRR = 0x80
    WORD_LVTT = 0xC8

cdef enum:
    APICBASE_EXTD = 0x400
    APICBASE_ENABLE = 0x800
    SVR_ENABLED = 0x100
    LVT_MASKED = 0x10000
    DELIVERY_MODE = 0x700

cdef extern from * nogil:
    int leading_zeros "__builtin_clz" (uint32_t bits) noexcept

cdef inline bint apic_enabled(KvmLapic *l) noexcept nogil:
    """Whether the base MSR has it on."""
    return (l.apic_base & APICBASE_ENABLE) != 0

cdef inline uint32_t apic_cr8(KvmLapic *l) noexcept nogil:
    """kvm_lapic_get_cr8(): the task priority's class."""
    return (l.regs[WORD_TPR] >> 4) & 15

cdef inline bint apic_x2apic_mode(KvmLapic *l) noexcept nogil:
    """Whether it is on, in x2APIC mode."""
    return (l.apic_base & (APICBASE_ENABLE | APICBASE_EXTD)) == (APICBASE_ENABLE | APICBASE_EXTD)

# The highest bit of 256 that begin at a word; -1: none.
cdef int apic_find_highest(KvmLapic *l, uint32_t word) noexcept nogil
cdef uint32_t kvm_apic_ppr(KvmLapic *l) noexcept nogil
# The vector that can be delivered now, or -1.
cdef int kvm_apic_has_interrupt(KvmLapic *l) noexcept nogil
# The class of what the task priority holds back, so that lowering it must exit; 0: nothing is.
cdef uint32_t kvm_apic_tpr_threshold(KvmLapic *l) noexcept nogil
# Acknowledge it: it is in service.
cdef int kvm_get_apic_interrupt(KvmLapic *l) noexcept nogil
# A vector becomes pending. Any thread; the vCPU must be kicked.
cdef void kvm_lapic_set_irr(KvmLapic *l, uint32_t vector, bint level_triggered) noexcept nogil
# End the highest vector in service, and give it; -1: there is none.
cdef int apic_set_eoi(KvmLapic *l) noexcept nogil
# Whether the deadline has come; then the caller lets the timer fire.
cdef bint apic_take_deadline(KvmLapic *l, uint64_t tsc) noexcept nogil
# Whether someone but the APIC must hear of the end of the highest vector in service.
cdef bint apic_eoi_is_told(KvmLapic *l) noexcept nogil
