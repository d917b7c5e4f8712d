"""The raw format: the file's bytes are the disk's."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence

from vmonty.base.errors import BlockError
from vmonty.vmm.block.buffers import cut, total
from vmonty.vmm.block.device import SECTOR, BlockDevice
from vmonty.vmm.block.file import HostFile
from vmonty.vmm.block.probe import PROBED_BYTES, probe


class RawDevice(BlockDevice):
    """A raw image or a host block device; owns *file*.

    A file that ends within a sector is a disk that ends with it, and reads as zeroes there. When the format was
    *probed*, writes that would make the disk look like an image of another format are refused (EPERM): the guest could
    have its host take it for one next time, with a backing file of the guest's choice.
    """

    def __init__(self, file: HostFile, *, probed: bool = False) -> None:
        self._file = file
        self._probed = probed
        self.size = -(-file.length() // SECTOR) * SECTOR
        self.read_only = not file.writable

    def preadv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.check_range(offset, total(buffers))
        self._file.preadv(offset, buffers)

    def pwritev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.check_write(offset, total(buffers))
        if self._probed and offset < PROBED_BYTES:
            buffers = self._guarded(offset, buffers)
        self._file.pwritev(offset, buffers)

    def _guarded(self, offset: int, buffers: Sequence[memoryview]) -> list[memoryview]:
        """*buffers* with a copy of what lies in the first bytes, which a guest cannot change after the look at it."""
        length = total(buffers)
        size = min(PROBED_BYTES - offset, length)
        new = b"".join(cut(buffers, 0, size))
        head = bytearray(self._file.read(0, PROBED_BYTES))
        head[offset : offset + size] = new
        if (kind := probe(bytes(head))) != "raw":
            raise BlockError(
                errno.EPERM,
                f"the guest writes the signature of a {kind} image to {self._file.name}, a disk without a given format;"
                " give format=raw to allow it",
            )
        return [memoryview(new), *cut(buffers, size, length - size)]

    def extents(self) -> Iterator[tuple[int, int]]:
        return self._file.extents()

    def flush(self) -> None:
        if not self.read_only:
            self._file.sync()

    def discard(self, offset: int, length: int) -> None:
        self.check_write(offset, length)
        if length:
            self._file.punch(offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self.check_write(offset, length)
        if length and not (unmap and self._file.punch(offset, length)):
            self._file.zero(offset, length)

    def close(self) -> None:
        if self._file.fd >= 0:
            try:
                self.flush()
            finally:
                self._file.close()
