"""The console device: multiport control messages as a Linux driver exchanges them, and data both ways."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator

import pytest

from vmonty.testing.virtio import NEXT, VirtioDriver
from vmonty.vmm.virtio import console
from vmonty.vmm.virtio.console import Console, Port
from vmonty.vmm.virtio.queue import Chain, Queue

from .conftest import Bench

RECEIVE, TRANSMIT, CONTROL_RECEIVE, CONTROL_TRANSMIT = range(4)


class Terminal:
    """A port, and what the guest wrote to it."""

    def __init__(self, **options: object) -> None:
        self.output = bytearray()
        self.port = Port(self.output.extend, **options)  # type: ignore[arg-type]


@pytest.fixture
def terminals() -> list[Terminal]:
    return [Terminal(console=True), Terminal(name="agent")]


@pytest.fixture
def driver(bench: Bench, terminals: list[Terminal]) -> VirtioDriver:
    device = Console(bench.memory, bench.loop, [terminal.port for terminal in terminals], columns=132, rows=43)
    return bench.driver(device)


def messages(driver: VirtioDriver, count: int) -> list[tuple[int, int, int, bytes]]:
    """The next *count* control messages: port, event, value, what follows."""
    found = driver.queues[CONTROL_RECEIVE].wait(count)
    return [(*struct.unpack("<IHH", buffer.data()[:8]), buffer.data()[8:]) for buffer in found]


def tell(driver: VirtioDriver, port: int, event: int, value: int) -> None:
    driver.queues[CONTROL_TRANSMIT].add([struct.pack("<IHH", port, event, value)])


def opened(driver: VirtioDriver) -> VirtioDriver:
    """As Linux's driver: take the ports, then open them."""
    driver.start(size=16)
    for _ in range(12):
        driver.queues[CONTROL_RECEIVE].add([], [64])
    tell(driver, 0xFFFF_FFFF, console.DEVICE_READY, 1)
    assert messages(driver, 2) == [(0, console.DEVICE_ADD, 0, b""), (1, console.DEVICE_ADD, 0, b"")]
    tell(driver, 0, console.PORT_READY, 1)
    assert messages(driver, 3) == [
        (0, console.CONSOLE_PORT, 1, b""),
        (0, console.RESIZE, 0, struct.pack("<HH", 43, 132)),
        (0, console.PORT_OPEN, 1, b""),
    ]
    tell(driver, 1, console.PORT_READY, 1)
    assert messages(driver, 2) == [(1, console.PORT_NAME, 1, b"agent\0"), (1, console.PORT_OPEN, 1, b"")]
    for port in (0, 1):
        tell(driver, port, console.PORT_OPEN, 1)
    return driver


def test_configuration(driver: VirtioDriver) -> None:
    assert [driver.access.config(0, 2), driver.access.config(2, 2), driver.access.config(4, 4)] == [132, 43, 2]
    driver.start(size=16)
    assert len(driver.queues) == 6


def test_output_of_each_port(bench: Bench, driver: VirtioDriver, terminals: list[Terminal]) -> None:
    opened(driver)
    driver.queues[TRANSMIT].add([b"to the ", b"console"])
    driver.queues[5].add([b"to the agent"])
    driver.queues[5].wait()
    bench.settle()
    assert [bytes(terminal.output) for terminal in terminals] == [b"to the console", b"to the agent"]


def test_input_waits_for_the_guest_and_for_room(bench: Bench, driver: VirtioDriver, terminals: list[Terminal]) -> None:
    port = terminals[0].port
    port.receive(b"early ")
    assert port.backlog() == 6
    opened(driver)
    port.receive(b"late")
    bench.settle()
    assert port.backlog() == 10
    for _ in range(3):
        driver.queues[RECEIVE].add([], [4])
    assert b"".join(buffer.data() for buffer in driver.queues[RECEIVE].wait(3)) == b"early late"
    assert port.backlog() == 0
    port.receive(b"more")
    driver.queues[RECEIVE].add([], [2, 100])
    (buffer,) = driver.queues[RECEIVE].wait()
    assert buffer.data() == b"more"


def test_a_driver_without_multiport_has_the_first_port(
    bench: Bench, driver: VirtioDriver, terminals: list[Terminal]
) -> None:
    driver.start(console.SIZE, size=16, queues=2)
    driver.queues[TRANSMIT].add([b"plain"])
    driver.queues[TRANSMIT].wait()
    assert terminals[0].output == b"plain"
    terminals[0].port.receive(b"typed")
    driver.queues[RECEIVE].add([], [10])
    (buffer,) = driver.queues[RECEIVE].wait()
    assert buffer.data() == b"typed"


def test_emergency_write_needs_no_driver(driver: VirtioDriver, terminals: list[Terminal]) -> None:
    driver.access.set_config(console.EMERG_OFFSET, 4, ord("!"))
    assert terminals[0].output == b"!"


def test_a_new_size_is_told(bench: Bench, driver: VirtioDriver, terminals: list[Terminal]) -> None:
    opened(driver)
    device = terminals[0].port._device
    assert device is not None
    device.resize(100, 50)
    assert messages(driver, 1) == [(0, console.RESIZE, 0, struct.pack("<HH", 50, 100))]


def test_messages_without_end_are_bounded(bench: Bench, driver: VirtioDriver, terminals: list[Terminal]) -> None:
    driver.start(size=64)
    for _ in range(1000):
        tell(driver, 0, console.DEVICE_READY, 1)
        driver.queues[CONTROL_TRANSMIT].wait()
    device = terminals[0].port._device
    assert device is not None
    assert len(device._messages) == console.MOST_MESSAGES
    tell(driver, 77, console.PORT_OPEN, 1)
    driver.queues[CONTROL_TRANSMIT].add([b"short"])
    bench.settle()
    assert not driver.broken


def test_a_reset_closes_the_ports(bench: Bench, driver: VirtioDriver, terminals: list[Terminal]) -> None:
    opened(driver)
    bench.settle()
    assert terminals[1].port.guest_open
    driver.access.set_status(0)
    assert not terminals[1].port.guest_open


class Flood:
    """A console whose guest wrote 16 GiB at once; what takes it waits for ``go``, and refuses most of it."""

    def __init__(self, bench: Bench) -> None:
        self.taken = 0
        self.begun, self.go = threading.Event(), threading.Event()
        self.bench = bench
        self.device = Console(bench.memory, bench.loop, [Port(self._take)])
        self.driver = bench.driver(self.device).start(console.SIZE, size=128, queues=2)
        queue = self.driver.queues[TRANSMIT]
        for slot in range(128):
            queue.describe(slot, 8 << 20, 1 << 20, NEXT if slot < 127 else 0, slot + 1 & 127)
        for _ in range(128):
            queue.offer(0)

    def _take(self, data: bytes) -> None:
        self.begun.set()
        assert self.go.wait(30)
        self.taken += len(data)
        assert self.taken <= 16 << 20, "nothing else had a turn"

    def notify(self, times: int = 1) -> None:
        """The guest's, which are on their way when this returns; and the first bytes."""
        for _ in range(times):
            self.driver.access.notify(TRANSMIT)
        assert self.begun.wait(30)

    def meanwhile(self, callback: Callable[[], object]) -> None:
        """Let the loop have *callback* before it goes on."""
        self.bench.loop.call_soon(lambda: (callback(), None)[1])
        self.go.set()
        for _ in range(3):
            self.bench.settle()


@pytest.fixture
def flood(bench: Bench) -> Iterator[Flood]:
    made = Flood(bench)
    yield made
    made.go.set()


def test_the_end_does_not_wait_for_all_that_the_guest_wrote(flood: Flood) -> None:
    flood.notify()
    flood.meanwhile(flood.device.close)
    assert flood.taken == console.MOST_OUTPUT


def test_a_reset_does_not_wait_either_and_forgets_the_rest(flood: Flood) -> None:
    flood.notify()
    flood.meanwhile(lambda: flood.device.set_status(0))
    assert flood.taken == console.MOST_OUTPUT
    flood.driver.start(console.SIZE, size=128, queues=2)
    flood.driver.queues[TRANSMIT].add([b"again"])
    flood.driver.queues[TRANSMIT].wait()
    assert flood.taken == console.MOST_OUTPUT + 5


def test_many_notifications_are_one_turn(flood: Flood) -> None:
    found: list[int] = []
    flood.notify(100)
    flood.meanwhile(lambda: (found.append(flood.taken), flood.device.close()))
    assert found == [console.MOST_OUTPUT]


def test_empty_buffers_take_turns_too(bench: Bench) -> None:
    """A guest that gives each back at once keeps nothing else on the loop from its turn."""

    class Refilled(Queue):
        given = 0

        def push(self, chain: Chain, written: int = 0) -> None:
            super().push(chain, written)
            self.given += 1
            assert self.given <= 10 * console.QUEUE_SIZE, "nothing else had a turn"
            driver.queues[TRANSMIT].offer(0)

    device = Console(bench.memory, bench.loop, [Port(bytes)])
    device.queues[TRANSMIT] = queue = Refilled(bench.memory, TRANSMIT, console.QUEUE_SIZE)
    driver = bench.driver(device).start(console.SIZE, size=16, queues=2)
    driver.queues[TRANSMIT].describe(0, 0x1000, 0)

    def begin() -> None:
        driver.queues[TRANSMIT].offer(0)
        bench.loop.call_soon(device.close)
        device.notified(TRANSMIT)

    bench.loop.run(begin)
    for _ in range(2):
        bench.settle()
    assert queue.given == console.QUEUE_SIZE


def test_long_output_is_whole(bench: Bench) -> None:
    got: list[bytes] = []
    device = Console(bench.memory, bench.loop, [Port(got.append)])
    driver = bench.driver(device).start(console.SIZE, size=16, queues=2)
    first = [bytes([65 + at]) * size for at, size in enumerate((100_000, 1, 0, 3 * console.MOST_OUTPUT, 70_000))]
    queue = driver.queues[TRANSMIT]
    buffers = [queue.add(first, notify=False), queue.add([b"next"], notify=False), queue.add([b"last"])]
    assert queue.wait(3) == buffers
    assert b"".join(got) == b"".join(first) + b"nextlast"
    assert max(map(len, got)) <= console.MOST_OUTPUT


def test_a_fault_of_what_takes_output_loses_no_buffer(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[bytes] = []

    def take(data: bytes) -> None:
        if data == b"bad":
            raise ValueError(data)
        got.append(data)

    failures: list[object] = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    device = Console(bench.memory, bench.loop, [Port(take)])
    driver = bench.driver(device).start(console.SIZE, size=16, queues=2)
    queue = driver.queues[TRANSMIT]
    buffers = [queue.add([b"bad"], notify=False), queue.add([b"good"])]
    assert queue.wait(2) == buffers
    assert got == [b"good"]
    assert len(failures) == 1
