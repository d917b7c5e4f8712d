"""KVM_RUN without its prologue and epilogue."""

from libc.stdint cimport uint8_t, uint64_t

from vmonty.kvm.soft.kvm_host cimport KvmVcpuArch

# struct kvm_run; a test compares them with the declaration.
cdef enum:
    RUN_REQUEST_WINDOW = 0
    RUN_IMMEDIATE_EXIT = 1
    RUN_CR8 = 16
    RUN_SYNC_REGS = 288      # kvm_valid_regs, kvm_dirty_regs

cdef bint _ready(KvmVcpuArch *a) noexcept nogil
