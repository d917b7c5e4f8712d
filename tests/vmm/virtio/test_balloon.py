"""The balloon: pages come and go, and their memory with them."""

from __future__ import annotations

import os
import struct
import threading

import pytest

from vmonty.base.errors import UsageError
from vmonty.testing.virtio import VirtioDriver
from vmonty.vmm.virtio import balloon
from vmonty.vmm.virtio.balloon import Balloon, runs

from .conftest import Bench

PAGE = 4096


@pytest.fixture
def device(bench: Bench) -> Balloon:
    return Balloon(bench.memory, bench.loop)


@pytest.fixture
def driver(bench: Bench, device: Balloon) -> VirtioDriver:
    return bench.driver(device).start()


def allocated(bench: Bench) -> int:
    """Bytes that the host has given to guest RAM."""
    return os.fstat(bench.memory.ram.fileno()).st_blocks * 512


def pages(driver: VirtioDriver, *numbers: int) -> list[bytes]:
    return [struct.pack(f"<{len(numbers)}I", *numbers)]


def test_the_target_reaches_the_driver(bench: Bench, device: Balloon, driver: VirtioDriver) -> None:
    device.set_target(bench.memory.size - 5 * PAGE)
    assert driver.access.acknowledge() == 2
    assert driver.access.config(0, 4) == 5
    driver.access.set_config(4, 4, 3)
    assert device.actual == 3
    with pytest.raises(UsageError, match="cannot leave"):
        device.set_target(bench.memory.size + 1)


def test_a_guest_has_no_more_than_its_memory_to_hand_over(bench: Bench, device: Balloon, driver: VirtioDriver) -> None:
    driver.access.set_config(4, 4, 0xFFFF_FFFF)
    assert device.actual == bench.memory.size // PAGE
    assert device.state()["actual"] == 0
    device.set_target(bench.memory.size)
    assert device.state()["actual"] == 0
    driver.access.set_config(4, 4, 0)
    assert device.state()["actual"] == bench.memory.size


def test_inflating_gives_memory_back(bench: Bench, driver: VirtioDriver) -> None:
    for page in range(1024, 1034):
        bench.memory.write(page * PAGE, b"x" * PAGE)
    before = allocated(bench)
    driver.queues[balloon.INFLATE].add(pages(driver, *range(1033, 1024, -1)))
    driver.queues[balloon.INFLATE].wait()
    assert before - allocated(bench) >= 8 * PAGE  # the ring itself may have taken a page
    assert bench.memory.read(1030 * PAGE, PAGE) == bytes(PAGE)
    assert bench.memory.read(1024 * PAGE, PAGE) == b"x" * PAGE
    driver.queues[balloon.DEFLATE].add(pages(driver, 1030))
    driver.queues[balloon.DEFLATE].wait()
    bench.memory.write(1030 * PAGE, b"again")


def test_pages_that_the_guest_does_not_have(bench: Bench, driver: VirtioDriver) -> None:
    bench.memory.write(bench.memory.size - PAGE, b"last")
    last = bench.memory.size // PAGE - 1
    driver.queues[balloon.INFLATE].add(pages(driver, last, last + 1, 0xFFFF_FFFF, 1 << 20))
    driver.queues[balloon.INFLATE].add([b"xyz"])
    driver.queues[balloon.INFLATE].wait(2)
    assert bench.memory.read(bench.memory.size - PAGE, 4) == bytes(4)
    assert not driver.broken


def test_reported_free_pages_are_given_back(bench: Bench, driver: VirtioDriver) -> None:
    address = driver.allocate(0, PAGE)
    buffer = driver.queues[balloon.REPORT].add([], [3 * PAGE + 100])
    assert buffer.writable[0][0] == address
    driver.queues[balloon.REPORT].wait()
    assert bench.memory.read(address, 3 * PAGE) == bytes(3 * PAGE)
    assert bench.memory.read(address + 3 * PAGE, 100) == b"\xa5" * 100


def test_statistics_are_asked_for_and_answered(bench: Bench, device: Balloon, driver: VirtioDriver) -> None:
    queue = driver.queues[balloon.STATS]
    queue.add([struct.pack("<HQHQ", 4, 1000, 5, 2000)])
    bench.settle()
    assert queue.collect() == []  # kept until the next question

    def guest() -> None:
        queue.wait()
        queue.add([struct.pack("<HQHQHQ", 4, 900, 5, 2000, 999, 1)])

    answering = threading.Thread(target=guest)
    answering.start()
    assert device.statistics(30) == {"free_memory": 900, "total_memory": 2000}
    answering.join()
    assert device.statistics(0.01) == {"free_memory": 900, "total_memory": 2000}


def test_runs() -> None:
    assert list(runs([5, 3, 4, 9, 3, 1])) == [(1, 1), (3, 3), (9, 1)]
    assert list(runs([])) == []
