"""Traditional memory balloon device. Source: virtio 1.2, 5.5 "Traditional Memory Balloon Device"."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterable

from vmonty.base.errors import UsageError
from vmonty.vmm.eventloop import EventLoop
from vmonty.vmm.memory import GuestMemory
from vmonty.vmm.virtio.device import VirtioDevice
from vmonty.vmm.virtio.queue import Chain, Queue

# 5.5.3 "Feature bits".
STATS_VQ, DEFLATE_ON_OOM, REPORTING = 1 << 1, 1 << 2, 1 << 5

# Drivers and devices in use number only the queues that were negotiated; REPORTING without STATS_VQ is not accepted,
# so that these are the same for all.
INFLATE, DEFLATE, STATS, REPORT = range(4)
QUEUE_SIZE = 128
PAGE = 4096
# One message of the driver's has 256 page numbers in Linux.
MOST_PAGES = 4096

CONFIG = struct.Struct("<II")
ACTUAL_OFFSET = 4
STAT = struct.Struct("<HQ")
# 5.5.6.4 "Memory Statistics Tags".
TAGS = (
    "swap_in", "swap_out", "major_faults", "minor_faults", "free_memory", "total_memory", "available_memory",
    "disk_caches", "hugetlb_allocations", "hugetlb_failures",
)  # fmt: skip


def runs(pages: Iterable[int]) -> Iterable[tuple[int, int]]:
    """(first page, count) of each run of consecutive numbers among *pages*, in order."""
    first = count = 0
    for page in sorted(set(pages)):
        if count and page == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = page, 1
    if count:
        yield first, count


class Balloon(VirtioDevice):
    """Takes pages from the guest, and gives their memory back to the host.

    Beyond what the guest hands over when it is asked (``set_target``), free pages that it reports are given back.
    """

    device_id, name = 5, "virtio-balloon"

    def __init__(self, memory: GuestMemory, loop: EventLoop, *, deflate_on_oom: bool = True) -> None:
        features = STATS_VQ | REPORTING | (DEFLATE_ON_OOM if deflate_on_oom else 0)
        super().__init__(memory, loop, [QUEUE_SIZE] * 4, features, CONFIG.pack(0, 0))
        self._stats: dict[str, int] = {}
        self._asked: tuple[Queue, Chain] | None = None
        self._news = threading.Condition()
        self._answers = 0

    def accepts(self, features: int) -> bool:
        """See the queues' numbers."""
        return bool(features & STATS_VQ) or not features & REPORTING

    # ---- the host's side ----------------------------------------------------------------------------------

    def set_target(self, size: int) -> None:
        """Ask the guest to get along with *size* bytes of memory. From any thread. Raises UsageError."""
        if not 0 < size <= self.memory.size:
            raise UsageError(f"a balloon cannot leave the guest {size} bytes; it has {self.memory.size}")
        self.change_config(CONFIG.pack((self.memory.size - size) // PAGE, self.actual))

    @property
    def actual(self) -> int:
        """How many pages the guest says it has handed over; it may say anything, but has no more than its memory."""
        _, actual = CONFIG.unpack(self.config)
        return min(int(actual), self.memory.size // PAGE)

    def state(self) -> dict[str, int | dict[str, int]]:
        """Bytes of memory: all, what the guest shall get along with, what it has now; and what it tells of them."""
        pages, _ = CONFIG.unpack(self.config)
        size = self.memory.size
        return {
            "memory": size, "target": size - pages * PAGE, "actual": size - self.actual * PAGE,
            "statistics": self.statistics(),
        }  # fmt: skip

    def statistics(self, timeout: float = 1.0) -> dict[str, int]:
        """The guest's memory statistics, asked for now; those of before if it does not answer in *timeout* seconds.

        Names as in TAGS, sizes in bytes. Not from the event loop's thread.
        """
        with self._news:
            before = self._answers
        self.loop.call_soon(self._ask)
        with self._news:
            self._news.wait_for(lambda: self._answers > before, timeout)
            return dict(self._stats)

    def _ask(self) -> None:
        """Give the buffer back that the driver left: that is the question (5.5.6.3)."""
        if self._asked is not None and self.running:
            (queue, chain), self._asked = self._asked, None
            queue.push(chain)
            self.signal(queue)

    # ---- the driver's side ----------------------------------------------------------------------------------

    def config_written(self, offset: int, size: int, value: int) -> None:
        """The driver tells how much it handed over."""
        if offset >= ACTUAL_OFFSET and offset + size <= CONFIG.size:
            self.config[offset : offset + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")

    def stopped(self) -> None:
        """Forget the buffer for statistics; a driver that starts anew has its memory back."""
        self._asked = None
        self.config[ACTUAL_OFFSET:] = bytes(4)

    def handle(self, queue: Queue) -> None:
        """Pages come or go, statistics, or free pages."""
        if queue.index == INFLATE:
            self.serve(queue, self._inflate)
        elif queue.index == DEFLATE:
            # The driver uses them again: the host gives memory at the first touch.
            self.serve(queue, lambda chain: 0)
        elif queue.index == STATS and self.has(STATS_VQ):
            self.serve(queue, lambda chain: self._take_stats(queue, chain))
        elif queue.index == REPORT and self.has(REPORTING):
            self.serve(queue, self._reported)

    def _inflate(self, chain: Chain) -> int:
        data = chain.take(min(chain.readable_size, 4 * MOST_PAGES) & ~3) or b""
        for first, count in runs(page for (page,) in struct.iter_unpack("<I", data)):
            self._discard(first * PAGE, count * PAGE)
        return 0

    def _discard(self, address: int, size: int) -> None:
        """Give back the part of it that is RAM; whatever else a driver names it does not have."""
        for block in self.memory.blocks:
            begin, end = max(address, block.base), min(address + size, block.base + block.size)
            if begin < end:
                self.memory.discard(begin, end - begin)

    def _reported(self, chain: Chain) -> int:
        for address, size in chain.places:
            begin, end = -(-address // PAGE) * PAGE, (address + size) // PAGE * PAGE
            if begin < end:
                self._discard(begin, end - begin)
        return 0

    def _take_stats(self, queue: Queue, chain: Chain) -> int | None:
        data = chain.take(min(chain.readable_size, STAT.size * 64)) or b""
        with self._news:
            whole = len(data) // STAT.size * STAT.size
            for tag, value in STAT.iter_unpack(data[:whole]):
                if tag < len(TAGS):
                    self._stats[TAGS[tag]] = value
            self._answers += 1
            self._news.notify_all()
        if self._asked is not None:
            # A driver has one such buffer; who sends another gets the old one back.
            self._asked[0].push(self._asked[1])
        self._asked = (queue, chain)
        return None
