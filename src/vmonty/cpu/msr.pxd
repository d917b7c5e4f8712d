"""Model-specific registers: one function each way, for RDMSR/WRMSR, VM entry and exit, and host software."""

from libc.stdint cimport uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState

# 1 when the register exists and the value is allowed, else 0 (#GP). No intercepts, no CPL check.
cdef bint read_msr(CpuState *s, uint32_t index, uint64_t *value) noexcept nogil
cdef bint write_msr(CpuState *s, uint32_t index, uint64_t value) noexcept nogil
# EFER with its checks (LME while paging, reserved bits); keeps LMA.
cdef bint write_efer(CpuState *s, uint64_t value) noexcept nogil

cdef bint _write_vm_cr(CpuState *s, uint64_t value) noexcept nogil
cdef bint _pat_valid(uint64_t value) noexcept nogil
cdef int _mtrr_fixed(uint32_t index) noexcept nogil
cdef int _group(uint32_t index) noexcept nogil
cdef bint _absent(CpuState *s, uint32_t index) noexcept nogil
cdef bint _mtrr_type(uint64_t value) noexcept nogil
cdef bint _mtrr_valid(CpuState *s, uint32_t index, uint64_t value) noexcept nogil
