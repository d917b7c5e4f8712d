"""The network device: frames both ways, merged buffers, offloads, back pressure, filters."""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence

import pytest

from vmonty.testing.virtio import Buffer, VirtioDriver
from vmonty.vmm.net.backend import Accepts, Gso, NetBackend, Offload, Receive
from vmonty.vmm.virtio import net
from vmonty.vmm.virtio.net import Net

from .conftest import Bench

MAC = bytes.fromhex("525400123456")
OTHER = bytes.fromhex("525400aaaaaa")
GROUP = bytes.fromhex("01005e000001")


class Cable(NetBackend):
    """Keeps what is sent; ``give`` brings a frame in, and remembers it when the guest has no room."""

    def __init__(self, offloads: bool = True) -> None:
        self.offloads = offloads
        self.sent: list[tuple[bytes, Offload | None]] = []
        self.accepted = Accepts.NOTHING
        self.refused: list[tuple[bytes, Offload | None]] = []
        self.readied = threading.Semaphore(0)
        self.receive: Receive | None = None

    def start(self, receive: Receive) -> None:
        self.receive = receive

    def guest_accepts(self, accepts: Accepts) -> None:
        self.accepted = accepts

    def send(self, frame: Sequence[bytes | bytearray | memoryview], offload: Offload | None) -> None:
        self.sent.append((b"".join(frame), offload))

    def ready(self) -> None:
        self.readied.release()
        waiting, self.refused = self.refused, []
        for frame, offload in waiting:
            self.give(frame, offload)

    def give(self, frame: bytes, offload: Offload | None = None) -> bool:
        assert self.receive is not None
        if not self.receive(frame, offload):
            self.refused.append((frame, offload))
            return False
        return True

    def close(self) -> None:
        self.receive = None


def frame(to: bytes = MAC, size: int = 100) -> bytes:
    return to + OTHER + b"\x08\x00" + bytes(at & 0xFF for at in range(size - 14))


def header(*fields: int) -> bytes:
    return net.HEADER.pack(*(*fields, *[0] * (7 - len(fields))))


@pytest.fixture
def cable() -> Cable:
    return Cable()


@pytest.fixture
def driver(bench: Bench, cable: Cable) -> VirtioDriver:
    return bench.driver(Net(bench.memory, bench.loop, cable, MAC, mtu=1500)).start()


def received(driver: VirtioDriver, count: int = 1) -> list[bytes]:
    return [buffer.data() for buffer in driver.queues[net.RECEIVE].wait(count)]


def command(driver: VirtioDriver, group: int, number: int, data: bytes) -> bool:
    buffer = driver.queues[net.CONTROL].add([bytes((group, number)), data], [1])
    assert driver.queues[net.CONTROL].wait() == [buffer]
    return buffer.data() == b"\0"


def test_configuration(driver: VirtioDriver) -> None:
    assert bytes(driver.access.config(at, 1) for at in range(6)) == MAC
    assert driver.access.config(6, 2) == 1
    assert driver.access.config(10, 2) == 1500
    assert driver.features & net.MTU


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_frame_goes_out(bench: Bench, driver: VirtioDriver, cable: Cable, pieces: int) -> None:
    whole = header() + frame()
    step = -(-len(whole) // pieces)
    driver.queues[net.TRANSMIT].add([whole[at : at + step] for at in range(0, len(whole), step)], [], driver.indirect)
    driver.queues[net.TRANSMIT].wait()
    assert cable.sent == [(frame(), None)]


def test_offloads_go_out(bench: Bench, driver: VirtioDriver, cable: Cable) -> None:
    driver.queues[net.TRANSMIT].add([header(1, 1, 54, 1448, 34, 16), frame(size=9000)])
    driver.queues[net.TRANSMIT].add([header(1, 0, 0, 0, 34, 16), frame()])
    bench.settle()
    assert [offload for _, offload in cable.sent] == [
        Offload(True, 34, 16, Gso.TCP4, 1448, 54),
        Offload(True, 34, 16, Gso.NONE, 0, 0),
    ]


@pytest.mark.parametrize(
    "fields",
    [
        (1, 0, 0, 0, 90, 9), (1, 0, 0, 0, 0xFFFF, 0xFFFF), (1, 9, 0, 100, 34, 16), (0, 1, 54, 1448, 0, 0),
        (1, 1, 54, 0, 34, 16),
    ],
)  # fmt: skip
def test_offloads_that_make_no_sense_drop_the_frame(
    bench: Bench, driver: VirtioDriver, cable: Cable, fields: tuple[int, ...]
) -> None:
    driver.queues[net.TRANSMIT].add([header(*fields), frame()])
    bench.settle()
    assert cable.sent == []
    assert len(driver.queues[net.TRANSMIT].collect()) == 1
    assert not driver.broken


@pytest.mark.parametrize("size", [0, 13, 66000])
def test_frames_of_no_size_are_dropped(bench: Bench, driver: VirtioDriver, cable: Cable, size: int) -> None:
    driver.queues[net.TRANSMIT].add([header(), bytes(size)])
    bench.settle()
    assert cable.sent == []
    assert not driver.broken


def test_a_frame_without_header_breaks_the_device(bench: Bench, driver: VirtioDriver) -> None:
    driver.queues[net.TRANSMIT].add([b"short"])
    bench.settle()
    assert driver.broken


def test_a_frame_comes_in(driver: VirtioDriver, cable: Cable) -> None:
    driver.queues[net.RECEIVE].add([], [1526])
    assert cable.give(frame(), Offload(True, 34, 16, Gso.TCP4, 1448, 54))
    assert received(driver) == [header(1, 1, 54, 1448, 34, 16, 1) + frame()]


def test_a_large_frame_is_spread_over_merged_buffers(driver: VirtioDriver, cable: Cable) -> None:
    for _ in range(5):
        driver.queues[net.RECEIVE].add([], [1000, 500])
    assert cable.give(frame(size=4000))
    parts = received(driver, 3)
    assert [len(part) for part in parts] == [1500, 1500, 1012]
    assert b"".join(parts) == header(0, 0, 0, 0, 0, 0, 3) + frame(size=4000)


def test_without_merging_a_frame_that_is_too_long_is_dropped(bench: Bench, cable: Cable) -> None:
    device = Net(bench.memory, bench.loop, cable, MAC)
    driver = bench.driver(device).start(net.MAC)
    driver.queues[net.RECEIVE].add([], [500])
    assert cable.give(frame(size=1000))
    assert cable.give(frame(size=300))
    assert received(driver) == [header(0, 0, 0, 0, 0, 0, 1) + frame(size=300)]


def test_back_pressure(bench: Bench, driver: VirtioDriver, cable: Cable) -> None:
    driver.queues[net.RECEIVE].add([], [1000])
    assert not cable.give(frame(size=2000))
    assert not cable.give(frame(size=1500))
    for _ in range(6):
        driver.queues[net.RECEIVE].add([], [1000])
    bench.settle()
    data = b"".join(received(driver, 5))
    assert frame(size=2000)[-900:] in data
    assert frame(size=1500)[-500:] in data
    assert cable.refused == []


def test_nothing_comes_before_the_driver_is_ready(bench: Bench, cable: Cable) -> None:
    driver = bench.driver(Net(bench.memory, bench.loop, cable, MAC))
    assert not cable.give(frame())
    driver.start()
    bench.settle()
    driver.queues[net.RECEIVE].add([], [1526])
    assert len(received(driver)) == 1


def test_a_receive_buffer_without_room_for_the_header_breaks_the_device(
    bench: Bench, driver: VirtioDriver, cable: Cable
) -> None:
    driver.queues[net.RECEIVE].add([], [4])
    cable.give(frame())
    bench.settle()
    assert driver.broken


def test_the_backend_knows_what_the_guest_accepts(bench: Bench, cable: Cable) -> None:
    device = Net(bench.memory, bench.loop, cable, MAC)
    driver = bench.driver(device).start(net.GUEST_CSUM | net.GUEST_TSO4 | net.CTRL_VQ | net.CTRL_GUEST_OFFLOADS)
    assert cable.accepted == Accepts.CHECKSUM | Accepts.TCP4
    assert command(driver, net.CLASS_GUEST_OFFLOADS, 0, struct.pack("<Q", net.GUEST_CSUM))
    assert cable.accepted == Accepts.CHECKSUM
    assert not command(driver, net.CLASS_GUEST_OFFLOADS, 0, struct.pack("<Q", net.GUEST_TSO6))
    driver.access.set_status(0)
    assert cable.accepted == Accepts.NOTHING


def test_no_offloads_with_a_backend_that_has_none(bench: Bench) -> None:
    driver = bench.driver(Net(bench.memory, bench.loop, Cable(offloads=False), MAC))
    assert not driver.access.features() & (net.GUEST_OFFLOADS | net.HOST_OFFLOADS)


@pytest.mark.parametrize("features", [net.GUEST_TSO4, net.HOST_TSO6, net.CTRL_RX])
def test_features_without_those_that_they_need_are_refused(bench: Bench, cable: Cable, features: int) -> None:
    with pytest.raises(AssertionError, match="refuses"):
        bench.driver(Net(bench.memory, bench.loop, cable, MAC)).start(features)


def passing(driver: VirtioDriver, cable: Cable, *addresses: bytes, tag: int | None = None) -> list[bool]:
    """Which of frames to *addresses* reach the guest."""
    result = []
    for address in addresses:
        whole = frame(address)
        if tag is not None:
            whole = whole[:12] + b"\x81\x00" + struct.pack(">H", tag) + whole[12:]
        buffer = driver.queues[net.RECEIVE].add([], [1526])
        assert cable.give(whole)
        got = driver.queues[net.RECEIVE].collect()
        result.append(got == [buffer])
        if not got:
            # Take the buffer back with a broadcast, so that the next frame finds its own.
            assert cable.give(frame(net.BROADCAST))
            driver.queues[net.RECEIVE].wait()
    return result


def test_receive_filters(driver: VirtioDriver, cable: Cable) -> None:
    everyone = (MAC, OTHER, GROUP, net.BROADCAST)
    assert passing(driver, cable, *everyone) == [True] * 4
    assert command(driver, net.CLASS_RX, net.PROMISC, b"\0")
    assert passing(driver, cable, *everyone) == [True, False, False, True]
    tables = struct.pack("<I", 1) + OTHER + struct.pack("<I", 1) + GROUP
    assert command(driver, net.CLASS_MAC, 0, tables)
    assert passing(driver, cable, *everyone) == [True, True, True, True]
    assert command(driver, net.CLASS_MAC, 0, bytes(8))
    assert command(driver, net.CLASS_RX, net.ALLMULTI, b"\1")
    assert passing(driver, cable, *everyone) == [True, False, True, True]
    assert command(driver, net.CLASS_MAC, 1, OTHER)
    assert passing(driver, cable, *everyone) == [False, True, True, True]


def test_vlan_filter(driver: VirtioDriver, cable: Cable) -> None:
    assert passing(driver, cable, MAC, tag=5) == [False]
    assert command(driver, net.CLASS_VLAN, 0, struct.pack("<H", 5))
    assert passing(driver, cable, MAC, tag=5) == [True]
    assert command(driver, net.CLASS_VLAN, 1, struct.pack("<H", 5))
    assert passing(driver, cable, MAC, tag=5) == [False]
    assert not command(driver, net.CLASS_VLAN, 0, struct.pack("<H", 4096))


@pytest.mark.parametrize(
    ("group", "number", "data"),
    [
        (0, 0, b""),
        (0, 6, b"\1"),
        (1, 0, b"\xff\xff\xff\xff"),
        (1, 0, bytes(9)),
        (1, 1, b"x"),
        (9, 9, b""),
        (5, 0, b"x"),
    ],
)
def test_commands_that_make_no_sense(driver: VirtioDriver, group: int, number: int, data: bytes) -> None:
    assert not command(driver, group, number, data)
    assert not driver.broken


def test_the_cable_is_pulled(bench: Bench, cable: Cable) -> None:
    device = Net(bench.memory, bench.loop, cable, MAC)
    driver = bench.driver(device).start()
    device.set_link(False)
    assert driver.access.acknowledge() == 2
    assert driver.access.config(6, 2) == 0
    driver.queues[net.TRANSMIT].add([header(), frame()])
    bench.settle()
    assert cable.sent == []
    buffer: Buffer = driver.queues[net.RECEIVE].add([], [1526])
    assert cable.give(frame())
    assert buffer.written is None


def test_a_reset_gives_the_card_its_own_address_back(bench: Bench, driver: VirtioDriver, cable: Cable) -> None:
    """What the configuration says and what the filter lets in are one, also for the next driver."""
    assert command(driver, net.CLASS_MAC, 1, OTHER)
    assert bytes(driver.access.config(at, 1) for at in range(6)) == OTHER
    driver.start()
    assert bytes(driver.access.config(at, 1) for at in range(6)) == MAC
    assert command(driver, net.CLASS_RX, net.PROMISC, b"\0")
    driver.queues[net.RECEIVE].add([], [2000])
    assert cable.give(frame(OTHER))
    assert cable.give(frame(MAC))
    assert [data[net.HEADER.size :] for data in received(driver)] == [frame(MAC)]


def test_a_queue_that_is_taken_away_leaves_the_address(bench: Bench, cable: Cable) -> None:
    device = Net(bench.memory, bench.loop, cable, MAC)
    assert command(bench.driver(device).start(), net.CLASS_MAC, 1, OTHER)
    bench.loop.run(lambda: device.disable_queue(net.CONTROL))
    assert device.config[:6] == OTHER
