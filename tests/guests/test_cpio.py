"""The cpio writer against the reader, against the host's cpio, and the reader against hostile input."""

from __future__ import annotations

import io
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmonty.base.errors import GuestError
from vmonty.guests import cpio


def sample() -> bytes:
    out = io.BytesIO()
    with cpio.Writer(out) as writer:
        writer.file("a/b/data", b"hello", mode=0o640, mtime=1_700_000_000)
        writer.symlink("a/link", "b/data")
        writer.device("dev/console", stat.S_IFCHR, 5, 1)
        writer.directory("empty", mode=0o700)
    return out.getvalue()


def test_round_trip() -> None:
    entries = {entry.name: entry for entry in cpio.read(io.BytesIO(sample()))}
    assert list(entries) == ["a", "a/b", "a/b/data", "a/link", "dev", "dev/console", "empty"]
    assert entries["a/b/data"] == cpio.Entry("a/b/data", stat.S_IFREG | 0o640, 1_700_000_000, b"hello")
    assert entries["a/link"].mode == stat.S_IFLNK | 0o777
    assert entries["a/link"].data == b"b/data"
    assert entries["dev/console"].device == (5, 1)
    assert entries["empty"].mode == stat.S_IFDIR | 0o700


def test_same_calls_same_bytes() -> None:
    assert sample() == sample()


def test_segments_follow_each_other() -> None:
    segment = sample()
    assert len(segment) % cpio.SEGMENT_ALIGN == 0
    assert len(list(cpio.read(io.BytesIO(segment + segment)))) == 14


def test_host_file_keeps_time_and_permissions(tmp_path: Path) -> None:
    path = tmp_path / "script"
    path.write_bytes(b"x" * 100_001)
    path.chmod(0o750)
    os.utime(path, (1, 1_234_567_890.9))
    out = io.BytesIO()
    with cpio.Writer(out) as writer:
        writer.host_file("bin/script", path)
    entry = list(cpio.read(io.BytesIO(out.getvalue())))[-1]
    assert entry == cpio.Entry("bin/script", stat.S_IFREG | 0o750, 1_234_567_890, b"x" * 100_001)


def test_file_that_shrinks_is_an_error() -> None:
    with pytest.raises(GuestError, match="ended 3 bytes early"):
        cpio.Writer(io.BytesIO()).stream("log", io.BytesIO(b"short"), 8)


@pytest.mark.parametrize("name", ["", "/etc", "a//b", "../up", "a/./b", "nul\0", "x" * 4096, cpio.TRAILER])
def test_writer_refuses_unsafe_names(name: str) -> None:
    with pytest.raises(GuestError):
        cpio.Writer(io.BytesIO()).file(name, b"")


def test_writer_refuses_what_32_bits_cannot_hold() -> None:
    with pytest.raises(GuestError, match="32 bits"):
        cpio.Writer(io.BytesIO()).file("old", b"", mtime=-1)


def test_hosts_cpio_reads_it() -> None:
    command = next(([*name, "cpio", "-tv"] for name in ([], ["busybox"]) if shutil.which([*name, "cpio"][0])), None)
    if command is None:
        pytest.skip("neither cpio nor busybox is on this host: install cpio")
    listing = subprocess.run(command, input=sample(), capture_output=True, check=True).stdout.decode()
    assert "a/link -> b/data" in listing


names = st.lists(st.text("abc.é-", min_size=1, max_size=5).filter(lambda s: s.strip(".")), min_size=1, max_size=3)


@given(st.dictionaries(names.map("/".join), st.binary(max_size=300), max_size=6))
def test_any_files_round_trip(files: dict[str, bytes]) -> None:
    out = io.BytesIO()
    with cpio.Writer(out) as writer:
        for name, data in files.items():
            writer.file(name, data)
    entries = cpio.read(io.BytesIO(out.getvalue()))
    assert {entry.name: entry.data for entry in entries if stat.S_ISREG(entry.mode)} == files


def readable(data: bytes) -> bool:
    """Whether the reader takes *data*; anything but an answer or a GuestError fails the test."""
    try:
        list(cpio.read(io.BytesIO(data), size_limit=1 << 20))
    except GuestError:
        return False
    return True


@given(st.binary(max_size=600))
@example(b"")
@example(cpio.MAGIC + b"0" * 104)
@example(cpio.MAGIC + b"+0000001" * 13 + b"a\0")
@example(cpio.MAGIC + b"FFFFFFFF" * 13)
def test_noise_is_refused(data: bytes) -> None:
    assert not readable(data)


@given(st.data())
def test_damage_never_breaks_the_reader(data: st.DataObject) -> None:
    archive = bytearray(sample())
    for at in data.draw(st.lists(st.integers(0, len(archive) - 1), max_size=8)):
        archive[at] = data.draw(st.integers(0, 255))
    readable(bytes(archive))


@given(st.integers(0, 600))
def test_truncation_is_noticed(length: int) -> None:
    assert not readable(sample()[:length])


@pytest.mark.parametrize("name", [b"../up", b"/etc/x", b"a\0b"])
def test_unsafe_names_are_refused(name: bytes) -> None:
    fields = b"00000001" + b"000081A4" + b"00000000" * 9 + b"%08X" % (len(name) + 1) + b"00000000"
    with pytest.raises(GuestError, match="plain relative path"):
        list(cpio.read(io.BytesIO(cpio.MAGIC + fields + name + bytes(64))))


def test_size_limit() -> None:
    with pytest.raises(GuestError, match="the limit is 4"):
        list(cpio.read(io.BytesIO(sample()), size_limit=4))
