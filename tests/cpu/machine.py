"""A bare processor with memory, tables and small guests, for the system tests."""

from __future__ import annotations

import struct

from vmonty.base.ram import Ram
from vmonty.cpu import inspection
from vmonty.cpu.core import Cpu
from vmonty.cpu.walks import SegmentState

PAGE = 4096
GDT, IDT, TSS, HANDLERS, CODE, USER_CODE = 0x1000, 0x2000, 0x3000, 0x4000, 0x8000, 0x9000
STACK0, STACK3, STACK_IST = 0xC000, 0xD000, 0xE000
TABLES = 0x10000  # PML4, PDPT, PD: identity, 2 MiB pages
SIZE = 2 << 20

CODE64, DATA, USER_DATA, USER_CODE64, CODE32, TASK = 0x08, 0x10, 0x1B, 0x23, 0x28, 0x38
LDT_SLOT, GATE_SLOT = 0x48, 0x58


def descriptor(base: int = 0, limit: int = 0xFFFFF, access: int = 0x93, flags: int = 0xC) -> int:
    """Pack a segment descriptor: access byte, and flags G D/B L AVL."""
    return (
        limit & 0xFFFF | (base & 0xFFFFFF) << 16 | access << 40 | (limit >> 16 & 15) << 48 | flags << 52
        | (base >> 24 & 0xFF) << 56
    )  # fmt: skip


def gate64(offset: int, selector: int = CODE64, kind: int = 0x8E, ist: int = 0) -> bytes:
    """Pack a 16-byte gate; kind is the access byte."""
    low = offset & 0xFFFF | selector << 16 | ist << 32 | kind << 40 | (offset >> 16 & 0xFFFF) << 48
    return struct.pack("<QQ", low, offset >> 32)


def gate32(offset: int, selector: int, kind: int = 0x8E) -> bytes:
    """Pack an 8-byte gate."""
    return struct.pack("<Q", offset & 0xFFFF | selector << 16 | kind << 40 | (offset >> 16 & 0xFFFF) << 48)


class Machine:
    """Two megabytes of RAM at 0, identity-mapped; GDT, TSS and an IDT whose gate n goes to HANDLERS + 16 n."""

    def __init__(self) -> None:
        self.ram = Ram(SIZE)
        self.cpu = Cpu()
        self.cpu.add_region(0, self.ram.view(0, SIZE))
        gdt = [
            0, descriptor(access=0x9B, flags=0xA), descriptor(), descriptor(access=0xF3),
            descriptor(access=0xFB, flags=0xA),
            descriptor(access=0x9B, flags=0xC), 0, descriptor(TSS, 0x67, 0x89, 0), 0,
        ]  # fmt: skip
        self.ram.write(GDT, struct.pack(f"<{len(gdt)}Q", *gdt))
        for vector in range(256):
            self.ram.write(IDT + 16 * vector, gate64(HANDLERS + 16 * vector))
            self.ram.write(HANDLERS + 16 * vector, b"\xf4")
        self.ram.write_u64(TSS + 4, STACK0)
        self.ram.write_u64(TSS + 0x24, STACK_IST)
        self.ram.write_u64(TABLES, TABLES + 0x1007)
        self.ram.write_u64(TABLES + 0x1000, TABLES + 0x2007)
        self.ram.write_u64(TABLES + 0x2000, 0x87)
        self["gdtr_base"], self["gdtr_limit"] = GDT, 0xFFF
        self["idtr_base"], self["idtr_limit"] = IDT, 0xFFF

    def __getitem__(self, name: str) -> int:
        return inspection.get(self.cpu, name)

    def __setitem__(self, name: str, value: int) -> None:
        inspection.put(self.cpu, name, value)

    def segment(self, name: str) -> SegmentState:
        return inspection.get_segment(self.cpu, name)

    def set_segment(self, name: str, selector: int, base: int, limit: int, rights: int) -> None:
        inspection.put_segment(self.cpu, name, SegmentState(selector, base, limit, rights))

    def long_mode(self, user: bool = False) -> Machine:
        """64-bit mode at CPL 0 or 3."""
        self.cpu.set_long_mode(TABLES, user)
        self.set_segment("cs", USER_CODE64 if user else CODE64, 0, 0xFFFFFFFF, 0xA0FB if user else 0xA09B)
        self.set_segment("ss", USER_DATA if user else DATA, 0, 0xFFFFFFFF, 0xC0F3 if user else 0xC093)
        self.set_segment("tr", TASK, TSS, 0x67, 0x8B)
        self["rsp"] = STACK3 if user else STACK0 - 0x100
        self["rip"] = CODE
        return self

    def protected_mode(self) -> Machine:
        """32-bit flat protected mode without paging."""
        self["efer"], self["cr0"], self["cr4"] = 0, 0x11, 0
        for name in ("es", "ss", "ds", "fs", "gs"):
            self.set_segment(name, DATA, 0, 0xFFFFFFFF, 0xC093)
        self.set_segment("cs", CODE32, 0, 0xFFFFFFFF, 0xC09B)
        self.set_segment("tr", TASK, TSS, 0x67, 0x8B)
        self["cpl"], self["rsp"], self["rip"] = 0, STACK0 - 0x100, CODE
        return self

    def run(self, code: bytes, at: int = CODE) -> str:
        """Put code there and run it until run() reports something."""
        self.ram.write(at, code)
        self["rip"] = at
        return self.cpu.run()

    @property
    def handler(self) -> int:
        """The vector whose handler ran (it halts at once)."""
        return (self["rip"] - 1 - HANDLERS) // 16

    def deliver(self, vector: int, error_code: int = -1, address: int = 0, kind: int = 3, length: int = 0) -> str:
        return inspection.raise_and_deliver(self.cpu, vector, error_code, address, kind, length)

    def stack(self, count: int, size: int = 8) -> list[int]:
        """The top slots of the stack."""
        at = self["rsp"]
        return [int.from_bytes(self.ram.read(at + size * n, size), "little") for n in range(count)]
