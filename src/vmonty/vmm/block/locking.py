"""Locks of image files, of the same kind as QEMU's, so that the two also keep off each other.

QEMU places open-file-description locks on single bytes: byte 100 + n says that its owner uses permission n, byte
200 + n that nobody else may. Source: QEMU, docs/system/qemu-block-drivers.rst, "Disk image file locking".
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from vmonty.base.errors import DiskImageError

CONSISTENT_READ, WRITE, RESIZE = 0, 1, 3
_USES, _FORBIDS = 100, 200
_FLOCK = struct.Struct("hh4xqqi4x")


def lock(fd: int, name: str, *, writable: bool) -> None:
    """Lock the file of *fd* until it is closed: many readers, or one writer.

    Raises DiskImageError when another program, or another disk of this one, uses the file otherwise.
    A file system without locks goes unlocked, as with QEMU.
    """
    uses = [CONSISTENT_READ, WRITE, RESIZE] if writable else [CONSISTENT_READ]
    forbids = [WRITE, RESIZE]
    try:
        for base, permissions in ((_USES, uses), (_FORBIDS, forbids)):
            for permission in permissions:
                _set(fd, base + permission)
        # Ours stand before we look: of two that come at once at least one sees the other.
        taken = any(_held(fd, _FORBIDS + permission) for permission in uses)
        taken = taken or any(_held(fd, _USES + permission) for permission in forbids)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP):
            return
        raise DiskImageError(f"{name} cannot be locked: {os.strerror(error.errno or 0)}") from error
    if taken:
        raise DiskImageError(
            f"{name} is in use by another machine or program; end that first, or give snapshot=on or a copy"
            if writable
            else f"{name} is being written by another machine or program; end that first, or give a copy"
        )


def _set(fd: int, byte: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))


def _held(fd: int, byte: int) -> bool:
    """Whether someone else holds a lock on *byte*."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
