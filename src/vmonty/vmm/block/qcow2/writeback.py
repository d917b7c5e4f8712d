"""Writing metadata so that the file is consistent at every moment, whenever the process or the host ends.

What is referenced is counted before, and what is counted no more is unreferenced before:

    1  refcount blocks, L2 tables that nothing names yet, a moved refcount table      then sync (data too)
    2  entries of the refcount table, or the header that names the moved one          then sync, if there were any
    3  L2 tables, L1 entries                                                          then sync
    4  only now clusters that were given up may be taken again

A stop in between leaves clusters that are counted and not used. Version 3's dirty bit, set before the first step, has
them collected when the image is opened next.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from vmonty.vmm.block.file import HostFile
from vmonty.vmm.block.qcow2 import header as layout
from vmonty.vmm.block.qcow2.header import DIRTY, Header
from vmonty.vmm.block.qcow2.refcounts import Refcounts, word_bytes
from vmonty.vmm.block.qcow2.tables import OFFSET, Tables

_ENTRIES = 64  # of a table are written together: 512 bytes

Writes = list[tuple[int, bytes]]


@dataclass
class Batch:
    """Everything that was dirty at one moment, as it was then."""

    first: Writes = field(default_factory=list)
    second: Writes = field(default_factory=list)
    third: Writes = field(default_factory=list)
    blocks: set[int] = field(default_factory=set)
    block_entries: set[int] = field(default_factory=set)
    tables: set[int] = field(default_factory=set)
    unlinked: set[int] = field(default_factory=set)
    l1: set[int] = field(default_factory=set)
    table_moved: tuple[int, int] | None = None


class Writeback:
    """Takes batches of dirty metadata and writes them; the device's lock is held for take() and the two after it."""

    def __init__(self, file: HostFile, header: Header, refcounts: Refcounts, tables: Tables) -> None:
        self._file = file
        self._header = header
        self._refcounts = refcounts
        self._tables = tables

    def pending(self) -> bool:
        """Whether memory differs from the file."""
        refcounts, tables = self._refcounts, self._tables
        return bool(
            refcounts.dirty or refcounts.table_dirty or refcounts.table_moved or tables.dirty or tables.l1_dirty
        )

    def take(self) -> Batch:
        """Copy what is dirty; it counts as clean from now on. Raises BlockError, and nothing has changed."""
        header, refcounts, tables = self._header, self._refcounts, self._tables
        # Tables must not name what lies behind the end. Nobody writes behind the high-water mark, which the lock keeps
        # where it is: so this never makes the file shorter.
        if self._file.length() < refcounts.high_water << header.cluster_bits:
            self._file.truncate(refcounts.high_water << header.cluster_bits)
        batch = Batch(
            blocks=refcounts.dirty, block_entries=refcounts.table_dirty, table_moved=refcounts.table_moved,
            tables=tables.dirty, unlinked=tables.unlinked, l1=tables.l1_dirty,
        )  # fmt: skip
        refcounts.dirty, refcounts.table_dirty, refcounts.table_moved = set(), set(), None
        tables.dirty, tables.unlinked, tables.l1_dirty = set(), set(), set()
        refcounts.writing, tables.writing = batch.blocks, batch.tables
        for index in sorted(batch.blocks):
            batch.first.append((refcounts.table[index], refcounts.packed(index)))
        for index in sorted(batch.tables):
            table = tables.table(index)
            assert table is not None
            where = batch.first if index in batch.unlinked else batch.third
            where.append((tables.l1[index] & OFFSET, word_bytes(table)))
        if batch.table_moved:
            batch.first.append((header.refcount_table_offset, word_bytes(refcounts.table)))
            place = layout.REFCOUNT_TABLE.pack(header.refcount_table_offset, header.refcount_table_clusters)
            batch.second.append((layout.REFCOUNT_TABLE_AT, place))
        else:
            for start in sorted({index // _ENTRIES * _ENTRIES for index in batch.block_entries}):
                part = word_bytes(refcounts.table[start : start + _ENTRIES])
                batch.second.append((header.refcount_table_offset + start * 8, part))
        for start in sorted({index // _ENTRIES * _ENTRIES for index in batch.l1}):
            batch.third.append((header.l1_table_offset + start * 8, word_bytes(tables.l1[start : start + _ENTRIES])))
        return batch

    def write(self, batch: Batch) -> None:
        """Write *batch*, without the device's lock. Raises BlockError."""
        file = self._file
        self._mark_dirty()
        for step in (batch.first, batch.second, batch.third):
            for offset, data in step:
                file.write(offset, data)
            if step or step is batch.first:
                file.sync()

    def _mark_dirty(self) -> None:
        header = self._header
        if header.version >= 3 and not header.incompatible & DIRTY:
            header.incompatible |= DIRTY
            try:
                self.write_features()
                self._file.sync()
            except BaseException:
                header.incompatible &= ~DIRTY  # the next batch tries again
                raise

    def write_features(self) -> None:
        """Put the feature bits into the file's header."""
        header = self._header
        data = struct.pack(">QQQ", header.incompatible, header.compatible, header.autoclear)
        self._file.write(layout.FEATURES_AT, data)

    def done(self) -> None:
        """The batch is in the file."""
        self._refcounts.writing, self._tables.writing = set(), set()

    def failed(self, batch: Batch) -> None:
        """The batch is not, or not all of it, in the file: all of it is dirty again."""
        self.done()
        refcounts, tables = self._refcounts, self._tables
        refcounts.dirty |= batch.blocks
        refcounts.table_dirty |= batch.block_entries
        if batch.table_moved:
            refcounts.table_moved = batch.table_moved
        tables.dirty |= batch.tables
        tables.unlinked |= batch.unlinked
        tables.l1_dirty |= batch.l1
