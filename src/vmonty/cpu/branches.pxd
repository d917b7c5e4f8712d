"""Control transfers: CALL, RET, JMP, Jcc, LOOP; the jump cache and the return prediction."""

from libc.stdint cimport int32_t, int64_t, uint64_t

from vmonty.cpu.assembler cimport Assembler
from vmonty.cpu.decode cimport Insn
from vmonty.cpu.state cimport CpuState
from vmonty.cpu.translate cimport Ea, Work

cdef void lookup(Work *w, Insn *i, int call) noexcept nogil
cdef void call(Work *w, Insn *i) noexcept nogil
cdef void call_indirect(Work *w, Insn *i) noexcept nogil
cdef void ret(Work *w, Insn *i) noexcept nogil
cdef void conditional(Work *w, Insn *i) noexcept nogil
# The branch of a loop whose next round stands right behind it.
cdef void next_round(Work *w, Insn *i) noexcept nogil
cdef void loop(Work *w, Insn *i) noexcept nogil
cdef void direct_jump(Work *w, Insn *i) noexcept nogil
