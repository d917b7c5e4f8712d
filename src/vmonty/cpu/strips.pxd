"""Loops of one block whose addresses move evenly: many iterations behind one check of their pages."""

from vmonty.cpu.translate cimport Work

# How a register moves in the loop.
cdef enum:
    STILL = 0
    WIDE = 1                 # by constants
    NARROW = 2               # by constants, its low 32 bits; the high ones become 0
    BY_REGISTER = 3          # by a register that stays
    ANYHOW = 4

cdef int find_strip(Work *w) noexcept nogil
