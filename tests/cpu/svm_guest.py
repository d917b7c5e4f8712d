"""A small guest under SVM with nested paging: what the SVM tests run."""

from __future__ import annotations

import struct

from vmonty.base.ram import Ram
from vmonty.cpu.core import Cpu
from vmonty.cpu.svm import Svm
from vmonty.cpu.vmcb import ExitCode, Field, Vmcb, msrpm_bit

F, X = Field, ExitCode
CODE, STACK, IDT, GDT, TSS, HANDLERS = 0x4000, 0x8000, 0xA000, 0xB000, 0xC000, 0x10000
RAM_SIZE = 2 << 20
VMCB, IOPM, MSRPM, TABLES = 0, 0x1000, 0x4000, 0x6000


class Guest:
    """2 MiB of memory, identity page tables, 64-bit mode at CPL 0, IDT gate n → HANDLERS + 16 n (HLT, intercepted)."""

    def __init__(self) -> None:
        self.cpu = Cpu(4 << 20)
        self.svm = Svm(self.cpu)
        self.ram = Ram(RAM_SIZE)
        self.pages = Ram(16 * 4096)
        self.vmcb = Vmcb(self.pages, VMCB)
        for level in range(3):
            self.pages.write_u64(TABLES + level * 4096, self.pages.address + TABLES + (level + 1) * 4096 | 7)
        for gfn in range(RAM_SIZE >> 12):
            self.map(gfn)
        self.ram.write_u64(0x1000, 0x2007)
        self.ram.write_u64(0x2000, 0x3007)
        self.ram.write_u64(0x3000, 0x87)
        gdt = (0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF)
        self.ram.write(GDT, struct.pack("<5Q", *gdt))
        self.ram.write_u64(TSS + 4, STACK)
        for vector in range(256):
            at = HANDLERS + 16 * vector
            low = at & 0xFFFF | 8 << 16 | (0xEE if vector in (3, 0x20) else 0x8E) << 40 | at >> 16 << 48
            self.ram.write(IDT + 16 * vector, struct.pack("<QQ", low, 0))
            self.ram.write(at, b"\xf4")
        self[F.ASID], self[F.NP_ENABLE], self[F.N_CR3] = 1, 1, self.pages.address + TABLES
        self[F.IOPM_BASE_PA], self[F.MSRPM_BASE_PA] = self.pages.address + IOPM, self.pages.address + MSRPM
        for code in (X.VMRUN, X.HLT, X.INTR, X.NMI, X.SHUTDOWN):
            self.vmcb.intercept(code)
        self.state()

    def __setitem__(self, field: Field, value: int) -> None:
        self.vmcb[field] = value

    def __getitem__(self, field: Field) -> int:
        return self.vmcb[field]

    def map(self, gfn: int, flags: int = 7) -> None:
        """Set the nested entry of a guest page."""
        self.pages.write_u64(TABLES + 3 * 4096 + 8 * gfn, self.ram.address + gfn * 4096 | flags)
        self.svm.flush()

    def state(self) -> None:
        self[F.CR0], self[F.CR3], self[F.CR4], self[F.EFER] = 0x80050033, 0x1000, 0x6A0, 0x1D01
        self[F.DR7], self[F.DR6], self[F.G_PAT] = 0x400, 0xFFFF0FF0, 0x0007040600070406
        for name in ("ES", "SS", "DS", "FS", "GS"):
            self.segment(name, 0x10, 0xC93)
        self.segment("CS", 8, 0xA9B)
        self.segment("TR", 0x28, 0x8B, TSS, 0x67)
        self.segment("LDTR", 0, 0)
        self[F.GDTR_BASE], self[F.GDTR_LIMIT], self[F.IDTR_BASE], self[F.IDTR_LIMIT] = GDT, 39, IDT, 0xFFF
        self[F.CPL], self[F.RSP], self[F.RFLAGS], self[F.RIP] = 0, STACK - 0x100, 2, CODE

    def segment(self, name: str, selector: int, attributes: int, base: int = 0, limit: int = 0xFFFFFFFF) -> None:
        for part, value in (("SELECTOR", selector), ("ATTRIB", attributes), ("BASE", base), ("LIMIT", limit)):
            self[F[f"{name}_{part}"]] = value

    def user(self) -> None:
        """CPL 3."""
        self.segment("CS", 0x23, 0xAFB)
        self.segment("SS", 0x1B, 0xCF3)
        self[F.CPL] = 3

    def run(self, code: str = "") -> int:
        """Put code (hex) at CODE and enter there; with none, go on. Gives the exit code."""
        if code:
            self.ram.write(CODE, bytes.fromhex(code))
            self.cpu.flush_code()  # the processor doesn't see the host's own writes
            self[F.RIP] = CODE
        return self.svm.enter(self.vmcb.address)

    @property
    def handler(self) -> int:
        """The vector whose handler ran (its HLT exited)."""
        return (self[F.RIP] - HANDLERS) // 16

    def stack(self, count: int) -> list[int]:
        """The top slots of the stack."""
        return [self.ram.read_u64(self[F.RSP] + 8 * n) for n in range(count)]

    def intercept_port(self, port: int) -> None:
        at = IOPM + (port >> 3)
        self.pages.write_u8(at, self.pages.read_u8(at) | 1 << (port & 7))

    def intercept_msr(self, index: int, write: bool) -> None:
        bit = msrpm_bit(index)
        assert bit is not None
        bit += write
        at = MSRPM + (bit >> 3)
        self.pages.write_u8(at, self.pages.read_u8(at) | 1 << (bit & 7))
