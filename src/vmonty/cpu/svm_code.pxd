"""The SVM instructions as code on this processor executes them. ``length``: the instruction's."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState
from vmonty.cpu.svm_exit cimport SvmState

# address: rAX in the instruction's address size.
cdef int vmrun(CpuState *s, uint64_t address, uint32_t length) noexcept nogil
cdef int vmload(CpuState *s, uint64_t address, uint32_t length) noexcept nogil
cdef int vmsave(CpuState *s, uint64_t address, uint32_t length) noexcept nogil
cdef int stgi(CpuState *s, uint32_t length) noexcept nogil
cdef int clgi(CpuState *s, uint32_t length) noexcept nogil
cdef int invlpga(CpuState *s, uint64_t linear, uint32_t length) noexcept nogil
cdef int vmmcall(CpuState *s, uint32_t length) noexcept nogil
# A #VMEXIT whose host is code of this processor: store the guest, load the host.
cdef void svm_return(CpuState *s) noexcept nogil

cdef int _refused(CpuState *s, uint32_t code, uint32_t length) noexcept nogil
cdef uint8_t *_page(CpuState *s, uint64_t address, bint write) noexcept nogil
