"""Which of a guest's pages the host has at hand, and which must be fetched before anybody can use them.

Pages of a file may have to be read; those of memory that is registered with userfaultfd(2) come from whoever serves it.
Other memory counts as there: what was never touched costs no more than clearing it. (Pages in the swap are not looked
for: no processor tells when one goes there, so it is in the guest's tables anyway.)
"""

from __future__ import annotations

import os

from vmonty.base import hostcall
from vmonty.kvm.soft.memslots import PAGE_SHIFT, PAGE_SIZE, Memslot

SMAPS, PAGEMAP, MOUNTINFO = "/proc/self/smaps", "/proc/self/pagemap", "/proc/self/mountinfo"
PAGEMAP_PRESENT = 1 << 63
# Memory by other names: /proc/pid/maps.
IN_MEMORY = (b"/memfd:", b"/dev/zero", b"/SYSV", b"[")
FILE_SYSTEMS_IN_MEMORY = (b"tmpfs", b"ramfs", b"rootfs", b"hugetlbfs", b"devtmpfs")
USERFAULT_FLAGS = (b"um", b"ui")  # missing, minor


class Residency:
    """Answers for the memory slots of a VM. What a slot's memory is, is looked up once."""

    def may_wait(self, slot: Memslot) -> bool:
        """Whether there are pages of *slot* that one might have to wait for."""
        if slot.fetched is None:
            slot.fetched = fetched_ranges(slot.userspace_addr, slot.userspace_addr + (slot.npages << PAGE_SHIFT))
        return bool(slot.fetched)

    def present(self, slot: Memslot, first_gfn: int, count: int) -> bytes:
        """A byte for each of *count* pages of *slot* from *first_gfn* on: 0 where it must be fetched."""
        there = bytearray(b"\1" * count)
        if self.may_wait(slot):
            begin = slot.hva(first_gfn << PAGE_SHIFT)
            for start, end, by_user in slot.fetched or ():
                low, high = max(start, begin), min(end, begin + (count << PAGE_SHIFT))
                if low < high:
                    at = low - begin >> PAGE_SHIFT
                    found = _in_page_tables(low, high) if by_user else _in_memory(low, high)
                    there[at : at + len(found)] = found
        return bytes(there)


def fetched_ranges(begin: int, end: int) -> tuple[tuple[int, int, bool], ...]:
    """The parts of this process's memory from *begin* to *end* whose pages are fetched: start, end, by userfaultfd."""
    found: list[tuple[int, int, bool]] = []
    start = stop = 0
    from_file = False
    in_memory: frozenset[bytes] | None = None
    try:
        with open(SMAPS, "rb") as smaps:
            for line in smaps:
                name, _, rest = line.partition(b" ")
                if name == b"VmFlags:":
                    by_user = any(flag in rest.split() for flag in USERFAULT_FLAGS)
                    low, high = max(start, begin), min(stop, end)
                    if low < high and (from_file or by_user):
                        found.append((low, high, by_user))
                elif not name.endswith(b":"):
                    start, stop = (int(part, 16) for part in name.split(b"-"))
                    if start >= end:
                        break
                    if stop > begin:
                        _, _, device, inode, *path = rest.split(maxsplit=4)
                        from_file = inode != b"0" and not (path and path[0].startswith(IN_MEMORY))
                        if from_file:
                            in_memory = in_memory if in_memory is not None else _devices_in_memory()
                            from_file = device not in in_memory
    except OSError:
        return ()  # no /proc: nothing is known
    return tuple(found)


def _devices_in_memory() -> frozenset[bytes]:
    """The devices, as /proc/pid/maps has them, of file systems whose files are memory."""
    found = set()
    with open(MOUNTINFO, "rb") as mounts:
        for line in mounts:
            fields = line.split()
            if fields[fields.index(b"-") + 1] in FILE_SYSTEMS_IN_MEMORY:
                major, minor = (int(part) for part in fields[2].split(b":"))
                found.add(b"%02x:%02x" % (major, minor))
    return frozenset(found)


def _in_memory(low: int, high: int) -> bytes:
    """mincore(2). Where nothing is mapped any more, nothing is to be fetched."""
    try:
        return hostcall.resident_pages(low, high - low)
    except OSError:
        return b"\1" * (high - low >> PAGE_SHIFT)


def _in_page_tables(low: int, high: int) -> bytes:
    """Pages that are mapped: for any other one somebody might be asked."""
    count = (high - low) // PAGE_SIZE
    try:
        fd = os.open(PAGEMAP, os.O_RDONLY | os.O_CLOEXEC)
        try:
            entries = memoryview(os.pread(fd, 8 * count, low // PAGE_SIZE * 8)).cast("Q")
        finally:
            os.close(fd)
    except OSError:
        return b"\1" * count
    return bytes(entry & PAGEMAP_PRESENT != 0 for entry in entries)
