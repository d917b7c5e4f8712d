"""Operands that share one TLB check."""

from vmonty.cpu.translate cimport Work

cdef void find_groups(Work *w) noexcept nogil
