"""The raw format: the file's bytes are the disk's."""

from __future__ import annotations

from collections.abc import Sequence

from vmonty.vmm.block.buffers import total
from vmonty.vmm.block.device import SECTOR, BlockDevice
from vmonty.vmm.block.file import HostFile


class RawDevice(BlockDevice):
    """A raw image or a host block device; owns *file*.

    A file that ends within a sector is a disk that ends with it, and reads as zeroes there.
    """

    def __init__(self, file: HostFile) -> None:
        self._file = file
        self.size = -(-file.length() // SECTOR) * SECTOR
        self.read_only = not file.writable

    def preadv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.check_range(offset, total(buffers))
        self._file.preadv(offset, buffers)

    def pwritev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.check_write(offset, total(buffers))
        self._file.pwritev(offset, buffers)

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
