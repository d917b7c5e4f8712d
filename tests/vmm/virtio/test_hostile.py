"""Every device against a guest that writes anything into its rings: it works or asks for a reset, and works after."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmonty.testing.virtio import VirtioDriver
from vmonty.vmm.virtio.balloon import Balloon
from vmonty.vmm.virtio.blk import Blk
from vmonty.vmm.virtio.console import Console, Port
from vmonty.vmm.virtio.device import VirtioDevice
from vmonty.vmm.virtio.net import Net
from vmonty.vmm.virtio.rng import Rng

from .conftest import Bench
from .test_blk import MemoryDisk
from .test_net import MAC, Cable, frame

DEVICES: dict[str, Callable[[Bench], VirtioDevice]] = {
    "rng": lambda bench: Rng(bench.memory, bench.loop),
    "blk": lambda bench: Blk(bench.memory, bench.loop, MemoryDisk(), queue_count=2),
    "console": lambda bench: Console(
        bench.memory, bench.loop, [Port(lambda data: None, console=True), Port(lambda data: None, name="second")]
    ),
    "net": lambda bench: Net(bench.memory, bench.loop, Cable(), MAC),
    "balloon": lambda bench: Balloon(bench.memory, bench.loop),
}

HALF = 8 << 20  # rings lie below; buffers of the fuzz above, so that it does not write its own rings

address = st.one_of(
    st.integers(HALF, (16 << 20) - 1), st.sampled_from([0, 0x1000, (16 << 20) - 1, 16 << 20, 1 << 32, (1 << 64) - 1])
)
length = st.one_of(st.integers(0, 600), st.sampled_from([1, 12, 16, 17, 512, 4096, 65536, (1 << 32) - 1]))
descriptor = st.tuples(address, length, st.integers(0, 7), st.one_of(st.integers(0, 8), st.integers(0, 0xFFFF)))
contents = st.one_of(
    st.binary(max_size=64),
    st.builds(struct.pack, st.just("<IIQ"), st.integers(0, 14), st.just(0), st.integers(0, 3000)),
    st.builds(struct.pack, st.just("<IHH"), st.integers(0, 3), st.integers(0, 8), st.integers(0, 2)),
)
ring = st.tuples(
    st.integers(0, 5),  # which queue
    st.lists(descriptor, min_size=1, max_size=8),
    st.lists(st.integers(0, 9), min_size=1, max_size=6),  # heads
    st.lists(contents, min_size=1, max_size=4),
)


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Exceptions on the loop or on a device's threads: there must be none."""
    found: list[object] = []
    monkeypatch.setattr(threading, "excepthook", found.append)
    yield found
    assert found == []


def attack(
    driver: VirtioDriver, rings: list[tuple[int, list[tuple[int, int, int, int]], list[int], list[bytes]]]
) -> None:
    for index, table, heads, texts in rings:
        queue = driver.queues[index % len(driver.queues)]
        for slot, entry in enumerate(table):
            queue.describe(slot, *entry)
        for (place, size, _, _), text in zip(table, texts * len(table), strict=False):
            if HALF <= place < (16 << 20) - 64 and size:
                driver.memory.write(place, text)
        for head in heads:
            queue.offer(head)
        driver.access.notify(queue.index)


@pytest.mark.parametrize("name", DEVICES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rings=st.lists(ring, min_size=1, max_size=5), features=st.integers(0, (1 << 24) - 1))
def test_anything_in_the_rings(
    bench: Bench,
    failures: list[object],
    name: str,
    rings: list[tuple[int, list[tuple[int, int, int, int]], list[int], list[bytes]]],
    features: int,
) -> None:
    device = DEVICES[name](bench)
    driver = bench.driver(device)
    offered = driver.access.features()
    chosen = offered & (features | ~0xFF_FFFF) if device.accepts(offered & (features | ~0xFF_FFFF)) else offered
    driver.start(chosen, size=16)
    attack(driver, rings)
    if isinstance(device, Net):
        assert isinstance(device._backend, Cable)
        device._backend.give(frame(size=3000))
    bench.settle()
    driver.start(size=16)
    assert not driver.broken
    bench.settle()
    bench.loop.run(device.close)
