"""Split virtqueues: what a sound driver gets, and what a broken one cannot do."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmonty.testing.virtio import INDIRECT, NEXT, WRITE, DriverQueue, VirtioDriver
from vmonty.vmm.memory import GuestMemory
from vmonty.vmm.virtio import device as virtio_device
from vmonty.vmm.virtio.device import FEATURE_VERSION_1, NEEDS_RESET, VirtioDevice
from vmonty.vmm.virtio.queue import FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, BrokenRing, Chain, Queue

from .conftest import Bench


class Echo(VirtioDevice):
    """Writes back what it reads, and keeps the shapes of what it saw."""

    device_id, name = 0x1234, "echo"

    def __init__(self, bench: Bench, sizes: tuple[int, ...] = (256,)) -> None:
        super().__init__(bench.memory, bench.loop, sizes)
        self.shapes: list[tuple[list[int], list[int]]] = []

    def handle(self, queue: Queue) -> None:
        self.serve(queue, self._echo)

    def _echo(self, chain: Chain) -> int:
        self.shapes.append(([len(view) for view in chain.readable], [len(view) for view in chain.writable]))
        return chain.put(b"".join(chain.readable))


@pytest.fixture
def echo(bench: Bench) -> Echo:
    return Echo(bench)


def started(
    bench: Bench, device: VirtioDevice, features: int | None = None, size: int = 64
) -> tuple[VirtioDriver, DriverQueue]:
    driver = bench.driver(device).start(features, size)
    return driver, driver.queues[0]


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event-idx"])
def test_a_buffer_goes_round(bench: Bench, echo: Echo, indirect: bool, event_idx: bool) -> None:
    features = FEATURE_INDIRECT_DESC | (FEATURE_EVENT_IDX if event_idx else 0)
    _, queue = started(bench, echo, features)
    for turn in range(200):  # several times round the ring
        buffer = queue.add([b"hello ", b"number %d" % turn], [4, 100], indirect)
        assert queue.wait() == [buffer]
        assert buffer.data() == b"hello number %d" % turn
    assert echo.shapes[0] == ([6, 8], [4, 100])
    assert echo.status & NEEDS_RESET == 0


def test_many_at_once_give_one_interrupt(bench: Bench, echo: Echo) -> None:
    _, queue = started(bench, echo)
    for number in range(20):
        queue.add([bytes([number])], [1], notify=False)
    before = bench.interrupts.count
    bench.loop.run(lambda: echo.notified(0))
    assert [buffer.data()[0] for buffer in queue.collect()] == list(range(20))
    assert bench.interrupts.count == before + 1


def test_no_interrupt_where_the_driver_wants_none(bench: Bench, echo: Echo) -> None:
    driver, queue = started(bench, echo, 0)
    driver.memory.write(queue.available, struct.pack("<H", 1))  # VIRTQ_AVAIL_F_NO_INTERRUPT
    queue.add([b"x"], [1])
    bench.settle()
    assert len(queue.collect()) == 1
    assert bench.interrupts.count == 0


def test_event_index_asks_for_a_later_interrupt(bench: Bench, echo: Echo) -> None:
    driver, queue = started(bench, echo)
    driver.memory.write(queue.available + 4 + 2 * queue.size, struct.pack("<H", 2))
    counts = []
    for _ in range(4):
        queue.add([b"x"], [1])
        bench.settle()
        counts.append(bench.interrupts.count)
    # The first is always told, since nothing is known of before; then the one that passes index 2.
    assert counts == [1, 1, 2, 2]


def test_the_device_says_where_it_wants_the_next_notification(bench: Bench, echo: Echo) -> None:
    driver, queue = started(bench, echo)
    for _ in range(3):
        queue.add([b"x"], [1])
    bench.settle()
    assert driver.memory.read(queue.used + 4 + 8 * queue.size, 2) == b"\3\0"


def test_many_notifications_come_back_as_one(bench: Bench, echo: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn leaves something: the others on the loop have theirs between two, not between a hundred."""
    monkeypatch.setattr(virtio_device, "MOST_AT_ONCE", 1)
    _, queue = started(bench, echo)
    turns: list[int] = []
    real = echo.handle
    monkeypatch.setattr(echo, "handle", lambda which: (turns.append(len(echo.shapes)), real(which))[-1])

    def crowd() -> None:
        for _ in range(20):
            queue.add([b"x"], [1], notify=False)
        for _ in range(100):
            echo.notified(0)
        bench.loop.call_soon(lambda: turns.append(-1))

    bench.loop.run(crowd)
    bench.settle()
    bench.settle()
    assert turns.index(-1) <= 102
    assert len(queue.wait(20)) == 20
    assert len(turns) <= 125


def test_reset_and_again(bench: Bench, echo: Echo) -> None:
    driver, queue = started(bench, echo)
    queue.add([b"one"], [3])
    queue.wait()
    driver.start()
    buffer = driver.queues[0].add([b"two"], [3])
    driver.queues[0].wait()
    assert buffer.data() == b"two"


def test_a_chain_from_before_a_reset_is_dropped(bench: Bench) -> None:
    queue, ring = bare(bench.memory)
    ring.add([b"x"], [1], notify=False)
    chain = queue.pop()
    assert chain is not None
    queue.reset()
    enable(queue, ring)
    queue.push(chain, 1)
    assert ring.used_index() == 0


def test_only_the_written_part_is_announced(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(GuestMemory, "written", lambda self, address, size: told.append((address, size)))
    queue, ring = bare(bench.memory)
    buffer = ring.add([], [100, 100, 100], notify=False)
    chain = queue.pop()
    assert chain is not None
    queue.push(chain, 150)
    assert told == [(buffer.writable[0][0], 100), (buffer.writable[1][0], 50)]


def bare(memory: GuestMemory, size: int = 16, features: int = FEATURE_INDIRECT_DESC) -> tuple[Queue, DriverQueue]:
    """A queue without a device, and the driver's end of it."""
    driver = VirtioDriver(memory, access=None, interrupts=None, base=0x10000)  # type: ignore[arg-type]
    ring = DriverQueue(driver, 0, size, 0x1000)
    queue = Queue(memory, 0, 256)
    enable(queue, ring, features)
    return queue, ring


def enable(queue: Queue, ring: DriverQueue, features: int = FEATURE_INDIRECT_DESC) -> None:
    queue.size, queue.descriptors, queue.driver, queue.device = ring.size, ring.descriptors, ring.available, ring.used
    queue.enable(features)


# ---- consuming a chain -----------------------------------------------------------------------------------


def test_headers_come_whole_however_they_are_cut(bench: Bench) -> None:
    queue, ring = bare(bench.memory)
    ring.add([b"he", b"", b"ader", b"payload"], [1, 3, 2], notify=False)
    chain = queue.pop()
    assert chain is not None
    assert (chain.readable_size, chain.writable_size) == (13, 6)
    assert chain.take(14) is None
    assert chain.take(6) == b"header"
    assert b"".join(chain.readable) == b"payload"
    status = chain.take_last()
    assert status is not None
    assert len(status) == 1
    assert [len(view) for view in chain.take_first(3)] == [1, 2]
    assert chain.put(b"abcdef") == 2
    assert chain.take_last() is None


def test_a_pop_can_be_undone(bench: Bench) -> None:
    queue, ring = bare(bench.memory)
    ring.add([b"x"], notify=False)
    first = queue.pop()
    queue.undo_pop()
    again = queue.pop()
    assert first is not None
    assert again is not None
    assert first.head == again.head
    assert queue.pop() is None
    assert queue.in_flight == 1


# ---- broken drivers ----------------------------------------------------------------------------------------


def offer(ring: DriverQueue, *descriptors: tuple[int, int, int, int]) -> None:
    for slot, (address, size, flags, following) in enumerate(descriptors):
        ring.describe(slot, address, size, flags, following)
    ring.offer(0)


@pytest.mark.parametrize(
    ("descriptors", "says"),
    [
        ([(0x100000, 8, NEXT, 0)], "loops"),
        ([(0x100000, 8, NEXT, 1), (0x100000, 8, NEXT, 0)], "loops"),
        ([(0x100000, 8, NEXT, 16)], "descriptor 16 of 16"),
        ([(0x100000, 8, NEXT, 0xFFFF)], "descriptor 65535"),
        ([(16 << 20, 1, 0, 0)], "not in RAM"),
        ([((16 << 20) - 1, 2, 0, 0)], "not in RAM"),
        ([(0xFFFF_FFFF_FFFF_FFFF, 0xFFFF_FFFF, 0, 0)], "not in RAM"),
        ([(0xFFFF_FFFF_FFFF_FFFF, 1, WRITE, 0)], "not in RAM"),
        ([(0, 0xFFFF_FFFF, 0, 0)], "not in RAM"),
        ([(0x100000, 8, NEXT | WRITE, 1), (0x100000, 8, 0, 0)], "behind a writable"),
        ([(0x100000, 0, INDIRECT, 0)], "table of 0 bytes"),
        ([(0x100000, 17, INDIRECT, 0)], "table of 17 bytes"),
        ([(0x100000, 0xFFFF_FFF0, INDIRECT, 0)], "table of"),
        ([(0xFF_FFF8, 16, INDIRECT, 0)], "not in RAM"),
        ([(0x100000, 16, INDIRECT | NEXT, 1), (0x100000, 8, 0, 0)], "where none may be"),
    ],
)  # fmt: skip
def test_a_broken_chain(bench: Bench, descriptors: list[tuple[int, int, int, int]], says: str) -> None:
    queue, ring = bare(bench.memory)
    offer(ring, *descriptors)
    with pytest.raises(BrokenRing, match=says):
        queue.pop()


def test_indirect_inside_indirect(bench: Bench) -> None:
    queue, ring = bare(bench.memory)
    bench.memory.write(0x100000, struct.pack("<QIHH", 0x200000, 16, INDIRECT, 0))
    offer(ring, (0x100000, 16, INDIRECT, 0))
    with pytest.raises(BrokenRing, match="where none may be"):
        queue.pop()


def test_a_loop_in_an_indirect_table(bench: Bench) -> None:
    queue, ring = bare(bench.memory)
    bench.memory.write(0x100000, struct.pack("<QIHH", 0x200000, 16, NEXT, 0) * 2)
    offer(ring, (0x100000, 32, INDIRECT, 0))
    with pytest.raises(BrokenRing, match="loops"):
        queue.pop()


def test_direct_descriptors_may_lead_to_an_indirect_table(bench: Bench) -> None:
    """2.7.5.3.2: the device must take these."""
    queue, ring = bare(bench.memory)
    bench.memory.write(0x100000, struct.pack("<QIHH", 0x200000, 5, WRITE, 0))
    offer(ring, (0x300000, 3, NEXT, 1), (0x100000, 16, INDIRECT | WRITE, 0))
    chain = queue.pop()
    assert chain is not None
    assert (chain.readable_size, chain.writable_size) == (3, 5)


def test_indirect_without_the_feature(bench: Bench) -> None:
    queue, ring = bare(bench.memory, features=0)
    ring.add([b"x"], indirect=True, notify=False)
    with pytest.raises(BrokenRing, match="where none may be"):
        queue.pop()


def test_more_than_4_gib_by_naming_the_same_memory_often(bench: Bench) -> None:
    queue, ring = bare(bench.memory)
    table = b"".join(struct.pack("<QIHH", 0, 15 << 20, NEXT, at + 1) for at in range(300))
    bench.memory.write(0x100000, table)
    offer(ring, (0x100000, len(table), INDIRECT, 0))
    with pytest.raises(BrokenRing, match="4 GiB"):
        queue.pop()


def test_more_descriptors_than_preadv_takes(bench: Bench) -> None:
    queue, ring = bare(bench.memory)
    table = b"".join(struct.pack("<QIHH", 0, 1, NEXT, at + 1) for at in range(1100))
    bench.memory.write(0x100000, table)
    offer(ring, (0x100000, len(table), INDIRECT, 0))
    with pytest.raises(BrokenRing, match="more than 1024"):
        queue.pop()


def test_an_index_that_runs_away(bench: Bench) -> None:
    queue, ring = bare(bench.memory)
    ring.set_index(17)
    with pytest.raises(BrokenRing, match="17 buffers"):
        queue.pop()


def test_a_head_that_is_out_already(bench: Bench) -> None:
    """A guest that offers one buffer for ever gets no more out of the ring than its size."""
    queue, ring = bare(bench.memory)
    chains = []
    for _ in range(16):
        offer(ring, (0x100000, 16, 0, 0))
        chains.append(queue.pop())
    queue.push(chains.pop())
    offer(ring, (0x100000, 16, 0, 0))
    assert queue.pop() is not None
    offer(ring, (0x100000, 16, 0, 0))
    with pytest.raises(BrokenRing, match="more buffers are out than the ring has entries"):
        queue.pop()


def test_a_head_outside_the_table(bench: Bench) -> None:
    queue, ring = bare(bench.memory)
    ring.offer(16)
    with pytest.raises(BrokenRing, match="descriptor 16 of 16"):
        queue.pop()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 0), ("size", 3), ("size", 512), ("descriptors", 0x1008), ("descriptors", 16 << 20),
        ("descriptors", (1 << 64) - 16), ("driver", 0x2001), ("driver", (16 << 20) - 2), ("device", 0x3002),
        ("device", 1 << 40),
    ],
)  # fmt: skip
def test_rings_that_cannot_be(bench: Bench, field: str, value: int) -> None:
    queue = Queue(bench.memory, 0, 256)
    queue.size, queue.descriptors, queue.driver, queue.device = 16, 0x1000, 0x2000, 0x3000
    setattr(queue, field, value)
    with pytest.raises(BrokenRing):
        queue.enable(0)
    assert queue.pop() is None


def test_a_broken_ring_breaks_the_device_until_reset(bench: Bench, echo: Echo) -> None:
    driver, queue = started(bench, echo)
    queue.describe(0, 1 << 40, 1)
    queue.offer(0)
    driver.access.notify(0)
    bench.settle()
    assert driver.broken
    assert driver.access.acknowledge() == 2  # configuration change
    assert "not in RAM" in (echo.failure or "")
    driver.access.notify(0)
    bench.settle()
    assert queue.used_index() == 0
    driver.start()
    assert not driver.broken
    buffer = driver.queues[0].add([b"well again"], [10])
    driver.queues[0].wait()
    assert buffer.data() == b"well again"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    table=st.lists(
        st.tuples(
            st.one_of(st.integers(0, 1 << 24), st.integers(0, (1 << 64) - 1)),
            st.one_of(st.integers(0, 4096), st.integers(0, (1 << 32) - 1)),
            st.integers(0, 7),
            st.one_of(st.integers(0, 16), st.integers(0, 0xFFFF)),
        ),
        min_size=16, max_size=16,
    ),
    available=st.binary(min_size=40, max_size=40),
)  # fmt: skip
def test_any_ring_gives_chains_or_is_broken(
    bench: Bench, table: list[tuple[int, int, int, int]], available: bytes
) -> None:
    queue, ring = bare(bench.memory)
    for slot, entry in enumerate(table):
        ring.describe(slot, *entry)
    bench.memory.write(ring.available, available[:2] + struct.pack("<H", available[2] % 20) + available[4:])
    with contextlib.suppress(BrokenRing):
        for _ in range(20):
            if (chain := queue.pop()) is None:
                break
            assert sum(map(len, chain.readable)) == chain.readable_size
            assert chain.head < 16
            queue.push(chain, chain.writable_size)
            queue.wants_interrupt()


def test_a_feature_set_without_version_1_is_refused(bench: Bench, echo: Echo) -> None:
    driver = bench.driver(echo)
    for features, fine in ((0, False), (FEATURE_VERSION_1 | 1 << 5, False), (FEATURE_VERSION_1, True)):
        driver.access.set_status(0)
        driver.access.set_status(3)
        driver.access.set_features(features)
        driver.access.set_status(11)
        assert (driver.access.status() == 11) is fine
