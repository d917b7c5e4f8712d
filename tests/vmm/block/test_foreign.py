"""Images of other programs, made by qemu-img: recognised by what is in them, and read; broken and hostile ones."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from vmonty.base.errors import BlockError, DiskImageError
from vmonty.vmm.block import foreign
from vmonty.vmm.block.image import format_of, open_image
from vmonty.vmm.peripherals import Disk

from .conftest import qemu

SIZE = 3 << 20


@pytest.fixture(scope="module")
def contents() -> bytes:
    data = bytearray(SIZE)
    data[: 64 << 10] = random.Random(1).randbytes(64 << 10)
    data[2 << 20 : (2 << 20) + 4096] = b"x" * 4096
    return bytes(data)


def make(folder: Path, contents: bytes, format: str, *options: str) -> Path:  # noqa: A002
    """An image whose name says something else."""
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not on this host: apt-get install qemu-utils")
    raw, image = folder / "raw", folder / "image.iso"
    raw.write_bytes(contents)
    qemu("qemu-img", "convert", "-f", "raw", "-O", format, *options, raw, image)
    return image


@pytest.mark.parametrize(
    ("format", "options", "name"),
    [
        ("vmdk", (), "VMDK"), ("vmdk", ("-o", "subformat=streamOptimized"), "VMDK"),
        ("vmdk", ("-o", "subformat=monolithicFlat"), "VMDK"),
        ("vmdk", ("-o", "subformat=twoGbMaxExtentSparse"), "VMDK"),
        ("vdi", (), "VDI"), ("vhdx", (), "VHDX"), ("vpc", ("-o", "force_size"), "VHD"),
        ("vpc", ("-o", "subformat=fixed,force_size"), "VHD"),
    ],
)  # fmt: skip
def test_they_are_read(
    tmp_path: Path, contents: bytes, format: str, options: tuple[str, ...], name: str  # noqa: A002
) -> None:  # fmt: skip
    image = make(tmp_path, contents, format, *options)
    before = hashlib.sha256(image.read_bytes()).digest()
    assert format_of(image) == name
    for given in ("auto", format):
        with open_image(image, format=given, read_only=True) as disk:
            assert disk.size == SIZE
            assert disk.read(0, SIZE) == contents
            with pytest.raises(BlockError):
                disk.write(0, b"x" * 512)
    with open_image(image, snapshot=True) as disk:
        disk.write(0, b"y" * 512)
        assert disk.read(0, 1024) == b"y" * 512 + contents[512:1024]
    assert hashlib.sha256(image.read_bytes()).digest() == before
    with pytest.raises(DiskImageError, match=f"is a {name} image, which is only read"):
        open_image(image)
    with pytest.raises(DiskImageError, match=f"is no qcow2 image|{format}|qcow2"):
        open_image(image, format="qcow2", read_only=True)


def dmg(contents: bytes) -> bytes:
    """A disk image of a Macintosh with one compressed block: data, block table in a property list, trailer."""
    import base64

    packed = zlib.compress(contents)
    table = struct.pack(">4sIQQQII", b"mish", 1, 0, SIZE // 512, 0, 0, 0).ljust(200, b"\0") + struct.pack(">I", 2)
    table += struct.pack(">IIQQQQ", 0x8000_0005, 0, 0, SIZE // 512, 0, len(packed))
    table += struct.pack(">IIQQQQ", 0xFFFF_FFFF, 0, SIZE // 512, 0, 0, 0)
    text = (
        '<?xml version="1.0"?><plist version="1.0"><dict><key>resource-fork</key><dict><key>blkx</key><array><dict>'
        f"<key>Data</key><data>{base64.b64encode(table).decode()}</data>"
        "</dict></array></dict></dict></plist>"
    ).encode()
    trailer = bytearray(512)
    trailer[:8] = b"koly" + struct.pack(">I", 4)
    struct.pack_into(">I", trailer, 8, 512)
    struct.pack_into(">QQ", trailer, 24, 0, len(packed))
    struct.pack_into(">QQ", trailer, 0xD8, len(packed), len(text))
    struct.pack_into(">Q", trailer, 0x1EC, SIZE // 512)
    return packed + text + bytes(trailer)


def test_a_macintosh_image(tmp_path: Path, contents: bytes) -> None:
    image = make(tmp_path, contents, "raw")
    image.write_bytes(dmg(contents))
    assert format_of(image) == "DMG"
    with open_image(image, read_only=True) as disk:
        assert disk.read(0, SIZE) == contents


def test_a_format_that_it_is_not(tmp_path: Path, contents: bytes) -> None:
    image = make(tmp_path, contents, "vdi")
    with pytest.raises(DiskImageError, match="is no vmdk image: by its contents it is VDI"):
        open_image(image, format="vmdk", read_only=True)
    raw = tmp_path / "disk.vmdk"
    raw.write_bytes(contents)
    with open_image(raw, read_only=True) as disk:
        assert disk.read(0, 512) == contents[:512], "a name is no format"


@pytest.mark.parametrize("format", ["vmdk", "vdi", "vhdx"])
def test_broken_ones_end_in_one_line(tmp_path: Path, contents: bytes, format: str) -> None:  # noqa: A002
    image = make(tmp_path, contents, format)
    whole = image.read_bytes()
    source = random.Random(9)
    for number in range(12):
        broken = bytearray(whole[: source.randrange(512, len(whole))] if number < 4 else whole)
        for _ in range(number):
            broken[source.randrange(16, 2048 if number % 2 else len(broken))] = source.randrange(256)
        image.write_bytes(broken)
        complaint = str(image)
        try:
            with open_image(image, read_only=True) as disk:
                disk.read(0, min(disk.size, 4096))
        except DiskImageError as error:
            complaint = str(error)
        assert "\n" not in complaint
        assert str(image) in complaint
    image.write_bytes(whole[:0x44] + bytes((0xFF,)) * 1000)
    with pytest.raises(DiskImageError, match="that qemu-img can read"):
        open_image(image, read_only=True)


DESCRIPTOR = """# Disk DescriptorFile
version=1
CID=11111111
parentCID={parent}
createType="monolithicFlat"
{hint}
{line} "{part}" 0
"""


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("RW 8 FLAT", "/etc/passwd"), ("RW 8 FLAT", "../secret"), ("RW 8 FLAT", "link"), ("RW +8 FLAT", "/etc/passwd"),
        ("  RW\n 8 FLAT", "/etc/passwd"), ("RW 8 FLAT", "nbd:localhost:1"), ("RW 8 SPARSE", "json:{}"),
    ],
)  # fmt: skip
def test_parts_elsewhere_are_refused(tmp_path: Path, line: str, part: str) -> None:
    """A descriptor could make any file of the host a part of the guest's disk."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"s" * 4096)
    (folder / "link").symlink_to(tmp_path / "secret")
    image = folder / "image"
    image.write_text(DESCRIPTOR.format(parent="ffffffff", hint="", line=line, part=part))
    with pytest.raises(DiskImageError, match="which is not beside it"):
        open_image(image, read_only=True)
    embedded = struct.pack("<4sIIQQQ", b"KDMV", 1, 3, 0, 128, 1).ljust(512, b"\0") + image.read_bytes()
    image.write_bytes(embedded.ljust(4096, b"\0"))
    with pytest.raises(DiskImageError, match="which is not beside it"):
        open_image(image, read_only=True)


def test_parents_and_nested_parts_are_refused(tmp_path: Path) -> None:
    image, inner = tmp_path / "image", tmp_path / "inner"
    image.write_text(
        DESCRIPTOR.format(parent="22222222", hint='parentFileNameHint="x.vmdk"', line="RW 8 FLAT", part="flat")
    )
    with pytest.raises(DiskImageError, match="has a parent image"):
        open_image(image, read_only=True)
    image.write_text(DESCRIPTOR.format(parent="ffffffff", hint="", line="RW 8 SPARSE", part="inner"))
    inner.write_text(DESCRIPTOR.format(parent="ffffffff", hint="", line="RW 8 FLAT", part="/etc/passwd"))
    with pytest.raises(DiskImageError, match="consists of parts itself"):
        open_image(image, read_only=True)


def sparse(magic: bytes, capacity: int, descriptor_at: int, text: str) -> bytes:
    """A sparse file of one empty grain table, with *text* in its second sector."""
    if magic == b"COWD":
        header = struct.pack("<4sIIIIIII", magic, 1, 3, capacity, 128, 22, 1, 64)
    else:
        fields = magic, 1, 3, capacity, 128, descriptor_at, 1, 512, 21, 21, 128
        header = struct.pack("<4sIIQQQQIQQQ", *fields) + b"\0\n \r\n"
    tables = struct.pack("<I", 22).ljust(512, b"\0") + bytes(2048)
    return (header.ljust(512, b"\0") + text.encode().ljust(20 * 512, b"\0") + tables).ljust(128 << 10, b"\0")


@pytest.fixture
def with_parent(tmp_path: Path) -> Callable[..., Path]:
    """A sparse image whose parent has a file of the host as its contents; its header may name no descriptor."""
    (tmp_path / "secret").write_bytes(b"secret!!" * 8192)
    parent = DESCRIPTOR.format(parent="ffffffff", hint="", line="RW 128 FLAT", part=tmp_path / "secret")
    (tmp_path / "base.vmdk").write_text(parent)

    def made(magic: bytes = b"KDMV", descriptor_at: int = 0) -> Path:
        child = DESCRIPTOR.format(
            parent="11111111", hint='parentFileNameHint="base.vmdk"', line="RW 128 SPARSE", part="child.vmdk"
        )
        image = tmp_path / "child.vmdk"
        image.write_bytes(sparse(magic, 128, descriptor_at, child))
        return image

    return made


@pytest.mark.parametrize("magic", [b"KDMV", b"COWD"])
@pytest.mark.parametrize("descriptor_at", [0, 1, 40])
def test_a_parent_that_the_header_does_not_tell_of(
    with_parent: Callable[..., Path], magic: bytes, descriptor_at: int
) -> None:
    with pytest.raises(DiskImageError, match="has a parent image"):
        open_image(with_parent(magic, descriptor_at), read_only=True)


@pytest.mark.parametrize("magic", [b"KDMV", b"COWD"])
def test_no_parent_is_opened_even_when_none_was_seen(
    with_parent: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, magic: bytes
) -> None:
    monkeypatch.setattr(foreign, "_check_vmdk", lambda path: None)
    image = with_parent(magic)
    qemu("qemu-img", "convert", "-f", "vmdk", "-O", "raw", image, copy := image.with_name("copy"))
    assert copy.read_bytes()[:8] == b"secret!!", "as it is given to qemu-img by its name alone"
    with open_image(image, read_only=True) as disk:
        assert disk.read(0, disk.size) == bytes(64 << 10)


def test_a_descriptor_whose_place_wraps_round(tmp_path: Path) -> None:
    """In bytes it is taken modulo 2^64."""
    (tmp_path / "secret").write_bytes(b"secret!!" * 8192)
    text = DESCRIPTOR.format(parent="ffffffff", hint="", line="RW 128 FLAT", part="/" + str(tmp_path / "secret"))
    (image := tmp_path / "image").write_bytes(sparse(b"KDMV", 0, (1 << 55) + 1, text))
    with pytest.raises(DiskImageError, match="which is not beside it"):
        open_image(image, read_only=True)


def test_a_name_that_is_not_text(tmp_path: Path, contents: bytes) -> None:
    image = make(tmp_path, contents, "vdi").rename(tmp_path / os.fsdecode(b"\xff.vdi"))
    with pytest.raises(DiskImageError, match="not UTF-8"):
        open_image(image, read_only=True)


def test_without_qemu_img(tmp_path: Path, contents: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    image = make(tmp_path, contents, "vdi")
    monkeypatch.setattr(foreign.shutil, "which", lambda name: None)
    with pytest.raises(DiskImageError, match="apt-get install qemu-utils"):
        open_image(image, read_only=True)


def test_nothing_stays_behind(tmp_path: Path, contents: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    image = make(tmp_path, contents, "vdi")
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(foreign.tempfile, "tempdir", str(place))
    with open_image(image, read_only=True) as disk:
        assert disk.read(0, 512) == contents[:512]
        assert list(place.iterdir()) == []


def test_a_backing_file_must_be_native(tmp_path: Path, contents: bytes) -> None:
    image = make(tmp_path, contents, "vmdk")
    overlay = tmp_path / "overlay"
    qemu("qemu-img", "create", "-f", "qcow2", "-b", image, "-F", "vmdk", overlay)
    with pytest.raises(DiskImageError, match="format 'vmdk'"):
        open_image(overlay, read_only=True)


def test_a_writable_guest_says_raw(tmp_path: Path) -> None:
    """Otherwise a guest could have its host take its disk for another format the next time."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    with pytest.raises(DiskImageError, match="say format=raw"):
        Disk.parse(str(path)).open()
    for options in ("format=raw", "ro", "snapshot"):
        Disk.parse(f"{path},{options}").open().close()
    Disk.parse(f"{tmp_path}/new.qcow2,size=1M").open().close()
    Disk.parse(f"{tmp_path}/new.qcow2").open().close()
