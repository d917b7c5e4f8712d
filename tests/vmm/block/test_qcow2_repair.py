"""Repairs of damaged images: what they leave marked, what they cost, and what they must not destroy."""

from __future__ import annotations

import contextlib
import struct
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest

from vmonty.base.errors import BlockError, DiskImageError
from vmonty.vmm.block.image import open_image
from vmonty.vmm.block.qcow2.check import check
from vmonty.vmm.block.qcow2.disk import Qcow2Disk
from vmonty.vmm.block.qcow2.header import DIRTY
from vmonty.vmm.block.qcow2.refcounts import Refcounts
from vmonty.vmm.block.qcow2.tables import COPIED, OFFSET

Make = Callable[..., Path]
CLUSTER = 512
COUNTS = CLUSTER // 2  # in a block


def word(image: bytearray, at: int) -> int:
    return int(struct.unpack_from(">Q", image, at)[0])


def put(image: bytearray, at: int, value: int) -> None:
    struct.pack_into(">Q", image, at, value)


def tables(image: bytearray) -> tuple[int, int, int]:
    """Where the L1 table, its first L2 table, and the refcount table are."""
    l1 = word(image, 40)
    return l1, word(image, l1) & OFFSET, word(image, 48)


@pytest.fixture
def written(make: Make) -> Path:
    """An image of small clusters with enough data for a few dozen refcount blocks."""
    path = make(8 << 20, cluster_size=CLUSTER)
    with open_image(path) as disk:
        disk.write(0, b"kept" * (1 << 20))
    return path


def is_dirty(path: Path) -> bool:
    return bool(path.read_bytes()[79] & DIRTY)


def absurd_snapshot(image: bytearray) -> None:
    struct.pack_into(">IQ", image, 60, 1, len(image))
    image += b"\xff" * CLUSTER


def misplaced_block(image: bytearray) -> None:
    put(image, tables(image)[2], 100)


def misplaced_data(image: bytearray) -> None:
    put(image, tables(image)[1], COPIED | 1 << 50)


@pytest.mark.parametrize("damage", [absurd_snapshot, misplaced_block, misplaced_data])
def test_an_image_stays_dirty_until_it_is_repaired(written: Path, damage: Callable[[bytearray], None]) -> None:
    sound = written.read_bytes()
    image = bytearray(sound)
    image[79] |= DIRTY
    damage(image)
    written.write_bytes(image)
    with contextlib.suppress(DiskImageError), open_image(written, repair=False) as disk:
        assert isinstance(disk, Qcow2Disk)
        report = check(disk, repair=True)
        assert report.damage_count > report.damages_fixed
    assert is_dirty(written)
    with pytest.raises(DiskImageError, match=r"damaged|cannot be checked"):
        open_image(written)
    image = bytearray(sound)
    image[79] |= DIRTY
    written.write_bytes(image)
    with open_image(written, repair=False) as disk:
        assert isinstance(disk, Qcow2Disk)
        check(disk)
        disk.write(0, b"a flush does not clear it either")
        disk.flush()
    assert is_dirty(written)
    open_image(written).close()
    assert not is_dirty(written)


def test_a_failing_host_leaves_it_dirty(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = bytearray(written.read_bytes())
    image[79] |= DIRTY
    written.write_bytes(image)
    disk = open_image(written, repair=False)
    assert isinstance(disk, Qcow2Disk)

    def fail(offset: int) -> array[int]:
        raise BlockError(5, "reading: Input/output error")

    monkeypatch.setattr(disk.tables, "read_table", fail)
    with pytest.raises(DiskImageError, match="cannot be checked"):
        check(disk, repair=True)
    disk.close()
    assert is_dirty(written)


def test_a_block_that_many_entries_name(written: Path) -> None:
    """A table may have a million entries, and each block thousands of counts."""
    image = bytearray(written.read_bytes())
    at = len(image)
    clusters = 64
    image += struct.pack(">Q", at + clusters * CLUSTER) * (clusters * CLUSTER // 8) + struct.pack(">H", 7) * COUNTS
    struct.pack_into(">QI", image, 48, at, clusters)
    image[79] |= DIRTY
    written.write_bytes(image)
    with pytest.raises(DiskImageError, match="refcount table name one block"):
        open_image(written)
    image[79] &= ~DIRTY
    written.write_bytes(image)
    with pytest.raises(DiskImageError, match="refcount table name one block"):
        open_image(written)
    for repair in (False, True):
        with open_image(written, read_only=not repair, repair=False) as disk:
            assert isinstance(disk, Qcow2Disk)
            report = check(disk, repair=repair)
        assert any("a block that another one names" in text for text in report.damages)
        assert report.leaks <= COUNTS, "it was gone through once"
        assert report.damages_fixed == report.leaks_fixed == 0
    assert written.read_bytes() == image, "none of its counts can be believed"
    with open_image(written, read_only=True) as disk:
        assert disk.read(0, 8) == b"keptkept"


def test_counts_behind_the_end_are_not_gone_through(written: Path) -> None:
    image = bytearray(written.read_bytes())
    table = tables(image)[2]
    last = struct.unpack_from(">I", image, 56)[0] * CLUSTER // 8 - 1
    assert word(image, table + 8 * last) == 0
    put(image, table + 8 * last, len(image))
    image += struct.pack(">H", 1) * COUNTS
    written.write_bytes(image)
    with open_image(written, read_only=True) as disk:
        assert isinstance(disk, Qcow2Disk)
        assert [first for first, _ in disk.refcounts.blocks()][-1] < disk.refcounts.high_water


def test_a_repair_holds_few_blocks_in_memory(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = bytearray(written.read_bytes())
    l1 = tables(image)[0]
    size = struct.unpack_from(">I", image, 36)[0] * 8
    image[l1 : l1 + size] = bytes(size)
    image[79] |= DIRTY
    written.write_bytes(image)
    most = 0
    add = Refcounts.add

    def counted(self: Refcounts, cluster: int, difference: int) -> int:
        nonlocal most
        result = add(self, cluster, difference)
        most = max(most, len(self.dirty))
        return result

    monkeypatch.setattr(Refcounts, "add", counted)
    with open_image(written) as disk:
        assert isinstance(disk, Qcow2Disk)
        assert check(disk).leaks == 0
        assert len(disk.refcounts.block_places) > 30
    assert 0 < most <= 17


def test_an_l2_table_that_many_entries_name(written: Path) -> None:
    image = bytearray(written.read_bytes())
    l1, l2, _ = tables(image)
    put(image, l1 + 8, COPIED | l2)
    image[79] |= DIRTY
    written.write_bytes(image)
    with pytest.raises(DiskImageError, match="damaged"):
        open_image(written)
    with open_image(written, read_only=True) as disk:
        assert isinstance(disk, Qcow2Disk)
        assert any("1 L1 entries name a table" in text for text in check(disk).damages)


def test_a_new_block_of_counts_spares_the_data(written: Path) -> None:
    """Such a block usually takes the first cluster of the range that it counts, where here are data."""
    image = bytearray(written.read_bytes())
    l1, l2, table = tables(image)
    place = COUNTS * CLUSTER
    assert word(image, table + 8) == place
    put(image, table + 8, 0)
    put(image, l2, COPIED | place)
    image[place : place + CLUSTER] = b"mine" * (CLUSTER // 4)
    # One cluster of the range is free.
    entries = [(word(image, l1 + 8 * number) & OFFSET) + at for number in range(8) for at in range(0, CLUSTER, 8)]
    put(image, next(at for at in entries if word(image, at) & OFFSET == place + 100 * CLUSTER), 0)
    image[79] |= DIRTY
    written.write_bytes(image)
    with open_image(written) as disk:
        assert isinstance(disk, Qcow2Disk)
        assert disk.read(0, CLUSTER) == b"mine" * (CLUSTER // 4)
        assert disk.refcounts.table[1] == place + 100 * CLUSTER
        assert check(disk).damage_count == 0
