"""What happens between instructions: traps, exits and interrupts that wait.

For the dispatcher: ``poll(s)`` when ``attention(s)``. It returns what ``events.deliver`` does.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vmonty.cpu.codecache cimport Block
from vmonty.cpu.decode cimport Insn
from vmonty.cpu.state cimport CpuState

cdef int poll(CpuState *s) noexcept nogil

cdef inline bint attention(CpuState *s) noexcept nogil:
    """Would poll() do something? Cheap enough for every turn of the dispatcher."""
    return (
        s.interrupt_line | s.nmi_line | s.pending_debug | s.guest_mode | s.activity | s.init_line | s.startup_line
    ) != 0


cdef inline bint stepping(CpuState *s) noexcept nogil:
    """Must instructions run one by one: TF, instruction breakpoints, #AC, the monitor trap flag, an observer?"""
    return (s.rflags & 0x100) != 0 or (s.breakpoints | s.monitor_trap | s.observe | s.alignment) != 0


# After one that ran alone; before: RFLAGS when it began. Data breakpoints that any instruction met: data_trap().
cdef bint instruction_in(CpuState *s, Block *b, uint64_t offset, Insn *i) noexcept nogil
cdef void note_step(CpuState *s, uint64_t code) noexcept nogil
cdef void instruction_done(CpuState *s, uint64_t before) noexcept nogil

# An instruction, or one iteration of it, is done: the data breakpoints that it met wait for the boundary.
cdef inline void data_trap(CpuState *s) noexcept nogil:
    s.pending_debug |= s.watch_hits
    s.watch_hits = 0

cdef int _debug_trap(CpuState *s) noexcept nogil
cdef bint _interrupts_open(CpuState *s) noexcept nogil
cdef int _poll_svm(CpuState *s) noexcept nogil
cdef bint _exits(CpuState *s, uint32_t pin, uint32_t code) noexcept nogil
