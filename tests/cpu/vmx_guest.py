"""A small guest under VMX with EPT: what the VMX tests run."""

from __future__ import annotations

import struct

from vmonty.base.ram import Ram
from vmonty.cpu.core import Cpu
from vmonty.cpu.vmcs import REVISION, Field
from vmonty.cpu.vmx import Vmx

F = Field
CODE, STACK, IDT, GDT, TSS, HANDLERS = 0x4000, 0x8000, 0xA000, 0xB000, 0xC000, 0x10000
PROCESSOR = 0x04006172 | 1 << 7 | 1 << 28 | 1 << 31
SECONDARY = 0x2 | 0x20 | 0x80
RAM_SIZE = 2 << 20


class Guest:
    """2 MiB of memory, identity page tables of 1 GiB (2 MiB present), 64-bit mode at CPL 0, IDT gate n →
    HANDLERS + 16 n.
    """

    def __init__(self) -> None:
        self.cpu = Cpu(4 << 20)
        self.vmx = Vmx(self.cpu)
        self.ram = Ram(RAM_SIZE)
        self.pages = Ram(16 * 4096)
        for page in (0, 1):
            self.pages.write_u32(page * 4096, REVISION)
        self.vmx.vmxon(self.page(0))
        self.vmx.vmclear(self.page(1))
        self.vmx.vmptrld(self.page(1))
        self.msr_bitmap, self.io_a, self.io_b, self.apic = (self.page(n) for n in (2, 3, 4, 5))
        for level in range(3):
            self.pages.write_u64((6 + level) * 4096, self.page(7 + level) | 7)
        for gfn in range(RAM_SIZE >> 12):
            self.map(gfn)
        self.ram.write_u64(0x1000, 0x2007)
        self.ram.write_u64(0x2000, 0x3007)
        self.ram.write_u64(0x3000, 0x87)
        gdt = (0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF)
        self.ram.write(GDT, struct.pack("<5Q", *gdt))
        self.ram.write_u64(TSS + 4, STACK)
        for vector in range(64):
            at = HANDLERS + 16 * vector
            low = at & 0xFFFF | 8 << 16 | (0xEE if vector in (3, 0x20) else 0x8E) << 40 | at >> 16 << 48
            self.ram.write(IDT + 16 * vector, struct.pack("<QQ", low, 0))
            self.ram.write(at, b"\xf4")  # hlt: the exit tells which handler ran
        self.controls()
        self.state()

    def page(self, number: int) -> int:
        return self.pages.address + number * 4096

    def map(self, gfn: int, flags: int = 0x37) -> None:
        """Set the EPT entry of a guest page."""
        self.pages.write_u64(9 * 4096 + 8 * gfn, self.ram.address + gfn * 4096 | flags)
        self.vmx.invept(2)

    def __setitem__(self, field: Field, value: int) -> None:
        self.vmx.vmwrite(field, value)

    def __getitem__(self, field: Field) -> int:
        return self.vmx.vmread(field)

    def controls(self) -> None:
        self[F.PIN_BASED_VM_EXEC_CONTROL] = 0x16 | 1 | 8 | 0x20
        self[F.CPU_BASED_VM_EXEC_CONTROL] = PROCESSOR
        self[F.SECONDARY_VM_EXEC_CONTROL] = SECONDARY
        self[F.VM_EXIT_CONTROLS] = 0x36DFB | 4 | 0x200 | 0x300000
        self[F.VM_ENTRY_CONTROLS] = 0x11FB | 4 | 0x200 | 0x8000
        self[F.MSR_BITMAP] = self.msr_bitmap
        self[F.IO_BITMAP_A], self[F.IO_BITMAP_B] = self.io_a, self.io_b
        self[F.EPT_POINTER] = self.page(6) | 0x1E
        self[F.VIRTUAL_PROCESSOR_ID] = 1
        self[F.VMCS_LINK_POINTER] = 0xFFFFFFFFFFFFFFFF
        self[F.CR4_GUEST_HOST_MASK] = 0x2000
        self[F.VIRTUAL_APIC_PAGE_ADDR] = self.apic

    def state(self) -> None:
        self[F.GUEST_CR0], self[F.GUEST_CR3], self[F.GUEST_CR4] = 0x80050033, 0x1000, 0x26A0
        self[F.CR0_READ_SHADOW], self[F.CR4_READ_SHADOW] = 0x80050033, 0x6A0
        self[F.GUEST_IA32_EFER], self[F.GUEST_DR7] = 0xD01, 0x400
        for name in ("ES", "SS", "DS", "FS", "GS"):
            self.segment(name, 0x10, 0xC093)
        self.segment("CS", 8, 0xA09B)
        self.segment("TR", 0x28, 0x8B, TSS, 0x67)
        self[F.GUEST_LDTR_AR_BYTES] = 0x10000
        self[F.GUEST_GDTR_BASE], self[F.GUEST_GDTR_LIMIT] = GDT, 39
        self[F.GUEST_IDTR_BASE], self[F.GUEST_IDTR_LIMIT] = IDT, 0x3FF
        self[F.GUEST_RSP], self[F.GUEST_RFLAGS], self[F.GUEST_RIP] = STACK - 0x100, 2, CODE

    def segment(self, name: str, selector: int, rights: int, base: int = 0, limit: int = 0xFFFFFFFF) -> None:
        for part, value in (("SELECTOR", selector), ("AR_BYTES", rights), ("BASE", base), ("LIMIT", limit)):
            self[F[f"GUEST_{name}_{part}"]] = value

    def user(self) -> None:
        """CPL 3."""
        self.segment("CS", 0x23, 0xA0FB)
        self.segment("SS", 0x1B, 0xC0F3)

    def run(self, code: str = "") -> int:
        """Put code (hex) at CODE and enter there; with none, go on. Gives the exit reason."""
        if code:
            self.ram.write(CODE, bytes.fromhex(code))
            self.cpu.flush_code()  # the processor doesn't see the host's own writes
            self[F.GUEST_RIP] = CODE
        return self.vmx.run()

    def skip(self) -> None:
        """Step over the instruction that exited."""
        self[F.GUEST_RIP] = self[F.GUEST_RIP] + self[F.VM_EXIT_INSTRUCTION_LEN]

    @property
    def qualification(self) -> int:
        return self[F.EXIT_QUALIFICATION]

    @property
    def handler(self) -> int:
        """The vector whose handler ran (its HLT exited)."""
        return (self[F.GUEST_RIP] - HANDLERS) // 16

    def msr_intercept(self, index: int, write: bool, on: bool = True) -> None:
        at = (index & 0x1FFF) + (0x2000 if index >= 0xC0000000 else 0) + (0x4000 if write else 0)
        offset = 2 * 4096 + (at >> 3)
        bit = 1 << (at & 7)
        self.pages.write_u8(offset, self.pages.read_u8(offset) & ~bit | (bit if on else 0))
