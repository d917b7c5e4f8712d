"""A vCPU in flat 64-bit mode: page tables, descriptor table, control registers.

Source: SDM, "4-Level Paging and 5-Level Paging", "Initializing IA-32e Mode", "Segment Descriptors".
"""

from __future__ import annotations

import struct

from vmonty.kvm.api import Vcpu
from vmonty.kvm.uapi.vcpu import kvm_segment
from vmonty.vmm.memory import GuestMemory

CR0_PE, CR0_ET, CR0_PG = 1, 1 << 4, 1 << 31
CR4_PAE = 1 << 5
EFER_LME, EFER_LMA = 1 << 8, 1 << 10
PTE_PRESENT, PTE_WRITABLE, PTE_LARGE = 1, 2, 1 << 7

# Linux's boot protocol fixes these two selectors ("64-bit Boot Protocol": __BOOT_CS, __BOOT_DS).
CODE_SELECTOR, DATA_SELECTOR = 0x10, 0x18
CODE_DESCRIPTOR, DATA_DESCRIPTOR = 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF
TASK_SELECTOR, TASK_DESCRIPTOR = 0x20, 0x0000_8B00_0000_FFFF

TABLES_SIZE = 7 * 4096


def write_tables(memory: GuestMemory, base: int) -> None:
    """Put the tables at *base*, a page: one with descriptors, then 4 levels that map 4 GiB one to one.

    base + 0x0000   GDT
    base + 0x1000   PML4        one entry
    base + 0x2000   PDPT        four entries
    base + 0x3000   4 × PD      512 entries of 2 MiB each
    """
    gdt = struct.pack("<6Q", 0, 0, CODE_DESCRIPTOR, DATA_DESCRIPTOR, TASK_DESCRIPTOR, 0)
    memory.write(base, gdt)
    link = PTE_PRESENT | PTE_WRITABLE
    memory.write(base + 0x1000, struct.pack("<Q", base + 0x2000 | link).ljust(4096, b"\0"))
    directories = [base + 0x3000 + 0x1000 * index | link for index in range(4)]
    memory.write(base + 0x2000, struct.pack("<4Q", *directories).ljust(4096, b"\0"))
    memory.write(base + 0x3000, struct.pack("<2048Q", *(page << 21 | PTE_LARGE | link for page in range(2048))))


def _segment(selector: int, kind: int, **bits: int) -> kvm_segment:
    return kvm_segment(base=0, limit=0xFFFF_FFFF, selector=selector, type=kind, present=1, g=1, **bits)


def enter(vcpu: Vcpu, base: int) -> None:
    """Put *vcpu* into 64-bit mode at CPL 0 on the tables at *base*; rip and the rest stay with the caller."""
    sregs = vcpu.get_sregs()
    data = _segment(DATA_SELECTOR, 3, s=1, db=1)
    sregs.cs = _segment(CODE_SELECTOR, 11, s=1, l=1)
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data
    sregs.tr = kvm_segment(base=0, limit=0xFFFF, selector=TASK_SELECTOR, type=11, present=1)
    sregs.gdt.base, sregs.gdt.limit = base, 6 * 8 - 1
    sregs.idt.base, sregs.idt.limit = 0, 0
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG
    sregs.cr3 = base + 0x1000
    sregs.cr4 = CR4_PAE
    sregs.efer = EFER_LME | EFER_LMA
    vcpu.set_sregs(sregs)
