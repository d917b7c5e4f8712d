"""VM entry and the way back: guest state between the VMCS and the processor. (Owner: system side.)"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vmonty.cpu.state cimport CpuState, Segment
from vmonty.cpu.vmx_exit cimport VmxState

# What enter_guest gives besides 0 (the guest is in place) and VM-instruction error numbers.
cdef enum:
    ENTRY_FAILED = 0x100     # a VM-entry failure is recorded as an exit (reason with bit 31)
    ENTRY_NO_VMCS = 0x101    # VMfailInvalid

# VM-instruction errors. SDM, "VM-Instruction Error Numbers".
cdef enum:
    ERROR_VMCALL_ROOT = 1
    ERROR_VMCLEAR_ADDRESS = 2
    ERROR_VMCLEAR_VMXON = 3
    ERROR_VMLAUNCH_NOT_CLEAR = 4
    ERROR_VMRESUME_NOT_LAUNCHED = 5
    ERROR_ENTRY_CONTROLS = 7
    ERROR_ENTRY_HOST = 8
    ERROR_VMPTRLD_ADDRESS = 9
    ERROR_VMPTRLD_VMXON = 10
    ERROR_VMPTRLD_REVISION = 11
    ERROR_UNSUPPORTED_FIELD = 12
    ERROR_READ_ONLY_FIELD = 13
    ERROR_VMXON_IN_ROOT = 15
    ERROR_MOV_SS = 26
    ERROR_INVALID_OPERAND = 28

cdef uint32_t enter_guest(CpuState *s, uint32_t launch) noexcept nogil
# After EXIT_VM: store the guest's state, clear non-root operation.
cdef void leave_guest(CpuState *s) noexcept nogil

cdef void _read_controls(CpuState *s) noexcept nogil
cdef uint32_t _load_guest(CpuState *s) noexcept nogil
cdef void _load_segment(uint8_t *v, Segment *segment, uint32_t index) noexcept nogil
cdef void _store_segment(uint8_t *v, Segment *segment, uint32_t index) noexcept nogil
cdef void _inject(CpuState *s) noexcept nogil
cdef uint32_t _fail(CpuState *s, uint32_t reason, uint64_t qualification) noexcept nogil
cdef uint32_t _load_msrs(CpuState *s, uint64_t area, uint32_t count) noexcept nogil
cdef void _store_msrs(CpuState *s, uint64_t area, uint32_t count) noexcept nogil
cdef uint8_t *_page(CpuState *s, uint64_t physical) noexcept nogil
