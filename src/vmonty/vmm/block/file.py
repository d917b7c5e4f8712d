"""The file or host block device that an image lies in: whole transfers, zeroing, locking."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from vmonty.base.errors import BlockError, DiskImageError
from vmonty.vmm.block import locking
from vmonty.vmm.block.buffers import cut, fill_zero, total, zeroes

IOV_MAX = 1024  # Linux's limit of views in one call
# linux/falloc.h
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16
_CANNOT = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL)

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class HostFile:
    """An open image file. Behind its end it reads as zeroes; a write there makes it longer.

    *fd* is given when the file is open already; one that is not *durable* is never synced. Raises DiskImageError when
    *path* cannot be opened or is locked by another, and BlockError afterwards.
    """

    def __init__(
        self, path: Path, *, writable: bool, lock: bool = True, fd: int | None = None, durable: bool = True
    ) -> None:
        self.name = str(path)
        self.writable = writable
        self._durable = durable
        self._syncing = threading.Lock()
        self._lost: OSError | None = None  # why a sync failed
        try:
            self.fd = _open(path, os.O_RDWR if writable else os.O_RDONLY) if fd is None else fd
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            remedy = "; give readonly=on for a file that may not be written" if writable and _denied(error) else ""
            raise DiskImageError(f"the disk image {path} cannot be opened: {reason}{remedy}") from error
        try:
            kind = os.fstat(self.fd).st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
                raise _neither(path)
            self.is_device = stat.S_ISBLK(kind)
            if lock:
                locking.lock(self.fd, self.name, writable=writable)
        except BaseException:
            os.close(self.fd)
            raise
        self._can_punch = self._can_zero = True

    def length(self) -> int:
        """The file's or device's length in bytes."""
        return os.lseek(self.fd, 0, os.SEEK_END) if self.is_device else os.fstat(self.fd).st_size

    def truncate(self, length: int) -> None:
        """Make the file *length* bytes long; a device stays as it is."""
        if not self.is_device:
            try:
                os.ftruncate(self.fd, length)
            except OSError as error:
                raise self._error("resizing", error) from error
            except OverflowError as error:
                raise BlockError(errno.EFBIG, f"resizing {self.name}: no file can have {length} bytes") from error

    def extents(self) -> Iterator[tuple[int, int]]:
        """(offset, length) of what the file stores; all of it where the file system does not say."""
        length = at = 0
        try:
            length = self.length()
            while at < length:
                start = os.lseek(self.fd, at, os.SEEK_DATA)
                at = os.lseek(self.fd, start, os.SEEK_HOLE)
                yield start, at - start
        except OSError as error:
            # ENXIO: no data up to the end.
            if error.errno != errno.ENXIO and at < length:
                yield at, length - at

    def preadv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill *buffers* from *offset* on."""
        wanted = total(buffers)
        done = 0
        while done < wanted:
            rest = cut(buffers, done, wanted) if done else buffers
            try:
                got = os.preadv(self.fd, rest[:IOV_MAX], offset + done)
            except OSError as error:
                raise self._error("reading", error) from error
            if got == 0:
                fill_zero(cut(buffers, done, wanted))
                return
            done += got

    def pwritev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write *buffers* at *offset*."""
        wanted = total(buffers)
        done = 0
        while done < wanted:
            rest = cut(buffers, done, wanted) if done else buffers
            try:
                got = os.pwritev(self.fd, rest[:IOV_MAX], offset + done)
            except OSError as error:
                raise self._error("writing", error) from error
            if got == 0:
                raise BlockError(errno.ENOSPC, f"writing {self.name}: the device ends at {offset + done}")
            done += got

    def read(self, offset: int, length: int) -> bytes:
        """*length* bytes from *offset*."""
        data = bytearray(length)
        self.preadv(offset, [memoryview(data)])
        return bytes(data)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write *data* at *offset*."""
        self.pwritev(offset, [memoryview(data).cast("B")])

    def sync(self) -> None:
        """Make what was written durable. Once that failed it fails until the file is opened anew.

        Linux tells of a failed write once, drops what it could not write, and has nothing left to fail the next time.
        """
        if not self._durable:
            return
        # One at a time: of two that wait for the same writes only one would be told.
        with self._syncing:
            if self._lost is not None:
                raise self._error("flushing", self._lost)
            try:
                os.fdatasync(self.fd)
            except OSError as error:
                # Not what it was: nobody shall wait for room (virtio-blk) that comes too late.
                self._lost = OSError(errno.EIO, error.strerror)
                raise self._error("flushing", self._lost) from error

    def punch(self, offset: int, length: int) -> bool:
        """Give up the storage of a range, which then reads as zeroes. False where the host cannot."""
        self._can_punch = self._can_punch and self._allocate(_PUNCH_HOLE | _KEEP_SIZE, offset, length)
        return self._can_punch

    def zero(self, offset: int, length: int) -> None:
        """Write zeroes; the file's length stays when it ends before."""
        if not self.is_device:
            length = min(length, self.length() - offset)
        if length <= 0:
            return
        self._can_zero = self._can_zero and self._allocate(_ZERO_RANGE | _KEEP_SIZE, offset, length)
        if not self._can_zero:
            step = IOV_MAX << 16
            for start in range(0, length, step):
                self.pwritev(offset + start, zeroes(min(step, length - start)))

    def _allocate(self, mode: int, offset: int, length: int) -> bool:
        while _fallocate(self.fd, mode, offset, length):
            number = ctypes.get_errno()
            if number == errno.EINTR:
                continue
            if number in _CANNOT:
                return False
            raise self._error("zeroing", OSError(number, os.strerror(number)))
        return True

    def _error(self, doing: str, error: OSError) -> BlockError:
        return BlockError(error.errno or errno.EIO, f"{doing} {self.name}: {error.strerror}")

    def close(self) -> None:
        """Close the file, which unlocks it. A second call does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def _open(path: Path, flags: int) -> int:
    """An fd of *path*; no FIFO is opened, which waits for its other end, and no serial line, which does for a carrier.

    Not by O_NONBLOCK: a CD drive then opens without a disc and does not lock its door, and a file with a lease fails.
    """
    kind = os.stat(path).st_mode
    if stat.S_ISFIFO(kind) or stat.S_ISCHR(kind):
        raise _neither(path)
    return os.open(path, flags | os.O_CLOEXEC)


def _neither(path: Path) -> DiskImageError:
    return DiskImageError(f"{path} is neither a file nor a block device")


def _denied(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
