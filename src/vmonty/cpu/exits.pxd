"""The ways out of a block: links to other blocks, polls, faults, helpers, and the stubs behind its body."""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from vmonty.cpu.assembler cimport Assembler
from vmonty.cpu.codecache cimport CodeCache
from vmonty.cpu.decode cimport Insn
from vmonty.cpu.translate cimport Work

cdef void exit_to(Work *w, uint64_t target, uint8_t *patch) noexcept nogil
cdef void jump_to(Work *w, uint64_t target) noexcept nogil
cdef void leave_at(Work *w, uint64_t rip, uint64_t stub) noexcept nogil
cdef uint8_t *emit_poll(Work *w, Insn *i, uint64_t target) noexcept nogil
cdef void poll_aside(Work *w, Insn *i) noexcept nogil
cdef void poll_end(Work *w, Insn *i, uint8_t *at) noexcept nogil
cdef void leave_fault(Work *w, Insn *i, int vector) noexcept nogil
cdef void leave_system(Work *w, Insn *i) noexcept nogil
cdef void call_helper(Work *w, Insn *i) noexcept nogil
cdef uint64_t lookup_stub(Work *w) noexcept nogil
cdef uint64_t cut(Work *w, Insn *i, uint64_t target) noexcept nogil
cdef void emit_stubs(Work *w) noexcept nogil
