"""Memory slots: the guest-physical address space. Names and rules: virt/kvm/kvm_main.c, __kvm_set_memory_region()."""

from __future__ import annotations

import errno
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import NamedTuple

from vmonty.base.record import Record, made
from vmonty.kvm.uapi.flags import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY

PAGE_SHIFT, PAGE_SIZE = 12, 4096
KVM_USER_MEM_SLOTS = 32764
KVM_MEM_MAX_NR_PAGES = (1 << 31) - 1
USER_ADDRESS_LIMIT = (1 << 47) - PAGE_SIZE
ADDRESS_SPACES = 1


class Memslot(Record):
    """*npages* pages from *base_gfn*, which are the host's from *userspace_addr*."""

    id: int
    base_gfn: int
    npages: int
    userspace_addr: int
    flags: int
    dirty: bytearray = made(factory=bytearray)
    # Where writes are noted instead of in ``dirty``: (slot, page).
    to_ring: Callable[[int, int], None] | None = None
    # What of the memory may have to be waited for: see mmu.residency. None: not looked up yet.
    fetched: tuple[tuple[int, int, bool], ...] | None = None
    # A change of the log reads, changes and writes a byte: no other thread's may come in between.
    _dirty_lock: threading.Lock = made(factory=threading.Lock)

    @property
    def end_gfn(self) -> int:
        """The first frame behind it."""
        return self.base_gfn + self.npages

    def hva(self, gpa: int) -> int:
        """The host-virtual address of *gpa*, which lies in this slot."""
        return self.userspace_addr + gpa - (self.base_gfn << PAGE_SHIFT)

    @property
    def logged(self) -> bool:
        """Whether writes are to be noted."""
        return bool(self.flags & KVM_MEM_LOG_DIRTY_PAGES)

    def mark_dirty(self, gfn: int) -> None:
        """Note a write to *gfn* in the dirty log, if there is one."""
        if self.to_ring is not None:
            if self.logged:
                self.to_ring(self.id, gfn - self.base_gfn)
        elif self.dirty:
            page = gfn - self.base_gfn
            with self._dirty_lock:
                self.dirty[page >> 3] |= 1 << (page & 7)

    def take_dirty(self) -> bytes:
        """The log, which is empty then: the kernel's xchg() of each word."""
        with self._dirty_lock:
            bitmap = bytes(self.dirty)
            self.dirty[:] = bytes(len(bitmap))
        return bitmap

    def dirty_runs(self, first: int, bits: int) -> Iterator[range]:
        """The dirty pages from *first* on whose *bits* are set, as runs of page numbers."""
        left = bits & int.from_bytes(self.dirty, "little") >> first
        page = first
        while left:
            skipped = (left & -left).bit_length() - 1
            left >>= skipped
            length = (~left & left + 1).bit_length() - 1
            page += skipped
            yield range(page, page + length)
            left, page = left >> length, page + length

    def clear_dirty(self, pages: range) -> None:
        """Forget that *pages* were written."""
        with self._dirty_lock:
            for page in pages:
                self.dirty[page >> 3] &= ~(1 << (page & 7))


class Change(NamedTuple):
    """What a request did: *old* must be unmapped, *new* may be used."""

    old: Memslot | None
    new: Memslot | None


class Memslots:
    """All slots of a VM. Readers use ``find`` without a lock: the sorted table is replaced, never changed."""

    def __init__(self) -> None:
        self.generation = 0
        self._by_id: dict[int, Memslot] = {}
        self._table: tuple[list[int], list[Memslot]] = ([], [])

    def __iter__(self) -> Iterator[Memslot]:
        return iter(self._table[1])

    def get(self, slot_id: int) -> Memslot | None:
        """The slot called *slot_id*."""
        return self._by_id.get(slot_id)

    def find(self, gpa: int) -> Memslot | None:
        """gfn_to_memslot(): the slot that *gpa* lies in."""
        bases, slots = self._table
        at = bisect_right(bases, gpa >> PAGE_SHIFT) - 1
        if at >= 0 and gpa >> PAGE_SHIFT < slots[at].end_gfn:
            return slots[at]
        return None

    def gpa(self, hva: int) -> int | None:
        """The guest-physical address of *hva*; None where it is no slot's."""
        for slot in self:
            if 0 <= hva - slot.userspace_addr < slot.npages << PAGE_SHIFT:
                return (slot.base_gfn << PAGE_SHIFT) + hva - slot.userspace_addr
        return None

    def set(
        self,
        slot: int,
        flags: int,
        guest_phys_addr: int,
        memory_size: int,
        userspace_addr: int,
        initially_dirty: bool = False,
        to_ring: Callable[[int, int], None] | None = None,
    ) -> Change:
        """KVM_SET_USER_MEMORY_REGION. Raises OSError: EINVAL, EEXIST.

        *initially_dirty*: a log that begins has all pages in it (KVM_DIRTY_LOG_INITIALLY_SET). *to_ring*: it is no
        bitmap, but calls this.
        """
        slot_id = slot & 0xFFFF
        if (
            flags & ~(KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY)
            or (memory_size | guest_phys_addr | userspace_addr) & (PAGE_SIZE - 1)
            or userspace_addr + memory_size > USER_ADDRESS_LIMIT
            or slot >> 16 >= ADDRESS_SPACES
            or slot_id >= KVM_USER_MEM_SLOTS
            or guest_phys_addr + memory_size > 1 << 64
            or memory_size >> PAGE_SHIFT > KVM_MEM_MAX_NR_PAGES
        ):
            raise OSError(errno.EINVAL, "bad memory region")
        old = self._by_id.get(slot_id)
        if memory_size == 0:
            if old is None:
                raise OSError(errno.EINVAL, "there is no such slot to delete")
            del self._by_id[slot_id]
            self._publish()
            return Change(old, None)
        new = Memslot(slot_id, guest_phys_addr >> PAGE_SHIFT, memory_size >> PAGE_SHIFT, userspace_addr, flags)
        if old is not None:
            if (
                new.userspace_addr != old.userspace_addr
                or new.npages != old.npages
                or (new.flags ^ old.flags) & KVM_MEM_READONLY
            ):
                raise OSError(errno.EINVAL, "a slot can be moved or change its logging, nothing else")
            if new.base_gfn == old.base_gfn and new.flags == old.flags:
                return Change(None, None)
        self._check_overlap(new, old)
        new.to_ring = to_ring
        if flags & KVM_MEM_LOG_DIRTY_PAGES and to_ring is None:
            if old is not None and old.dirty:
                new.dirty, new._dirty_lock = old.dirty, old._dirty_lock
            else:
                pages = (1 << new.npages) - 1 if initially_dirty else 0
                new.dirty = bytearray(pages.to_bytes((new.npages + 63) // 64 * 8, "little"))
        self._by_id[slot_id] = new
        self._publish()
        return Change(old, new)

    def set_private(self, slot_id: int, guest_phys_addr: int, memory_size: int, userspace_addr: int) -> Change:
        """A new slot of the kernel's own (KVM_INTERNAL_MEM_SLOTS). Raises OSError: EEXIST."""
        if slot_id in self._by_id:
            raise OSError(errno.EEXIST, "the VM has it")
        new = Memslot(slot_id, guest_phys_addr >> PAGE_SHIFT, memory_size >> PAGE_SHIFT, userspace_addr, 0)
        self._check_overlap(new, None)
        self._by_id[slot_id] = new
        self._publish()
        return Change(None, new)

    def _check_overlap(self, new: Memslot, old: Memslot | None) -> None:
        for other in self._by_id.values():
            if other is not old and other.base_gfn < new.end_gfn and new.base_gfn < other.end_gfn:
                raise OSError(errno.EEXIST, "another slot lies there")

    def _publish(self) -> None:
        slots = sorted(self._by_id.values(), key=lambda entry: entry.base_gfn)
        self._table = ([entry.base_gfn for entry in slots], slots)
        # Behind it: who has seen the new generation sees the new slots.
        self.generation += 1
