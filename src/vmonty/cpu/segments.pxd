"""Segment registers and descriptor tables, with every check and in every mode. (Owner: system side.)

``size`` is the operand size in bytes; ``length`` the instruction's; ``linear`` the linear address of a memory
operand whose segment checks the caller has made. ``info`` is the VMX instruction-information word of a
descriptor-table instruction
(0 if the caller has none) and ``displacement`` its exit qualification.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vmonty.cpu.state cimport (
    ACCESS_IMPLICIT,
    CR4_PVI,
    CR4_VME,
    FLAG_IOPL,
    FLAG_VIF,
    FLAG_VIP,
    FLAG_VM,
    TLB_ENTRIES,
    CpuState,
    Segment,
    TlbEntry,
)
from vmonty.cpu.tlb cimport read_value

# MOV/POP to ES, SS, DS, FS, GS and LDS etc. Never CS. GO_ON or LEAVE_EVENT.
# MOV and POP to SS: the caller sets SHADOW_MOV_SS.
cdef int load_segment(CpuState *s, uint32_t index, uint32_t selector) noexcept nogil
cdef int lldt(CpuState *s, uint32_t selector, uint32_t length, uint32_t info, uint64_t displacement) noexcept nogil
cdef int ltr(CpuState *s, uint32_t selector, uint32_t length, uint32_t info, uint64_t displacement) noexcept nogil
# SLDT (0) and STR (1): the value to store, after UMIP and intercept checks.
cdef int store_selector(CpuState *s, uint32_t task, uint64_t *value, uint32_t length, uint32_t info,
                        uint64_t displacement) noexcept nogil
# LGDT (0) and LIDT (1); SGDT and SIDT.
cdef int load_table(CpuState *s, uint32_t interrupts, uint64_t linear, uint32_t size, uint32_t length, uint32_t info,
                    uint64_t displacement) noexcept nogil
cdef int store_table(CpuState *s, uint32_t interrupts, uint64_t linear, uint32_t length, uint32_t info,
                     uint64_t displacement) noexcept nogil
# VERR/VERW/LAR/LSL: set or clear ZF in s.rflags; LAR/LSL give *value when ZF is set.
cdef int verify(CpuState *s, uint32_t selector, uint32_t write) noexcept nogil
cdef int lar(CpuState *s, uint32_t selector, uint64_t *value) noexcept nogil
cdef int lsl(CpuState *s, uint32_t selector, uint64_t *value) noexcept nogil

# For events, transfers, tasks.
# A descriptor of GDT or LDT (low 8 bytes); beyond the table's limit: the vector with the error code given.
cdef int read_descriptor(CpuState *s, uint32_t selector, uint32_t vector, uint32_t error,
                         uint64_t *descriptor) noexcept nogil
cdef bint stack_holds(const Segment *segment, uint64_t low, uint64_t size) noexcept nogil
cdef void unpack(Segment *segment, uint32_t selector, uint64_t descriptor) noexcept nogil
# Set the accessed bit in the table if it is clear.
cdef int set_accessed(CpuState *s, uint32_t selector, uint64_t *descriptor) noexcept nogil
# Put a checked code descriptor into CS with RPL = cpl, and recompute the mode.
cdef int enter_code(CpuState *s, uint32_t selector, uint64_t descriptor, uint32_t cpl) noexcept nogil
# A stack segment for privilege level cpl: checks, then *segment. Errors: vector (#TS or #GP, #SS when not present).
cdef int stack_segment(CpuState *s, uint32_t selector, uint32_t cpl, uint32_t vector, uint32_t external,
                       Segment *segment) noexcept nogil
cdef void set_real(CpuState *s, uint32_t index, uint32_t selector) noexcept nogil
cdef void set_null(CpuState *s, uint32_t index, uint32_t selector) noexcept nogil
cdef uint64_t stack_mask(CpuState *s) noexcept nogil

cdef inline bint protected_mode(CpuState *s) noexcept nogil:
    """Protected mode, compatibility or 64-bit mode: not real and not virtual-8086."""
    return s.mode >= 2


cdef inline bint long_mode(CpuState *s) noexcept nogil:
    """EFER.LMA: 64-bit or compatibility mode."""
    return (s.efer & 0x400) != 0


cdef inline int implicit_read(CpuState *s, uint64_t linear, uint32_t size, uint64_t *value) noexcept nogil:
    """Read a system data structure with supervisor rights; 8-byte reads try the supervisor TLB first."""
    cdef TlbEntry *e = &s.tlb_read[0][(linear >> 12) & (TLB_ENTRIES - 1)]
    if size == 8 and e.negated_tag + (linear & ~<uint64_t> 0xFFF) == 0 and (linear & 0xFFF) <= 0xFF8 and not s.observe:
        value[0] = (<uint64_t *> (e.host + (linear & 0xFFF)))[0]
        return 0
    return read_value(s, linear, size, ACCESS_IMPLICIT, value)


cdef bint _system_descriptor(CpuState *s, uint32_t selector, uint64_t *descriptor, uint64_t *high) noexcept nogil
cdef bint _visible(CpuState *s, uint32_t selector, uint64_t descriptor) noexcept nogil
cdef bint _peek(CpuState *s, uint32_t selector, uint64_t *descriptor, int *why) noexcept nogil
cdef int _zero_flag(CpuState *s, bint on) noexcept nogil

cdef inline bint virtual_interrupt_due(CpuState *s) noexcept nogil:
    """VIF and VIP at the beginning of an instruction: #GP. SDM, "Class 2—Maskable Hardware Interrupt Handling in
    Virtual-8086 Mode Using the Virtual Interrupt Mechanism", "Protected-Mode Virtual Interrupts".
    """
    if s.cpl != 3 or (s.rflags & (FLAG_VIF | FLAG_VIP)) != (FLAG_VIF | FLAG_VIP):
        return False
    if (s.rflags & FLAG_IOPL) == FLAG_IOPL:
        return False
    return (s.cr4 & (CR4_VME if s.rflags & FLAG_VM else CR4_PVI)) != 0
