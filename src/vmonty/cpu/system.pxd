"""Instructions that are executed by compiled helpers, and the events of the dispatcher. (Owner: system side.)"""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from vmonty.cpu.decode cimport Insn
from vmonty.cpu.state cimport CpuState

cdef int execute(CpuState *s, Insn *i) noexcept nogil
