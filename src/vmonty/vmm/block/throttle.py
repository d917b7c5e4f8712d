"""Limits on a disk's speed: leaky buckets for bytes and for operations."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from vmonty.base.errors import UsageError
from vmonty.vmm.block.buffers import total
from vmonty.vmm.block.device import BlockDevice

BURST_S = 0.1  # what may be done at once after a pause, in seconds of the limit; QEMU's


@dataclass(frozen=True)
class Limits:
    """Bytes and operations a second, 0 for no limit; *total* ones hold for reads and writes together.

    Raises UsageError for a negative number, or a total beside a limit of its parts.
    """

    bps: int = 0
    bps_rd: int = 0
    bps_wr: int = 0
    iops: int = 0
    iops_rd: int = 0
    iops_wr: int = 0

    def __post_init__(self) -> None:
        if any(getattr(self, name) < 0 for name in self.__dataclass_fields__):
            raise UsageError("a disk's limits are bytes and operations a second, 0 for none")
        if (self.bps and (self.bps_rd or self.bps_wr)) or (self.iops and (self.iops_rd or self.iops_wr)):
            raise UsageError("give a disk's limit either for reads and writes together or for each")


class Bucket:
    """Lets *rate* units a second through, and a tenth of a second's worth at once. Thread-safe."""

    def __init__(self, rate: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._full = 0.0  # the moment at which all that was let through is worked off
        self._lock = threading.Lock()

    def take(self, units: int) -> float:
        """Put *units* in; the seconds to wait before they may pass."""
        with self._lock:
            now = self._clock()
            start = max(self._full, now)
            self._full = start + units / self._rate
            return max(0.0, start - now - BURST_S)


class ThrottledDevice(BlockDevice):
    """*inner* within *limits*: an operation that is too early waits, in its thread. Owns *inner*."""

    waits = True

    def __init__(
        self,
        inner: BlockDevice,
        limits: Limits,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self._inner = inner
        self._hurry = threading.Event()
        self._sleep = sleep or self._hurry.wait
        self.read_only = inner.read_only

        def buckets(*rates: int) -> list[Bucket]:
            return [Bucket(rate, clock) for rate in rates if rate]

        both_bytes, both_operations = buckets(limits.bps), buckets(limits.iops)
        self._reads = both_bytes + buckets(limits.bps_rd), both_operations + buckets(limits.iops_rd)
        self._writes = both_bytes + buckets(limits.bps_wr), both_operations + buckets(limits.iops_wr)

    @property
    def size(self) -> int:  # type: ignore[override]  # a snapshot that is applied may change it
        """Bytes, a multiple of 512."""
        return self._inner.size

    def _wait(self, direction: tuple[list[Bucket], list[Bucket]], length: int) -> None:
        wait = max(
            [bucket.take(length) for bucket in direction[0]] + [bucket.take(1) for bucket in direction[1]], default=0.0
        )
        if wait > 0:
            self._sleep(wait)

    def preadv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self._wait(self._reads, total(buffers))
        self._inner.preadv(offset, buffers)

    def pwritev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self._wait(self._writes, total(buffers))
        self._inner.pwritev(offset, buffers)

    def hurry(self, on: bool) -> None:
        if on:
            self._hurry.set()
        else:
            self._hurry.clear()
        self._inner.hurry(on)

    def extents(self) -> Iterator[tuple[int, int]]:
        return self._inner.extents()

    def flush(self) -> None:
        self._inner.flush()

    def discard(self, offset: int, length: int) -> None:
        self._wait(self._writes, 0)
        self._inner.discard(offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self._wait(self._writes, 0 if unmap else length)
        self._inner.write_zeroes(offset, length, unmap)

    def close(self) -> None:
        self._inner.close()
