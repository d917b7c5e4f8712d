"""Images made to harm: each is refused or fails with an error of ours, at once and without much memory."""

from __future__ import annotations

import contextlib
import resource
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmonty.base.errors import BlockError, DiskImageError
from vmonty.vmm.block.image import open_image
from vmonty.vmm.block.qcow2 import create, snapshots
from vmonty.vmm.block.qcow2.check import check
from vmonty.vmm.block.qcow2.disk import Qcow2Disk
from vmonty.vmm.block.qcow2.tables import OFFSET

CLUSTER, SIZE = 4096, 1 << 20
# Of the header, by the specification's names.
FIELDS = {
    "version": (4, "I"), "backing_file_offset": (8, "Q"), "backing_file_size": (16, "I"), "cluster_bits": (20, "I"),
    "size": (24, "Q"), "crypt_method": (32, "I"), "l1_size": (36, "I"), "l1_table_offset": (40, "Q"),
    "refcount_table_offset": (48, "Q"), "refcount_table_clusters": (56, "I"), "nb_snapshots": (60, "I"),
    "snapshots_offset": (64, "Q"), "incompatible": (72, "Q"), "autoclear": (88, "Q"), "refcount_order": (96, "I"),
    "header_length": (100, "I"), "compression_type": (104, "B"),
    "extension": (112, "I"), "extension_length": (116, "I"),
}  # fmt: skip
interesting = st.one_of(
    st.sampled_from(
        [0, 1, 9, 21, 22, 63, CLUSTER, 2 * CLUSTER, 3 * CLUSTER, 1 << 20, 0x7FFF_FFFF, 0xFFFF_FFFF, 1 << 55]
    ),
    st.sampled_from([1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]),
    st.integers(0, 64).map(lambda number: number * CLUSTER),
    st.integers(0, (1 << 64) - 1),
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An image with data, compressed data, zeroes and two snapshots."""
    path = tmp_path_factory.mktemp("hostile") / "sound.qcow2"
    with create.making(path) as file:
        create.create(file, SIZE, cluster_size=CLUSTER)
    with open_image(path) as disk:
        assert isinstance(disk, Qcow2Disk)
        disk.write(0, b"data" * 20_000)
        for cluster in range(40, 60):
            disk.write_compressed(cluster, bytes([cluster]) * CLUSTER)
        snapshots.create(disk, "one")
        disk.write(5000, b"more" * 5000)
        snapshots.create(disk, "two")
        disk.write_zeroes(20_000, 20_000, True)
    return path.read_bytes()


def survive(path: Path, image: bytes) -> None:
    """Whatever is in it: our errors only."""
    path.write_bytes(image)
    limit = 1 << 30
    with contextlib.suppress(DiskImageError, BlockError):
        open_image(path, read_only=True).close()
    with contextlib.suppress(DiskImageError, BlockError), open_image(path) as disk:
        for offset in (0, 5000, 41 * CLUSTER, 200_000, max(0, min(disk.size, 1 << 62) - 600)):
            with contextlib.suppress(BlockError):
                disk.read(offset, min(CLUSTER * 3, max(0, disk.size - offset)))
            with contextlib.suppress(BlockError):
                disk.write(offset, b"x" * min(600, max(0, disk.size - offset)))
        with contextlib.suppress(BlockError):
            disk.discard(0, min(disk.size, SIZE))
        if isinstance(disk, Qcow2Disk):
            for act in (
                lambda: check(disk),
                lambda: snapshots.create(disk, "new"),
                lambda: snapshots.apply(disk, "one"),
                lambda: snapshots.delete(disk, "two"),
                lambda: check(disk, repair=True),
            ):
                with contextlib.suppress(DiskImageError, BlockError):
                    act()
    assert path.stat().st_size < limit


calm = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@settings(calm, max_examples=60)
@given(changes=st.dictionaries(st.sampled_from(sorted(FIELDS)), interesting, min_size=1, max_size=3))
def test_mutated_headers(sound: bytes, tmp_path: Path, changes: dict[str, int]) -> None:
    image = bytearray(sound)
    for name, value in changes.items():
        offset, form = FIELDS[name]
        struct.pack_into(">" + form, image, offset, value & (1 << 8 * struct.calcsize(form)) - 1)
    survive(tmp_path / "disk.qcow2", bytes(image))


@settings(calm, max_examples=60)
@given(
    changes=st.lists(
        st.tuples(st.integers(1, 60), st.integers(0, CLUSTER // 8 - 1), interesting), min_size=1, max_size=6
    ),
    dirty=st.booleans(),
)
def test_mutated_tables(sound: bytes, tmp_path: Path, changes: list[tuple[int, int, int]], dirty: bool) -> None:
    """Words anywhere in the first clusters: L1, L2, refcounts and snapshots all lie there or behind."""
    image = bytearray(sound)
    clusters = len(image) // CLUSTER
    l1 = int.from_bytes(image[40:48], "big")
    for cluster, word, value in changes:
        # Half of them at the beginning of a table, where the entries are in use.
        place = (cluster % clusters) * CLUSTER + (word if word % 2 else word % 16) * 8
        if word % 3 == 0:
            place = l1
        if place + 8 <= len(image):
            struct.pack_into(">Q", image, place, value)
    image[79] |= dirty
    survive(tmp_path / "disk.qcow2", bytes(image))


@settings(calm, max_examples=30)
@given(length=st.integers(0, 40 * CLUSTER))
def test_cut_short(sound: bytes, tmp_path: Path, length: int) -> None:
    survive(tmp_path / "disk.qcow2", sound[:length])


def test_tables_of_absurd_size_take_no_memory(sound: bytes, tmp_path: Path) -> None:
    """A sparse file may be as long as it likes."""
    path = tmp_path / "disk.qcow2"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, value in (
        ("l1_size", 0xFFFF_FFFF),
        ("refcount_table_clusters", 0xFFFF_FFFF),
        ("nb_snapshots", 0xFFFF_FFFF),
    ):
        image = bytearray(sound)
        offset, form = FIELDS[name]
        struct.pack_into(">" + form, image, offset, value)
        path.write_bytes(image)
        with path.open("r+b") as file:
            file.truncate(1 << 42)
        with pytest.raises(DiskImageError):
            open_image(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_data_over_metadata_is_not_written(sound: bytes, tmp_path: Path) -> None:
    """An L2 entry that points to the image's own L1 table gives the guest no hold on it."""
    path = tmp_path / "disk.qcow2"
    image = bytearray(sound)
    l1 = int.from_bytes(image[40:48], "big")
    l2 = int.from_bytes(image[l1 : l1 + 8], "big") & 0x00FF_FFFF_FFFF_FE00
    for target in (l1, l2, int.from_bytes(image[48:56], "big")):
        struct.pack_into(">Q", image, l2, 1 << 63 | target)
        struct.pack_into(">Q", image, l1, 1 << 63 | l2)
        path.write_bytes(image)
        with open_image(path) as disk, pytest.raises(BlockError, match="damaged"):
            disk.write(0, b"evil" * 10)
        assert path.read_bytes()[target : target + 40] == bytes(image[target : target + 40])


def test_a_range_that_goes_on_over_metadata_is_not_written(tmp_path: Path) -> None:
    """The first cluster is data, and the second, which follows it in the file, is another L2 table."""
    path = tmp_path / "disk.qcow2"
    with create.making(path) as file:
        create.create(file, 1 << 20, cluster_size=512)
    with open_image(path) as disk:
        disk.write(0, b"d" * 512)
        disk.write(1 << 19, b"d" * 512)  # under another table, which is behind the first data
    image = bytearray(path.read_bytes())
    l1 = int.from_bytes(image[40:48], "big")
    first, second = (int.from_bytes(image[l1 + at : l1 + at + 8], "big") & OFFSET for at in (0, 8 * (1 << 19 >> 15)))
    data = int.from_bytes(image[first : first + 8], "big") & OFFSET
    assert second == data + 512
    struct.pack_into(">Q", image, first + 8, 1 << 63 | second)
    path.write_bytes(image)
    with open_image(path) as disk:
        assert disk.read(0, 1024) == b"d" * 512 + bytes(image[second : second + 512])
        with pytest.raises(BlockError, match="damaged"):
            disk.write(0, b"e" * 1024)
    assert path.read_bytes()[second : second + 512] == bytes(image[second : second + 512])


@pytest.mark.parametrize("kind", [0, 1])
def test_a_compressed_cluster_that_would_fill_memory(tmp_path: Path, kind: int) -> None:
    path = tmp_path / "disk.qcow2"
    with create.making(path) as file:
        create.create(file, SIZE, compression=["zlib", "zstd"][kind])
    with open_image(path) as disk:
        assert isinstance(disk, Qcow2Disk)
        disk.write_compressed(0, bytes(65536))
        run = disk.tables.compressed_extent(disk.map(0, 512)[0].where)
    from vmonty.vmm.block.qcow2.compression import compress

    bomb = compress(kind, bytes(64 << 20))
    with path.open("r+b") as stream:
        stream.seek(run[0])
        stream.write(bomb[: run[1]])
    with open_image(path, read_only=True) as disk:
        with contextlib.suppress(BlockError):
            assert disk.read(0, 65536) == bytes(65536)
        assert disk.read(65536, 65536) == bytes(65536)
