"""The entropy device."""

from __future__ import annotations

from vmonty.vmm.virtio.rng import MOST_BYTES, Rng

from .conftest import Bench


def test_it_fills_buffers_with_different_bytes(bench: Bench) -> None:
    driver = bench.driver(Rng(bench.memory, bench.loop)).start()
    buffers = [driver.queues[0].add([], [32, 32], driver.indirect) for _ in range(2)]
    driver.queues[0].wait(2)
    first, second = (buffer.data() for buffer in buffers)
    assert len(first) == len(second) == 64
    assert first != second
    assert b"\xa5" * 8 not in first


def test_a_huge_buffer_gets_a_part(bench: Bench) -> None:
    driver = bench.driver(Rng(bench.memory, bench.loop)).start()
    buffer = driver.queues[0].add([], [MOST_BYTES * 3])
    driver.queues[0].wait()
    assert buffer.written == MOST_BYTES
