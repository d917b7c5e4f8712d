"""What every disk offers, whatever its format."""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from vmonty.base.closing import Closing
from vmonty.base.errors import BlockError

SECTOR = 512


class BlockDevice(Closing, ABC):
    """A disk. Every method may be called from any thread, several at a time.

    Offsets and lengths are bytes, any, inside *size*; buffers are byte views, writable for a read. An operation is
    done whole, or raises BlockError; after an error the contents of its range are not known. A write survives the
    end of the process and of the host once a later flush() has returned.
    """

    size: int
    """Bytes, a multiple of 512."""
    read_only: bool
    """Whether changes are refused with EROFS."""
    waits: bool = False
    """Whether operations may wait for more than the host: then nobody else's thread should do them."""

    @abstractmethod
    def preadv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill *buffers* from *offset* on. Raises BlockError."""

    @abstractmethod
    def pwritev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write *buffers* at *offset*. Raises BlockError."""

    @abstractmethod
    def flush(self) -> None:
        """Make all writes durable that have returned. Raises BlockError."""

    @abstractmethod
    def discard(self, offset: int, length: int) -> None:
        """Say that the contents are of no interest any more: a hint, they may stay. Raises BlockError."""

    @abstractmethod
    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Make the range read as zeroes; with *unmap* its storage may be given up. Raises BlockError."""

    def hurry(self, on: bool) -> None:  # most disks wait for nothing but the host
        """While *on*, operations wait for nothing but the host: the one who uses it shall end."""

    @abstractmethod
    def close(self) -> None:
        """Flush and give up the file. A second call does nothing; no other method may be called afterwards."""

    def extents(self) -> Iterator[tuple[int, int]]:
        """(offset, length) of the parts that may be other than zero, in order; nobody writes meanwhile."""
        if self.size:
            yield 0, self.size

    def read(self, offset: int, length: int) -> bytes:
        """*length* bytes from *offset*, as a copy. Raises BlockError."""
        data = bytearray(length)
        self.preadv(offset, [memoryview(data)])
        return bytes(data)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write *data* at *offset*. Raises BlockError."""
        self.pwritev(offset, [memoryview(data).cast("B")])

    def check_range(self, offset: int, length: int) -> None:
        """Raise BlockError (EINVAL) for a range that is not inside the disk."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise BlockError(errno.EINVAL, f"{length} bytes at {offset} are outside a disk of {self.size} bytes")

    def check_write(self, offset: int, length: int) -> None:
        """As check_range(), and EROFS for a disk that is read-only."""
        if self.read_only:
            raise BlockError(errno.EROFS, "the disk is read-only")
        self.check_range(offset, length)
