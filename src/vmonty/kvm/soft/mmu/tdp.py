"""Two-dimensional paging: the table that maps guest-physical to host addresses for the processor's walker.

    gpa  47    39 38    30 29    21 20    12 11      0
        ┌────────┬────────┬────────┬────────┬─────────┐
        │ level 4│ level 3│ level 2│ level 1│ offset  │      one table of 512 entries each
        └────────┴────────┴────────┴────────┴─────────┘

Host physical address = address in this process. What an entry looks like says mmu.spte.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator

from vmonty.base.ram import Ram
from vmonty.kvm.soft.memslots import PAGE_SHIFT, Memslot, Memslots
from vmonty.kvm.soft.mmu.residency import Residency
from vmonty.kvm.soft.mmu.spte import ADDRESS, LARGE, WRITE, Format
from vmonty.kvm.soft.stats import PAGES_1G, PAGES_2M, PAGES_4K, Statistics
from vmonty.kvm.uapi.flags import KVM_MEM_READONLY

PRESENT = 7  # of a present entry one of these bits is set, in either format
LEVELS = 4
ENTRIES = 512
ARENA_PAGES = 64
# What became of a fault (RET_PF_*). All but the first: the access can be made again.
NO_SLOT, FIXED, SPURIOUS = 0, 1, 2
# Levels whose entries can be pages, and where they are counted.
LARGE_PAGES = {2: PAGES_2M, 3: PAGES_1G}


class Tables:
    """Page-table pages: 4 KiB each, at addresses that never move, reused through a free list."""

    def __init__(self) -> None:
        self._arenas: list[Ram] = []
        self._free: list[int] = []
        self._arena_of: dict[int, Ram] = {}
        self._free_in: dict[int, int] = {}

    def allocate(self) -> int:
        """The address of a zeroed page."""
        if not self._free:
            arena = Ram(ARENA_PAGES << PAGE_SHIFT, "vmonty-mmu")
            self._arenas.append(arena)
            for page in range(ARENA_PAGES):
                address = arena.address + (page << PAGE_SHIFT)
                self._arena_of[address] = arena
                self._free.append(address)
            self._free_in[arena.address] = ARENA_PAGES
        address = self._free.pop()
        self._free_in[self._arena_of[address].address] -= 1
        arena = self._arena_of[address]
        arena.fill(address - arena.address, 4096)
        return address

    @property
    def used(self) -> int:
        """Pages that are allocated."""
        return ARENA_PAGES * len(self._arenas) - len(self._free)

    def free(self, address: int) -> None:
        """Give a page back. No processor may still walk it. An arena that is all free goes back to the host."""
        self._free.append(address)
        arena = self._arena_of[address]
        pages = range(arena.address, arena.address + (ARENA_PAGES << PAGE_SHIFT), 1 << PAGE_SHIFT)
        self._free_in[arena.address] = self._free_in.get(arena.address, 0) + 1
        if self._free_in[arena.address] == ARENA_PAGES:
            del self._free_in[arena.address]
            self._arenas.remove(arena)
            self._free = [page for page in self._free if self._arena_of[page] is not arena]
            for page in pages:
                del self._arena_of[page]

    def read(self, table: int, index: int) -> int:
        """Entry *index* of the page at *table*."""
        arena = self._arena_of[table]
        return arena.read_u64(table - arena.address + 8 * index)

    def write(self, table: int, index: int, value: int) -> None:
        """Store entry *index*: one aligned 64-bit store, so that a walker sees the old or the new."""
        arena = self._arena_of[table]
        arena.write_u64(table - arena.address + 8 * index, value)

    def count(self, table: int, index: int, number: int) -> int:
        """How many of the *number* entries from *index* on are not empty."""
        arena = self._arena_of[table]
        entries = arena.read(table - arena.address + 8 * index, 8 * number)
        return sum(map(bool, memoryview(entries).cast("Q")))

    def clear(self, table: int) -> None:
        """Empty the page at *table*."""
        arena = self._arena_of[table]
        arena.fill(table - arena.address, 4096)

    def fill(self, table: int, index: int, values: list[int]) -> None:
        """Store several entries from *index* on."""
        arena = self._arena_of[table]
        arena.write(table - arena.address + 8 * index, struct.pack(f"<{len(values)}Q", *values))


class TdpMmu:
    """The EPT or nested page table of a VM, shared by its vCPUs, filled on faults."""

    def __init__(self, memslots: Memslots, stats: Statistics, entries: Format) -> None:
        self._format = entries
        self._memslots = memslots
        self._stats = stats
        self._tables = Tables()
        self.lock = threading.Lock()
        self.root = self._tables.allocate()
        self.pages = 1
        # Page-table pages that were taken out, and may still be walked.
        self._retired: list[int] = []
        # With asynchronous page faults: only pages that are at hand are mapped before they are needed.
        self._residency: Residency | None = None

    def watch(self, residency: Residency) -> None:
        """From now on map ahead only what *residency* says is at hand."""
        self._residency = residency

    @staticmethod
    def _index(gpa: int, level: int) -> int:
        return gpa >> PAGE_SHIFT + 9 * (level - 1) & ENTRIES - 1

    def page_fault(self, gpa: int, write: bool, walk: bool = False) -> int:
        """kvm_tdp_page_fault(): map what lies around *gpa*; NO_SLOT where none allows the access (MMIO).

        *walk*: for the processor's walk of the guest's tables.
        The largest page that slot and host memory have there; where it is 4 KiB a whole level-1 table is filled, as far
        as the slot reaches: the pages are there anyway.
        """
        with self.lock:
            # Under the lock: who changes a slot zaps it when the new one is known, so what the old one says is never
            # mapped behind the zap. The kernel has mmu_invalidate_retry() for it.
            slot = self._memslots.find(gpa)
            if slot is None or (write and slot.flags & KVM_MEM_READONLY):
                return NO_SLOT
            if self._allows(gpa, write):
                return SPURIOUS
            if slot.logged:
                self._map_logged(self._descend(gpa, 1), gpa, slot, write)
            elif self._residency is not None and self._residency.may_wait(slot):
                self._map_present(self._residency, gpa, slot)
            elif slot.flags & KVM_MEM_READONLY or not self._map_large(gpa, slot):
                self._map_around(self._descend(gpa, 1), gpa, slot)
        return FIXED

    def _allows(self, gpa: int, write: bool) -> bool:
        """is_access_allowed(): the fault is settled already, by another vCPU's."""
        for level, _, entry in self.walk(gpa):
            if level == 1 or entry & LARGE:
                return bool(entry & PRESENT) and (not write or bool(entry & WRITE))
        return False

    def _map_large(self, gpa: int, slot: Memslot, highest: int = 3) -> bool:
        """kvm_mmu_max_mapping_level(): a page of 1 GiB or 2 MiB, where slot and host memory have a whole one there.

        False where they don't, or where the table of a lower level is already. *highest*: the level of the largest one.
        """
        table = self.root
        for level in range(LEVELS, 1, -1):
            index = self._index(gpa, level)
            entry = self._tables.read(table, index)
            if level in LARGE_PAGES:
                if entry & PRESENT and entry & LARGE:
                    return True
                size = ENTRIES ** (level - 1)
                first = gpa >> PAGE_SHIFT & ~(size - 1)
                inside = slot.base_gfn <= first and first + size <= slot.end_gfn
                if (
                    level <= highest
                    and not entry & PRESENT
                    and inside
                    and not slot.hva(first << PAGE_SHIFT) & (size << PAGE_SHIFT) - 1
                ):
                    self._tables.write(table, index, self._leaf(slot, first, True) | LARGE)
                    self._stats.values[LARGE_PAGES[level]] += 1
                    return True
            if not entry & PRESENT:
                if level == 2:
                    return False
                entry = self._new_table(table, index)
            table = entry & ADDRESS
        return False

    def _new_table(self, table: int, index: int) -> int:
        entry = self._tables.allocate() | self._format.table
        self._tables.write(table, index, entry)
        self.pages += 1
        return entry

    def _descend(self, gpa: int, to_level: int) -> int:
        """The table of *to_level*, made on the way; large pages are dropped, and come back in parts."""
        table = self.root
        for level in range(LEVELS, to_level, -1):
            index = self._index(gpa, level)
            entry = self._tables.read(table, index)
            if entry & PRESENT and level in LARGE_PAGES and entry & LARGE:
                self._stats.values[LARGE_PAGES[level]] -= 1
                entry = 0
            if not entry & PRESENT:
                entry = self._new_table(table, index)
            table = entry & ADDRESS
        return table

    def _leaf(self, slot: Memslot, gfn: int, write: bool) -> int:
        return self._format.spte(slot.hva(gfn << PAGE_SHIFT), write and not slot.flags & KVM_MEM_READONLY)

    def _map_around(self, table: int, gpa: int, slot: Memslot) -> None:
        first = gpa >> PAGE_SHIFT & ~(ENTRIES - 1)
        begin, end = max(first, slot.base_gfn), min(first + ENTRIES, slot.end_gfn)
        self._stats.values[PAGES_4K] += end - begin - self._tables.count(table, begin - first, end - begin)
        self._tables.fill(table, begin - first, [self._leaf(slot, gfn, True) for gfn in range(begin, end)])

    def _map_present(self, residency: Residency, gpa: int, slot: Memslot) -> None:
        """As _map_around(), but of the other pages only those that are at hand."""
        first = gpa >> PAGE_SHIFT & ~(ENTRIES - 1)
        begin, end = max(first, slot.base_gfn), min(first + ENTRIES, slot.end_gfn)
        there = residency.present(slot, begin, end - begin)
        if all(there):
            if slot.flags & KVM_MEM_READONLY or not self._map_large(gpa, slot, highest=2):
                self._map_around(self._descend(gpa, 1), gpa, slot)
            return
        table = self._descend(gpa, 1)
        for gfn, at_hand in enumerate(there, begin):
            if (at_hand or gfn == gpa >> PAGE_SHIFT) and not self._tables.read(table, gfn - first):
                self._stats.values[PAGES_4K] += 1
                self._tables.write(table, gfn - first, self._leaf(slot, gfn, True))

    def map_page(self, gpa: int, slot: Memslot, write: bool) -> None:
        """Map one page, writable if *write*. The caller has the lock."""
        self._map_logged(self._descend(gpa, 1), gpa, slot, write)

    def _map_logged(self, table: int, gpa: int, slot: Memslot, write: bool) -> None:
        gfn = gpa >> PAGE_SHIFT
        if write:
            slot.mark_dirty(gfn)
        self._stats.values[PAGES_4K] += 1 - self._tables.count(table, gfn & ENTRIES - 1, 1)
        self._tables.write(table, gfn & ENTRIES - 1, self._leaf(slot, gfn, write))

    def zap(self, slot: Memslot) -> None:
        """kvm_zap_gfn_range(): unmap *slot*. The caller makes every vCPU flush its TLB."""
        self._change(slot.base_gfn, slot.end_gfn, 0)

    def walk(self, gpa: int) -> Iterator[tuple[int, int, int]]:
        """The entries that the processor reads for *gpa*: level, address, value; the last one may be empty."""
        table = self.root
        for level in range(LEVELS, 0, -1):
            index = self._index(gpa, level)
            value = self._tables.read(table, index)
            yield level, table + 8 * index, value
            if not value & PRESENT or (level in LARGE_PAGES and value & LARGE):
                return
            table = value & ADDRESS

    def invalidate_mmio_sptes(self) -> None:
        """There are none: vCPUs remember where devices are, with all of the generation."""

    def zap_all(self) -> list[int]:
        """kvm_mmu_zap_all(): unmap everything. The page-table pages now out of use; ``free`` them after a flush."""
        gone: list[int] = []
        with self.lock:
            for index in range(ENTRIES):
                entry = self._tables.read(self.root, index)
                if entry & PRESENT:
                    self._tables.write(self.root, index, 0)
                    self._collect(entry & ADDRESS, LEVELS - 1, gone)
        return gone

    def _collect(self, table: int, level: int, gone: list[int]) -> None:
        """*table*, which was taken out, and those below it; what they map is counted no more."""
        gone.append(table)
        self.pages -= 1
        if level == 1:
            self._stats.values[PAGES_4K] -= self._tables.count(table, 0, ENTRIES)
            return
        for index in range(ENTRIES):
            entry = self._tables.read(table, index)
            if entry & PRESENT and level in LARGE_PAGES and entry & LARGE:
                self._stats.values[LARGE_PAGES[level]] -= 1
            elif entry & PRESENT:
                self._collect(entry & ADDRESS, level - 1, gone)

    def retired(self) -> list[int]:
        """The page-table pages that zaps have taken out since the last time: ``free`` them after a flush."""
        with self.lock:
            gone, self._retired = self._retired, []
        return gone

    def free(self, pages: list[int]) -> None:
        """No processor walks these any more."""
        with self.lock:
            for page in pages:
                self._tables.free(page)

    def zap_range(self, first_gfn: int, end_gfn: int) -> None:
        """kvm_unmap_gfn_range(): the memory behind it goes away. The caller flushes."""
        self._change(first_gfn, end_gfn, 0)

    def write_protect(self, first_gfn: int, end_gfn: int) -> None:
        """Take the write permission from a range, for dirty logging. The caller flushes."""
        self._change(first_gfn, end_gfn, ~WRITE)

    def _change(self, first_gfn: int, end_gfn: int, mask: int) -> None:
        with self.lock:
            if first_gfn < end_gfn:
                self._change_in(self.root, LEVELS, first_gfn, end_gfn, mask)

    def _change_in(self, table: int, level: int, first: int, end: int, mask: int) -> None:
        """In *table*, which has entries of *level*. A large page that changes in part is dropped, and faults again."""
        tables, values = self._tables, self._stats.values
        size = ENTRIES ** (level - 1)
        gfn = first
        while gfn < end:
            index, base = gfn // size & ENTRIES - 1, gfn // size * size
            stop = min(base + size, end)
            entry, whole = tables.read(table, index), stop - gfn == size
            if level == 1:
                if entry:
                    tables.write(table, index, entry & mask)
                    values[PAGES_4K] -= not mask
            elif not entry & PRESENT:
                pass
            elif level in LARGE_PAGES and entry & LARGE:
                keep = mask if whole else 0
                tables.write(table, index, entry & keep)
                values[LARGE_PAGES[level]] -= not keep
            elif whole and not mask:
                tables.write(table, index, 0)
                self._collect(entry & ADDRESS, level - 1, self._retired)
            else:
                self._change_in(entry & ADDRESS, level - 1, gfn, stop, mask)
            gfn = stop
