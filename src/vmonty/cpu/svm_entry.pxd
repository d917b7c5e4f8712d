"""VMRUN and the way back: guest state between the VMCB and the processor."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState, Segment
from vmonty.cpu.svm_exit cimport SvmState

# VMRUN up to the guest's first instruction: 1, or 0 when the consistency checks refused it (VMEXIT_INVALID is
# recorded, nothing was loaded). The caller has set svm_of(s).guest_code, vmcb and vmcb_pointer.
cdef bint enter_svm_guest(CpuState *s) noexcept nogil
# After EXIT_VM: store the guest's state, leave guest mode.
cdef void leave_svm_guest(CpuState *s) noexcept nogil
# VMLOAD and VMSAVE: FS, GS, TR, LDTR, KernelGSBase, STAR…SFMASK, SYSENTER.
cdef void load_state(CpuState *s, uint8_t *vmcb) noexcept nogil
cdef void save_state(CpuState *s, uint8_t *vmcb) noexcept nogil
# The host's own state, when the host is code of this processor: to and from the page at VM_HSAVE_PA.
cdef void save_host(CpuState *s, uint8_t *area) noexcept nogil
cdef void load_host(CpuState *s, uint8_t *area) noexcept nogil

cdef void _load_segment(CpuState *s, uint8_t *vmcb, Segment *segment, uint32_t offset) noexcept nogil
cdef void _store_segment(uint8_t *vmcb, Segment *segment, uint32_t offset) noexcept nogil
cdef bint _consistent(CpuState *s, uint8_t *vmcb) noexcept nogil
cdef bint _event_valid(uint64_t event) noexcept nogil
cdef void _load_common(CpuState *s, uint8_t *vmcb) noexcept nogil
cdef void _store_common(CpuState *s, uint8_t *vmcb) noexcept nogil
cdef void _inject(CpuState *s) noexcept nogil
cdef void _fetch_bytes(CpuState *s) noexcept nogil
cdef uint8_t *_physical(CpuState *s, uint64_t physical) noexcept nogil
