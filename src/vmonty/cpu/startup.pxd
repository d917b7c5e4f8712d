"""How a processor begins: reset, INIT, start-up IPI."""

from vmonty.cpu.state cimport CpuState

# The registers that RESET and INIT set alike; the caller recomputes what hangs on them (mode_changed, flush_all).
cdef void reset_registers(CpuState *s) noexcept nogil
# An INIT or a SIPI that waits: LEAVE_NEXT when it has to go on waiting, or was none.
cdef int take_startup(CpuState *s) noexcept nogil
cdef bint _blocked(CpuState *s) noexcept nogil
