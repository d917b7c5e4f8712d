"""Shadow paging: tables for the processor's one-dimensional walker, made from the guest's own.

    guest's table (gfn, role) ──► shadow page ──► entries: host pages, with what the guest's entries allow

A table of the guest is write-protected while it is shadowed. A write to one of the last level lets the page go out of
step (unsync) until the guest flushes its TLB; one to a table above drops its shadow pages. So no write is emulated, and
none is lost. rmap leads from a gfn to the entries that map it. The walker's own instructions for devices run over
two-dimensional tables (``tdp``), which know of shadowed gfns too.

Source: Documentation/virt/kvm/x86/mmu.rst; arch/x86/kvm/mmu/mmu.c, paging_tmpl.h.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from vmonty.base import hostcall
from vmonty.kvm.soft.memslots import PAGE_SHIFT, Memslot
from vmonty.kvm.soft.mmu.paging_tmpl import (
    ACC_ALL,
    ACC_EXEC,
    ACC_USER,
    ACC_WRITE,
    ACCESSED,
    CR0_WP,
    CR4_SMEP,
    DIRTY,
    EFER_NX,
    ERROR_FETCH,
    ERROR_USER,
    ERROR_WRITE,
    NX,
    PRESENT,
    USER,
    Absent,
    GuestWalker,
    Registers,
    Translation,
    gpte_access,
    reserved,
)
from vmonty.kvm.soft.mmu.residency import Residency
from vmonty.kvm.soft.mmu.spte import ADDRESS, LARGE, WRITE, Format, check_mmio_spte, make_mmio_spte
from vmonty.kvm.soft.mmu.tdp import Tables, TdpMmu
from vmonty.kvm.soft.stats import (
    MAX_MMU_RMAP_SIZE,
    MMU_CACHE_MISS,
    MMU_PDE_ZAPPED,
    MMU_PTE_WRITE,
    MMU_RECYCLED,
    MMU_SHADOW_ZAPPED,
    MMU_UNSYNC,
    PAGES_2M,
    PAGES_4K,
)
from vmonty.kvm.uapi.flags import KVM_MEM_READONLY

if TYPE_CHECKING:
    from vmonty.kvm.soft.kvm_main import Kvm

ENTRIES = 512
PAE_ROOT = -1  # an index: the four entries that CR3 names without long mode
LINK = PRESENT | WRITE | USER | ACCESSED
PREFETCH = 8
# Beyond as many shadow pages the shrinker drops the oldest, or beyond KVM_SET_NR_MMU_PAGES.
MOST_PAGES = 8192


class Outcome(Enum):
    """What became of a page fault (RET_PF_*)."""

    FIXED = 1
    EMULATE = 2
    FAILED = 3
    WRITES_ROOT = 4  # a table that the very access needs
    LATER = 5  # the host fetches the page
    DEVICE = 6  # emulate, and an entry for devices was made


class Role(NamedTuple):
    """union kvm_mmu_page_role: what a shadow page depends on besides its gfn."""

    level: int
    access: int
    direct: bool
    quadrant: int
    width: int
    context: int  # CR0.WP, CR4.SMEP, EFER.NX


class ShadowPage:
    """struct kvm_mmu_page."""

    __slots__ = (
        "children", "filled", "gfn", "invalid", "large", "mmio", "parents", "role", "snapshot", "table", "unsync",
    )  # fmt: skip

    def __init__(self, gfn: int, role: Role, table: int) -> None:
        self.gfn, self.role, self.table = gfn, role, table
        self.children: dict[int, ShadowPage] = {}
        self.parents: set[tuple[ShadowPage, int]] = set()
        # Leaf entries: index → the guest's entry that it was made from, and the gfn that it maps.
        self.filled: dict[int, tuple[int, int]] = {}
        # Entries that are large pages: index → the gfn of the first of their pages.
        self.large: dict[int, int] = {}
        # Entries for devices' pages: index → the guest's entry.
        self.mmio: dict[int, int] = {}
        self.unsync = self.invalid = False
        self.snapshot = b""


class ShadowMmu:
    """The shadow pages of a VM."""

    def __init__(self, kvm: Kvm, entries: Format) -> None:
        self._kvm = kvm
        self._memslots = kvm.memslots
        self._stats = kvm.stats
        self.tdp = TdpMmu(kvm.memslots, kvm.stats, entries)
        self.lock = threading.RLock()
        self.walker = GuestWalker(kvm.memslots)
        self.tables = Tables()
        self._pages: OrderedDict[tuple[int, Role], ShadowPage] = OrderedDict()
        self._of_gfn: dict[int, list[ShadowPage]] = {}
        self._rmap: dict[int, set[tuple[ShadowPage, int]]] = {}
        self._direct: dict[int, set[ShadowPage]] = {}
        # By the gfn of the first page: entries that are large pages; and how many shadowed tables lie in such a range.
        self._large: dict[int, set[tuple[ShadowPage, int]]] = {}
        self._tables_in: Counter[int] = Counter()
        self._unsync: set[ShadowPage] = set()
        self._freed: list[int] = []
        self._emulated_writable: set[int] = set()
        # The last write for which tables were dropped: gfn and address.
        self._dropped_for = (0, 0)
        self._residency: Residency | None = None

    def watch(self, residency: Residency) -> None:
        """As TdpMmu's."""
        self._residency = residency

    def _at_hand(self, slot: Memslot, gfn: int, count: int) -> bytes | None:
        """Which pages of *slot* may be mapped ahead; None: all."""
        if self._residency is None or not self._residency.may_wait(slot):
            return None
        return self._residency.present(slot, gfn, count)

    @property
    def root(self) -> int:
        """The two-dimensional tables, for emulation."""
        return self.tdp.root

    @property
    def pages(self) -> int:
        """Shadow pages."""
        return len(self._pages)

    # ---- two-dimensional tables for the emulator --------------------------------------------------------------

    def page_fault(self, gpa: int, write: bool, walk: bool = False) -> bool:
        """Map *gpa* for an instruction that is emulated; False where no slot allows the access.

        *walk*: only for the processor's walk of the guest's tables, whose flags it sets.
        """
        with self.lock:
            slot = self._memslots.find(gpa)
            if slot is None or (write and slot.flags & KVM_MEM_READONLY):
                return False
            gfn = gpa >> PAGE_SHIFT
            if write and not walk:
                self._unprotect(gfn, emulated=True)
                self._flush_and_free()
            if write:
                self._emulated_writable.add(gfn)
            with self.tdp.lock:
                self.tdp.map_page(gpa, slot, write)
        return True

    # ---- shadow pages ------------------------------------------------------------------------------------------

    def get_page(self, gfn: int, role: Role) -> ShadowPage:
        """kvm_mmu_get_shadow_page(): the page for *gfn* and *role*, in step with the guest's table."""
        key = (gfn, role)
        page = self._pages.get(key)
        if page is not None:
            self._pages.move_to_end(key)
            if page.unsync:
                self._sync(page)
            return page
        self._make_room()
        self._stats.values[MMU_CACHE_MISS] += 1
        page = self._pages[key] = ShadowPage(gfn, role, self.tables.allocate())
        if role.direct:
            if role.level == 1:
                self._direct.setdefault(gfn >> 9, set()).add(page)
                self._fill_direct(page)
        else:
            self._of_gfn.setdefault(gfn, []).append(page)
            self._tables_in[gfn & ~(ENTRIES - 1)] += 1
            for other in self._of_gfn[gfn]:
                if other.unsync:
                    self._sync(other)
                    self._set_sync(other)
            if self._write_protect_gfn(gfn):
                self._kvm.flush_remote_tlbs()
        return page

    def _limit(self) -> int:
        return self._kvm.nr_mmu_pages or MOST_PAGES

    def _make_room(self) -> None:
        """kvm_mmu_zap_oldest_mmu_pages(), the shrinker: the oldest go, but for tables of the last level's parents."""
        if len(self._pages) < self._limit():
            return
        count = max(1, len(self._pages) // 8)
        for page in [page for page in self._pages.values() if page.role.level == 1][:count]:
            self._stats.values[MMU_RECYCLED] += 1
            self._zap_page(page)
        self._flush_and_free()

    def shrink(self, count: int) -> int:
        """mmu_shrink_scan(): give up to *count* of the oldest pages back; how many there were."""
        with self.lock:
            oldest = list(self._pages.values())[:count]
            for page in oldest:
                self._zap_page(page)
            self._flush_and_free()
            return len(oldest)

    def _zap_page(self, page: ShadowPage) -> None:
        """kvm_mmu_prepare_zap_page()."""
        if page.invalid:
            return
        page.invalid = True
        counters = self._stats.values
        counters[MMU_SHADOW_ZAPPED] += 1
        for index in list(page.filled):
            self._drop(page, index)
        for index in list(page.large):
            self._drop_large(page, index)
        for index in list(page.mmio):
            self._drop_mmio(page, index)
        for index, child in page.children.items():
            child.parents.discard((page, index))
        page.children.clear()
        for parent, index in page.parents:
            parent.children.pop(index, None)
            self.tables.write(parent.table, index, 0)
        page.parents.clear()
        if page.role.level == 1:
            counters[PAGES_4K] -= self.tables.count(page.table, 0, ENTRIES)
        self.tables.clear(page.table)
        del self._pages[page.gfn, page.role]
        self._set_sync(page)
        if page.role.direct:
            if page.role.level == 1:
                self._direct[page.gfn >> 9].discard(page)
        else:
            self._of_gfn[page.gfn].remove(page)
            self._tables_in[page.gfn & ~(ENTRIES - 1)] -= 1
            if not self._of_gfn[page.gfn]:
                del self._of_gfn[page.gfn]
        self._freed.append(page.table)

    def _flush_and_free(self) -> None:
        """kvm_mmu_commit_zap_page(): no walker is in a table that is used anew."""
        if self._freed:
            self._kvm.flush_remote_tlbs()
            for table in self._freed:
                self.tables.free(table)
            self._freed.clear()

    def link(self, parent: ShadowPage, index: int, child: ShadowPage) -> None:
        """link_shadow_page()."""
        old = parent.children.get(index)
        if old is child:
            return
        if old is not None:
            old.parents.discard((parent, index))
        if index in parent.large:
            self._drop_large(parent, index)
        parent.children[index] = child
        child.parents.add((parent, index))
        self.tables.write(parent.table, index, child.table | LINK)

    # ---- leaf entries ------------------------------------------------------------------------------------------

    def _spte(self, slot: Memslot, gfn: int, access: int, writable: bool) -> int:
        value = slot.hva(gfn << PAGE_SHIFT) | PRESENT | ACCESSED | DIRTY
        if access & ACC_USER:
            value |= USER
        if access & ACC_WRITE and writable and not slot.flags & KVM_MEM_READONLY:
            value |= WRITE
        return value if access & ACC_EXEC else value | NX

    def _set(self, page: ShadowPage, index: int, gfn: int, gpte: int, spte: int) -> None:
        if index in page.filled:
            self._drop(page, index)
        if index in page.mmio:
            self._drop_mmio(page, index)
        page.filled[index] = gpte, gfn
        page.snapshot = b""  # the table as a whole has not been compared with this entry
        entries = self._rmap.setdefault(gfn, set())
        entries.add((page, index))
        counters = self._stats.values
        counters[MAX_MMU_RMAP_SIZE] = max(counters[MAX_MMU_RMAP_SIZE], len(entries))
        counters[PAGES_4K] += 1
        self.tables.write(page.table, index, spte)

    def _drop(self, page: ShadowPage, index: int) -> None:
        _, gfn = page.filled.pop(index)
        entries = self._rmap[gfn]
        entries.discard((page, index))
        if not entries:
            del self._rmap[gfn]
        self._stats.values[PAGES_4K] -= 1
        self.tables.write(page.table, index, 0)

    def _set_mmio(self, page: ShadowPage, index: int, found: Translation, generation: int) -> None:
        """mark_mmio_spte(): where no slot is, as of *generation*."""
        if index in page.filled:
            self._drop(page, index)
        elif page.role.direct and index not in page.mmio and self.tables.read(page.table, index):
            self._stats.values[PAGES_4K] -= 1
        page.mmio[index] = 0 if page.role.direct else found.gptes[1]
        page.snapshot = b""
        self.tables.write(page.table, index, make_mmio_spte(found.gfn, found.allowed, generation))

    def _drop_mmio(self, page: ShadowPage, index: int) -> None:
        del page.mmio[index]
        self.tables.write(page.table, index, 0)

    def is_mmio(self, root: ShadowPage | None, gva: int) -> bool:
        """handle_mmio_page_fault(): whether *gva* is still known as a device's."""
        with self.lock:
            page = root
            while page is not None and page.role.level > 1:
                page = page.children.get(gva >> PAGE_SHIFT + 9 * (page.role.level - 1) & ENTRIES - 1)
            if page is None:
                return False
            return check_mmio_spte(
                self.tables.read(page.table, gva >> PAGE_SHIFT & ENTRIES - 1), self._memslots.generation
            )

    def _set_large(self, page: ShadowPage, index: int, gfn: int, access: int, slot: Memslot) -> bool:
        """A page of 2 MiB, where slot and host memory have one whole, and nothing in it is watched; whether it is."""
        if (
            slot.logged or slot.flags & KVM_MEM_READONLY or self._tables_in[gfn] or index in page.children
            or not slot.base_gfn <= gfn <= slot.end_gfn - ENTRIES
            or slot.hva(gfn << PAGE_SHIFT) & (ENTRIES << PAGE_SHIFT) - 1
        ):  # fmt: skip
            return False
        if (there := self._at_hand(slot, gfn, ENTRIES)) is not None and not all(there):
            return False
        if index not in page.large:
            page.large[index] = gfn
            self._large.setdefault(gfn, set()).add((page, index))
            self._stats.values[PAGES_2M] += 1
        self.tables.write(page.table, index, self._spte(slot, gfn, access, True) | LARGE)
        return True

    def _drop_large(self, page: ShadowPage, index: int) -> None:
        gfn = page.large.pop(index)
        entries = self._large[gfn]
        entries.discard((page, index))
        if not entries:
            del self._large[gfn]
        self._stats.values[PAGES_2M] -= 1
        self.tables.write(page.table, index, 0)

    def _protected(self, gfn: int) -> bool:
        """Whether it holds a table of the guest that is shadowed in step."""
        return any(not page.unsync for page in self._of_gfn.get(gfn, ()))

    def _fill_direct(self, page: ShadowPage) -> None:
        """All entries of a direct page of the last level: a large page of the guest, or a guest without paging."""
        values = [0] * ENTRIES
        first = page.gfn
        for slot in self._memslots:
            begin, end = max(first, slot.base_gfn), min(first + ENTRIES, slot.end_gfn)
            there = self._at_hand(slot, begin, end - begin) if begin < end else None
            for gfn in range(begin, end):
                if there is None or there[gfn - begin]:
                    writable = not slot.logged and gfn not in self._of_gfn
                    values[gfn - first] = self._spte(slot, gfn, page.role.access, writable)
        self.tables.fill(page.table, 0, values)
        self._stats.values[PAGES_4K] += sum(map(bool, values))

    def _write_protect_gfn(self, gfn: int) -> bool:
        """rmap_write_protect(): no entry lets the guest write there; True when one did."""
        changed = False
        for page, index in self._entries(gfn):
            spte = self.tables.read(page.table, index)
            if spte & WRITE:
                self.tables.write(page.table, index, spte & ~WRITE)
                changed = True
        for page, index in list(self._large.get(gfn & ~(ENTRIES - 1), ())):
            self._drop_large(page, index)  # it comes back in small ones
            changed = True
        if gfn in self._emulated_writable:
            self._emulated_writable.discard(gfn)
            self.tdp.write_protect(gfn, gfn + 1)
            changed = True
        return changed

    def _entries(self, gfn: int) -> Iterator[tuple[ShadowPage, int]]:
        yield from self._rmap.get(gfn, ())
        for page in self._direct.get(gfn >> 9, ()):
            yield page, gfn & ENTRIES - 1

    # ---- out of step and back -----------------------------------------------------------------------------------

    def _unprotect(self, gfn: int, emulated: bool = False) -> None:
        """The guest writes to one of its tables: the last level goes out of step, what is above is dropped."""
        pages = list(self._of_gfn.get(gfn, ()))
        counters = self._stats.values
        counters[MMU_PTE_WRITE] += bool(pages)
        for page in pages:
            if page.role.level == 1 and not emulated:
                page.unsync = True
                self._unsync.add(page)
                counters[MMU_UNSYNC] = len(self._unsync)
            else:
                counters[MMU_PDE_ZAPPED] += page.role.level > 1
                self._zap_page(page)

    def _guest_table(self, page: ShadowPage) -> memoryview | None:
        slot = self._memslots.find(page.gfn << PAGE_SHIFT)
        if slot is None:
            return None
        try:
            data = hostcall.read_memory(slot.hva(page.gfn << PAGE_SHIFT), 4096)
        except OSError:
            return None
        if page.role.width == 4:
            data = data[2048 * page.role.quadrant : 2048 * (page.role.quadrant + 1)]
        return memoryview(data)

    def _sync(self, page: ShadowPage) -> bool:
        """FNAME(sync_page)(): drop the entries whose origin has changed; whether there were any."""
        table = self._guest_table(page)
        if table is None:
            for index in list(page.filled):
                self._drop(page, index)
            for index in list(page.mmio):
                self._drop_mmio(page, index)
            return True
        data = bytes(table)
        if data == page.snapshot:
            return False
        page.snapshot = data
        values = table.cast("Q" if page.role.width == 8 else "I")
        stale = [index for index, (gpte, _) in page.filled.items() if values[index] != gpte]
        for index in stale:
            self._drop(page, index)
        devices = [index for index, gpte in page.mmio.items() if values[index] != gpte]
        for index in devices:
            self._drop_mmio(page, index)
        return bool(stale or devices)

    def _set_sync(self, page: ShadowPage) -> None:
        page.unsync = False
        self._unsync.discard(page)
        self._stats.values[MMU_UNSYNC] = len(self._unsync)

    def sync_all(self) -> None:
        """kvm_mmu_sync_roots(): the guest has flushed its TLB. Tables that have not changed are protected again."""
        with self.lock:
            calm: list[ShadowPage] = []
            for page in list(self._unsync):
                old = page.snapshot
                if not self._sync(page) and page.snapshot == old:
                    calm.append(page)
            if not calm:
                return
            changed = False
            for page in calm:
                self._set_sync(page)
                changed |= self._write_protect_gfn(page.gfn)
            if changed:
                self._kvm.flush_remote_tlbs()
            for page in calm:
                self._sync(page)  # a write may have come before the protection

    def zap_all(self) -> list[int]:
        """Unmap everything; the pages to ``free`` when no processor walks them any more."""
        self.drop_all()
        return self.tdp.zap_all()

    def retired(self) -> list[int]:
        """As TdpMmu's."""
        return self.tdp.retired()

    def free(self, pages: list[int]) -> None:
        """Give back what zap_all() told."""
        self.tdp.free(pages)

    def zap_range(self, first_gfn: int, end_gfn: int) -> None:
        """The host's mapping there goes: every shadow page does."""
        self.drop_all()
        self.tdp.zap_range(first_gfn, end_gfn)

    def invalidate_mmio_sptes(self) -> None:
        """kvm_mmu_invalidate_mmio_sptes(): the generation begins anew, and old entries would seem to be of it."""
        self.drop_all()

    def drop_all(self) -> None:
        """Every shadow page: user space may have changed anything."""
        with self.lock:
            for page in list(self._pages.values()):
                self._zap_page(page)
            self._flush_and_free()

    def sync_address(self, root: ShadowPage | None, gva: int) -> None:
        """kvm_mmu_invlpg(): the entry for *gva* goes."""
        with self.lock:
            page = root
            while page is not None:
                index = gva >> PAGE_SHIFT + 9 * (page.role.level - 1) & ENTRIES - 1
                if page.role.level == 1:
                    if index in page.filled:
                        self._drop(page, index)
                    elif index in page.mmio:
                        self._drop_mmio(page, index)
                    return
                page = page.children.get(index)

    # ---- page faults --------------------------------------------------------------------------------------------

    def fault(
        self, roots: dict[int, ShadowPage], registers: Registers, gva: int, error: int, cpl: int, rflags: int,
        absent: Callable[[int], bool],
    ) -> Outcome:  # fmt: skip
        """FNAME(page_fault)(). Raises GuestFault for what the guest's own tables refuse.

        *absent*: whether a guest-physical address is not to be touched yet.
        """
        with self.lock:
            try:
                found = (
                    self.walker.walk(registers, gva, error, cpl, rflags)
                    if registers.paging
                    else Translation(gfn=gva >> PAGE_SHIFT & 0xF_FFFF, level=0)
                )
            except Absent:
                return Outcome.FAILED
            generation = self._memslots.generation
            slot = self._memslots.find(found.gfn << PAGE_SHIFT)
            write = bool(error & ERROR_WRITE)
            if slot is None and not error & ERROR_FETCH:
                outcome = self._fetch(roots, registers, gva, error, found, None, generation)
                self._flush_and_free()
                return outcome
            if slot is None or (write and slot.flags & KVM_MEM_READONLY):
                return Outcome.FAILED if error & ERROR_FETCH else Outcome.EMULATE
            if self._residency is not None and absent(found.gfn << PAGE_SHIFT):
                return Outcome.LATER
            if write and found.gfn in self._of_gfn:
                upper = any(page.role.level > 1 for page in self._of_gfn[found.gfn])
                self._unprotect(found.gfn)
                self._flush_and_free()
                again, self._dropped_for = upper and (found.gfn, gva) == self._dropped_for, (found.gfn, gva)
                if again or any(page.invalid for page in roots.values()):
                    return Outcome.WRITES_ROOT  # the code that writes needs the table too
            outcome = self._fetch(roots, registers, gva, error, found, slot)
            self._flush_and_free()
            return outcome

    def _context(self, registers: Registers) -> int:
        return (
            (1 if registers.cr0 & CR0_WP else 0)
            | (2 if registers.cr4 & CR4_SMEP else 0)
            | (4 if registers.efer & EFER_NX else 0)
        )

    def _fetch(
        self, roots: dict[int, ShadowPage], registers: Registers, gva: int, error: int, found: Translation,
        slot: Memslot | None, generation: int = 0,
    ) -> Outcome:  # fmt: skip
        """FNAME(fetch)(): descend from the root, making what is missing, and set the last entry.

        Without a *slot* it says that none was there at *generation*.
        """
        index = PAE_ROOT if registers.long_mode else gva >> 30 & 3
        page = roots.get(index)
        if page is None or page.invalid:
            return Outcome.FIXED  # the root is made anew before the next entry
        context, width = self._context(registers), registers.width if registers.paging else 8
        write = bool(error & ERROR_WRITE)
        allowed = found.allowed
        if not found.dirty:
            allowed &= ~ACC_WRITE
        if (
            registers.paging and write and not found.allowed & ACC_WRITE
            and not registers.cr0 & CR0_WP and not error & ERROR_USER
        ):  # fmt: skip
            # CR0.WP is clear: the supervisor writes, and the user must not see that entry.
            allowed = (allowed | ACC_WRITE) & ~ACC_USER
            if registers.cr4 & CR4_SMEP:
                allowed &= ~ACC_EXEC
        while page.role.level > 1:
            level = page.role.level - 1
            if level >= found.level and found.level:
                role = Role(level, found.access[level], False, self._quadrant(gva, level, width), width, context)
                child = self.get_page(found.tables[level], role)
                if self._changed(registers, gva, found, level + 1):
                    return Outcome.FIXED  # the guest was quicker than the protection: again
            else:
                if not page.role.direct and registers.paging and self._changed(registers, gva, found, found.level):
                    return Outcome.FIXED
                base = found.gfn & ~((1 << 9 * level) - 1)
                if (
                    level == 1
                    and slot is not None
                    and self._set_large(page, gva >> 21 & ENTRIES - 1, base, allowed, slot)
                ):
                    return Outcome.FIXED
                child = self.get_page(base, Role(level, allowed, True, 0, 8, context))
            self.link(page, gva >> PAGE_SHIFT + 9 * level & ENTRIES - 1, child)
            page = child
        index = gva >> PAGE_SHIFT & ENTRIES - 1
        if slot is None:
            self._set_mmio(page, index, found, generation)
            return Outcome.DEVICE
        protected = self._protected(found.gfn)
        if write:
            if protected:
                return Outcome.WRITES_ROOT  # or another table that maps itself
            slot.mark_dirty(found.gfn)
        writable = not protected and (write or not slot.logged)
        spte = self._spte(slot, found.gfn, allowed, writable)
        if page.role.direct:
            if index in page.mmio:
                self._drop_mmio(page, index)
            self._stats.values[PAGES_4K] += not self.tables.read(page.table, index)
            self.tables.write(page.table, index, spte)
            return Outcome.FIXED
        self._set(page, index, found.gfn, found.gptes[1], spte)
        self._prefetch(page, registers, index)
        return Outcome.FIXED

    def _changed(self, registers: Registers, gva: int, found: Translation, level: int) -> bool:
        """Whether the guest's entry that led to a table is another one by now."""
        if level not in found.tables:
            return False
        bits = 9 if registers.width == 8 else 10
        at = registers.width * (gva >> PAGE_SHIFT + bits * (level - 1) & (1 << bits) - 1)
        now = self.walker.read((found.tables[level] << PAGE_SHIFT) + at, registers.width)
        return now is None or (now ^ found.gptes[level]) & ~(ACCESSED | DIRTY) != 0

    @staticmethod
    def _quadrant(gva: int, level: int, width: int) -> int:
        """Which part of a table of 1024 entries a shadow page has."""
        return 0 if width == 8 else gva >> PAGE_SHIFT + 9 * level & (1 if level == 1 else 3)

    def _prefetch(self, page: ShadowPage, registers: Registers, index: int) -> None:
        """FNAME(pte_prefetch)(): the neighbours, as far as the guest has used them already."""
        table = self._guest_table(page)
        if table is None:
            return
        values = table.cast("Q" if page.role.width == 8 else "I")
        nx = bool(registers.efer & EFER_NX)
        first = index & ~(PREFETCH - 1)
        for at in range(first, first + PREFETCH):
            gpte = values[at]
            if at in page.filled or gpte & (PRESENT | ACCESSED) != PRESENT | ACCESSED or reserved(gpte, 1, registers):
                continue
            gfn = (gpte & (ADDRESS if page.role.width == 8 else 0xFFFF_F000)) >> PAGE_SHIFT
            slot = self._memslots.find(gfn << PAGE_SHIFT)
            if slot is None or ((there := self._at_hand(slot, gfn, 1)) is not None and not there[0]):
                continue
            access = page.role.access & gpte_access(gpte, nx)
            if not gpte & DIRTY:
                access &= ~ACC_WRITE
            writable = not slot.logged and not self._protected(gfn)
            self._set(page, at, gfn, gpte, self._spte(slot, gfn, access, writable))

    # ---- roots --------------------------------------------------------------------------------------------------

    def make_roots(self, registers: Registers) -> dict[int, ShadowPage]:
        """mmu_alloc_shadow_roots(), mmu_alloc_direct_roots(): PAE_ROOT → level 4, or 0 to 3 → level 2."""
        context = self._context(registers)
        with self.lock:
            if not registers.paging:
                return {n: self.get_page(n << 18, Role(2, ACC_ALL, True, 0, 8, context)) for n in range(4)}
            if registers.long_mode:
                role = Role(4, ACC_ALL, False, 0, 8, context)
                return {PAE_ROOT: self.get_page((registers.cr3 & ADDRESS) >> PAGE_SHIFT, role)}
            if registers.width == 4:
                gfn = registers.cr3 >> PAGE_SHIFT & 0xF_FFFF
                return {n: self.get_page(gfn, Role(2, ACC_ALL, False, n, 4, context)) for n in range(4)}
            return {
                n: self.get_page((pdpte & ADDRESS) >> PAGE_SHIFT, Role(2, ACC_ALL, False, 0, 8, context))
                for n, pdpte in enumerate(registers.pdptrs)
                if pdpte & PRESENT
            }

    def walk(self, root: int, level: int, gva: int) -> Iterator[tuple[int, int, int]]:
        """What the processor reads for *gva* from *root* on: level, address, value; the last entry may be empty."""
        table = root
        while True:
            index = gva >> PAGE_SHIFT + 9 * (level - 1) & ENTRIES - 1
            value = self.tables.read(table, index)
            yield level, table + 8 * index, value
            if level == 1 or not value & PRESENT or (level == 2 and value & LARGE):
                return
            table, level = value & ADDRESS, level - 1

    # ---- slots and dirty logging --------------------------------------------------------------------------------

    def zap(self, slot: Memslot) -> None:
        """kvm_mmu_zap_all_fast(): a slot goes: every shadow page does. The caller makes every vCPU flush its TLB."""
        with self.lock:
            self.drop_all()
            self._emulated_writable.clear()
            self.tdp.zap(slot)

    def write_protect(self, first_gfn: int, end_gfn: int) -> None:
        """Take the write permission from a range, for dirty logging. The caller flushes."""
        with self.lock:
            gfns = set(range(first_gfn, end_gfn))
            mapped = gfns & (self._rmap.keys() | self._emulated_writable)
            for block in range(first_gfn >> 9, (end_gfn - 1 >> 9) + 1):
                if self._direct.get(block) or block << 9 in self._large:
                    mapped |= gfns & set(range(block << 9, block + 1 << 9))
            for gfn in mapped:
                self._write_protect_gfn(gfn)
