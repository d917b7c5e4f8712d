"""IA32_VMX_*: what this processor's VMX honours."""

from libc.stdint cimport uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState

cdef bint field_exists(uint32_t encoding) noexcept nogil
cdef bint capability(CpuState *s, uint32_t index, uint64_t *value) noexcept nogil
# Are all bits of a control word allowed? index: 0x481 … 0x48B, of the capability MSR.
cdef bint controls_allowed(CpuState *s, uint32_t index, uint32_t value) noexcept nogil

# Bits that must be 1 (default1 class, plain and "true" MSRs) and that may be. Bit 31 of the primary
# processor-based controls is added in code: it is no C int.
cdef enum:
    PIN_DEFAULT1 = 0x16
    PIN_MAY = 0x1 | 0x8 | 0x20 | 0x40
    PROCESSOR_DEFAULT1 = 0x0401E172
    PROCESSOR_TRUE1 = 0x04006172
    PROCESSOR_MAY = 0x7BF99E8C
    SECONDARY_MAY = 0x2111CEE
    EXIT_DEFAULT1 = 0x36DFF
    EXIT_TRUE1 = 0x36DFB
    EXIT_MAY = 0x7C8204
    ENTRY_DEFAULT1 = 0x11FF
    ENTRY_TRUE1 = 0x11FB
    ENTRY_MAY = 0xC204

cdef bint _row(uint32_t index, uint32_t *must, uint32_t *may) noexcept nogil
