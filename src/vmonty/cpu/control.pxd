"""Control and debug registers, and the other privileged instructions that change or show the processor.

Register numbers are those of ``gpr``; the functions read and write ``s.gpr`` themselves. Each asks first whether VMX or
SVM intercepts it. GO_ON or LEAVE_NEXT when done (the caller advances rip), LEAVE_JUMP when rip is already right.
"""

from libc.stdint cimport uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState

cdef int mov_to_cr(CpuState *s, uint32_t cr, uint32_t register, uint32_t length) noexcept nogil
cdef int mov_from_cr(CpuState *s, uint32_t cr, uint32_t register, uint32_t length) noexcept nogil
cdef int mov_to_dr(CpuState *s, uint32_t dr, uint32_t register, uint32_t length) noexcept nogil
cdef int mov_from_dr(CpuState *s, uint32_t dr, uint32_t register, uint32_t length) noexcept nogil
cdef int clts(CpuState *s, uint32_t length) noexcept nogil
# linear: of a memory operand (for the exit information), is_memory 0 for the register form.
cdef int lmsw(CpuState *s, uint32_t value, uint32_t is_memory, uint64_t linear, uint32_t length) noexcept nogil
# SMSW: the value to store (CR0 as the guest may see it), after the UMIP check.
cdef int smsw(CpuState *s, uint32_t length, uint64_t *value) noexcept nogil
cdef int invlpg(CpuState *s, uint64_t linear, uint32_t length) noexcept nogil
cdef int invpcid(CpuState *s, uint64_t kind, uint64_t linear, uint32_t length, uint32_t info,
                 uint64_t displacement) noexcept nogil
cdef int wbinvd(CpuState *s, uint32_t length) noexcept nogil
cdef int invd(CpuState *s, uint32_t length) noexcept nogil
cdef int xgetbv(CpuState *s) noexcept nogil
cdef int xsetbv(CpuState *s, uint32_t length) noexcept nogil

# Without any intercept: for VM entry and exit, task switches, and the host's own writes.
cdef int check_cr0(CpuState *s, uint64_t value) noexcept nogil
cdef int check_cr4(CpuState *s, uint64_t value) noexcept nogil
cdef int set_cr0(CpuState *s, uint64_t value) noexcept nogil
cdef int set_cr3(CpuState *s, uint64_t value) noexcept nogil
cdef int set_cr4(CpuState *s, uint64_t value) noexcept nogil
cdef int load_pdptes(CpuState *s, uint64_t cr0, uint64_t cr3, uint64_t cr4) noexcept nogil
cdef int apply_cr0(CpuState *s, uint64_t value) noexcept nogil
cdef int apply_cr4(CpuState *s, uint64_t value) noexcept nogil

cdef inline bint privileged(CpuState *s) noexcept nogil:
    """CPL 0? Real mode counts as 0; virtual-8086 mode as 3."""
    return s.cpl == 0


cdef int _cr_exit(CpuState *s, uint64_t cr, uint64_t kind, uint64_t register, uint32_t length) noexcept nogil
cdef uint64_t _operand(CpuState *s, uint32_t register) noexcept nogil
cdef void _result(CpuState *s, uint32_t register, uint64_t value) noexcept nogil
cdef int _guest_cr0(CpuState *s, uint64_t value) noexcept nogil
cdef int _write_cr8(CpuState *s, uint64_t value, uint32_t length) noexcept nogil
cdef int _debug_checks(CpuState *s, uint32_t dr, uint32_t register, uint32_t load, uint32_t length) noexcept nogil
cdef bint _selective(CpuState *s, uint64_t value) noexcept nogil
cdef int _pdpte_fault(CpuState *s) noexcept nogil
