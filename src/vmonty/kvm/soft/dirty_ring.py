"""The dirty ring: each vCPU lists the pages that it wrote; user space takes them out and has them armed again.

    struct kvm_dirty_gfn, 16 bytes          flags of an entry
    0  flags   4  slot   8  offset, pages   0 free ──KVM──► DIRTY ──user space──► RESET ──KVM_RESET_DIRTY_RINGS──► 0

Source: api.rst, "KVM_CAP_DIRTY_LOG_RING/ACQ_REL"; virt/kvm/dirty_ring.c.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import threading

from vmonty.kvm.uapi.flags import KVM_DIRTY_GFN_F_DIRTY, KVM_DIRTY_GFN_F_RESET, KVM_DIRTY_LOG_PAGE_OFFSET
from vmonty.kvm.uapi.run import kvm_dirty_gfn

ENTRY_SIZE = ctypes.sizeof(kvm_dirty_gfn)
MAX_ENTRIES = 65536
MAX_BYTES = MAX_ENTRIES * ENTRY_SIZE
# Entries that the guest's exit leaves free, for writes of KVM itself.
RESERVED_ENTRIES = 64
OFFSET = KVM_DIRTY_LOG_PAGE_OFFSET * mmap.PAGESIZE


def check_size(size: int) -> None:
    """kvm_vm_ioctl_enable_dirty_log_ring(). Raises OSError: EINVAL, E2BIG."""
    if size & (size - 1) or size < max(mmap.PAGESIZE, RESERVED_ENTRIES * ENTRY_SIZE):
        raise OSError(errno.EINVAL, "a ring's size in bytes is a power of two, of a page at least")
    if size > MAX_BYTES:
        raise OSError(errno.E2BIG, f"a ring has at most {MAX_ENTRIES} entries")


class DirtyRing:
    """The ring of one vCPU, in *pages* that user space maps too. Any thread."""

    def __init__(self, pages: memoryview) -> None:
        self._count = len(pages) // ENTRY_SIZE
        self._entries = (kvm_dirty_gfn * self._count).from_buffer(pages)
        self._soft_limit = self._count - RESERVED_ENTRIES
        self._dirty_index = 0
        self._reset_index = 0
        self._lock = threading.Lock()

    @property
    def soft_full(self) -> bool:
        """Whether the guest must wait for user space."""
        return self._dirty_index - self._reset_index >= self._soft_limit

    def push(self, slot: int, offset: int) -> None:
        """kvm_dirty_ring_push(): page *offset* of *slot* was written. One that finds no room at all is dropped."""
        with self._lock:
            if self._dirty_index - self._reset_index >= self._count:
                return
            entry = self._entries[self._dirty_index % self._count]
            entry.slot, entry.offset = slot, offset
            # Last: user space takes what it sees flagged.
            entry.flags = KVM_DIRTY_GFN_F_DIRTY
            self._dirty_index += 1

    def reset(self) -> list[tuple[int, int]]:
        """kvm_dirty_ring_reset(): free the entries that user space has taken; their (slot, offset)."""
        taken = []
        with self._lock:
            while self._reset_index < self._dirty_index:
                entry = self._entries[self._reset_index % self._count]
                if not entry.flags & KVM_DIRTY_GFN_F_RESET:
                    break
                taken.append((entry.slot, entry.offset))
                entry.flags = 0
                self._reset_index += 1
        return taken
