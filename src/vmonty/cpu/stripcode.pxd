"""The code of strips: a loop's setup, and the end of its strip."""

from libc.stdint cimport uint8_t

from vmonty.cpu.decode cimport Insn
from vmonty.cpu.translate cimport Work

# The ordinary body's last instruction.
cdef void emit_turn(Work *w, Insn *i) noexcept nogil
# What stands in front of the strip's first instruction.
cdef void emit_setup(Work *w) noexcept nogil
# The strip's last instruction; the strip began at ``strip``.
cdef void emit_strip_end(Work *w, Insn *i, uint8_t *strip) noexcept nogil
