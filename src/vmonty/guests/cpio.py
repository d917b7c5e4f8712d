"""Archives in the "new ASCII" cpio format (newc), which the kernel unpacks as its initramfs.

    +--------+------------------------------------+----------+-----+----------+-----+
    | 070701 | 13 fields, 8 hexadecimal digits    | name NUL | pad | contents | pad |   one entry
    +--------+------------------------------------+----------+-----+----------+-----+
      ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check

The header and name together, and the contents, are each padded to 4 bytes; ``TRAILER!!!`` ends a segment.
Segments may follow each other: the kernel unpacks them in order, and a later file replaces an earlier one.
Source: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst and init/initramfs.c.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from vmonty.base.errors import GuestError

MAGIC = b"070701"
TRAILER = "TRAILER!!!"
SEGMENT_ALIGN = 512  # a segment after an unaligned end is dropped by the kernel without a word
PATH_MAX = 4096
FIELD_MAX = 0xFFFF_FFFF

_HEADER_SIZE = 110
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Entry:
    """One member of an archive. *mode* holds the file type too; *data* is a symlink's target."""

    name: str
    mode: int
    mtime: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


class Writer:
    """Writes one segment to *out*; parent directories that were not written yet are added.

    The output depends on the calls only: owner 0:0, inode numbers count up, times are the caller's.
    All names are relative to the root, without a leading slash. Raises GuestError for a name, size or time
    that the format cannot hold. ``close()`` writes the trailer; leaving ``with`` by an exception does not.
    """

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._written = 0
        self._ino = 0
        self._directories: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    def directory(self, name: str, *, mode: int = 0o755, mtime: int = 0) -> None:
        """Write a directory, once: a second call for the same name does nothing."""
        if name in self._directories:
            return
        self._header(name, stat.S_IFDIR | mode, mtime, nlink=2)
        self._directories.add(name)

    def file(self, name: str, data: bytes, *, mode: int = 0o644, mtime: int = 0) -> None:
        """Write a regular file that holds *data*."""
        self._header(name, stat.S_IFREG | mode, mtime, size=len(data))
        self._put(data)
        self._pad(4)

    def stream(self, name: str, source: IO[bytes], size: int, *, mode: int = 0o644, mtime: int = 0) -> None:
        """Write a regular file with the next *size* bytes of *source*, a piece at a time."""
        self._header(name, stat.S_IFREG | mode, mtime, size=size)
        left = size
        while left:
            piece = source.read(min(left, _CHUNK))
            if not piece:
                raise GuestError(f"{name}: ended {left} bytes early while it was archived; try again")
            self._put(piece)
            left -= len(piece)
        self._pad(4)

    def host_file(self, name: str, path: Path, *, mode: int | None = None) -> None:
        """Write a copy of the host's file *path* (symlinks followed), with its time and permissions."""
        with path.open("rb") as source:
            status = os.fstat(source.fileno())
            permissions = stat.S_IMODE(status.st_mode) if mode is None else mode
            self.stream(name, source, status.st_size, mode=permissions, mtime=int(status.st_mtime))

    def symlink(self, name: str, target: str, *, mtime: int = 0) -> None:
        """Write a symbolic link that points to *target*."""
        data = os.fsencode(target)
        self._header(name, stat.S_IFLNK | 0o777, mtime, size=len(data))
        self._put(data)
        self._pad(4)

    def device(self, name: str, kind: int, major: int, minor: int, *, mode: int = 0o600) -> None:
        """Write a device node; *kind* is ``stat.S_IFCHR`` or ``stat.S_IFBLK``."""
        self._header(name, kind | mode, 0, rdev=(major, minor))

    def close(self) -> None:
        """End the segment, padded so that another one may follow."""
        self._entry(TRAILER, 0, 0, 1, 0, (0, 0), ino=0)
        self._pad(SEGMENT_ALIGN)

    def _header(
        self,
        name: str,
        mode: int,
        mtime: int,
        *,
        nlink: int = 1,
        size: int = 0,
        rdev: tuple[int, int] = (0, 0),
    ) -> None:
        _check_name(name)
        if name == TRAILER:
            raise GuestError(f"{name!r} cannot be a file's name: it ends an archive")
        parent = name.rpartition("/")[0]
        if parent:
            self.directory(parent)
        self._ino += 1
        self._entry(name, mode, mtime, nlink, size, rdev, ino=self._ino)

    def _entry(
        self, name: str, mode: int, mtime: int, nlink: int, size: int, rdev: tuple[int, int], *, ino: int
    ) -> None:
        raw = os.fsencode(name) + b"\0"
        fields = (ino, mode, 0, 0, nlink, mtime, size, 0, 0, *rdev, len(raw), 0)
        if not all(0 <= field <= FIELD_MAX for field in fields):
            raise GuestError(f"{name}: size {size} or time {mtime} does not fit the archive's 32 bits")
        self._put(MAGIC + b"".join(b"%08X" % field for field in fields) + raw)
        self._pad(4)

    def _put(self, data: bytes) -> None:
        self._out.write(data)
        self._written += len(data)

    def _pad(self, alignment: int) -> None:
        self._put(bytes(-self._written % alignment))


def read(source: IO[bytes], *, size_limit: int = 1 << 30) -> Iterator[Entry]:
    """Yield the entries of all segments of *source*, the trailers left out.

    Nothing in the archive is trusted: GuestError names the offset of a malformed header, an unsafe name, an
    entry of more than *size_limit* bytes, a missing trailer or a truncated end.
    """
    tape = _Tape(source)
    segments = 0
    while tape.skip_zeros():
        while (entry := _read_entry(tape, size_limit)).name != TRAILER:
            yield entry
        segments += 1
    if not segments:
        raise GuestError("not a cpio archive: it is empty")


def _read_entry(tape: _Tape, size_limit: int) -> Entry:
    offset = tape.offset
    header = tape.take(_HEADER_SIZE)
    if header[:6] != MAGIC:
        raise GuestError(f"cpio archive: no newc header at offset {offset}")
    digits = header[6:]
    # int() would accept signs, blanks and underscores.
    if digits.strip(b"0123456789abcdefABCDEF"):
        raise GuestError(f"cpio archive: a header field at offset {offset} is not hexadecimal")
    try:
        fields = [int(digits[at : at + 8], 16) for at in range(0, len(digits), 8)]
    except ValueError:
        raise GuestError(f"cpio archive: a header field at offset {offset} is not hexadecimal") from None
    mode, mtime, size, name_size = fields[1], fields[5], fields[6], fields[11]
    if not 2 <= name_size <= PATH_MAX:
        raise GuestError(f"cpio archive: a name of {name_size} bytes at offset {offset}")
    if size > size_limit:
        raise GuestError(f"cpio archive: an entry of {size} bytes at offset {offset}; the limit is {size_limit}")
    raw = tape.take(name_size)
    if raw[-1]:
        raise GuestError(f"cpio archive: the name at offset {offset} does not end with a NUL")
    name = os.fsdecode(raw[:-1])
    _check_name(name)
    tape.align(4)
    data = tape.take(size)
    tape.align(4)
    return Entry(name, mode, mtime, data, (fields[9], fields[10]))


def _check_name(name: str) -> None:
    parts = name.split("/")
    if "\0" in name or len(os.fsencode(name)) >= PATH_MAX or {"", ".", ".."}.intersection(parts):
        raise GuestError(f"cpio archive: {name[:80]!r} is not a plain relative path")


class _Tape:
    """Sequential input that counts, and that fails rather than return less than was asked for."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self._ahead = b""
        self.offset = 0

    def take(self, size: int) -> bytes:
        pieces = io.BytesIO()
        pieces.write(self._ahead[:size])
        self._ahead = self._ahead[size:]
        while (left := size - pieces.tell()) and (piece := self._source.read(min(left, _CHUNK))):
            pieces.write(piece)
        data = pieces.getvalue()
        if len(data) != size:
            raise GuestError(f"cpio archive: truncated after {self.offset + len(data)} bytes")
        self.offset += size
        return data

    def align(self, alignment: int) -> None:
        self.take(-self.offset % alignment)

    def skip_zeros(self) -> bool:
        """Skip the padding between segments; False at the end of the input."""
        while True:
            data = self._ahead.lstrip(b"\0")
            self.offset += len(self._ahead) - len(data)
            self._ahead = data or self._source.read(SEGMENT_ALIGN)
            if data or not self._ahead:
                return bool(data)
