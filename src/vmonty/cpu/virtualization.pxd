"""The instructions of VMX and SVM, from their operands on."""

from libc.stdint cimport uint32_t, uint64_t

from vmonty.cpu.decode cimport Insn
from vmonty.cpu.state cimport CpuState

cdef int vmx_register(CpuState *s, Insn *i) noexcept nogil
cdef int vmx_pointer(CpuState *s, Insn *i) noexcept nogil
cdef int vmx_field(CpuState *s, Insn *i) noexcept nogil
cdef int vmx_invalidate(CpuState *s, Insn *i) noexcept nogil
cdef int svm_instruction(CpuState *s, Insn *i) noexcept nogil
