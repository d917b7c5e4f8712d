"""Raw images: whole transfers at any offset, locks that QEMU honours, and what auto-detection must not allow."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vmonty.base.errors import BlockError, DiskImageError
from vmonty.vmm.block.image import open_image

from .conftest import qemu

SIZE = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(SIZE))
    return image


def test_scattered_transfers(path: Path) -> None:
    with open_image(path, format="raw") as disk:
        disk.pwritev(1000, [memoryview(b"ab"), memoryview(b""), memoryview(b"cde")])
        parts = [memoryview(bytearray(3)), memoryview(bytearray(4))]
        disk.preadv(999, parts)
        assert [bytes(part) for part in parts] == [b"\0ab", b"cde\0"]
        many = [memoryview(bytes([index % 251])) for index in range(5000)]
        disk.pwritev(SIZE - 5000, many)
        assert disk.read(SIZE - 5000, 5000) == b"".join(many)
    assert path.read_bytes()[1000:1005] == b"abcde"
    assert path.stat().st_size == SIZE


def test_a_file_that_ends_within_a_sector(path: Path) -> None:
    os.truncate(path, 1000)
    with open_image(path, format="raw") as disk:
        assert disk.size == 1024
        assert disk.read(990, 34) == bytes(34)
        disk.write(1020, b"tail")
        assert disk.read(1018, 6) == b"\0\0tail"


@pytest.mark.parametrize("unmap", [False, True])
def test_zeroing(path: Path, unmap: bool) -> None:
    path.write_bytes(b"x" * SIZE)
    with open_image(path, format="raw") as disk:
        disk.write_zeroes(5000, 70000, unmap)
        disk.discard(200_000, 65536)
        disk.flush()
        data = disk.read(0, SIZE)
        assert data[4999:75001] == b"x" + bytes(70000) + b"x"
        assert disk.size == SIZE
        blocks = os.stat(path).st_blocks
        disk.write_zeroes(0, SIZE, True)
        assert os.stat(path).st_blocks < blocks


@pytest.mark.parametrize(("offset", "length"), [(SIZE, 1), (-1, 1), (SIZE - 1, 2), (1 << 70, 1)])
def test_outside_the_disk(path: Path, offset: int, length: int) -> None:
    with open_image(path, format="raw") as disk:
        for act in (disk.read, disk.discard, lambda at, size: disk.write(at, bytes(size))):
            with pytest.raises(BlockError) as error:
                act(offset, length)
            assert error.value.errno == errno.EINVAL


def test_read_only(path: Path) -> None:
    path.chmod(0o444)
    with open_image(path, read_only=True) as disk, open_image(path, read_only=True) as again:
        assert disk.read_only
        assert again.read(0, 1) == b"\0"
        for act in (lambda: disk.write(0, b"x"), lambda: disk.discard(0, 512), lambda: disk.write_zeroes(0, 1, True)):
            with pytest.raises(BlockError) as error:
                act()
            assert error.value.errno == errno.EROFS


def test_one_writer_keeps_others_off(path: Path) -> None:
    with open_image(path, format="raw"):
        for read_only in (False, True):
            with pytest.raises(DiskImageError, match=r"in use|being written"):
                open_image(path, format="raw", read_only=read_only)
        assert "lock" in qemu("qemu-io", "-f", "raw", "-c", "read 0 512", path, status=1)
    with open_image(path, format="raw", read_only=True):
        with pytest.raises(DiskImageError, match="in use"):
            open_image(path, format="raw")
        assert "lock" in qemu("qemu-io", "-f", "raw", "-c", "write 0 512", path, status=1)
        qemu("qemu-io", "-r", "-f", "raw", "-c", "read 0 512", path)
    open_image(path, format="raw").close()


def test_a_guest_cannot_turn_its_disk_into_another_format(path: Path) -> None:
    with open_image(path) as disk:
        disk.write(0, b"QF")
        disk.write(512, b"QFI\xfb")
        for offset, data in ((0, b"QFI\xfb" + bytes(5000)), (2, b"I\xfb"), (0, b"KDMV"), (1, b"FI\xfb")):
            with pytest.raises(BlockError, match="format=raw") as error:
                disk.write(offset, data)
            assert error.value.errno == errno.EPERM
        disk.pwritev(0, [memoryview(b"ab"), memoryview(b"c" * 1000)])
        assert disk.read(0, 1003) == b"ab" + b"c" * 1000 + b"\0"
    with open_image(path, format="raw") as disk:
        disk.write(0, b"QFI\xfb")
    with open_image(path, format="raw") as disk:
        assert disk.read(0, 4) == b"QFI\xfb"


@pytest.mark.parametrize(
    ("head", "complaint"),
    [(b"KDMV", "VMDK"), (b"QED\0", "QED"), (b"vhdxfile", "VHDX"), (b"LUKS\xba\xbe", "LUKS"), (b"QFI\xfb", "qcow2")],
)
def test_what_is_no_raw_disk(path: Path, head: bytes, complaint: str) -> None:
    path.write_bytes(head + bytes(1000))
    with pytest.raises(DiskImageError, match=complaint) as error:
        open_image(path)
    assert "\n" not in str(error.value)
    open_image(path, format="raw").close()


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    for place, complaint in ((tmp_path / "none", "No such file"), (tmp_path, "directory"), ("/dev/null", "neither")):
        with pytest.raises(DiskImageError, match=complaint):
            open_image(place)
    (tmp_path / "none2").touch()
    with pytest.raises(DiskImageError, match="unknown disk format"):
        open_image(tmp_path / "none2", format="zip", read_only=True)


@pytest.mark.parametrize("read_only", [False, True])
def test_a_fifo_is_refused_at_once(tmp_path: Path, read_only: bool) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with ThreadPoolExecutor() as pool:
        opening = pool.submit(open_image, fifo, read_only=read_only)
        try:
            with pytest.raises(DiskImageError, match="fifo is neither a file nor a block device"):
                opening.result(10)
        finally:
            os.close(os.open(fifo, os.O_RDWR))  # whoever waits for a writer goes on


def test_extents_name_all_that_is_not_zero(path: Path) -> None:
    os.truncate(path, 0)
    os.truncate(path, 1 << 30)
    with open_image(path, format="raw") as disk:
        written = {5 << 20: b"five", (1 << 30) - 4096: b"the end", 700 << 20: b"x" * 200_000}
        for offset, data in written.items():
            disk.write(offset, data)
        extents = list(disk.extents())
        for offset, data in written.items():
            assert any(start <= offset and offset + len(data) <= start + length for start, length in extents)
        assert sum(length for _, length in extents) < 64 << 20
