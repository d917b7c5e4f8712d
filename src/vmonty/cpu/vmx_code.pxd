"""The VMX instructions as code on this processor executes them.

``refused`` comes first, before the operand is looked at: the VM exit of a guest, or #UD, #GP; GO_ON otherwise. The
others finish with RFLAGS as VMsucceed, VMfailInvalid or VMfailValid leave them.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState, Segment
from vmonty.cpu.vmx_exit cimport VmxState

cdef int refused(CpuState *s, uint32_t reason, uint32_t length, uint32_t info, uint64_t displacement) noexcept nogil
cdef int vmxon(CpuState *s, uint64_t region) noexcept nogil
cdef int vmxoff(CpuState *s) noexcept nogil
cdef int vmclear(CpuState *s, uint64_t region) noexcept nogil
cdef int vmptrld(CpuState *s, uint64_t region) noexcept nogil
cdef uint64_t vmptrst(CpuState *s) noexcept nogil
# The field into *value; with a failure the destination stays, and False comes back.
cdef bint vmread(CpuState *s, uint64_t field, uint64_t *value) noexcept nogil
cdef int vmwrite(CpuState *s, uint64_t field, uint64_t value) noexcept nogil
cdef int vmenter(CpuState *s, uint32_t launch, uint32_t length) noexcept nogil
# INVEPT (limit 2) and INVVPID (limit 3): the type, and the descriptor.
cdef int invalidate(CpuState *s, uint64_t kind, uint32_t limit, uint64_t low, uint64_t high) noexcept nogil
cdef int vmcall_root(CpuState *s) noexcept nogil
cdef void succeed(CpuState *s) noexcept nogil
# A VM exit whose host is code of this processor: store the guest, load the host.
cdef void vmx_return(CpuState *s) noexcept nogil

cdef int _fail(CpuState *s, uint32_t error) noexcept nogil
cdef uint8_t *_region(CpuState *s, uint64_t region) noexcept nogil
cdef uint32_t host_refused(CpuState *s) noexcept nogil
cdef void _load_host(CpuState *s) noexcept nogil
cdef void _host_segment(Segment *segment, uint64_t selector, uint64_t base, uint32_t rights) noexcept nogil
