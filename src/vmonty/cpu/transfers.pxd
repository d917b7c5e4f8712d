"""Far JMP, CALL, RET and IRET. (Owner: system side.)

``size`` is the operand size in bytes (2, 4, 8). All return LEAVE_JUMP when done.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState, Segment

cdef int far_jump(CpuState *s, uint32_t selector, uint64_t offset, uint32_t size, uint32_t length) noexcept nogil
cdef int far_call(CpuState *s, uint32_t selector, uint64_t offset, uint32_t size, uint32_t length) noexcept nogil
cdef int far_return(CpuState *s, uint32_t size, uint32_t pop_bytes) noexcept nogil
cdef int iret(CpuState *s, uint32_t size, uint32_t length) noexcept nogil

cdef int _pop(CpuState *s, uint64_t *rsp, uint32_t size, uint64_t *value) noexcept nogil
cdef int _push2(CpuState *s, uint64_t first, uint64_t second, uint32_t size, uint64_t *rsp) noexcept nogil
cdef int _check_offset(CpuState *s, uint64_t descriptor, uint64_t offset) noexcept nogil
cdef int _direct(CpuState *s, uint32_t selector, uint64_t descriptor) noexcept nogil
cdef int _system_target(CpuState *s, uint32_t selector, uint64_t gate, uint32_t call, uint32_t length) noexcept nogil
cdef int _gate(CpuState *s, uint32_t selector, uint64_t gate, uint32_t call, uint32_t length) noexcept nogil
cdef int _gate_inner(CpuState *s, uint32_t selector, uint64_t descriptor, uint64_t offset, uint32_t cpl, uint32_t size,
                     uint32_t parameters, uint32_t length) noexcept nogil
cdef int _return_code(CpuState *s, uint32_t selector, uint64_t *descriptor) noexcept nogil
cdef int _return_stack(CpuState *s, uint32_t selector, uint32_t cpl, bint to_64, Segment *segment) noexcept nogil
cdef void _leave_level(CpuState *s) noexcept nogil
cdef void _iret_flags(CpuState *s, uint64_t flags, uint32_t size, uint32_t cpl) noexcept nogil
cdef int _iret_real(CpuState *s, uint32_t size) noexcept nogil
cdef int _iret_vm86(CpuState *s, uint64_t rip, uint64_t cs, uint64_t flags, uint64_t rsp) noexcept nogil
