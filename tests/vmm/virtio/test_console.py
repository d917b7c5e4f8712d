"""The console device: multiport control messages as a Linux driver exchanges them, and data both ways."""

from __future__ import annotations

import struct

import pytest

from vmonty.testing.virtio import VirtioDriver
from vmonty.vmm.virtio import console
from vmonty.vmm.virtio.console import Console, Port

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
