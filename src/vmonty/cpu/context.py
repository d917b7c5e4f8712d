"""What a VM exit leaves in the processor: registers that are neither in the VMCS nor in the VMCB.

Host software that gives the processor to another guest stores them here and loads them again: general registers, CR2,
XCR0, debug registers, MSRs of the guest's own, vector state, and the accesses of an instruction that is half emulated.
"""

from __future__ import annotations

import cython
from cython.cimports.libc.string import memcpy, memset
from cython.cimports.vmonty.cpu.breakpoints import debug_changed
from cython.cimports.vmonty.cpu.tlb import flush_all


@cython.cclass
class Context:
    """One guest's share of a processor, while it has none. It starts as after reset."""

    def __cinit__(self):
        memset(cython.address(self.c), 0, cython.sizeof(GuestContext))
        self.c.xcr0 = 1
        self.c.dr[6] = 0xFFFF0FF0
        self.c.dr[7] = 0x400
        # FCW and MXCSR. SDM, "IA-32 and Intel 64 Processor States Following Power-up, Reset, or INIT"
        self.c.xsave[0] = 0x7F
        self.c.xsave[1] = 3
        self.c.xsave[24] = 0x80
        self.c.xsave[25] = 0x1F
        self.c.xsave[512] = 3

    def store(self, cpu: Cpu) -> None:
        """Take the registers out of a processor that runs nothing."""
        s: cython.pointer(CpuState) = cpu.s
        c: cython.pointer(GuestContext) = cython.address(self.c)
        memcpy(cython.address(c.gpr[0]), cython.address(s.gpr[0]), cython.sizeof(c.gpr))
        memcpy(cython.address(c.dr[0]), cython.address(s.dr[0]), cython.sizeof(c.dr))
        memcpy(cython.address(c.xsave[0]), cython.address(s.xsave[0]), XSAVE_SIZE)
        c.mmio_count = s.mmio_count
        c.mmio_at = s.mmio_at
        c.mmio_writes_count = s.mmio_writes_count
        c.mmio_writes_at = s.mmio_writes_at
        memcpy(cython.address(c.mmio[0]), cython.address(s.mmio[0]), s.mmio_count * cython.sizeof(MmioSlot))
        memcpy(
            cython.address(c.mmio_writes[0]), cython.address(s.mmio_writes[0]),
            s.mmio_writes_count * cython.sizeof(MmioSlot),
        )  # fmt: skip
        c.emulated = s.emulated
        c.exit = s.exit
        c.cr2 = s.cr2
        c.xcr0 = s.xcr0
        c.star = s.star
        c.lstar = s.lstar
        c.cstar = s.cstar
        c.fmask = s.fmask
        c.kernel_gs_base = s.kernel_gs_base
        c.tsc_aux = s.tsc_aux
        c.spec_ctrl = s.spec_ctrl

    def load(self, cpu: Cpu) -> None:
        """Put them into a processor that runs nothing; it forgets the guest before, and trusts no code unseen."""
        s: cython.pointer(CpuState) = cpu.s
        c: cython.pointer(GuestContext) = cython.address(self.c)
        memcpy(cython.address(s.gpr[0]), cython.address(c.gpr[0]), cython.sizeof(c.gpr))
        memcpy(cython.address(s.dr[0]), cython.address(c.dr[0]), cython.sizeof(c.dr))
        memcpy(cython.address(s.xsave[0]), cython.address(c.xsave[0]), XSAVE_SIZE)
        debug_changed(s)
        s.mmio_count = c.mmio_count
        s.mmio_at = c.mmio_at
        s.mmio_writes_count = c.mmio_writes_count
        s.mmio_writes_at = c.mmio_writes_at
        memcpy(cython.address(s.mmio[0]), cython.address(c.mmio[0]), c.mmio_count * cython.sizeof(MmioSlot))
        memcpy(
            cython.address(s.mmio_writes[0]), cython.address(c.mmio_writes[0]),
            c.mmio_writes_count * cython.sizeof(MmioSlot),
        )  # fmt: skip
        s.emulated = c.emulated
        s.exit = c.exit
        s.cr2 = c.cr2
        s.xcr0 = c.xcr0
        s.star = c.star
        s.lstar = c.lstar
        s.cstar = c.cstar
        s.fmask = c.fmask
        s.kernel_gs_base = c.kernel_gs_base
        s.tsc_aux = c.tsc_aux
        s.spec_ctrl = c.spec_ctrl
        s.host_generation += 1
        flush_all(s)
