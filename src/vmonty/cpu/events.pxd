"""Exceptions, interrupts, INT n: how events reach their handlers or the hypervisor. (Owner: system side.)

For the dispatcher:
  * a helper returned LEAVE_EVENT, or VM entry injected: ``deliver(s)`` while ``s.event.pending``;
  * at an instruction boundary: ``poll(s)`` when ``attention(s)``.
Both return GO_ON (nothing to do), LEAVE_JUMP (rip, cs, mode changed: look again) or LEAVE_EXIT.
For ``system``: one function per instruction; ``length`` is the instruction's.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState, Event, Segment

cdef int deliver(CpuState *s) noexcept nogil
cdef int poll(CpuState *s) noexcept nogil
# INT n (EVENT_SOFT_INTERRUPT), INT3/INTO (EVENT_SOFT_EXCEPTION 3/4), INT1 (EVENT_PRIVILEGED 1).
cdef int software_interrupt(CpuState *s, uint32_t vector, uint32_t kind, uint32_t length) noexcept nogil
cdef int hlt(CpuState *s, uint32_t length) noexcept nogil
cdef int sti(CpuState *s) noexcept nogil
cdef int cli(CpuState *s) noexcept nogil
# POPF: write RFLAGS from a popped value by operand size 2, 4, 8 with the IOPL and virtual-8086 rules.
cdef int popf(CpuState *s, uint64_t value, uint32_t size) noexcept nogil
# PUSHF: the value to push, after the IOPL check of virtual-8086 mode.
cdef int pushf(CpuState *s, uint32_t size, uint64_t *value) noexcept nogil

cdef inline bint attention(CpuState *s) noexcept nogil:
    """Would poll() do something? Cheap enough for every turn of the dispatcher."""
    return (
        s.interrupt_line | s.nmi_line | s.pending_debug | s.guest_mode | s.activity | s.init_line | s.startup_line
    ) != 0


cdef inline bint stepping(CpuState *s) noexcept nogil:
    """Must instructions run one by one: TF, instruction breakpoints, #AC, the monitor trap flag, an observer?"""
    return (s.rflags & 0x100) != 0 or (s.breakpoints | s.monitor_trap | s.observe | s.alignment) != 0


# After one that ran alone; before: RFLAGS when it began. Data breakpoints that any instruction met: data_trap().
cdef void instruction_done(CpuState *s, uint64_t before) noexcept nogil

# An instruction, or one iteration of it, is done: the data breakpoints that it met wait for the boundary.
cdef inline void data_trap(CpuState *s) noexcept nogil:
    s.pending_debug |= s.watch_hits
    s.watch_hits = 0

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
cdef int _debug_trap(CpuState *s) noexcept nogil
cdef bint _interrupts_open(CpuState *s) noexcept nogil
cdef int _poll_svm(CpuState *s) noexcept nogil
cdef bint _exits(CpuState *s, uint32_t pin, uint32_t code) noexcept nogil
