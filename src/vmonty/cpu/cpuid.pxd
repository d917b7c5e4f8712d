"""What CPUID answers and which features exist: one table per processor, filled from ``models``."""

from libc.stdint cimport uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState

cdef enum:
    MAX_CPUID_ENTRIES = 64

# CpuModel.msrs_allowed: groups of model-specific registers that a feature brings, numbered as models.MSR_GROUPS is.
cdef enum:
    MSRS_TSC = 0
    MSRS_TSC_ADJUST = 1
    MSRS_APIC = 2
    MSRS_SPEC_CTRL = 3
    MSRS_ARCH_CAPABILITIES = 4
    MSRS_SYSENTER = 5
    MSRS_MACHINE_CHECK = 6
    MSRS_PAT = 7
    MSRS_MTRR = 8
    MSRS_TSC_DEADLINE = 9
    MSRS_EFER = 10
    MSRS_SYSCALL = 11
    MSRS_LONG_MODE = 12
    MSRS_TSC_AUX = 13
    MSRS_OSVW = 14


cdef struct CpuidEntry:
    uint32_t leaf
    uint32_t subleaf
    uint32_t indexed         # the subleaf matters
    uint32_t eax
    uint32_t ebx
    uint32_t ecx
    uint32_t edx
    uint32_t pad


cdef struct CpuModel:
    CpuidEntry entries[64]
    uint32_t count
    uint32_t pad
    uint64_t cr4_allowed     # bits of CR4 that the features bring
    uint64_t efer_allowed
    uint64_t xcr0_allowed
    uint64_t msrs_allowed


# CPUID without intercepts: EAX, EBX, ECX, EDX into out[0..3].
cdef void lookup(CpuState *s, uint32_t leaf, uint32_t subleaf, uint32_t *out) noexcept nogil
cdef uint64_t cr4_allowed(CpuState *s) noexcept nogil
cdef uint64_t efer_allowed(CpuState *s) noexcept nogil
cdef uint64_t xcr0_allowed(CpuState *s) noexcept nogil
cdef bint msrs_allowed(CpuState *s, uint32_t group) noexcept nogil

cdef CpuidEntry *_find(CpuModel *m, uint32_t leaf, uint32_t subleaf) noexcept nogil
