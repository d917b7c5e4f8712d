"""Images that QEMU made: read and written by us, clean for QEMU afterwards; and chains of backing files."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from vmonty.base.errors import DiskImageError
from vmonty.vmm.block.image import open_image
from vmonty.vmm.block.qcow2 import snapshots
from vmonty.vmm.block.qcow2.disk import Qcow2Disk

from .conftest import assert_clean, contents, qemu

SIZE = 4 << 20
OPTIONS = [
    "compat=1.1",
    "compat=0.10",
    "cluster_size=512",
    "cluster_size=2M",
    "refcount_bits=1",
    "refcount_bits=2,cluster_size=4k",
    "refcount_bits=64,lazy_refcounts=on",
    "preallocation=metadata",
    "preallocation=falloc",
]


@pytest.fixture(scope="module")
def data() -> bytes:
    chance = random.Random(3)
    pieces = [chance.choice([bytes(65536), chance.randbytes(65536), b"text" * 16384]) for _ in range(SIZE >> 16)]
    return b"".join(pieces)


@pytest.mark.parametrize("options", OPTIONS)
def test_written_by_both(tmp_path: Path, options: str, data: bytes) -> None:
    path, raw = tmp_path / "disk.qcow2", tmp_path / "disk.raw"
    raw.write_bytes(data)
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, SIZE)
    qemu("qemu-io", "-c", f"write -s {raw} 0 {SIZE // 2}", "-c", "write -z 300k 200k", "-c", "discard 1M 128k", path)
    expected = bytearray(contents(path))
    with open_image(path) as disk:
        assert disk.size == SIZE
        assert disk.read(0, SIZE) == expected
        for offset, piece in (
            (5, b"first"),
            (300_000, b"zero" * 9999),
            (1 << 20, b"x"),
            (SIZE - 70_000, b"e" * 70_000),
        ):
            disk.write(offset, piece)
            expected[offset : offset + len(piece)] = piece
        disk.write_zeroes(100_000, 400_000, True)
        expected[100_000:500_000] = bytes(400_000)
    assert_clean(path)
    assert contents(path) == expected
    qemu("qemu-io", "-c", "write -P 7 0 1M", path)
    expected[: 1 << 20] = b"\7" * (1 << 20)
    with open_image(path, read_only=True) as disk:
        assert disk.read(0, SIZE) == expected


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster", ["4k", "64k", "2M"])
def test_compressed(tmp_path: Path, compression: str, cluster: str, data: bytes) -> None:
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(data)
    options = f"compression_type={compression},cluster_size={cluster}"
    qemu("qemu-img", "convert", "-c", "-O", "qcow2", "-o", options, raw, path)
    with open_image(path) as disk:
        assert disk.read(0, SIZE) == data
        disk.write(70_001, b"over")
        disk.discard(1 << 20, 1 << 20)
    assert_clean(path)
    assert contents(path)[: 1 << 20] == data[:70_001] + b"over" + data[70_005 : 1 << 20]


def test_snapshots(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, SIZE)
    qemu("qemu-io", "-c", "write -P 1 0 1M", path)
    qemu("qemu-img", "snapshot", "-c", "one", path)
    qemu("qemu-io", "-c", "write -P 2 512k 1M", path)
    one = b"\1" * (1 << 20) + bytes(3 << 20)
    with open_image(path) as disk:
        assert isinstance(disk, Qcow2Disk)
        assert [(item.id, item.name, item.disk_size) for item in snapshots.read(disk.file, disk.header)] == [
            ("1", "one", SIZE)
        ]
        disk.write(0, b"three")
        snapshots.create(disk, "two")
        snapshots.apply(disk, "one")
        assert disk.read(0, SIZE) == one
    assert_clean(path)
    assert "two" in qemu("qemu-img", "snapshot", "-l", path)
    qemu("qemu-img", "snapshot", "-a", "two", path)
    assert contents(path)[:6] == b"three\1"
    with open_image(path) as disk:
        assert isinstance(disk, Qcow2Disk)
        snapshots.delete(disk, "1")
    assert_clean(path)


def test_a_snapshot_of_another_size(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, SIZE)
    qemu("qemu-img", "snapshot", "-c", "small", path)
    qemu("qemu-img", "resize", "-q", path, 2 * SIZE)
    with open_image(path) as disk:
        assert isinstance(disk, Qcow2Disk)
        disk.write(2 * SIZE - 5, b"large")
        snapshots.apply(disk, "small")
        assert disk.size == SIZE
    assert_clean(path)


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """raw of 1 MiB ← qcow2 of 2 MiB in another folder ← qcow2 of 4 MiB, by relative names."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "base.raw").write_bytes(b"\1" * (1 << 20))
    create = ("qemu-img", "create", "-q", "-f", "qcow2")
    qemu(*create, "-b", "base.raw", "-F", "raw", folder / "middle.qcow2", 2 << 20)
    qemu("qemu-io", "-c", "write -P 2 512k 1M", folder / "middle.qcow2")
    qemu(*create, "-b", "images/middle.qcow2", "-F", "qcow2", tmp_path / "top.qcow2", SIZE)
    return tmp_path / "top.qcow2"


def test_a_chain_of_backing_files(chain: Path) -> None:
    expected = bytearray(b"\1" * (512 << 10) + b"\2" * (1 << 20)).ljust(SIZE, b"\0")
    before = (chain.parent / "images/middle.qcow2").read_bytes()
    link = chain.parent / "images" / "link"
    link.symlink_to(chain)
    with open_image(link) as disk:
        assert disk.read(0, SIZE) == expected
        for offset in (500_000, (1 << 20) + 3, (2 << 20) - 3, 3 << 20):
            disk.write(offset, b"top level")
            expected[offset : offset + 9] = b"top level"
        disk.write_zeroes(0, 300_000, False)
        expected[:300_000] = bytes(300_000)
        assert disk.read(0, SIZE) == expected
    assert_clean(chain)
    assert contents(chain) == expected
    assert (chain.parent / "images/middle.qcow2").read_bytes() == before


def test_two_overlays_share_a_base_that_nobody_writes(chain: Path) -> None:
    middle = chain.parent / "images/middle.qcow2"
    other = chain.with_name("other.qcow2")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", middle, "-F", "qcow2", other, SIZE)
    with open_image(chain) as disk, open_image(other) as second:
        disk.write(0, b"a")
        second.write(0, b"b")
        assert (disk.read(0, 2), second.read(0, 2)) == (b"a\1", b"b\1")
        with pytest.raises(DiskImageError, match="in use"):
            open_image(middle)


def test_snapshot_mode(chain: Path) -> None:
    files = [chain, chain.parent / "images/middle.qcow2", chain.parent / "images/base.raw"]
    before = [file.read_bytes() for file in files]
    with open_image(chain, snapshot=True) as disk, open_image(chain, snapshot=True) as second:
        disk.write(100, b"gone")
        disk.flush()
        assert disk.read(99, 6) == b"\1gone\1"
        assert second.read(99, 6) == b"\1" * 6
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize(
    ("backing", "complaint"),
    [
        ("top.qcow2", "backing file of itself"),
        ("none.qcow2", "No such file"),
        ("nbd://localhost/x", "only files"),
        ('json:{"driver":"raw"}', "only files"),
    ],
)
def test_backing_files_that_cannot_be(chain: Path, backing: str, complaint: str) -> None:
    qemu("qemu-img", "rebase", "-u", "-b", backing, "-F", "qcow2", chain)
    with pytest.raises(DiskImageError, match=complaint):
        open_image(chain)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("-o", "extended_l2=on"), "extended L2"),
        (("-o", "data_file={}/data.raw"), "external data file"),
        # Not LUKS: for that qemu-img measures its CPU time, which fails on a busy host.
        (("--object", "secret,id=s,data=p", "-o", "encrypt.format=aes,encrypt.key-secret=s"), "encrypted"),
    ],
)
def test_what_is_refused(tmp_path: Path, arguments: tuple[str, ...], complaint: str) -> None:
    path = tmp_path / "disk.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", *(item.format(tmp_path) for item in arguments), path, SIZE)
    with pytest.raises(DiskImageError, match=complaint) as error:
        open_image(path)
    assert "\n" not in str(error.value)


def test_bitmaps_are_given_up(tmp_path: Path) -> None:
    """We do not keep them up to date: QEMU must learn that."""
    path = tmp_path / "disk.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, SIZE)
    qemu("qemu-img", "bitmap", "--add", path, "mine")
    with open_image(path) as disk:
        disk.write(0, b"x")
    assert int.from_bytes(path.read_bytes()[88:96], "big") == 0


def test_unknown_features(make: Callable[..., Path]) -> None:
    path = make(SIZE)
    image = bytearray(path.read_bytes())
    image[79] |= 1 << 5
    path.write_bytes(image)
    with pytest.raises(DiskImageError, match=r"not known here .incompatible bits 0x20"):
        open_image(path)
    image[79] = 2
    path.write_bytes(image)
    with pytest.raises(DiskImageError, match="marked as corrupt"):
        open_image(path)
    open_image(path, read_only=True).close()
