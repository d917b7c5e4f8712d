"""The checks of VM entry. (Owner: system side.)"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState
from vmonty.cpu.vmx_exit cimport VmxState

# 0, or the VM-instruction error number (7: controls).
cdef uint32_t check_controls(CpuState *s) noexcept nogil
# 0, or 8 + the exit qualification of the entry failure (0 in general, 2 PDPTEs, 3 NMI injection, 4 VMCS link pointer).
cdef uint32_t check_guest(CpuState *s) noexcept nogil

cdef bint _injection_valid(CpuState *s) noexcept nogil
cdef bint _registers_valid(CpuState *s) noexcept nogil
cdef bint _segments_valid(CpuState *s) noexcept nogil
cdef bint _segment_valid(uint64_t limit, uint64_t rights) noexcept nogil
cdef bint _code_valid(CpuState *s) noexcept nogil
cdef bint _vm86_valid(uint8_t *m) noexcept nogil
cdef uint32_t _state_valid(CpuState *s) noexcept nogil
