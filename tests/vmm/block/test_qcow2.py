"""qcow2 images of every geometry, written by us: against a model in memory, and against QEMU."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmonty.base.errors import DiskImageError
from vmonty.vmm.block.device import BlockDevice
from vmonty.vmm.block.image import open_image
from vmonty.vmm.block.qcow2 import create, snapshots
from vmonty.vmm.block.qcow2.check import Report, check
from vmonty.vmm.block.qcow2.disk import Qcow2Disk
from vmonty.vmm.block.qcow2.header import DIRTY
from vmonty.vmm.block.qcow2.open import read_header

from .conftest import assert_clean, contents, host_file, qemu

Make = Callable[..., Path]
GEOMETRIES = [
    {"version": 3},
    {"version": 2},
    {"cluster_size": 512, "refcount_bits": 1},
    {"cluster_size": 512, "refcount_bits": 64},
    {"cluster_size": 1024, "refcount_bits": 2},
    {"cluster_size": 4096, "refcount_bits": 4},
    {"cluster_size": 4096, "refcount_bits": 8, "compression": "zstd"},
    {"cluster_size": 2 << 20, "refcount_bits": 32, "lazy_refcounts": True},
]
named = pytest.mark.parametrize("options", GEOMETRIES, ids=lambda item: "-".join(map(str, item.values())))


def qcow2(device: BlockDevice) -> Qcow2Disk:
    assert isinstance(device, Qcow2Disk)
    return device


class Model:
    """A disk and the bytes that it should have."""

    def __init__(self, disk: BlockDevice, start: bytes) -> None:
        self.disk = disk
        self.bytes = bytearray(start)

    def act(self, kind: str, offset: int, length: int, seed: int) -> None:
        offset %= len(self.bytes)
        length = min(length, len(self.bytes) - offset)
        end = offset + length
        if kind == "write":
            data = random.Random(seed).randbytes(length)
            cut = seed % (length + 1)
            self.disk.pwritev(offset, [memoryview(data)[:cut], memoryview(data)[cut:]])
            self.bytes[offset:end] = data
        elif kind in ("zero", "unmap"):
            self.disk.write_zeroes(offset, length, kind == "unmap")
            self.bytes[offset:end] = bytes(length)
        elif kind == "discard":
            self.disk.discard(offset, length)
            # Old bytes or zeroes: both are right, but what was written beside must stay.
            now = self.disk.read(offset, length)
            assert all(new in (0, old) for new, old in zip(now, self.bytes[offset:end], strict=True))
            self.bytes[offset:end] = now
        elif kind == "flush":
            self.disk.flush()
        else:
            assert self.disk.read(offset, length) == self.bytes[offset:end]

    def verify(self) -> None:
        assert self.disk.read(0, len(self.bytes)) == self.bytes


KINDS = ["write", "write", "write", "read", "zero", "unmap", "discard", "flush"]


@named
def test_random_operations(make: Make, options: dict[str, int]) -> None:
    size = 3 << 20
    path = make(size, **options)
    chance = random.Random(str(options))
    start = bytes(size)
    for _ in range(2):
        with open_image(path) as disk:
            model = Model(disk, start)
            for number in range(150):
                model.act(chance.choice(KINDS), chance.randrange(size), chance.choice([512, 5000, 200_000]), number)
            model.verify()
        start = bytes(model.bytes)
        assert_clean(path)
    assert contents(path) == start


operation = st.tuples(st.sampled_from(KINDS), st.integers(0, 1 << 17), st.integers(0, 20_000), st.integers(0, 1 << 16))


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(operation, max_size=30), backed=st.booleans(), version=st.sampled_from([2, 3]))
def test_any_operations(tmp_path: Path, steps: list[tuple[str, int, int, int]], backed: bool, version: int) -> None:
    """With small clusters, on nothing or on a backing file that is shorter than the disk."""
    size, start = 1 << 17, bytes(1 << 17)
    path, base = tmp_path / "disk.qcow2", tmp_path / "base.raw"
    path.unlink(missing_ok=True)
    if backed:
        old = random.Random(1).randbytes(70_144)
        base.write_bytes(old)
        start = old.ljust(size, b"\0")
    with create.making(path) as file:
        create.create(
            file, size, cluster_size=1024, version=version,
            backing_file="base.raw" if backed else None, backing_format="raw" if backed else None,
        )  # fmt: skip
    with open_image(path) as disk:
        model = Model(disk, start)
        for step in steps:
            model.act(*step)
        model.verify()
        report = check(qcow2(disk))
        assert not report.damages
    with open_image(path, read_only=True) as disk:
        report = check(qcow2(disk))
        assert (report.leaks, report.damages) == (0, [])
        assert disk.read(0, size) == model.bytes


@named
def test_snapshots(make: Make, options: dict[str, int]) -> None:
    size = 3 << 20
    path = make(size, **options)
    kept: dict[str, bytes] = {}
    with open_image(path) as device:
        disk = qcow2(device)
        model = Model(disk, bytes(size))
        for name in ("first", "second"):
            for number in range(30):
                model.act("write", number * 77_000, 9000, number)
            if options.get("refcount_bits") == 1:
                with pytest.raises(DiskImageError, match="do not hold more snapshots"):
                    snapshots.create(disk, name)
                continue
            snapshots.create(disk, name)
            kept[name] = bytes(model.bytes)
        for number in range(30):
            model.act(KINDS[number % len(KINDS)], number * 91_000, 40_000, number)
        model.verify()
    assert_clean(path)
    if not kept:
        return
    now = bytes(model.bytes)
    assert contents(path) == now
    for name, data in kept.items():
        copy = path.with_name("copy.raw")
        qemu("qemu-img", "convert", "-l", f"snapshot.name={name}", "-O", "raw", path, copy)
        assert copy.read_bytes() == data
    with open_image(path) as device:
        disk = qcow2(device)
        snapshots.apply(disk, "first")
        assert disk.read(0, size) == kept["first"]
        disk.write(0, b"after")
        snapshots.delete(disk, "first")
        with pytest.raises(DiskImageError, match="no snapshot 'first'; there are: second"):
            snapshots.apply(disk, "first")
        assert disk.read(0, size) == b"after" + kept["first"][5:]
    assert_clean(path)
    with open_image(path) as device:
        snapshots.apply(qcow2(device), "second")
        snapshots.delete(qcow2(device), "second")
        assert device.read(0, size) == kept["second"]
    assert_clean(path)


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_compressed_clusters(make: Make, compression: str) -> None:
    size = 4 << 20
    path = make(size, compression=compression)
    chance = random.Random(7)
    data = bytearray(size)
    with open_image(path) as device:
        for cluster in range(0, size >> 16, 2):
            piece = chance.randbytes(chance.choice([0, 10, 3000, 65536])).ljust(65536, b"a")
            qcow2(device).write_compressed(cluster, piece)
            data[cluster << 16 : cluster + 1 << 16] = piece
    assert_clean(path)
    assert contents(path) == data
    with open_image(path) as device:
        model = Model(device, data)
        for number in range(60):
            model.act(chance.choice(KINDS), chance.randrange(size), 9000, number)
        model.verify()
    assert_clean(path)
    assert contents(path) == model.bytes


def test_discarded_space_is_given_back(make: Make) -> None:
    path = make(32 << 20)
    with open_image(path) as disk:
        disk.write(0, b"x" * (16 << 20))
        disk.flush()
        full = path.stat().st_blocks
        disk.discard(0, 16 << 20)
        disk.flush()
        assert path.stat().st_blocks < full // 8
        # And taken again: the file does not grow.
        length = path.stat().st_size
        disk.write(1 << 20, b"y" * (15 << 20))
        disk.flush()
        assert path.stat().st_size <= length + 65536
    assert_clean(path)


def test_a_range_in_one_piece_is_one_read(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters that follow each other in the file, too; and where they do not, each comes from its place."""
    with open_image(make(1 << 20, cluster_size=512)) as disk:
        data = random.Random(5).randbytes(8 * 512)
        for first, end in ((0, 4), (6, 8), (4, 6)):
            for cluster in range(first, end):
                disk.write(cluster * 512, data[cluster * 512 : (cluster + 1) * 512])
        reads = []
        file = qcow2(disk).file
        preadv = file.preadv
        monkeypatch.setattr(file, "preadv", lambda at, views: (reads.append(at), preadv(at, views)))
        for first, end, pieces in ((0, 4, 1), (1, 4, 1), (6, 8, 1), (2, 6, 2), (0, 8, 3), (0, 9, 3), (3, 5, 2)):
            reads.clear()
            expected = (data + bytes(512))[first * 512 + 7 : end * 512 - 2]
            assert disk.read(first * 512 + 7, len(expected)) == expected
            assert len(reads) == pieces, (first, end)


def test_refcount_structures_grow(make: Make) -> None:
    """Small clusters need many refcount blocks, and then another refcount table."""
    path = make(8 << 20, cluster_size=512, refcount_bits=64)
    with open_image(path) as disk:
        before = read_header(host_file(path)).refcount_table_clusters
        for start in range(0, 8 << 20, 1 << 20):
            disk.write(start, bytes([start >> 20 | 1]) * (1 << 20))
        disk.flush()
    assert read_header(host_file(path)).refcount_table_clusters > before
    assert_clean(path)


def test_threads_side_by_side(make: Make) -> None:
    """Writers of neighbouring sectors in the same new clusters, readers, flushes and discards elsewhere."""
    size, threads = 8 << 20, 6
    path = make(size)
    failures: list[BaseException] = []
    with open_image(path) as disk:

        def work(mine: int) -> None:
            chance = random.Random(mine)
            try:
                for _ in range(250):
                    sector = chance.randrange((4 << 20) // 512 // threads) * threads + mine
                    data = chance.randbytes(512)
                    disk.write(sector * 512, data)
                    assert disk.read(sector * 512, 512) == data
                    if chance.random() < 0.1:
                        disk.flush()
                    at = (4 << 20) + chance.randrange(4 << 4) * 65536
                    disk.write(at, data)
                    disk.discard(at, 65536)
            except BaseException as error:
                failures.append(error)

        workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for failure in failures:
            raise failure
    assert_clean(path)


def test_who_waits_for_a_write_goes_on_after_it(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second writer of a new cluster waits for the first one's, and a check for both."""
    path = make(4 << 20)
    with open_image(path) as device:
        disk = qcow2(device)
        real, inside, gate = disk.file.pwritev, threading.Event(), threading.Event()

        def held(offset: int, buffers: Sequence[memoryview]) -> None:
            inside.set()
            assert gate.wait(60)
            real(offset, buffers)

        monkeypatch.setattr(disk.file, "pwritev", held)
        reports: list[Report] = []
        threads = [
            threading.Thread(target=disk.write, args=(512, b"a" * 512), daemon=True),
            threading.Thread(target=disk.write, args=(1024, b"b" * 512), daemon=True),
            threading.Thread(target=lambda: reports.append(check(disk)), daemon=True),
        ]
        threads[0].start()
        assert inside.wait(60)
        threads[1].start()
        threads[1].join(0.1)
        threads[2].start()
        threads[2].join(0.1)
        assert disk.read(0, 2048) == bytes(2048), "linked before it was written"
        assert not reports
        gate.set()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert disk.read(0, 2048) == bytes(512) + b"a" * 512 + b"b" * 512 + bytes(512)
        assert [(report.damage_count, report.leaks) for report in reports] == [(0, 0)]
    assert_clean(path)


def test_an_image_that_was_not_closed_is_repaired(make: Make) -> None:
    path = make(4 << 20)
    with open_image(path) as disk:
        disk.write(0, b"kept" * 30_000)
        disk.flush()
        saved = path.read_bytes()
        assert read_header(host_file(path)).incompatible & DIRTY
    # As after a kill: marked, and one cluster counted that nobody uses.
    image = bytearray(saved)
    table = int.from_bytes(image[48:56], "big")
    block = int.from_bytes(image[table : table + 8], "big")
    image[block + 200] = 0
    image[block + 201] = 1
    path.write_bytes(image)
    with open_image(path, read_only=True) as disk:
        assert check(qcow2(disk)).leaks == 1
    with open_image(path) as disk:
        assert disk.read(0, 120_000) == b"kept" * 30_000
    assert_clean(path)


def test_repair_of_counts_and_flags(make: Make) -> None:
    path = make(4 << 20)
    with open_image(path) as disk:
        disk.write(0, b"data" * 50_000)
    image = bytearray(path.read_bytes())
    table = int.from_bytes(image[48:56], "big")
    block = int.from_bytes(image[table : table + 8], "big")
    image[block + 9] = 0  # cluster 4: used and not counted
    image[block + 300] = 1
    path.write_bytes(image)
    qemu("qemu-img", "check", path, status=2)
    with open_image(path) as disk:
        report = check(qcow2(disk), repair=True)
        assert report.damage_count == report.damages_fixed > 0
        assert report.leaks == report.leaks_fixed > 0
    assert_clean(path)
