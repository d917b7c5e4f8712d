"""Instructions that work on the stack: PUSH, POP, LEAVE."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from vmonty.cpu.decode cimport Insn
from vmonty.cpu.translate cimport Ea, Work

cdef void adjust_rsp(Work *w, int by) noexcept nogil
# Bring guest rsp up to date, unless the instruction is one more of a run of pushes or pops.
cdef void settle_rsp(Work *w) noexcept nogil
cdef int goes_on(Work *w, Insn *i) noexcept nogil
cdef void push(Work *w, Insn *i) noexcept nogil
cdef void push_constant(Work *w, Insn *i, uint64_t value, int size) noexcept nogil
cdef void pop(Work *w, Insn *i) noexcept nogil
cdef void load_target(Work *w, Insn *i) noexcept nogil
cdef void keep(Work *w, int reg, int back) noexcept nogil
cdef void push_memory(Work *w, Insn *i) noexcept nogil
cdef void pop_memory(Work *w, Insn *i) noexcept nogil
cdef void leave_frame(Work *w, Insn *i) noexcept nogil
