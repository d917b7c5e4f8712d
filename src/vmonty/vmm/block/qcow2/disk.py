"""The qcow2 disk: reads and writes of guest clusters.

Metadata is looked up and changed under one lock; data goes between the file and the caller's buffers outside of it, so
operations run side by side. Three rules keep that right:

- A cluster's new place is linked into its L2 table after its data was written; until then other writers of this guest
  cluster wait, and readers see the old place.
- A host cluster that is given up is not taken again before the file says so (writeback.py), nor before every operation
  has ended that had begun by then: one of them may still be using it.
- Snapshots wait until no operation is under way.
"""

from __future__ import annotations

import errno
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from vmonty.base.errors import BlockError
from vmonty.vmm.block.buffers import cut, fill_zero, scatter, total, zeroes
from vmonty.vmm.block.device import SECTOR, BlockDevice
from vmonty.vmm.block.file import HostFile
from vmonty.vmm.block.qcow2 import compression
from vmonty.vmm.block.qcow2.header import DIRTY, Header
from vmonty.vmm.block.qcow2.refcounts import Refcounts
from vmonty.vmm.block.qcow2.tables import COMPRESSED, COPIED, OFFSET, ZERO, Tables
from vmonty.vmm.block.qcow2.writeback import Writeback

_DECOMPRESSED_BYTES = 1 << 20
_ZERO_STEP = 1 << 20
# Clusters of a range that are compared one by one to see whether they lie in one piece.
_MOST_PLAIN = 64


class Kind(Enum):
    """Where bytes of the disk come from."""

    DATA = 1
    ZERO = 2
    BACKING = 3
    COMPRESSED = 4


@dataclass(slots=True)
class Run:
    """*length* bytes from *offset* of the disk on; *where* is their offset in the file, or a compressed L2 entry."""

    kind: Kind
    offset: int
    length: int
    where: int = 0


@dataclass(slots=True)
class Step:
    """A part of a write: *length* bytes to *host*, in place or in *count* new clusters for guest cluster *first* on."""

    length: int
    host: int
    first: int = 0
    count: int = 0
    head: Sequence[Run] = ()
    tail: Sequence[Run] = ()


@dataclass(slots=True)
class Freed:
    """A host cluster that one reference less uses since operation number *since*."""

    since: int
    cluster: int
    punch: bool


class Qcow2Disk(BlockDevice):
    """An open qcow2 image; owns *file* and *backing*. Made by open.py, which has checked the header."""

    def __init__(self, file: HostFile, header: Header, backing: BlockDevice | None) -> None:
        self.file = file
        self.header = header
        self.backing = backing
        self.size = -(-header.size // SECTOR) * SECTOR
        self.read_only = not file.writable
        self.refcounts = Refcounts(file, header)
        self.tables = Tables(file, header, self.refcounts)
        self.refcounts.is_metadata = self.is_metadata
        self.writeback = Writeback(file, header, self.refcounts, self.tables)
        self._bits = header.cluster_bits
        self._cluster = header.cluster_size
        self._l2_bits = header.cluster_bits - 3
        self._zero = ZERO if header.version >= 3 else 0
        self._hole = Kind.BACKING if backing is not None else Kind.ZERO
        self.lock = threading.RLock()  # taken after _flushing where both are
        self._changed = threading.Condition(self.lock)
        self._waiting = 0
        self._flushing = threading.RLock()
        self._allocating: set[int] = set()
        self._operations: dict[int, None] = {}
        self._next_operation = 0
        self._freed: list[Freed] = []
        self._compressed_at = 0
        self._compressed_end = 0
        # It was not closed, and no check has made its counts right: the dirty bit must outlive us.
        self.unrepaired = bool(header.incompatible & DIRTY)
        self._decompressed: OrderedDict[int, bytes] = OrderedDict()
        self._closed = False

    # -- the interface

    def preadv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        length = total(buffers)
        self.check_range(offset, length)
        number = self._begin()
        try:
            with self.lock:
                host = self._plain_data(offset, length)
                runs = [] if host else self.map(offset, length)
            if host:
                self.file.preadv(host, buffers)
            else:
                self._read_runs(runs, buffers)
        finally:
            self._end(number)

    def pwritev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        length = total(buffers)
        self.check_write(offset, length)
        number = self._begin()
        try:
            with self.lock:
                host = self._overwritable(offset, length)
                step = self._plan(offset, length) if length and not host else None
            if host:
                self.file.pwritev(host, buffers)
            elif step is not None:
                self._write_steps(offset, length, step, buffers)
        finally:
            self._end(number)
        self._relieve()

    def extents(self) -> Iterator[tuple[int, int]]:
        reach = self._cluster << self._l2_bits
        for offset in range(0, self.size, reach):
            with self.lock:
                runs = self.map(offset, min(reach, self.size - offset))
            yield from ((run.offset, run.length) for run in runs if run.kind is not Kind.ZERO)

    def flush(self) -> None:
        if not self.read_only:
            with self._flushing:
                self._flush()

    def discard(self, offset: int, length: int) -> None:
        self.check_write(offset, length)
        first, end = self._whole_clusters(offset, length)
        self._unmap(first, end, keep=False, hint=True)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self.check_write(offset, length)
        first, end = self._whole_clusters(offset, length)
        if first >= end or not (self._zero or (unmap and self.backing is None)):
            self._write_zero_bytes(offset, length)
            return
        self._write_zero_bytes(offset, (first << self._bits) - offset)
        self._unmap(first, end, keep=not unmap, hint=False)
        rest = min(end << self._bits, offset + length)
        self._write_zero_bytes(rest, offset + length - rest)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            if not self.read_only:
                self.settle()
        finally:
            self.file.close()
            if self.backing is not None:
                self.backing.close()

    def settle(self) -> None:
        """Write everything, free what was given up, and clear the dirty bit, unless it waits for a repair."""
        self.flush()
        while self._freed or self.writeback.pending():
            self.flush()
        if self.header.incompatible & DIRTY and not self.unrepaired:
            self.header.incompatible &= ~DIRTY
            self.writeback.write_features()
            self.file.sync()

    def switch(self, l1: array[int]) -> None:
        """Take another active L1 table, which the header names already. The lock is held."""
        self.tables.l1 = l1
        self.tables.forget()
        self._decompressed.clear()
        self.size = -(-self.header.size // SECTOR) * SECTOR

    # -- operations under way

    def _begin(self) -> int:
        with self.lock:
            number = self._next_operation
            self._next_operation = number + 1
            self._operations[number] = None
            return number

    def _end(self, number: int) -> None:
        with self.lock:
            del self._operations[number]
            if self._waiting and not self._operations:
                self._changed.notify_all()

    def _wait_for_change(self) -> None:
        """Wait until an allocation or the last operation has ended. The lock is held."""
        self._waiting += 1
        try:
            self._changed.wait()
        finally:
            self._waiting -= 1

    @contextmanager
    def _operation(self) -> Iterator[None]:
        number = self._begin()
        try:
            yield
        finally:
            self._end(number)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock while no operation is under way."""
        with self._flushing, self.lock:
            while self._operations:
                self._wait_for_change()
            yield

    # -- reading

    def _plain_data(self, offset: int, length: int) -> int:
        """Where in the file a range lies that is plain data in one piece, the commonest case, else 0."""
        cluster = offset >> self._bits
        more = (offset + length - 1 >> self._bits) - cluster
        index = cluster & (1 << self._l2_bits) - 1
        if length == 0 or index + more >> self._l2_bits:
            return 0
        table = self.tables.table(cluster >> self._l2_bits)
        if table is None:
            return 0
        entry = table[index]
        if entry & (COMPRESSED | self._zero) or not entry & OFFSET:
            return 0
        if more and not self._in_one_piece(table, index, more):
            return 0
        return self.tables.host_offset(entry) + (offset & self._cluster - 1)

    def _in_one_piece(self, table: array[int], index: int, more: int) -> bool:
        """Whether *more* clusters follow the one of entry *index* in the file as they do for the guest."""
        entry = table[index]
        if more > _MOST_PLAIN or not self.tables.valid((entry & OFFSET) + more * self._cluster):
            return False
        while more and table[index + more] == entry + more * self._cluster:
            more -= 1
        return not more

    def map(self, offset: int, length: int) -> list[Run]:
        """Where a range comes from, merged into as few runs as there are. The lock is held."""
        runs: list[Run] = []
        last: Run | None = None
        mask = self._cluster - 1
        while length > 0:
            cluster = offset >> self._bits
            index = cluster & (1 << self._l2_bits) - 1
            table = self.tables.table(cluster >> self._l2_bits)
            if table is None:
                size = ((1 << self._l2_bits) - index << self._bits) - (offset & mask)
                run = Run(self._hole, offset, min(size, length))
            else:
                size = min(self._cluster - (offset & mask), length)
                run = self._run(table[index], offset, size)
            if last is not None and last.kind is run.kind and self._follows(last, run):
                last.length += run.length
            else:
                runs.append(run)
                last = run
            offset += run.length
            length -= run.length
        return runs

    def _run(self, entry: int, offset: int, length: int) -> Run:
        if entry & COMPRESSED:
            return Run(Kind.COMPRESSED, offset, length, entry)
        if entry & self._zero:
            return Run(Kind.ZERO, offset, length)
        host = self.tables.host_offset(entry)
        if host:
            return Run(Kind.DATA, offset, length, host + (offset & self._cluster - 1))
        return Run(self._hole, offset, length)

    @staticmethod
    def _follows(last: Run, run: Run) -> bool:
        if run.kind is Kind.DATA:
            return last.where + last.length == run.where
        return run.kind is not Kind.COMPRESSED

    def _read_runs(self, runs: Sequence[Run], buffers: Sequence[memoryview]) -> None:
        done = 0
        for run in runs:
            pieces = buffers if len(runs) == 1 else cut(buffers, done, run.length)
            if run.kind is Kind.DATA:
                self.file.preadv(run.where, pieces)
            elif run.kind is Kind.ZERO:
                fill_zero(pieces)
            elif run.kind is Kind.BACKING:
                self._read_backing(run, pieces)
            else:
                start = run.offset & self._cluster - 1
                scatter(memoryview(self._decompress(run.where))[start : start + run.length], pieces)
            done += run.length

    def _read_backing(self, run: Run, buffers: Sequence[memoryview]) -> None:
        assert self.backing is not None
        there = max(0, min(run.length, self.backing.size - run.offset))
        if there:
            self.backing.preadv(run.offset, buffers if there == run.length else cut(buffers, 0, there))
        if there < run.length:
            fill_zero(cut(buffers, there, run.length - there))

    def _decompress(self, entry: int) -> bytes:
        with self.lock:
            data = self._decompressed.get(entry)
            if data is not None:
                self._decompressed.move_to_end(entry)
                return data
            offset, length = self.tables.compressed_extent(entry)
        try:
            data = compression.decompress(self.header.compression_type, self.file.read(offset, length), self._cluster)
        except ValueError as error:
            raise BlockError(
                errno.EIO, f"{self.file.name} is damaged: compressed data at {offset:#x}: {error}"
            ) from error
        with self.lock:
            self._decompressed[entry] = data
            if len(self._decompressed) << self._bits > max(_DECOMPRESSED_BYTES, self._cluster):
                self._decompressed.popitem(last=False)
        return data

    # -- writing

    def is_metadata(self, cluster: int) -> bool:
        """Whether host *cluster* holds the header or a table that is in use."""
        header, bits = self.header, self._bits
        l1, table = header.l1_table_offset >> bits, header.refcount_table_offset >> bits
        return (
            cluster == 0
            or cluster in self.refcounts.block_places
            or cluster << bits in self.tables.l2_places
            or l1 <= cluster < l1 + -(-header.l1_size * 8 >> bits)
            or table <= cluster < table + header.refcount_table_clusters
        )

    def _wait(self, first: int, end: int) -> None:
        """Wait until none of guest clusters first..end-1 is being allocated."""
        while self._allocating and any(first <= cluster < end for cluster in self._allocating):
            self._wait_for_change()

    def _in_place(self, cluster: int) -> int:
        """The host offset of a guest cluster that may be overwritten where it is, else 0."""
        table = self.tables.table(cluster >> self._l2_bits)
        if table is None or not self.tables.l1[cluster >> self._l2_bits] & COPIED:
            return 0
        entry = table[cluster & (1 << self._l2_bits) - 1]
        if not entry & COPIED or entry & (COMPRESSED | self._zero):
            return 0
        host = self.tables.host_offset(entry)
        if host and self.is_metadata(host >> self._bits):
            raise BlockError(errno.EIO, f"{self.file.name} is damaged: data lies over metadata at {host:#x}")
        return host

    def _overwritable(self, offset: int, length: int) -> int:
        """Where in the file a range lies that may be overwritten there in one piece, the commonest case, else 0."""
        cluster = offset >> self._bits
        more = (offset + length - 1 >> self._bits) - cluster
        index = cluster & (1 << self._l2_bits) - 1
        if length == 0 or index + more >> self._l2_bits:
            return 0
        if self._allocating and not self._allocating.isdisjoint(range(cluster, cluster + more + 1)):
            return 0
        host = self._in_place(cluster)
        if not host:
            return 0
        if more:
            table = self.tables.table(cluster >> self._l2_bits)
            first = host >> self._bits
            if table is None or not self._in_one_piece(table, index, more):
                return 0
            if any(map(self.is_metadata, range(first + 1, first + 1 + more))):
                return 0
        return host + (offset & self._cluster - 1)

    def _write_steps(self, offset: int, length: int, step: Step, buffers: Sequence[memoryview]) -> None:
        """Write a range whose first step is *step*."""
        done = 0
        while True:
            pieces = buffers if step.length == length else cut(buffers, done, step.length)
            if step.count:
                self._write_new(step, pieces)
            else:
                self.file.pwritev(step.host, pieces)
            done += step.length
            if done == length:
                return
            with self.lock:
                step = self._plan(offset + done, length - done)

    def _plan(self, offset: int, length: int) -> Step:
        """The first step of a write. The lock is held."""
        mask = self._cluster - 1
        first = offset >> self._bits
        last = offset + length - 1 >> self._bits
        self._wait(first, first + 1)
        host = self._in_place(first)
        cluster = first + 1
        if host:
            while cluster <= last and self._in_place(cluster) == host + (cluster - first << self._bits):
                cluster += 1
            size = min(length, (cluster << self._bits) - offset)
            return Step(size, host + (offset & mask))
        # New clusters, as far as one L2 table reaches.
        last = min(last, first | (1 << self._l2_bits) - 1)
        while cluster <= last and cluster not in self._allocating and not self._in_place(cluster):
            cluster += 1
        table = self.tables.writable_table(first >> self._l2_bits)
        fresh_from = self.refcounts.high_water
        host_cluster, count = self.refcounts.allocate(cluster - first)
        step = Step(min(length, (first + count << self._bits) - offset), host_cluster << self._bits, first, count)
        fresh = host_cluster >= fresh_from and not self.file.is_device
        at = first & (1 << self._l2_bits) - 1
        if fresh and self._hole is Kind.ZERO and not table[at] and not table[at + count - 1]:
            step.host += offset & mask
        else:
            self._plan_copies(step, offset, fresh)
        self._allocating.update(range(first, first + count))
        return step

    def _plan_copies(self, step: Step, offset: int, fresh: bool) -> None:
        """What a step's new clusters take over around its bytes; where they are *fresh* the file has zeroes already."""
        mask = self._cluster - 1
        end = offset + step.length
        try:
            head = self.map(step.first << self._bits, offset & mask)
            tail = self.map(end, -end & mask)
        except BlockError:
            self._give_back(step)
            raise
        if fresh and all(run.kind is Kind.ZERO for run in head):
            step.host += offset & mask
        else:
            step.head = head
        if not (fresh and all(run.kind is Kind.ZERO for run in tail)):
            step.tail = tail

    def _write_new(self, step: Step, pieces: Sequence[memoryview]) -> None:
        try:
            if step.head or step.tail:
                pieces = [*self._old(step.head), *pieces, *self._old(step.tail)]
            self.file.pwritev(step.host, pieces)
        except BaseException:
            with self.lock:
                self._give_back(step)
                self._allocated(step)
            raise
        with self.lock:
            try:
                self.link(step.first, step.count, step.host & -self._cluster | COPIED, self._cluster)
            finally:
                self._allocated(step)

    def _allocated(self, step: Step) -> None:
        """Others may write to a step's clusters again. The lock is held."""
        self._allocating.difference_update(range(step.first, step.first + step.count))
        if self._waiting:
            self._changed.notify_all()

    def link(self, first: int, count: int, entry: int, stride: int) -> None:
        """Make guest clusters *first* on point to *entry*, the next to *entry* + *stride*… The lock is held."""
        table = self.tables.writable_table(first >> self._l2_bits)
        at = first & (1 << self._l2_bits) - 1
        for index in range(at, at + count):
            if table[index]:
                self._free(table[index], punch=False)
            table[index] = entry
            entry += stride

    def _old(self, runs: Sequence[Run]) -> list[memoryview]:
        """What a new cluster takes over from the old one."""
        if not runs:
            return []
        if all(run.kind is Kind.ZERO for run in runs):
            return zeroes(sum(run.length for run in runs))
        view = memoryview(bytearray(sum(run.length for run in runs)))
        self._read_runs(runs, [view])
        return [view]

    def _give_back(self, step: Step) -> None:
        host = step.host >> self._bits
        for cluster in range(host, host + step.count):
            self.refcounts.add(cluster, -1)

    def _free(self, entry: int, *, punch: bool) -> None:
        """Drop an L2 entry's reference. The lock is held."""
        if entry & COMPRESSED:
            offset, length = self.tables.compressed_extent(entry)
            clusters = range(offset >> self._bits, (offset + length - 1 >> self._bits) + 1)
            self._decompressed.clear()
        elif entry & OFFSET:
            cluster = self.tables.host_offset(entry) >> self._bits
            clusters = range(cluster, cluster + 1)
        else:
            return
        self.give_up(clusters, punch=punch)

    def give_up(self, clusters: range, *, punch: bool = False) -> None:
        """One reference less to each host cluster, once the file says so. The lock is held."""
        self._freed += [Freed(self._next_operation, cluster, punch) for cluster in clusters]

    def write_compressed(self, cluster: int, data: bytes | bytearray) -> None:
        """Write a whole guest cluster compressed, or as it is when that is no gain. For a new image's writer."""
        packed = compression.compress(self.header.compression_type, data)
        if len(packed) >= self._cluster:
            self.pwritev(cluster << self._bits, [memoryview(data)[: self.size - (cluster << self._bits)]])
            return
        with self._operation():
            with self.lock:
                self._wait(cluster, cluster + 1)
                self.tables.writable_table(cluster >> self._l2_bits)
                at = self._take_bytes(len(packed))
            self.file.write(at, packed)
            with self.lock:
                self.link(cluster, 1, self.tables.compressed_entry(at, len(packed)), 0)
        self._relieve()

    def _take_bytes(self, length: int) -> int:
        """A place for *length* bytes of compressed data: behind the last, when that cluster has room."""
        sectors_end = -(-(self._compressed_at + length) // 512) * 512
        if self._compressed_at and sectors_end <= self._compressed_end:
            at = self._compressed_at
            if (
                at >> self._bits != (at - 1) >> self._bits
                or self.refcounts.get(at >> self._bits) >= self.refcounts.maximum
            ):
                at = 0
        else:
            at = 0
        if at:
            self.refcounts.add(at >> self._bits, 1)
        else:
            host, _ = self.refcounts.allocate(1)
            at = host << self._bits
            self._compressed_end = at + self._cluster
        self._compressed_at = at + length
        return at

    # -- giving up and zeroing

    def _whole_clusters(self, offset: int, length: int) -> tuple[int, int]:
        """(first, end) of the clusters that a range covers; the disk's last one may be short."""
        first = offset + self._cluster - 1 >> self._bits
        end = offset + length >> self._bits
        if offset + length == self.size:
            end = self.size + self._cluster - 1 >> self._bits
        return first, max(first, end)

    def _unmap(self, first: int, end: int, *, keep: bool, hint: bool) -> None:
        """Make whole clusters read as zeroes: their storage stays with *keep*; with *hint* old contents may stay."""
        while first < end:
            stop = min(end, (first | (1 << self._l2_bits) - 1) + 1)
            with self._operation(), self.lock:
                self._wait(first, stop)
                self._unmap_in_table(first, stop, keep, hint)
            first = stop
            self._relieve()

    def _unmap_in_table(self, first: int, stop: int, keep: bool, hint: bool) -> None:
        if self.tables.table(first >> self._l2_bits) is None and (hint or self.backing is None):
            return
        if hint and self.backing is not None and not self._zero:
            return  # version 2 cannot say zero over a backing file
        gone = self._zero if self.backing is not None else 0
        table = None
        for cluster in range(first, stop):
            index = cluster & (1 << self._l2_bits) - 1
            seen = table if table is not None else self.tables.table(first >> self._l2_bits)
            entry = seen[index] if seen is not None else 0
            if entry == gone or (hint and entry == 0) or (entry == 0 and self.backing is None):
                continue
            if table is None:
                table = self.tables.writable_table(first >> self._l2_bits)
            if keep and entry & COPIED and self._zero:
                table[index] = entry | ZERO
            else:
                table[index] = gone
                self._free(entry, punch=hint or not keep)

    def _write_zero_bytes(self, offset: int, length: int) -> None:
        while length > 0:
            part = min(length, _ZERO_STEP)
            with self.lock:
                runs = self.map(offset, part)
            if any(run.kind is not Kind.ZERO for run in runs):
                self.pwritev(offset, zeroes(part))
            offset += part
            length -= part

    # -- flushing

    def _relieve(self) -> None:
        """Flush when memory holds more changed tables than it should."""
        if len(self.tables.dirty) > self.tables.most // 2 or len(self.refcounts.dirty) > 16:
            self.flush()

    def _flush(self) -> None:
        with self.lock:
            if not self.writeback.pending() and not self._freed and not self.tables.freed:
                batch = None
            else:
                batch = self.writeback.take()
                for cluster in self.tables.freed:
                    self.tables.l2_places.discard(cluster << self._bits)
                    self.give_up(range(cluster, cluster + 1))
                self.tables.freed = []
                freed, self._freed = self._freed, []
        if batch is None:
            self.file.sync()
            return
        try:
            self.writeback.write(batch)
        except BaseException:
            with self.lock:
                self.writeback.failed(batch)
                self._freed = freed + self._freed
            raise
        with self.lock:
            self.writeback.done()
            if batch.table_moved:
                self.give_up(range(batch.table_moved[0], sum(batch.table_moved)))
        self._release(freed)

    def _release(self, freed: list[Freed]) -> None:
        """Count down what the file no longer names, unless an operation may still use it."""
        with self.lock:
            oldest = next(iter(self._operations), self._next_operation)
            ready = [item for item in freed if item.since <= oldest]
            self._freed += [item for item in freed if item.since > oldest]
            holes = sorted(item.cluster for item in ready if item.punch and self.refcounts.get(item.cluster) == 1)
        for first, count in _contiguous(holes):
            self.file.punch(first << self._bits, count << self._bits)
        with self.lock:
            for item in ready:
                # A damaged image may count less than it uses.
                if self.refcounts.get(item.cluster):
                    self.refcounts.add(item.cluster, -1)
            if self._compressed_at and self.refcounts.get(self._compressed_at - 1 >> self._bits) == 0:
                self._compressed_at = 0


def _contiguous(clusters: list[int]) -> Iterator[tuple[int, int]]:
    """(first, number) of each run in a sorted list."""
    start = 0
    for at in range(1, len(clusters) + 1):
        if at == len(clusters) or clusters[at] != clusters[at - 1] + 1:
            yield clusters[start], at - start
            start = at
