"""A vCPU in flat 32-bit protected mode without paging, as loaders hand over: Linux's 32-bit entry, PVH, multiboot.

Source: Documentation/arch/x86/boot.rst, "32-bit Boot Protocol"; xen.git, docs/misc/pvh.pandoc; Multiboot Specification
0.6.96, "Machine state".
"""

from __future__ import annotations

import struct

from vmonty.kvm.api import Vcpu
from vmonty.kvm.uapi.vcpu import kvm_segment
from vmonty.vmm.memory import GuestMemory

CODE_SELECTOR, DATA_SELECTOR, TASK_SELECTOR = 0x10, 0x18, 0x20
_GDT = (0, 0, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x0000_8B00_0000_FFFF, 0)
_CR0_PE, _CR0_ET = 1, 1 << 4


def write_tables(memory: GuestMemory, base: int) -> None:
    """Put the descriptor table at *base*."""
    memory.write(base, struct.pack("<6Q", *_GDT))


def enter(vcpu: Vcpu, base: int) -> None:
    """Put *vcpu* into 32-bit mode at CPL 0 with the table at *base*; eip and the rest stay with the caller."""
    sregs = vcpu.get_sregs()
    sregs.cs = kvm_segment(limit=0xFFFF_FFFF, selector=CODE_SELECTOR, type=11, present=1, s=1, db=1, g=1)
    data = kvm_segment(limit=0xFFFF_FFFF, selector=DATA_SELECTOR, type=3, present=1, s=1, db=1, g=1)
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data
    sregs.tr = kvm_segment(limit=0xFFFF, selector=TASK_SELECTOR, type=11, present=1)
    sregs.gdt.base, sregs.gdt.limit = base, 8 * len(_GDT) - 1
    sregs.idt.base, sregs.idt.limit = 0, 0
    sregs.cr0 = _CR0_PE | _CR0_ET
    sregs.cr3 = sregs.cr4 = sregs.efer = 0
    vcpu.set_sregs(sregs)
