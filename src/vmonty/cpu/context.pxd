"""Registers of a guest that no control block holds."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vmonty.cpu.core cimport Cpu
from vmonty.cpu.state cimport CpuState, Exit, MmioSlot
from vmonty.cpu.vmx_exit cimport vmx_of

cdef enum:
    XSAVE_SIZE = 832         # x87, SSE and AVX in the standard format

cdef struct GuestContext:
    uint64_t gpr[16]
    uint64_t dr[8]
    uint64_t cr2
    uint64_t xcr0
    uint64_t star
    uint64_t lstar
    uint64_t cstar
    uint64_t fmask
    uint64_t kernel_gs_base
    uint64_t tsc_aux
    uint64_t spec_ctrl
    Exit exit
    MmioSlot mmio[128]       # as in CpuState
    MmioSlot mmio_writes[128]
    uint32_t mmio_count
    uint32_t mmio_at
    uint32_t mmio_writes_count
    uint32_t mmio_writes_at
    uint32_t emulated
    uint8_t xsave[832]


cdef class Context:
    cdef GuestContext c
