"""The block device: every request, durability by order of calls, concurrency, and requests that make no sense."""

from __future__ import annotations

import errno
import struct
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from vmonty.base.errors import BlockError
from vmonty.testing.virtio import LIMIT_S, Buffer, VirtioDriver
from vmonty.vmm.block.device import BlockDevice
from vmonty.vmm.block.image import open_image
from vmonty.vmm.block.throttle import Limits, ThrottledDevice
from vmonty.vmm.virtio import blk
from vmonty.vmm.virtio import device as virtio_device
from vmonty.vmm.virtio.blk import Blk, Topology

from .conftest import Bench

SIZE = 1 << 20


class MemoryDisk(BlockDevice):
    """A disk in memory that writes down its calls; ``gate`` holds reads up while it is clear."""

    def __init__(self, read_only: bool = False) -> None:
        self.data = bytearray(range(256)) * (SIZE // 256)
        self.size, self.read_only = SIZE, read_only
        self.calls: list[tuple[object, ...]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fails = False
        self.full = 0  # how often there is no room
        self.inside = 0
        self.most_inside = threading.Semaphore(0)

    def preadv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.most_inside.release()
        assert self.gate.wait(LIMIT_S)
        if self.fails:
            raise BlockError(errno.EIO, "on purpose")
        for buffer in buffers:
            buffer[:] = self.data[offset : offset + len(buffer)]
            offset += len(buffer)

    def pwritev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self._need_room()
        self.calls.append(("write", offset, sum(map(len, buffers))))
        for buffer in buffers:
            self.data[offset : offset + len(buffer)] = buffer
            offset += len(buffer)

    def flush(self) -> None:
        self.calls.append(("flush",))

    def discard(self, offset: int, length: int) -> None:
        self.calls.append(("discard", offset, length))

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self._need_room()
        self.calls.append(("zero", offset, length, unmap))
        self.data[offset : offset + length] = bytes(length)

    def _need_room(self) -> None:
        if self.full:
            self.full -= 1
            raise BlockError(errno.ENOSPC, "writing disk.qcow2: No space left on device")

    def close(self) -> None:
        pass


@pytest.fixture
def disk() -> MemoryDisk:
    return MemoryDisk()


@pytest.fixture
def driver(bench: Bench, disk: MemoryDisk) -> VirtioDriver:
    return bench.driver(Blk(bench.memory, bench.loop, disk, serial="vmonty-0")).start()


def ask(
    driver: VirtioDriver,
    kind: int,
    sector: int = 0,
    data: Sequence[bytes] = (),
    room: Sequence[int] = (),
    queue: int = 0,
) -> Buffer:
    header = struct.pack("<IIQ", kind, 0, sector)
    return driver.queues[queue].add([header, *data], [*room, 1], driver.indirect)


def done(driver: VirtioDriver, buffer: Buffer, queue: int = 0) -> tuple[int, bytes]:
    """Wait for *buffer*, alone; its status and data."""
    assert driver.queues[queue].wait() == [buffer]
    data = buffer.data()
    return data[-1], data[:-1]


def test_configuration(bench: Bench, disk: MemoryDisk) -> None:
    device = Blk(bench.memory, bench.loop, disk, topology=Topology(512, 4096, 8192, 65536), queue_count=2)
    access = bench.driver(device).access
    assert access.config(0, 8) == SIZE // 512
    assert access.config(12, 4) == blk.MOST_SEGMENTS
    assert access.config(20, 4) == 512
    assert [access.config(24, 1), access.config(25, 1), access.config(26, 2), access.config(28, 4)] == [3, 0, 16, 128]
    assert access.config(32, 1) == 1
    assert access.config(34, 2) == 2
    assert access.config(36, 4) == access.config(48, 4) == blk.MOST_RANGE_SECTORS
    assert access.config(56, 1) == 1
    assert blk.CONFIG.size == 60


def test_read_and_write(driver: VirtioDriver, disk: MemoryDisk) -> None:
    assert done(driver, ask(driver, blk.T_IN, 1, room=[512, 1024])) == (0, bytes(range(256)) * 6)
    status, _ = done(driver, ask(driver, blk.T_OUT, 3, data=[b"a" * 512, b"b" * 1024]))
    assert status == 0
    assert disk.data[1536 : 1536 + 1536] == b"a" * 512 + b"b" * 1024
    assert disk.calls == [("write", 1536, 1536)]


def test_headers_and_status_may_lie_anyhow(driver: VirtioDriver) -> None:
    """2.7.4: no assumptions about how a message is cut."""
    header = struct.pack("<IIQ", blk.T_IN, 0, 0)
    whole = driver.queues[0].add([header[:3], header[3:10], header[10:]], [100, 413])
    assert done(driver, whole) == (0, bytes(range(256)) * 2)
    data = driver.queues[0].add([struct.pack("<IIQ", blk.T_OUT, 0, 0) + b"z" * 512], [1])
    assert done(driver, data)[0] == 0


def test_flush_and_identity(driver: VirtioDriver, disk: MemoryDisk) -> None:
    assert done(driver, ask(driver, blk.T_FLUSH)) == (0, b"")
    assert disk.calls == [("flush",)]
    assert done(driver, ask(driver, blk.T_GET_ID, room=[20])) == (0, b"vmonty-0".ljust(20, b"\0"))


def test_discard_and_write_zeroes(driver: VirtioDriver, disk: MemoryDisk) -> None:
    ranges = struct.pack("<QII", 8, 8, 0) + struct.pack("<QII", 64, 16, 0)
    assert done(driver, ask(driver, blk.T_DISCARD, data=[ranges]))[0] == 0
    assert done(driver, ask(driver, blk.T_WRITE_ZEROES, data=[struct.pack("<QII", 2, 1, 1)]))[0] == 0
    assert disk.calls == [("discard", 4096, 4096), ("discard", 32768, 8192), ("zero", 1024, 512, True)]


@pytest.mark.parametrize(
    ("kind", "sector", "data", "room", "status"),
    [
        (blk.T_IN, SIZE // 512, [], [512], blk.IOERR),
        (blk.T_IN, SIZE // 512 - 1, [], [1024], blk.IOERR),
        (blk.T_IN, (1 << 64) - 1, [], [512], blk.IOERR),
        (blk.T_IN, 0, [], [511], blk.IOERR),
        (blk.T_OUT, SIZE // 512, [b"x" * 512], [], blk.IOERR),
        (blk.T_OUT, 0, [b"x" * 100], [], blk.IOERR),
        (blk.T_DISCARD, 0, [b"short"], [], blk.IOERR),
        (blk.T_DISCARD, 0, [], [], blk.IOERR),
        (blk.T_DISCARD, 0, [struct.pack("<QII", 0, 8, 1)], [], blk.UNSUPP),
        (blk.T_DISCARD, 0, [struct.pack("<QII", SIZE // 512, 8, 0)], [], blk.IOERR),
        (blk.T_WRITE_ZEROES, 0, [struct.pack("<QII", 0, 0xFFFFFFFF, 0)], [], blk.IOERR),
        (blk.T_WRITE_ZEROES, 0, [struct.pack("<QII", 0, 1, 2)], [], blk.UNSUPP),
        (blk.T_DISCARD, 0, [struct.pack("<QII", 0, 1, 0) * 33], [], blk.IOERR),
        (2, 0, [], [], blk.UNSUPP),
        (0xFFFF_FFFF, 0, [], [], blk.UNSUPP),
    ],
)  # fmt: skip
def test_requests_that_cannot_be_done(
    driver: VirtioDriver, disk: MemoryDisk, kind: int, sector: int, data: list[bytes], room: list[int], status: int
) -> None:
    assert done(driver, ask(driver, kind, sector, data, room))[0] == status
    assert disk.calls == []
    assert not driver.broken


@pytest.mark.parametrize(("readable", "writable"), [([b"short"], [1]), ([b"x" * 16], []), ([], [512])])
def test_requests_without_header_or_status_break_the_device(
    bench: Bench, driver: VirtioDriver, readable: list[bytes], writable: list[int]
) -> None:
    driver.queues[0].add(readable, writable)
    bench.settle()
    assert driver.broken


def test_a_backend_that_fails(driver: VirtioDriver, disk: MemoryDisk) -> None:
    disk.fails = True
    assert done(driver, ask(driver, blk.T_IN, room=[512]))[0] == blk.IOERR


@pytest.mark.parametrize("slowness", [0.0, 2.0], ids=["in its place", "on a thread"])
def test_a_host_without_room(
    bench: Bench, disk: MemoryDisk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, slowness: float
) -> None:
    """The request waits, is carried out as soon as there is room, and the user is told once."""
    monkeypatch.setattr(blk, "ROOM_S", 0.001)
    device = Blk(bench.memory, bench.loop, disk)
    driver = bench.driver(device).start()
    disk.full, device._slowness = 3, slowness
    assert done(driver, ask(driver, blk.T_OUT, 3, data=[b"a" * 512, b"b" * 512])) == (0, b"")
    assert disk.calls == [("write", 1536, 1024)]
    disk.full = 2
    ranges = struct.pack("<QII", 2, 1, 0) + struct.pack("<QII", 8, 1, 0)
    assert done(driver, ask(driver, blk.T_WRITE_ZEROES, data=[ranges]))[0] == 0
    assert disk.calls[1:] == [("zero", 1024, 512, False), ("zero", 4096, 512, False)]
    told = "vmonty: writing disk.qcow2: No space left on device; the guest waits until there is room"
    assert [record.getMessage() for record in caplog.records] == [told] * 2


def test_who_waits_for_room_holds_up_nobody(bench: Bench, disk: MemoryDisk) -> None:
    """More writes without room than there are threads; a discard may be what makes it."""
    device = Blk(bench.memory, bench.loop, disk)
    driver = bench.driver(device).start()
    disk.full = 1 << 30
    for _ in range(2 * blk.WORKERS):
        ask(driver, blk.T_OUT, data=[b"a" * 512])
    trim = ask(driver, blk.T_DISCARD, data=[struct.pack("<QII", 8, 8, 0)])
    assert done(driver, trim)[0] == 0
    assert disk.calls == [("discard", 4096, 4096)]


def test_a_reset_does_not_wait_for_room(driver: VirtioDriver, disk: MemoryDisk) -> None:
    disk.full = 1 << 30
    buffer = ask(driver, blk.T_OUT, data=[b"a" * 512])
    driver.access.set_status(0)
    assert driver.memory.read(buffer.writable[0][0], 1) == bytes((blk.IOERR,))


def test_a_read_only_disk(bench: Bench) -> None:
    disk = MemoryDisk(read_only=True)
    driver = bench.driver(Blk(bench.memory, bench.loop, disk)).start()
    assert driver.features & blk.RO
    assert not driver.features & (blk.DISCARD | blk.WRITE_ZEROES)
    assert done(driver, ask(driver, blk.T_OUT, data=[b"x" * 512]))[0] == blk.IOERR
    assert done(driver, ask(driver, blk.T_DISCARD, data=[struct.pack("<QII", 0, 1, 0)]))[0] == blk.UNSUPP
    assert done(driver, ask(driver, blk.T_IN, room=[512]))[0] == blk.OK
    assert disk.calls == []


def test_requests_run_at_the_same_time(driver: VirtioDriver, disk: MemoryDisk) -> None:
    disk.gate.clear()
    for sector in range(4):
        ask(driver, blk.T_IN, sector, room=[512])
    for _ in range(4):
        assert disk.most_inside.acquire(timeout=LIMIT_S)
    disk.gate.set()
    assert len(driver.queues[0].wait(4)) == 4


def test_a_reset_waits_for_what_is_in_flight(driver: VirtioDriver, disk: MemoryDisk) -> None:
    disk.gate.clear()
    buffer = ask(driver, blk.T_IN, room=[512])
    assert disk.most_inside.acquire(timeout=LIMIT_S)
    resetting = threading.Thread(target=driver.access.set_status, args=(0,))
    resetting.start()
    resetting.join(0.05)
    assert resetting.is_alive()
    disk.gate.set()
    resetting.join(LIMIT_S)
    assert not resetting.is_alive()
    assert driver.access.status() == 0
    assert driver.memory.read(buffer.writable[1][0], 1) == b"\0"  # it ended well


def test_who_is_held_back_does_not_hold_up_the_end(bench: Bench, tmp_path: Path) -> None:
    """Sixteen requests of a disk that takes one in a minute, and then a reset: all are done, at once."""
    image = tmp_path / "disk"
    image.write_bytes(b"x" * (1 << 20))
    with ThrottledDevice(open_image(image, format="raw"), Limits(bps=1024)) as disk:
        driver = bench.driver(Blk(bench.memory, bench.loop, disk)).start()
        first, *_ = [ask(driver, blk.T_IN, room=[65536]) for _ in range(16)]
        assert driver.queues[0].wait() == [first]
        resetting = threading.Thread(target=driver.access.set_status, args=(0,), daemon=True)
        resetting.start()
        resetting.join(LIMIT_S)
        assert not resetting.is_alive()
        assert first.data() == b"x" * 65536 + b"\0"


def test_write_through_flushes_before_it_answers(bench: Bench, disk: MemoryDisk) -> None:
    device = Blk(bench.memory, bench.loop, disk)
    driver = bench.driver(device).start(device.features & ~blk.FLUSH)
    assert driver.access.config(blk.WRITEBACK_OFFSET, 1) == 0
    assert done(driver, ask(driver, blk.T_OUT, data=[b"x" * 512]))[0] == 0
    assert disk.calls == [("write", 0, 512), ("flush",)]


def test_the_driver_switches_the_cache_mode(driver: VirtioDriver, disk: MemoryDisk) -> None:
    assert driver.access.config(blk.WRITEBACK_OFFSET, 1) == 1
    driver.access.set_config(blk.WRITEBACK_OFFSET, 1, 0)
    assert done(driver, ask(driver, blk.T_OUT, data=[b"x" * 512]))[0] == 0
    assert disk.calls == [("write", 0, 512), ("flush",)]
    driver.access.set_config(blk.WRITEBACK_OFFSET, 1, 7)
    assert driver.access.config(blk.WRITEBACK_OFFSET, 1) == 0


def test_several_queues(bench: Bench, disk: MemoryDisk) -> None:
    driver = bench.driver(Blk(bench.memory, bench.loop, disk, queue_count=3)).start()
    assert len(driver.queues) == 3
    for queue in range(3):
        assert done(driver, ask(driver, blk.T_IN, queue, room=[512], queue=queue), queue)[0] == 0


def test_a_disk_that_grows_tells_the_driver(bench: Bench, disk: MemoryDisk) -> None:
    device = Blk(bench.memory, bench.loop, disk)
    driver = bench.driver(device).start()
    disk.size = 2 * SIZE
    device.resized()
    assert driver.access.acknowledge() == 2
    assert driver.access.config(0, 8) == 2 * SIZE // 512


def readers(disk: MemoryDisk, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads that read from *disk*, from now on."""
    threads: list[str] = []
    read = disk.preadv

    def preadv(offset: int, buffers: Sequence[memoryview]) -> None:
        threads.append(threading.current_thread().name)
        read(offset, buffers)

    monkeypatch.setattr(disk, "preadv", preadv)
    return threads


def test_a_vcpu_does_a_few_requests_itself(bench: Bench, disk: MemoryDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the disk answers at once; after some it goes on, and the loop's thread does the rest."""
    monkeypatch.setattr(blk, "SLOW_NS", 10**12)
    monkeypatch.setattr(virtio_device, "MOST_FOR_VCPU", 16)
    device = Blk(bench.memory, bench.loop, disk)
    driver = bench.driver(device).start()
    assert not device.quick(), "nobody knows yet"
    while not device.quick():
        assert done(driver, ask(driver, blk.T_IN, room=[512]))[0] == 0
    bench.settle()
    monkeypatch.setattr(driver.access, "notify", lambda index: None)
    threads = readers(disk, monkeypatch)
    for sector in range(20):
        ask(driver, blk.T_IN, sector, room=[512])
    while not bench.loop.borrow(lambda: device.notified(0)):
        bench.settle()  # its thread has yet to go to sleep
    assert len(driver.queues[0].wait(20)) == 20
    ours = threading.current_thread().name
    assert threads == [ours] * 16 + [bench.loop.name] * 4


def test_a_disk_that_was_slow_is_tried_again(bench: Bench, disk: MemoryDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads do its requests, but for one in some; when that is quick, and the next, there is no need for them."""
    device = Blk(bench.memory, bench.loop, disk)
    driver = bench.driver(device).start()
    threads = readers(disk, monkeypatch)

    def at_once(count: int) -> int:
        threads.clear()
        for _ in range(count):
            assert done(driver, ask(driver, blk.T_IN, room=[512]))[0] == 0
        bench.settle()
        return threads.count(bench.loop.name)

    monkeypatch.setattr(blk, "SLOW_NS", 1)
    assert at_once(4 * blk.PROBE) == 4
    assert not device.quick()
    monkeypatch.setattr(blk, "SLOW_NS", 10**12)
    assert at_once(4 * blk.PROBE) > 4
    assert device.quick()
    monkeypatch.setattr(blk, "SLOW_NS", 1)
    assert at_once(2 * blk.PROBE) > 2
    assert not device.quick()


def test_large_requests_are_no_vcpus_work(bench: Bench, disk: MemoryDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """However quick the disk: the vCPU would stand still meanwhile. A few small ones, and it is again."""
    monkeypatch.setattr(blk, "SLOW_NS", 10**12)
    device = Blk(bench.memory, bench.loop, disk)
    driver = bench.driver(device).start()

    def ask_until_quick(wanted: bool, room: int) -> int:
        for count in range(100):
            if device.quick() is wanted:
                return count
            assert done(driver, ask(driver, blk.T_IN, room=[room]))[0] == 0
            bench.settle()
        raise AssertionError(f"after 100 requests of {room} bytes quick() is not {wanted}")

    ask_until_quick(True, 512)
    assert ask_until_quick(False, 256 << 10) > 0
    assert ask_until_quick(True, 4096) > 0


def test_what_is_done_is_told_while_the_rest_goes_on(
    bench: Bench, disk: MemoryDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread does a batch; the driver gets on with its first requests while the later ones wait for the disk."""
    monkeypatch.setattr(blk, "SLOW_NS", 10**12)
    monkeypatch.setattr(virtio_device, "UNTOLD_NS", 0)
    device = Blk(bench.memory, bench.loop, disk)
    driver = bench.driver(device).start()
    while not device.quick():
        assert done(driver, ask(driver, blk.T_IN, room=[512]))[0] == 0
    bench.settle()
    threads = readers(disk, monkeypatch)
    third = threading.Event()
    read = disk.preadv

    def preadv(offset: int, buffers: Sequence[memoryview]) -> None:
        if offset == 2 * 512:
            assert third.wait(LIMIT_S)
        read(offset, buffers)

    monkeypatch.setattr(disk, "preadv", preadv)
    with monkeypatch.context() as quiet:
        quiet.setattr(driver.access, "notify", lambda index: None)
        for sector in range(3):
            ask(driver, blk.T_IN, sector, room=[512])
    driver.access.notify(0)
    assert len(driver.queues[0].wait(2)) == 2
    third.set()
    assert len(driver.queues[0].wait()) == 1
    assert threads == [bench.loop.name] * 3
