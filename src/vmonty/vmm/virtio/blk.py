"""Block device. Source: virtio 1.2, 5.2 "Block Device"."""

from __future__ import annotations

import errno
import logging
import queue as queues
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from vmonty.base.errors import BlockError
from vmonty.vmm.block.device import SECTOR, BlockDevice
from vmonty.vmm.eventloop import EventLoop
from vmonty.vmm.memory import GuestMemory
from vmonty.vmm.virtio.device import VirtioDevice
from vmonty.vmm.virtio.queue import BrokenRing, Chain, Queue

# 5.2.3 "Feature bits".
SEG_MAX, RO, BLK_SIZE, FLUSH, TOPOLOGY, CONFIG_WCE, MQ, DISCARD, WRITE_ZEROES = (
    1 << bit for bit in (2, 5, 6, 9, 10, 11, 12, 13, 14)
)
# 5.2.6 "Device Operation".
T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
UNMAP = 1
ID_BYTES = 20

HEADER = struct.Struct("<IIQ")
SEGMENT = struct.Struct("<QII")
# 5.2.4 "Device configuration layout", up to write_zeroes_may_unmap.
CONFIG = struct.Struct("<QIIHBBIBBHIBBHIIIIIB3x")
WRITEBACK_OFFSET = 32

QUEUE_SIZE = 256
MOST_SEGMENTS = QUEUE_SIZE - 2
MOST_RANGES = 32  # of one discard or write-zeroes request
MOST_RANGE_SECTORS = 1 << 22  # 2 GiB
WORKERS = 4

# A read or write that takes longer, in nanoseconds, is worth a thread: for any, and for each byte.
# Handing over costs some 100 µs with the threads' waits for the interpreter, and while they work a probe waits too.
SLOW_NS, SLOW_NS_PER_BYTE = 200_000, 0.5
# Requests that usually have so many bytes are copied beside the vCPU, not in its stead.
WORTH_WAKING = 32 << 10
# A request for which the host has no room waits, and is tried again after so many seconds.
ROOM_S = 1.0
# While they are slow every so many is tried all the same. One that met a busy host counts as this many times slow.
PROBE, MOST_SLOW = 8, 4.0


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Topology:
    """What the disk says of itself, in bytes: its logical and physical block, and the I/O sizes that it likes."""

    logical_block: int = 512
    physical_block: int = 4096
    minimum_io: int = 4096
    optimal_io: int = 0


class Blk(VirtioDevice):
    """The disk *backend*, with *serial* as its ID (20 bytes at most).

    Requests go straight between file and guest RAM: on a few threads of its own, concurrently; but reads and writes on
    *loop*'s thread, which had better be the disk's alone, or in its place, while they take no longer than handing them
    over would (the host has the file in its page cache). The cache is write-back: a flush that is answered means that
    all writes answered before are durable. A driver that takes no FLUSH, or switches the cache to write-through, has
    each write flushed before it is answered. A request for which the host has no room waits until it has: an error
    would cost the guest its file system.
    """

    device_id, name = 2, "virtio-blk"
    pci_class = 0x010000

    def __init__(
        self, memory: GuestMemory, loop: EventLoop, backend: BlockDevice, *, serial: str = "",
        topology: Topology | None = None, queue_count: int = 1, workers: int = WORKERS,
    ) -> None:  # fmt: skip
        self.backend = backend
        self._id = serial.encode()[:ID_BYTES].ljust(ID_BYTES, b"\0")
        self._topology = topology or Topology()
        features = SEG_MAX | BLK_SIZE | FLUSH | TOPOLOGY | CONFIG_WCE
        features |= RO if backend.read_only else DISCARD | WRITE_ZEROES
        features |= MQ if queue_count > 1 else 0
        super().__init__(memory, loop, [QUEUE_SIZE] * queue_count, features, self._describe(queue_count))
        self._writeback = True
        self._requests: queues.SimpleQueue[Callable[[], None] | None] = queues.SimpleQueue()
        self._idle = threading.Condition()
        self._in_flight = 0
        self._stopping = False
        self._roomless: list[Callable[[], None]] = []  # requests that wait for room
        self._full = False  # is the host, for this disk? the user was told
        self._worker_count = workers
        self._workers: list[threading.Thread] = []
        # How long reads and writes took lately outside of the threads, as a multiple of what is slow. (There they wait
        # for the interpreter, too.) Not known yet, so slow.
        self._slowness = 2.0
        self._probes = 0
        self._usual_size = 0.0  # of those requests, in bytes

    def _describe(self, queue_count: int) -> bytes:
        shape = self._topology
        blocks = shape.physical_block // shape.logical_block
        return CONFIG.pack(
            self.backend.size // SECTOR, 0, MOST_SEGMENTS, 0, 0, 0, shape.logical_block,
            blocks.bit_length() - 1, 0, shape.minimum_io // shape.logical_block,
            shape.optimal_io // shape.logical_block, 1, 0, queue_count,
            MOST_RANGE_SECTORS, MOST_RANGES, shape.physical_block // SECTOR, MOST_RANGE_SECTORS, MOST_RANGES, 1,
        )  # fmt: skip

    def resized(self) -> None:
        """The backend's size changed: tell the driver. From any thread."""
        struct.pack_into("<Q", self.config, 0, self.backend.size // SECTOR)
        self.change_config(bytes(self.config))

    # ---- the driver's calls -----------------------------------------------------------------------------

    def started(self) -> None:
        """Settle the cache mode, and start the threads when this is the first time."""
        self._writeback = self.has(FLUSH)
        self.config[WRITEBACK_OFFSET] = int(self._writeback)
        while len(self._workers) < self._worker_count:
            name = f"{self.name} {len(self._workers)}"
            worker = threading.Thread(target=self._work, name=name, daemon=True)
            self._workers.append(worker)
            worker.start()

    def stopped(self) -> None:
        """Wait for the requests in flight: they use guest RAM."""
        self.backend.hurry(True)
        self._stopping = True
        self._try_again()
        with self._idle:
            self._idle.wait_for(lambda: not self._in_flight)
        self._stopping = False
        self.backend.hurry(False)

    def close(self) -> None:
        """End the threads. The backend stays open: it is its maker's."""
        self.stopped()
        for _ in self._workers:
            self._requests.put(None)
        for worker in self._workers:
            worker.join()
        self._workers.clear()

    def config_written(self, offset: int, size: int, value: int) -> None:
        """The cache mode is all that can be written (5.2.5)."""
        if offset == WRITEBACK_OFFSET and size == 1 and self.has(CONFIG_WCE) and value in (0, 1):
            self._writeback = bool(value)
            self.config[offset] = value

    def quick(self) -> bool:
        """While the host has the file in its page cache, and requests are small: the vCPU does without its own time."""
        return self._slowness < 1.0 and self._usual_size < WORTH_WAKING

    def handle(self, queue: Queue) -> None:
        """Give each request to the threads."""
        self.serve(queue, lambda chain: self._accept(queue, chain))

    def _accept(self, queue: Queue, chain: Chain) -> int | None:
        header = chain.take(HEADER.size)
        status = chain.take_last()
        if header is None or status is None:
            raise BrokenRing(f"{self.name}: a request without header or status byte")
        kind, _, sector = HEADER.unpack(header)
        if kind <= T_OUT and (self._slowness < 1.0 or self._probe()):
            begin = time.perf_counter_ns()
            if self._answer(chain, kind, sector, status):
                self._note(time.perf_counter_ns() - begin, chain.writable_size + chain.readable_size)
                return chain.writable_size
        with self._idle:
            self._in_flight += 1
        self._requests.put(lambda: self._finish(queue, chain, kind, sector, status))
        return None

    def _probe(self) -> bool:
        self._probes = (self._probes + 1) % PROBE
        return self._probes == 0 and not self.backend.waits

    def _note(self, taken_ns: int, size: int) -> None:
        taken = min(taken_ns / (SLOW_NS + SLOW_NS_PER_BYTE * size), MOST_SLOW)
        # Probes are few: a good one counts for more.
        self._usual_size += (size - self._usual_size) / 8
        self._slowness += (taken - self._slowness) / (8 if self._slowness < 1.0 else 2)

    # ---- the threads ------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (request := self._requests.get()) is not None:
            request()

    def _finish(self, queue: Queue, chain: Chain, kind: int, sector: int, status: memoryview) -> None:
        waits = False
        try:
            waits = not self._answer(chain, kind, sector, status) and self._wait_for_room(
                lambda: self._finish(queue, chain, kind, sector, status)
            )
            if not waits:
                queue.push(chain, chain.writable_size)
                self.signal(queue)
        finally:
            if not waits:
                with self._idle:
                    self._in_flight -= 1
                    if not self._in_flight:
                        self._idle.notify_all()

    def _wait_for_room(self, request: Callable[[], None]) -> bool:
        """Put *request* off, and let its thread go on; False when there is no time."""
        with self._idle:
            if self._stopping:
                return False
            self._roomless.append(request)
            if len(self._roomless) == 1:
                self.loop.call_later(ROOM_S, self._try_again)
        return True

    def _try_again(self) -> None:
        with self._idle:
            requests, self._roomless = self._roomless, []
        for request in requests:
            self._requests.put(request)

    def _answer(self, chain: Chain, kind: int, sector: int, status: memoryview) -> bool:
        """Carry a request out, whatever happens: the guest waits for its status. False: the host has no room for it.

        What it writes ends with the status, and only readers get more.
        """
        try:
            status[0] = self._execute(chain, kind, sector)
            self._full = self._full and kind not in (T_OUT, T_WRITE_ZEROES)
        except BlockError as error:
            status[0] = IOERR
            if error.errno == errno.ENOSPC:
                with self._idle:
                    told, self._full = self._full, True
                if not told:
                    logger.warning("vmonty: %s; the guest waits until there is room", error)
                return False
        except Exception:  # a fault of ours: the guest's request must end all the same, and its thread live on
            status[0] = IOERR
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
        return True

    def _execute(self, chain: Chain, kind: int, sector: int) -> int:
        """Carry a request out; returns its status. Raises BlockError."""
        match kind:
            case 0:
                if not self._inside(sector, chain.writable_size - 1):
                    return IOERR
                self.backend.preadv(sector * SECTOR, chain.writable)
            case 1:
                if self.backend.read_only or not self._inside(sector, chain.readable_size - HEADER.size):
                    return IOERR
                self.backend.pwritev(sector * SECTOR, chain.readable)
                self._settle_write()
            case 4:
                self.backend.flush()
            case 8:
                chain.put(self._id)
            case 11 | 13 if not self.backend.read_only:
                return self._ranges(chain, kind)
            case _:
                return UNSUPP
        return OK

    def _inside(self, sector: int, size: int) -> bool:
        return size % SECTOR == 0 and sector * SECTOR + size <= self.backend.size

    def _settle_write(self) -> None:
        if not self._writeback:
            self.backend.flush()

    def _ranges(self, chain: Chain, kind: int) -> int:
        """5.2.6.2: discard or zero up to MOST_RANGES ranges."""
        size = sum(map(len, chain.readable))  # they stay there: it may be carried out again
        if not size or size % SEGMENT.size or size > MOST_RANGES * SEGMENT.size:
            return IOERR
        ranges = list(SEGMENT.iter_unpack(b"".join(chain.readable)))
        allowed = UNMAP if kind == T_WRITE_ZEROES else 0
        for sector, count, flags in ranges:
            if flags & ~allowed:
                return UNSUPP
            if count > MOST_RANGE_SECTORS or not self._inside(sector, count * SECTOR):
                return IOERR
        for sector, count, flags in ranges:
            if kind == T_DISCARD:
                self.backend.discard(sector * SECTOR, count * SECTOR)
            else:
                self.backend.write_zeroes(sector * SECTOR, count * SECTOR, bool(flags & UNMAP))
        self._settle_write()
        return OK
