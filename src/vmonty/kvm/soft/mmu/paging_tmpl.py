"""The guest's page tables as a page fault must see them: permissions, reserved bits, accessed and dirty flags.

Source: arch/x86/kvm/mmu/paging_tmpl.h, FNAME(walk_addr_generic)(); SDM, "Page-Fault Exceptions", "Accessed and Dirty
Flags".
"""

from __future__ import annotations

from typing import NamedTuple

from vmonty.base import hostcall
from vmonty.kvm.soft.memslots import PAGE_SHIFT, Memslots

PRESENT, WRITABLE, USER, ACCESSED, DIRTY, LARGE, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
ERROR_PRESENT, ERROR_WRITE, ERROR_USER, ERROR_RESERVED, ERROR_FETCH = 1, 2, 4, 8, 16
ACC_EXEC, ACC_WRITE, ACC_USER, ACC_ALL = 1, 2, 4, 7
ADDRESS = 0x000F_FFFF_FFFF_F000
CR0_WP, CR4_PSE, CR4_PAE, CR4_LA57, CR4_SMEP, CR4_SMAP = 1 << 16, 1 << 4, 1 << 5, 1 << 12, 1 << 20, 1 << 21
EFER_LMA, EFER_NX, RFLAGS_AC = 1 << 10, 1 << 11, 1 << 18
PHYSICAL_BITS = 46
RESERVED_ADDRESS = (1 << 52) - (1 << PHYSICAL_BITS)


class Registers(NamedTuple):
    """The guest's control registers that its paging depends on, and the PDPTEs loaded with CR3 (PAE)."""

    cr0: int
    cr3: int
    cr4: int
    efer: int
    pdptrs: tuple[int, ...] = (0, 0, 0, 0)

    @property
    def paging(self) -> bool:
        """CR0.PG."""
        return bool(self.cr0 >> 31 & 1)

    @property
    def long_mode(self) -> bool:
        """4- or 5-level paging."""
        return self.paging and bool(self.efer & EFER_LMA)

    @property
    def width(self) -> int:
        """Bytes of a guest entry."""
        return 8 if self.cr4 & CR4_PAE else 4


class Translation:
    """A successful walk. *tables*: level → gfn of the guest's table there; *access*: level → what the entries above it
    allow; *gptes*: level → the entry used. *level* is that of the leaf; *gfn* of the 4 KiB page; *allowed* of the leaf.
    """

    def __init__(self, gfn: int = 0, level: int = 1) -> None:
        self.gfn = gfn
        self.level = level
        self.allowed = ACC_ALL
        self.dirty = True
        self.tables: dict[int, int] = {}
        self.access: dict[int, int] = {}
        self.gptes: dict[int, int] = {}


class GuestFault(Exception):  # it is the guest's, not ours
    """The guest's own tables refuse: the error code of its #PF."""

    def __init__(self, error_code: int) -> None:
        super().__init__(f"#PF error code {error_code:#x}")
        self.error_code = error_code


class Absent(Exception):
    """A table of the guest is where no memory is."""


def gpte_access(gpte: int, nx: bool) -> int:
    """What one entry allows."""
    return gpte & (WRITABLE | USER) | (0 if nx and gpte & NX else ACC_EXEC)


def reserved(gpte: int, level: int, registers: Registers) -> bool:
    """Whether bits are set that must be zero. SDM, "Reserved bits" of "Page-Fault Exceptions"."""
    if registers.width == 4:
        return level == 2 and bool(gpte & LARGE and registers.cr4 & CR4_PSE and gpte & 1 << 21)
    bits = RESERVED_ADDRESS
    if not registers.efer & EFER_NX:
        bits |= NX
    if not registers.efer & EFER_LMA:
        bits |= 0x7FF << 52
    if gpte & LARGE and level > 1:
        if level >= 4:
            return True
        bits |= 0x3FFF_E000 if level == 3 else 0x1F_E000
    return bool(gpte & bits)


class GuestWalker:
    """Walks and changes guest memory through the memory slots."""

    def __init__(self, memslots: Memslots) -> None:
        self._memslots = memslots

    def hva(self, gpa: int) -> int | None:
        """Where *gpa* is in this process."""
        slot = self._memslots.find(gpa)
        return None if slot is None else slot.hva(gpa)

    def read(self, gpa: int, width: int) -> int | None:
        """An entry."""
        hva = self.hva(gpa)
        if hva is None:
            return None
        try:
            return int.from_bytes(hostcall.read_memory(hva, width), "little")
        except OSError:
            return None  # user space has unmapped it

    def walk(self, registers: Registers, gva: int, error: int, cpl: int, rflags: int) -> Translation:
        """Translate for the access that *error* describes. Raises GuestFault, Absent."""
        while True:
            found = self._walk(registers, gva, error, cpl, rflags)
            if found is not None:
                return found

    def _walk(self, registers: Registers, gva: int, error: int, cpl: int, rflags: int) -> Translation | None:
        width, nx = registers.width, bool(registers.efer & EFER_NX)
        bits = 9 if width == 8 else 10
        cause = error & (ERROR_WRITE | ERROR_USER)
        if error & ERROR_FETCH and (registers.cr4 & CR4_SMEP or (width == 8 and nx)):
            cause |= ERROR_FETCH
        result = Translation()
        access = ACC_ALL
        if registers.long_mode:
            level, table = 5 if registers.cr4 & CR4_LA57 else 4, registers.cr3 & ADDRESS
        elif width == 8:
            pdpte = registers.pdptrs[gva >> 30 & 3]
            if not pdpte & PRESENT:
                raise GuestFault(cause)
            level, table = 2, pdpte & ADDRESS
        else:
            level, table = 2, registers.cr3 & 0xFFFF_F000
        places: list[tuple[int, int]] = []
        while True:
            shift = PAGE_SHIFT + bits * (level - 1)
            gpa = table + width * (gva >> shift & (1 << bits) - 1)
            gpte = self.read(gpa, width)
            if gpte is None:
                raise Absent
            result.tables[level], result.access[level] = table >> PAGE_SHIFT, access
            if not gpte & PRESENT:
                raise GuestFault(cause)
            if reserved(gpte, level, registers):
                raise GuestFault(cause | ERROR_PRESENT | ERROR_RESERVED)
            access &= gpte_access(gpte, nx)
            places.append((gpa, gpte))
            result.gptes[level] = gpte
            if level == 1 or (gpte & LARGE and (width == 8 or registers.cr4 & CR4_PSE)):
                break
            table, level = gpte & (ADDRESS if width == 8 else 0xFFFF_F000), level - 1
        if not permitted(registers, access, error, cpl, rflags):
            raise GuestFault(cause | ERROR_PRESENT)
        for number, (at, value) in enumerate(places):
            wish = value | ACCESSED
            if number == len(places) - 1 and error & ERROR_WRITE:
                wish |= DIRTY
            if wish != value:
                hva = self.hva(at)
                if hva is None or not hostcall.compare_exchange(hva, width, value, wish):
                    return None  # another processor changed it: again
                if (slot := self._memslots.find(at)) is not None:
                    slot.mark_dirty(at >> PAGE_SHIFT)
            result.gptes[level + len(places) - 1 - number] = wish
        leaf = result.gptes[level]
        page = leaf & (ADDRESS if width == 8 else 0xFFFF_F000)
        if level > 1:
            size = 1 << PAGE_SHIFT + bits * (level - 1)
            if width == 4:
                page = page & 0xFFC0_0000 | (leaf >> 13 & 0xFF) << 32
            page = page & ~(size - 1) | gva & size - 1
        result.gfn, result.level = page >> PAGE_SHIFT, level
        result.allowed, result.dirty = access, bool(leaf & DIRTY)
        return result


def permitted(registers: Registers, access: int, error: int, cpl: int, rflags: int) -> bool:
    """SDM, "Determination of Access Rights"."""
    user = bool(access & ACC_USER)
    if error & ERROR_USER:
        if not user or (error & ERROR_WRITE and not access & ACC_WRITE):
            return False
        return not error & ERROR_FETCH or bool(access & ACC_EXEC)
    if error & ERROR_FETCH:
        return bool(access & ACC_EXEC) and not (user and registers.cr4 & CR4_SMEP)
    if user and registers.cr4 & CR4_SMAP and not (rflags & RFLAGS_AC and cpl < 3):
        return False
    return not error & ERROR_WRITE or bool(access & ACC_WRITE) or not registers.cr0 & CR0_WP
