"""Exceptions, interrupts, INT n: how events reach their handlers or the hypervisor. (Owner: system side.)

For the dispatcher, when a helper returned LEAVE_EVENT, or VM entry injected: ``deliver(s)`` while ``s.event.pending``.
It returns GO_ON (nothing to do), LEAVE_JUMP (rip, cs, mode changed: look again) or LEAVE_EXIT.
For ``system``: one function per instruction; ``length`` is the instruction's.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState, Event, Segment

cdef int deliver(CpuState *s) noexcept nogil
# INT n (EVENT_SOFT_INTERRUPT), INT3/INTO (EVENT_SOFT_EXCEPTION 3/4), INT1 (EVENT_PRIVILEGED 1).
cdef int software_interrupt(CpuState *s, uint32_t vector, uint32_t kind, uint32_t length) noexcept nogil
cdef int hlt(CpuState *s, uint32_t length) noexcept nogil
cdef int sti(CpuState *s) noexcept nogil
cdef int cli(CpuState *s) noexcept nogil
# POPF: write RFLAGS from a popped value by operand size 2, 4, 8 with the IOPL and virtual-8086 rules.
cdef int popf(CpuState *s, uint64_t value, uint32_t size) noexcept nogil
# PUSHF: the value to push, after the IOPL check of virtual-8086 mode.
cdef int pushf(CpuState *s, uint32_t size, uint64_t *value) noexcept nogil

cdef int _deliver_one(CpuState *s) noexcept nogil
cdef int _class(uint32_t vector) noexcept nogil
cdef int _exception_exit(CpuState *s) noexcept nogil
cdef int _triple_fault(CpuState *s) noexcept nogil
cdef int _through_idt(CpuState *s, uint32_t external) noexcept nogil
cdef int _long(CpuState *s, uint32_t external, uint64_t flags, uint64_t rip) noexcept nogil
cdef int _protected(CpuState *s, uint32_t external, uint64_t flags, uint64_t rip) noexcept nogil
cdef int _real(CpuState *s, uint64_t flags, uint64_t rip) noexcept nogil
cdef int _gate_checks(CpuState *s, uint64_t gate, uint32_t external) noexcept nogil
cdef int _target(CpuState *s, uint32_t selector, uint32_t external, uint64_t *descriptor, uint32_t *cpl) noexcept nogil
cdef int _inner_stack_long(CpuState *s, uint32_t offset, uint32_t external, uint64_t *rsp) noexcept nogil
cdef int _inner_stack(CpuState *s, uint32_t cpl, uint32_t external, Segment *stack, uint64_t *esp) noexcept nogil
cdef int _push(CpuState *s, Segment *stack, uint64_t *esp, uint64_t *values, uint32_t count, uint32_t size,
               uint32_t cpl, uint32_t error) noexcept nogil
cdef void _enter_handler(CpuState *s, uint32_t interrupt_gate) noexcept nogil
cdef int _vm86_interrupt(CpuState *s, uint32_t vector, uint32_t length) noexcept nogil
