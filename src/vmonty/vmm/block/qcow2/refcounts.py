"""Reference counts of host clusters, and the allocator on them.

Source: docs/interop/qcow2.txt, "Host cluster management". In memory the counts are always true; ``dirty`` blocks differ
from the file. The device writes them in an order that leaves the file consistent at every moment.
"""

from __future__ import annotations

import errno
import sys
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator

from vmonty.base.errors import BlockError
from vmonty.vmm.block.file import HostFile
from vmonty.vmm.block.qcow2.header import MAX_REFCOUNT_TABLE_BYTES, Header

CACHED_BLOCKS = 32
_TYPECODES = {1: "B", 2: "B", 4: "B", 8: "B", 16: "H", 32: "I", 64: "Q"}


def words(data: bytes) -> array[int]:
    """Big-endian 64-bit words."""
    table = array("Q", data)
    if sys.byteorder == "little":
        table.byteswap()
    return table


def word_bytes(table: array[int]) -> bytes:
    """The reverse of words()."""
    return words(table.tobytes()).tobytes()


class Refcounts:
    """The counts of one image. Not thread-safe: its device holds a lock around every call."""

    def __init__(self, file: HostFile, header: Header) -> None:
        self._file = file
        self._header = header
        self.bits = 1 << header.refcount_order
        self.maximum = (1 << self.bits) - 1
        self.per_block = header.cluster_size * 8 // self.bits
        self.table = words(
            file.read(header.refcount_table_offset, header.refcount_table_clusters << header.cluster_bits)
        )
        named = [offset >> header.cluster_bits for offset in self.table if offset]
        self.block_places = set(named)
        # How many entries name a block that another one names: in no sound image any does.
        self.doubled = len(named) - len(self.block_places)
        self.table_dirty: set[int] = set()
        self.table_moved: tuple[int, int] | None = None  # the old place: (first cluster, clusters)
        self.dirty: set[int] = set()
        self.writing: set[int] = set()
        self._blocks: OrderedDict[int, array[int]] = OrderedDict()
        self._hint = 0
        # What holds metadata is never handed out, whatever a damaged image counts.
        self.is_metadata: Callable[[int], bool] = lambda cluster: False
        length = file.length()
        self._limit = length >> header.cluster_bits if file.is_device else 1 << (56 - header.cluster_bits)
        # Behind it no cluster was ever written: a file has zeroes there.
        self.high_water = -(-length // header.cluster_size)

    # -- counts

    def get(self, cluster: int) -> int:
        """The count of a host cluster."""
        index, at = divmod(cluster, self.per_block)
        block = self._block(index)
        return block[at] if block is not None else 0

    def add(self, cluster: int, difference: int) -> int:
        """Change a count, and return it. Raises BlockError (EIO) when it leaves its range."""
        index, at = divmod(cluster, self.per_block)
        block = self._block(index)
        if block is None:
            block = self._new_block(index)
        count = block[at] + difference
        if not 0 <= count <= self.maximum:
            raise BlockError(errno.EIO, f"{self._file.name}: the refcount of cluster {cluster} would become {count}")
        block[at] = count
        self.dirty.add(index)
        if count == 0 and cluster < self._hint:
            self._hint = cluster
        return count

    def blocks(self) -> Iterator[tuple[int, array[int]]]:
        """(first cluster, counts) of each block that counts clusters of the file, once."""
        seen: set[int] = set()
        # However long the table is: behind the high-water mark is nothing to be counted.
        for index, offset in enumerate(self.table[: -(-self.high_water // self.per_block)]):
            if offset and offset not in seen:
                seen.add(offset)
                block = self._block(index)
                assert block is not None
                yield index * self.per_block, block

    # -- allocation

    def allocate(self, wanted: int, *, whole: bool = False) -> tuple[int, int]:
        """Take up to *wanted* contiguous clusters, all of them if *whole*: (first cluster, number), counts set to 1."""
        first = self._hint
        while True:
            first = self._next_free(first)
            count = 1
            while count < wanted and self._is_free(first + count):
                count += 1
            if count == wanted or not whole:
                break
            first += count
        if first + count > self._limit:
            raise BlockError(errno.ENOSPC, f"{self._file.name} is full")
        for cluster in range(first, first + count):
            # A block that this needs may take clusters itself, perhaps just these.
            index, at = divmod(cluster, self.per_block)
            block = self._block(index)
            if block is None:
                self._new_block(index)
                for taken in range(first, cluster):
                    self.add(taken, -1)
                return self.allocate(wanted, whole=whole)
            block[at] = 1
            self.dirty.add(index)
        if not whole:
            self._hint = first + count
        self.high_water = max(self.high_water, first + count)
        return first, count

    def _is_free(self, cluster: int) -> bool:
        return self.get(cluster) == 0 and not self.is_metadata(cluster)

    def _next_free(self, cluster: int) -> int:
        while True:
            index, at = divmod(cluster, self.per_block)
            block = self._block(index)
            if block is None:
                found = at
            else:
                try:
                    found = block.index(0, at)
                except ValueError:
                    cluster = (index + 1) * self.per_block
                    continue
            cluster = index * self.per_block + found
            if not self.is_metadata(cluster):
                return cluster
            cluster += 1

    def _new_block(self, index: int) -> array[int]:
        """Make the counts of a range that has none; they lie in the range's own first cluster."""
        if index >= len(self.table):
            self._grow(index + 1)
            existing = self._block(index)
            if existing is not None:
                return existing
        first = index * self.per_block
        while self.is_metadata(first):
            first += 1
        if first >= min(self._limit, (index + 1) * self.per_block):
            raise BlockError(errno.ENOSPC, f"{self._file.name} is full")
        block = array(_TYPECODES[self.bits], bytes(self.per_block * array(_TYPECODES[self.bits]).itemsize))
        block[first - index * self.per_block] = 1
        self.table[index] = first << self._header.cluster_bits
        self.block_places.add(first)
        self.table_dirty.add(index)
        self.dirty.add(index)
        self._blocks[index] = block
        self.high_water = max(self.high_water, first + 1)
        return block

    def _grow(self, entries: int) -> None:
        """Make room for *entries* blocks: a longer table, at another place."""
        header = self._header
        clusters = -(-max(entries, len(self.table) * 3 // 2) * 8 >> header.cluster_bits)
        if clusters << header.cluster_bits > MAX_REFCOUNT_TABLE_BYTES:
            raise BlockError(errno.EFBIG, f"{self._file.name} cannot grow further; use larger clusters")
        old = header.refcount_table_offset >> header.cluster_bits, header.refcount_table_clusters
        self.table.extend([0] * ((clusters << header.cluster_bits - 3) - len(self.table)))
        first, _ = self.allocate(clusters, whole=True)
        header.refcount_table_offset = first << header.cluster_bits
        header.refcount_table_clusters = clusters
        if self.table_moved is None:
            self.table_moved = old
        else:
            # The place of a moment ago was never written.
            for cluster in range(old[0], old[0] + old[1]):
                self.add(cluster, -1)

    # -- blocks in memory

    def _block(self, index: int) -> array[int] | None:
        block = self._blocks.get(index)
        if block is not None:
            self._blocks.move_to_end(index)
            return block
        if index >= len(self.table) or not self.table[index]:
            return None
        offset, size = self.table[index], self._header.cluster_size
        if offset % size or offset == 0 or offset >= self.high_water << self._header.cluster_bits:
            raise BlockError(errno.EIO, f"{self._file.name} is damaged: a refcount block at {offset:#x}")
        block = self._unpack(self._file.read(offset, size))
        self._blocks[index] = block
        if len(self._blocks) > CACHED_BLOCKS:
            for other in list(self._blocks):
                if other not in self.dirty and other not in self.writing and other != index:
                    del self._blocks[other]
                    break
        return block

    def packed(self, index: int) -> bytes:
        """A block as it stands in the file."""
        block = self._blocks[index]
        if self.bits >= 8:
            swapped = array(block.typecode, block)
            if sys.byteorder == "little":
                swapped.byteswap()
            return swapped.tobytes()
        per_byte = 8 // self.bits
        data = bytearray(len(block) // per_byte)
        for part in range(per_byte):
            # The first count is in the lowest bits.
            shift = part * self.bits
            for at, count in enumerate(block[part::per_byte]):
                if count:
                    data[at] |= count << shift
        return bytes(data)

    def _unpack(self, data: bytes) -> array[int]:
        if self.bits >= 8:
            block = array(_TYPECODES[self.bits], data)
            if sys.byteorder == "little":
                block.byteswap()
            return block
        per_byte = 8 // self.bits
        mask = (1 << self.bits) - 1
        table = [bytes(byte >> part * self.bits & mask for part in range(per_byte)) for byte in range(256)]
        return array("B", b"".join(table[byte] for byte in data))
