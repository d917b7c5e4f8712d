"""Which of a guest's pages the host has at hand, and which must be fetched before anybody can use them.

Pages of a file may have to be read; those of memory that is registered with userfaultfd(2) come from whoever serves it.
(Who hands the userfaultfd on keeps it open here, too: by it one sees that there is such memory.)
Other memory counts as there: what was never touched costs no more than clearing it. (Pages in the swap are not looked
for: no processor tells when one goes there, so it is in the guest's tables anyway.)
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from vmonty.base import hostcall
from vmonty.kvm.soft.memslots import PAGE_SHIFT, PAGE_SIZE, Memslot

MAPS, SMAPS, FDS = "/proc/self/maps", "/proc/self/smaps", "/proc/self/fd"
PAGEMAP, MOUNTINFO, USERFAULTFD = "/proc/self/pagemap", "/proc/self/mountinfo", "anon_inode:[userfaultfd]"
PAGEMAP_PRESENT = 1 << 63
# Memory by other names: /proc/pid/maps.
IN_MEMORY = (b"/memfd:", b"/dev/zero", b"/SYSV", b"[")
FILE_SYSTEMS_IN_MEMORY = (b"tmpfs", b"ramfs", b"rootfs", b"hugetlbfs", b"devtmpfs")
FLAGS = b"VmFlags:"
USERFAULT_FLAGS = (b"um", b"ui")  # missing, minor


class Residency:
    """Answers for the memory slots of a VM. What a slot's memory is, is looked up once."""

    def look(self, slots: Iterable[Memslot]) -> None:
        """Look it up for several at once: that takes milliseconds."""
        ranges = fetched_ranges()
        for slot in slots:
            begin, stop = slot.userspace_addr, slot.userspace_addr + (slot.npages << PAGE_SHIFT)
            slot.fetched = tuple(
                (max(start, begin), min(end, stop), by_user)
                for start, end, by_user in ranges
                if start < stop and begin < end
            )  # fmt: skip

    def may_wait(self, slot: Memslot) -> bool:
        """Whether there are pages of *slot* that one might have to wait for."""
        if slot.fetched is None:
            self.look([slot])
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


def fetched_ranges() -> list[tuple[int, int, bool]]:
    """The parts of this process's memory whose pages are fetched: start, end, whether by userfaultfd."""
    found: list[tuple[int, int, bool]] = []
    mapping = b""
    try:
        in_memory = _devices_in_memory()
        if _has_userfaultfd():
            with open(SMAPS, "rb") as smaps:
                for line in smaps:
                    if line.startswith(FLAGS):
                        by_user = any(flag in USERFAULT_FLAGS for flag in line.split())
                        if by_user or _from_file(mapping, in_memory):
                            found.append((*_where(mapping), by_user))
                    elif not line[:1].isupper():  # an address
                        mapping = line
            return found
        with open(MAPS, "rb") as maps:
            return [(*_where(line), False) for line in maps if _from_file(line, in_memory)]
    except OSError:
        return []  # no /proc: nothing is known


def _has_userfaultfd() -> bool:
    """Whether it is worth while to read what takes the host ten times as long."""
    for name in os.listdir(FDS):
        try:
            if os.readlink(f"{FDS}/{name}") == USERFAULTFD:
                return True
        except FileNotFoundError:
            continue  # it was closed meanwhile
    return False


def _where(mapping: bytes) -> tuple[int, int]:
    start, end = mapping[: mapping.index(b" ")].split(b"-")
    return int(start, 16), int(end, 16)


def _from_file(mapping: bytes, in_memory: frozenset[bytes]) -> bool:
    """Of a line of /proc/pid/maps: whether there is a file behind it that is not memory itself."""
    _, _, _, device, inode, *path = mapping.split(maxsplit=5)
    return inode != b"0" and device not in in_memory and not (path and path[0].startswith(IN_MEMORY))


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
