"""What CPUID answers and which features exist: one table per processor, filled from ``models``."""

from libc.stdint cimport uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState

cdef enum:
    MAX_CPUID_ENTRIES = 64


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


# CPUID without intercepts: EAX, EBX, ECX, EDX into out[0..3].
cdef void lookup(CpuState *s, uint32_t leaf, uint32_t subleaf, uint32_t *out) noexcept nogil
cdef uint64_t cr4_allowed(CpuState *s) noexcept nogil
cdef uint64_t efer_allowed(CpuState *s) noexcept nogil
cdef uint64_t xcr0_allowed(CpuState *s) noexcept nogil

cdef CpuidEntry *_find(CpuModel *m, uint32_t leaf, uint32_t subleaf) noexcept nogil
