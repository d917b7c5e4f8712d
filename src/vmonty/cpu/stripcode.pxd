"""The code of strips: a loop's setup, and the end of its strip."""

from libc.stdint cimport uint8_t

from vmonty.cpu.decode cimport Insn
from vmonty.cpu.translate cimport Work

# What stands at the block's entry, up to the strip's first instruction.
cdef void emit_setup(Work *w) noexcept nogil
# The strip's last instruction; the strip began at ``strip``, and the ordinary body follows.
cdef void emit_strip_end(Work *w, Insn *i, uint8_t *strip) noexcept nogil
