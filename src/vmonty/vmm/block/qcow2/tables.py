"""L1 and L2 tables: from guest clusters to host clusters.

Source: docs/interop/qcow2.txt, "Cluster mapping".

    L2 entry    63 COPIED   62 COMPRESSED   9..55 host offset            0 ZERO (version 3)
    compressed  62 set      x..61 sectors - 1   0..x-1 host offset       x = 62 - (cluster_bits - 8)
"""

from __future__ import annotations

import errno
from array import array
from collections import OrderedDict

from vmonty.base.errors import BlockError
from vmonty.vmm.block.file import HostFile
from vmonty.vmm.block.qcow2.header import Header
from vmonty.vmm.block.qcow2.refcounts import Refcounts, words

COPIED, COMPRESSED, ZERO = 1 << 63, 1 << 62, 1
OFFSET = 0x00FF_FFFF_FFFF_FE00
CACHED_BYTES = 16 << 20


class Tables:
    """The active L1 table and a cache of L2 tables. Not thread-safe: its device holds a lock around every call."""

    def __init__(self, file: HostFile, header: Header, refcounts: Refcounts) -> None:
        self._file = file
        self._header = header
        self._refcounts = refcounts
        self.l1 = words(file.read(header.l1_table_offset, header.l1_size * 8))
        self.l1_dirty: set[int] = set()
        self.dirty: set[int] = set()
        self.unlinked: set[int] = set()
        """Tables (by L1 index) whose place no L1 entry in the file names yet."""
        self.writing: set[int] = set()
        self.freed: list[int] = []
        """Host clusters of tables that were replaced."""
        self._cache: OrderedDict[int, array[int]] = OrderedDict()
        self.most = max(8, CACHED_BYTES >> header.cluster_bits)
        shift = 62 - (header.cluster_bits - 8)
        self._compressed_offset = (1 << shift) - 1
        self._compressed_shift = shift
        self._compressed_sectors = (1 << header.cluster_bits - 8) - 1
        self.l2_places = {entry & OFFSET for entry in self.l1}

    def table(self, index: int) -> array[int] | None:
        """The L2 table of L1 entry *index* for looking up, None when there is none. Raises BlockError (EIO)."""
        table = self._cache.get(index)
        if table is not None:
            return table
        offset = self.l1[index] & OFFSET
        if not offset:
            return None
        if not self.valid(offset) or self.l1[index] & ~(OFFSET | COPIED):
            raise self._damaged(f"L1 entry {index} is {self.l1[index]:#x}")
        table = words(self._file.read(offset, self._header.cluster_size))
        self._insert(index, table)
        return table

    def read_table(self, offset: int) -> array[int]:
        """An L2 table by its host offset, as it stands in the file."""
        return words(self._file.read(offset, self._header.cluster_size))

    def writable_table(self, index: int) -> array[int]:
        """The L2 table of L1 entry *index* for changing: made or copied when need be. Raises BlockError."""
        table = self.table(index)
        if table is not None and self.l1[index] & COPIED:
            self._cache.move_to_end(index)
            self.dirty.add(index)
            return table
        cluster, _ = self._refcounts.allocate(1)
        if table is None:
            table = array("Q", bytes(self._header.cluster_size))
            self._insert(index, table)
        else:
            self.freed.append((self.l1[index] & OFFSET) >> self._header.cluster_bits)
        self.l1[index] = cluster << self._header.cluster_bits | COPIED
        self.l2_places.add(cluster << self._header.cluster_bits)
        self.l1_dirty.add(index)
        self.dirty.add(index)
        self.unlinked.add(index)
        return table

    def _insert(self, index: int, table: array[int]) -> None:
        self._cache[index] = table
        if len(self._cache) > self.most:
            for other in self._cache:
                if other not in self.dirty and other not in self.writing and other != index:
                    del self._cache[other]
                    break

    def forget(self) -> None:
        """Drop the cache; nothing may be dirty."""
        assert not self.dirty
        self._cache.clear()
        self.l2_places = {entry & OFFSET for entry in self.l1}

    def valid(self, offset: int) -> bool:
        """Whether a cluster can lie at host *offset*."""
        return 0 < offset < self._refcounts.high_water << self._header.cluster_bits and not offset & (
            self._header.cluster_size - 1
        )

    def host_offset(self, entry: int) -> int:
        """The place of a standard cluster's data, 0 when it has none. Raises BlockError (EIO) for a damaged entry."""
        offset = entry & OFFSET
        if offset and not self.valid(offset):
            raise self._damaged(f"an L2 entry is {entry:#x}")
        return offset

    def compressed_extent(self, entry: int) -> tuple[int, int]:
        """(host offset, bytes at most) of a compressed cluster. Raises BlockError (EIO) for a damaged entry."""
        offset = entry & self._compressed_offset
        sectors = (entry >> self._compressed_shift & self._compressed_sectors) + 1
        length = sectors * 512 - (offset & 511)
        # Compressed data may end with the file, anywhere in its last cluster.
        if offset < self._header.cluster_size or offset >= self._refcounts.high_water << self._header.cluster_bits:
            raise self._damaged(f"an L2 entry is {entry:#x}")
        return offset, length

    def compressed_entry(self, offset: int, length: int) -> int:
        """The L2 entry of *length* bytes of compressed data at host *offset*."""
        sectors = (offset + length - 1 >> 9) - (offset >> 9)
        return COMPRESSED | sectors << self._compressed_shift | offset

    def _damaged(self, what: str) -> BlockError:
        return BlockError(errno.EIO, f"{self._file.name} is damaged: {what}; try vmonty disk check --repair")
