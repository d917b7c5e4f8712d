"""Checking an image: what is referenced against what is counted, and repairing the counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from vmonty.base.errors import BlockError, DiskImageError
from vmonty.vmm.block.qcow2 import snapshots
from vmonty.vmm.block.qcow2.disk import Qcow2Disk
from vmonty.vmm.block.qcow2.header import CORRUPT
from vmonty.vmm.block.qcow2.references import References
from vmonty.vmm.block.qcow2.tables import COMPRESSED, COPIED, OFFSET

_MOST_NAMED = 20
_MOST_DIRTY = 16  # refcount blocks


@dataclass
class Report:
    """What a check found: *damages* endanger data, *leaks* only take space (in clusters)."""

    leaks: int = 0
    damages: list[str] = field(default_factory=list)
    damage_count: int = 0
    leaks_fixed: int = 0
    damages_fixed: int = 0

    def damage(self, text: str, *, fixed: bool = False) -> None:
        """Note one."""
        self.damage_count += 1
        self.damages_fixed += fixed
        if len(self.damages) < _MOST_NAMED:
            self.damages.append(text)


def check(disk: Qcow2Disk, *, repair: bool = False) -> Report:
    """Compare all counts and flags with what the tables refer to, and with *repair* correct them.

    Raises DiskImageError when the refcount table itself cannot be read.
    """
    if repair and disk.read_only:
        raise DiskImageError(f"{disk.file.name} is open for reading only")
    with disk.alone():
        if not disk.read_only:
            disk.flush()
        report = Report()
        try:
            references = _references(disk)
            for damage in references.damages:
                report.damage(damage)
            if doubled := disk.refcounts.doubled:
                # None of their counts says which of the ranges it belongs to.
                report.damage(f"{doubled} entries of the refcount table name a block that another one names")
                repair = False
            _compare(disk, references, report, repair)
            if repair:
                disk.flush()
            _check_copied(disk, report, repair)
            if repair and report.damage_count == report.damages_fixed:
                disk.header.incompatible &= ~CORRUPT
                disk.unrepaired = False
                disk.settle()
                disk.writeback.write_features()
        except BlockError as error:
            raise DiskImageError(f"the qcow2 image {disk.file.name} cannot be checked: {error}") from error
        return report


def _references(disk: Qcow2Disk) -> References:
    header, tables = disk.header, disk.tables
    found = References(tables, header.cluster_bits)
    found.add_range(0, header.cluster_size)
    found.add_range(header.l1_table_offset, header.l1_size * 8)
    found.add_range(header.refcount_table_offset, header.refcount_table_clusters << header.cluster_bits)
    for offset in disk.refcounts.table:
        if tables.valid(offset):
            found.add_range(offset, header.cluster_size)
        elif offset:
            found.damages.append(f"a refcount table entry is {offset:#x}")
    found.add_l1(tables.l1)
    kept = snapshots.read(disk.file, header)
    found.add_range(header.snapshots_offset, sum(len(snapshot.pack()) for snapshot in kept))
    for snapshot in kept:
        found.add_range(snapshot.l1_offset, snapshot.l1_size * 8)
        found.add_l1(snapshots.l1_of(disk, snapshot))
    found.finish(tables.read_table)
    return found


def _compare(disk: Qcow2Disk, references: References, report: Report, repair: bool) -> None:
    refcounts = disk.refcounts
    # A block of counts that a repair makes must not lie over what a table names.
    refcounts.is_metadata = lambda cluster: cluster in references.counts or disk.is_metadata(cluster)
    try:
        _find_leaks(disk, references.counts, report, repair)
        _find_damages(disk, references.counts, report, repair)
    finally:
        refcounts.is_metadata = disk.is_metadata


def _find_leaks(disk: Qcow2Disk, wanted: Counter[int], report: Report, repair: bool) -> None:
    refcounts = disk.refcounts
    for first, block in refcounts.blocks():
        if not any(block):
            continue
        for at, count in enumerate(block):
            if count <= wanted.get(first + at, 0):
                continue
            report.leaks += 1
            if repair:
                refcounts.add(first + at, wanted.get(first + at, 0) - count)
                report.leaks_fixed += 1
        _relieve(disk)


def _find_damages(disk: Qcow2Disk, wanted: Counter[int], report: Report, repair: bool) -> None:
    refcounts = disk.refcounts
    for cluster, count in sorted(wanted.items()):
        counted = refcounts.get(cluster)
        if counted < count:
            fixes = repair and count <= refcounts.maximum
            report.damage(f"cluster {cluster} is used {count} times and counted {counted} times", fixed=fixes)
            if fixes:
                refcounts.add(cluster, count - counted)
                _relieve(disk)


def _relieve(disk: Qcow2Disk) -> None:
    """Changed blocks stay in memory until they are written."""
    if len(disk.refcounts.dirty) > _MOST_DIRTY:
        disk.flush()


def _check_copied(disk: Qcow2Disk, report: Report, repair: bool) -> None:
    bits = disk.header.cluster_bits
    named = [entry & OFFSET for entry in disk.tables.l1 if entry & OFFSET]
    if doubled := len(named) - len(set(named)):
        # No sound image has it: going through one table for each of a million entries serves nobody.
        report.damage(f"{doubled} L1 entries name a table that another one names")
        return
    wrong = 0
    for entry in disk.tables.l1:
        offset = entry & OFFSET
        if not disk.tables.valid(offset):
            continue
        wrong += (disk.refcounts.get(offset >> bits) == 1) != bool(entry & COPIED)
        for old in disk.tables.read_table(offset):
            if not old & COMPRESSED and disk.tables.valid(old & OFFSET):
                wrong += (disk.refcounts.get((old & OFFSET) >> bits) == 1) != bool(old & COPIED)
    if wrong:
        report.damage(f"{wrong} entries have a wrong COPIED flag", fixed=repair)
        if repair:
            snapshots.refresh_copied(disk)
