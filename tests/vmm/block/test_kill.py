"""A writer is killed at any moment: all that was flushed is there afterwards, and the image is sound."""

from __future__ import annotations

import os
import random
import select
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmonty.vmm.block.image import open_image

from .conftest import assert_sound, qemu

SIZE, SLOT = 8 << 20, 4096
SLOTS = SIZE // SLOT
TURNS = 6
LIMIT_S = 60


def batches(seed: int) -> Iterator[list[tuple[int, int, int]]]:
    """What the writer does between two flushes, without end: (first slot, slots, value), 0 to zero them."""
    chance, value = random.Random(seed), seed << 32
    while True:
        batch = []
        for _ in range(chance.randrange(1, 30)):
            value += 1
            if chance.random() < 0.15:
                batch.append((chance.randrange(SLOTS // 16) * 16, 16, 0))
            else:
                batch.append((chance.randrange(SLOTS), 1, value))
        yield batch


def write_until_killed(path: Path, kind: str, seed: int, out: int) -> None:
    """In the child: one byte to *out* for each flush that has returned."""
    disk = open_image(path, format=kind)
    for batch in batches(seed):
        for slot, count, value in batch:
            if value:
                disk.write(slot * SLOT, value.to_bytes(8, "little") * (SLOT // 8))
            else:
                disk.write_zeroes(slot * SLOT, count * SLOT, True)
        disk.flush()
        os.write(out, b".")


def killed_writer(path: Path, kind: str, seed: int, seconds: float) -> int:
    """Kill a writer *seconds* after its first flush; the number of flushes that had returned."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            write_until_killed(path, kind, seed, write)
        finally:
            os._exit(1)
    os.close(write)
    try:
        assert select.select([read], [], [], LIMIT_S)[0], "the writer never flushed"
        # The moment of the kill is what is random here; nothing is expected of it.
        time.sleep(seconds)
    finally:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    with os.fdopen(read, "rb") as pipe:
        flushes = len(pipe.read())
    assert os.WTERMSIG(status) == signal.SIGKILL
    return flushes


def values(data: bytes) -> set[int]:
    if data == data[:8] * (len(data) // 8):
        data = data[:8]
    return {int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)}


OPTIONS: dict[str, dict[str, object]] = {
    "qcow2": {},
    "qcow2-small": {"cluster_size": 1024, "refcount_bits": 32},
    "qcow2-v2": {"version": 2},
    "qcow2-backed": {"backing_file": "base.raw", "backing_format": "raw"},
}


@pytest.mark.parametrize("variant", ["raw", *OPTIONS])
def test_killed_between_any_two_writes(make: Callable[..., Path], tmp_path: Path, variant: str) -> None:
    kind = variant.partition("-")[0]
    # Each slot may hold any of these values, also several of them, torn.
    possible = [{0} for _ in range(SLOTS)]
    if kind == "raw":
        path = tmp_path / "disk.raw"
        path.write_bytes(bytes(SIZE))
    else:
        path = make(SIZE, **OPTIONS[variant])
    if variant == "qcow2-backed":
        (tmp_path / "base.raw").write_bytes(b"".join(n.to_bytes(8, "little") * (SLOT // 8) for n in range(SLOTS)))
        possible = [{slot} for slot in range(SLOTS)]
    chance = random.Random(variant)
    for turn in range(1, TURNS + 1):
        flushes = killed_writer(path, kind, turn, chance.uniform(0, 0.15))
        assert flushes
        # One more flush may have been done, and the batch after it begun.
        for number, batch in zip(range(flushes + 2), batches(turn), strict=False):
            for slot, count, value in batch:
                for each in range(slot, slot + count):
                    possible[each] = {value} if number < flushes else possible[each] | {value}
        if kind == "qcow2":
            assert_sound(path, leaks=variant == "qcow2-v2")
        with open_image(path, format=kind) as disk:
            for slot in range(SLOTS):
                found = values(disk.read(slot * SLOT, SLOT))
                assert found <= possible[slot], f"slot {slot} after turn {turn}, {flushes} flushes"
                possible[slot] = found
    if kind == "qcow2":
        # A version that has no dirty bit keeps its leaks, and nothing else.
        repair = ["-r", "leaks"] if variant == "qcow2-v2" else []
        qemu("qemu-img", "check", *repair, path)
        qemu("qemu-img", "check", path)
