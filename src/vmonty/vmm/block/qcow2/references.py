"""Who refers to which host cluster: every table of an image, walked once.

Each L1 and L2 table is read once, however often a damaged or hostile image names it, and counted as often as it is
named: so the work is bounded by the file's length.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator

from vmonty.base.errors import BlockError, DiskImageError
from vmonty.vmm.block.qcow2.header import MAX_L1_BYTES
from vmonty.vmm.block.qcow2.tables import COMPRESSED, COPIED, OFFSET, Tables

MAX_ALL_L1_BYTES = 256 << 20

Reader = Callable[[int], "array[int]"]


class References:
    """The references from L1 tables to clusters, and what is wrong with them."""

    def __init__(self, tables: Tables, cluster_bits: int) -> None:
        self._tables = tables
        self._bits = cluster_bits
        self.counts: Counter[int] = Counter()
        self.damages: list[str] = []
        self._l1_bytes = 0
        self._l2: Counter[int] = Counter()

    def add_range(self, offset: int, length: int) -> None:
        """Count one reference to the clusters of *length* bytes at host *offset*."""
        if length:
            self.counts.update(range(offset >> self._bits, (offset + length - 1 >> self._bits) + 1))

    def add_l1(self, l1: array[int]) -> None:
        """Count what an L1 table refers to. Raises DiskImageError when tables are absurdly large."""
        self._l1_bytes += len(l1) * 8
        if self._l1_bytes > MAX_ALL_L1_BYTES or len(l1) * 8 > MAX_L1_BYTES:
            raise DiskImageError("the qcow2 image is damaged: its snapshots' L1 tables are larger than any disk's")
        for entry in l1:
            if not entry:
                continue
            offset = entry & OFFSET
            if entry & ~(OFFSET | COPIED) or not self._tables.valid(offset):
                self.damages.append(f"an L1 entry is {entry:#x}")
                continue
            self._l2[offset] += 1

    def finish(self, read: Reader) -> None:
        """Count what the L2 tables refer to; *read* gives one by its host offset."""
        for offset, times in self._l2.items():
            self.counts[offset >> self._bits] += times
            for cluster in self.clusters(read(offset)):
                self.counts[cluster] += times
        self._l2.clear()

    def clusters(self, table: array[int]) -> Iterator[int]:
        """The host clusters that an L2 table refers to."""
        for entry in table:
            if not entry:
                continue
            try:
                if entry & COMPRESSED:
                    at, length = self._tables.compressed_extent(entry)
                    yield from range(at >> self._bits, (at + length - 1 >> self._bits) + 1)
                elif at := self._tables.host_offset(entry):
                    yield at >> self._bits
            except BlockError as error:
                self.damages.append(str(error))
