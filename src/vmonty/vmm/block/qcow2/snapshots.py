"""Internal snapshots: copies of the L1 table that share all clusters with the disk.

Source: docs/interop/qcow2.txt, "Snapshots". Each function first lets operations under way end, and leaves the file
consistent: counts go up before a table names a cluster, and down after.
"""

from __future__ import annotations

import struct
import time
from array import array
from dataclasses import dataclass

from vmonty.base.errors import DiskImageError
from vmonty.vmm.block.file import HostFile
from vmonty.vmm.block.qcow2 import header as layout
from vmonty.vmm.block.qcow2.disk import Qcow2Disk
from vmonty.vmm.block.qcow2.header import Header
from vmonty.vmm.block.qcow2.refcounts import word_bytes, words
from vmonty.vmm.block.qcow2.references import References
from vmonty.vmm.block.qcow2.tables import COMPRESSED, COPIED, OFFSET

_ENTRY = struct.Struct(">QIHHIIQII")
_EXTRA = struct.Struct(">QQQ")
_MAX_EXTRA = 1024
_NO_ICOUNT = (1 << 64) - 1


@dataclass(frozen=True)
class Snapshot:
    """One entry of the snapshot table; sizes in bytes, the date in nanoseconds since 1970."""

    id: str
    name: str
    date_ns: int
    vm_clock_ns: int
    vm_state_size: int
    disk_size: int
    l1_offset: int
    l1_size: int
    extra: bytes = b""

    def pack(self) -> bytes:
        """The entry as it stands in the table."""
        identity, name = self.id.encode(errors="surrogateescape"), self.name.encode(errors="surrogateescape")
        seconds, nanoseconds = divmod(self.date_ns, 10**9)
        extra = self.extra or _EXTRA.pack(self.vm_state_size, self.disk_size, _NO_ICOUNT)
        data = _ENTRY.pack(
            self.l1_offset, self.l1_size, len(identity), len(name), seconds, nanoseconds,
            self.vm_clock_ns, min(self.vm_state_size, 0xFFFF_FFFF), len(extra),
        )  # fmt: skip
        data += extra + identity + name
        return data + bytes(-len(data) % 8)


def read(file: HostFile, header: Header) -> list[Snapshot]:
    """The snapshot table. Raises DiskImageError for one that cannot be."""
    result: list[Snapshot] = []
    at = header.snapshots_offset
    end = file.length()
    for _ in range(header.nb_snapshots):
        if at + _ENTRY.size > end:
            raise DiskImageError(f"the qcow2 image {file.name} is damaged: its snapshot table is cut off")
        fields = _ENTRY.unpack(file.read(at, _ENTRY.size))
        l1_offset, l1_size, id_size, name_size, seconds, nanoseconds, clock, vm_state, extra_size = fields
        if extra_size > _MAX_EXTRA or l1_size * 8 > layout.MAX_L1_BYTES:
            raise DiskImageError(f"the qcow2 image {file.name} is damaged: a snapshot says sizes that cannot be")
        if l1_size and (
            l1_offset % header.cluster_size or l1_offset == 0 or l1_offset + l1_size * 8 > end + header.cluster_size
        ):
            raise DiskImageError(f"the qcow2 image {file.name} is damaged: a snapshot's L1 table at {l1_offset:#x}")
        rest = file.read(at + _ENTRY.size, extra_size + id_size + name_size)
        extra, identity, name = rest[:extra_size], rest[extra_size : extra_size + id_size], rest[extra_size + id_size :]
        disk_size = header.size
        if extra_size >= 8:
            vm_state = struct.unpack_from(">Q", extra)[0]
        if extra_size >= 16:
            disk_size = struct.unpack_from(">Q", extra, 8)[0]
        result.append(
            Snapshot(
                identity.decode(errors="surrogateescape"),
                name.decode(errors="surrogateescape"),
                seconds * 10**9 + nanoseconds,
                clock,
                vm_state,
                disk_size,
                l1_offset,
                l1_size,
                extra,
            )
        )
        at += -(-(_ENTRY.size + len(rest)) // 8) * 8
    return result


def find(disk: Qcow2Disk, name: str) -> Snapshot:
    """The snapshot whose id or name is *name*. Raises DiskImageError when there is none."""
    snapshots = read(disk.file, disk.header)
    for snapshot in snapshots:
        if name == snapshot.id:
            return snapshot
    for snapshot in snapshots:
        if name == snapshot.name:
            return snapshot
    there = ", ".join(item.name for item in snapshots) or "none"
    raise DiskImageError(f"{disk.file.name} has no snapshot {name!r}; there are: {there}")


def create(disk: Qcow2Disk, name: str) -> Snapshot:
    """Keep the disk's contents of now under *name*. Raises DiskImageError."""
    if not name or len(name.encode(errors="surrogateescape")) > 255:
        raise DiskImageError("a snapshot needs a name of 1 to 255 bytes")
    _check_writable(disk)
    with disk.alone():
        disk.settle()
        snapshots = read(disk.file, disk.header)
        if any(name in (item.name, item.id) for item in snapshots):
            raise DiskImageError(f"{disk.file.name} has a snapshot {name!r} already")
        if len(snapshots) >= layout.MAX_SNAPSHOTS:
            raise DiskImageError(f"{disk.file.name} has {len(snapshots)} snapshots, as many as there may be")
        l1 = array("Q", [entry & OFFSET for entry in disk.tables.l1])
        _count(disk, l1, 1)
        offset = _place(disk, word_bytes(l1))
        disk.flush()
        refresh_copied(disk)
        identity = str(1 + max((int(item.id) for item in snapshots if item.id.isdecimal()), default=0))
        made = Snapshot(identity, name, time.time_ns(), 0, 0, disk.header.size, offset, len(l1))
        _replace(disk, [*snapshots, made])
        disk.settle()
        return made


def delete(disk: Qcow2Disk, name: str) -> None:
    """Forget the snapshot *name*, by name or id. Raises DiskImageError."""
    _check_writable(disk)
    with disk.alone():
        disk.settle()
        gone = find(disk, name)
        _replace(disk, [item for item in read(disk.file, disk.header) if item.id != gone.id])
        l1 = l1_of(disk, gone)
        _count(disk, l1, -1)
        _drop(disk, gone.l1_offset, gone.l1_size * 8)
        disk.flush()
        refresh_copied(disk)
        disk.settle()


def apply(disk: Qcow2Disk, name: str) -> None:
    """Make the disk what it was at the snapshot *name*, by name or id; its contents of now are lost.

    The disk may change its size. Raises DiskImageError.
    """
    _check_writable(disk)
    with disk.alone():
        disk.settle()
        header = disk.header
        snapshot = find(disk, name)
        target = l1_of(disk, snapshot)
        if len(target) < header.l1_needed(snapshot.disk_size):
            raise DiskImageError(
                f"the qcow2 image {disk.file.name} is damaged: snapshot {name!r} has too small a table"
            )
        target.extend([0] * (1 - len(target)))
        _count(disk, target, 1)
        new = _place(disk, word_bytes(target))
        disk.flush()
        before = array("Q", disk.tables.l1), header.l1_table_offset, header.l1_size * 8
        header.size, header.l1_size, header.l1_table_offset = snapshot.disk_size, len(target), new
        place = layout.SIZE_AND_L1.pack(header.size, 0, header.l1_size, new)
        disk.file.write(layout.SIZE_AT, place)
        disk.file.sync()
        disk.switch(target)
        _count(disk, before[0], -1)
        _drop(disk, *before[1:])
        disk.flush()
        refresh_copied(disk)
        disk.settle()


def _check_writable(disk: Qcow2Disk) -> None:
    if disk.read_only:
        raise DiskImageError(f"{disk.file.name} is open for reading only")


def l1_of(disk: Qcow2Disk, snapshot: Snapshot) -> array[int]:
    return words(disk.file.read(snapshot.l1_offset, snapshot.l1_size * 8))


def _count(disk: Qcow2Disk, l1: array[int], difference: int) -> None:
    """Change the counts of everything that an L1 table refers to; all or nothing."""
    references = References(disk.tables, disk.header.cluster_bits)
    references.add_l1(l1)
    references.finish(disk.tables.read_table)
    if references.damages:
        raise DiskImageError(f"the qcow2 image {disk.file.name} is damaged: {references.damages[0]}; check it first")
    counts = sorted(references.counts.items())
    for cluster, times in counts:
        if not 0 <= disk.refcounts.get(cluster) + difference * times <= disk.refcounts.maximum:
            raise DiskImageError(
                f"{disk.file.name} counts references in {disk.refcounts.bits} bits, which do not hold more snapshots"
                if difference > 0
                else f"the qcow2 image {disk.file.name} is damaged: a cluster is counted too little; check it first"
            )
    for number, (cluster, times) in enumerate(counts):
        disk.refcounts.add(cluster, difference * times)
        if number % 4096 == 0 and len(disk.refcounts.dirty) > 16:
            disk.flush()


def _place(disk: Qcow2Disk, data: bytes) -> int:
    """Write *data* into clusters of its own, and return where."""
    bits = disk.header.cluster_bits
    cluster, _ = disk.refcounts.allocate(-(-len(data) >> bits), whole=True)
    disk.file.write(cluster << bits, data)
    return cluster << bits


def _drop(disk: Qcow2Disk, offset: int, length: int) -> None:
    bits = disk.header.cluster_bits
    if length:
        disk.give_up(range(offset >> bits, (offset + length - 1 >> bits) + 1))


def _replace(disk: Qcow2Disk, snapshots: list[Snapshot]) -> None:
    """Write another snapshot table, and have the header name it."""
    header = disk.header
    old, new = read(disk.file, header), b"".join(snapshot.pack() for snapshot in snapshots)
    old_place = header.snapshots_offset, sum(len(snapshot.pack()) for snapshot in old)
    offset = _place(disk, new) if new else 0
    disk.flush()
    header.nb_snapshots, header.snapshots_offset = len(snapshots), offset
    disk.file.write(layout.SNAPSHOTS_AT, layout.SNAPSHOTS.pack(len(snapshots), offset))
    disk.file.sync()
    _drop(disk, *old_place)


def refresh_copied(disk: Qcow2Disk) -> None:
    """COPIED says that a count is exactly one: set it right in the active tables."""
    refcounts, tables, bits = disk.refcounts, disk.tables, disk.header.cluster_bits
    for index, entry in enumerate(tables.l1):
        if not entry:
            continue
        table = tables.table(index)
        assert table is not None
        changed = False
        for at, old in enumerate(table):
            if old & OFFSET and not old & COMPRESSED:
                single = refcounts.get((old & OFFSET) >> bits) == 1
                if single != bool(old & COPIED):
                    table[at] = old ^ COPIED
                    changed = True
        if changed:
            tables.dirty.add(index)
        if (refcounts.get((entry & OFFSET) >> bits) == 1) != bool(entry & COPIED):
            tables.l1[index] = entry ^ COPIED
            tables.l1_dirty.add(index)
        if len(tables.dirty) > tables.most // 2:
            disk.flush()
