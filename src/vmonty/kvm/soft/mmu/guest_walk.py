"""The guest's own page tables, walked in software: GVA → GPA, for emulation, KVM_TRANSLATE and insight.

Source: SDM, "Paging"; in the kernel arch/x86/kvm/mmu/paging_tmpl.h, walk_addr_generic(). It changes nothing: accessed
and dirty bits are the processor's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

PRESENT, WRITABLE, USER, LARGE = 1, 2, 4, 0x80
CR0_PG, CR4_PSE, CR4_PAE, CR4_LA57, EFER_LMA = 1 << 31, 1 << 4, 1 << 5, 1 << 12, 1 << 10
ADDRESS_64 = 0x000F_FFFF_FFFF_F000


class GuestMemory(Protocol):
    """Reads guest-physical memory; None where there is none."""

    def read_gpa(self, gpa: int, size: int) -> bytes | None: ...


class Entry(NamedTuple):
    """One entry that the walk read: the level it is of (1: leaf), where it is, and what it holds."""

    level: int
    gpa: int
    value: int


class Walk(NamedTuple):
    """The result: *gpa* is None where nothing is mapped."""

    gpa: int | None
    writable: bool = True
    user: bool = True
    entries: Sequence[Entry] = ()


def walk(memory: GuestMemory, gva: int, cr0: int, cr3: int, cr4: int, efer: int) -> Walk:
    """Translate *gva* with these control registers."""
    if not cr0 & CR0_PG:
        return Walk(gva & 0xFFFF_FFFF)
    if efer & EFER_LMA:
        levels = 5 if cr4 & CR4_LA57 else 4
        return _walk(memory, gva, cr3 & ADDRESS_64, levels, width=8, bits=9, large_levels=(2, 3))
    gva &= 0xFFFF_FFFF
    if cr4 & CR4_PAE:
        return _walk(memory, gva, cr3 & 0xFFFF_FFE0, 3, width=8, bits=9, large_levels=(2,))
    return _walk(memory, gva, cr3 & 0xFFFF_F000, 2, width=4, bits=10, large_levels=(2,) if cr4 & CR4_PSE else ())


def _walk(
    memory: GuestMemory, gva: int, table: int, levels: int, width: int, bits: int, large_levels: tuple[int, ...]
) -> Walk:
    writable = user = True
    entries: list[Entry] = []
    pae_root = levels == 3
    for level in range(levels, 0, -1):
        shift = 12 + bits * (level - 1)
        at = table + width * (gva >> shift & (1 << bits) - 1)
        raw = memory.read_gpa(at, width)
        if raw is None:
            return Walk(None, entries=entries)
        value = int.from_bytes(raw, "little")
        entries.append(Entry(level, at, value))
        if not value & PRESENT:
            return Walk(None, entries=entries)
        if not (pae_root and level == 3):  # PDPTEs of PAE carry no permissions
            writable, user = writable and bool(value & WRITABLE), user and bool(value & USER)
        address = value & (ADDRESS_64 if width == 8 else 0xFFFF_F000)
        if level == 1 or (level in large_levels and value & LARGE):
            if width == 4 and level == 2:  # PSE-36: bits 39:32 lie in 20:13
                address = value & 0xFFC0_0000 | (value >> 13 & 0xFF) << 32
            offset = (1 << shift) - 1
            return Walk(address & ~offset | gva & offset, writable, user, entries)
        table = address
    raise AssertionError("the last level returns")
