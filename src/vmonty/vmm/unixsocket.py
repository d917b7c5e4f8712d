"""A Unix socket to listen at, for its own user: it takes nobody's place, and takes away no file but its own."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path

from vmonty.base.errors import UsageError


class UnixListener:
    """``socket`` listens at *path*. Raises UsageError when something is there already, OSError when it cannot be made.

    What a process left that was killed is replaced.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        _remove_dead(path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            # Before bind(), which gives the file these permissions: it is never there with others.
            os.fchmod(self.socket.fileno(), 0o600)
            self.socket.bind(str(path))
            self._file = _identity(path)
            self.socket.listen()
        except BaseException:
            self.socket.close()
            raise

    def remove(self) -> None:
        """Take the file away, unless another one is there by now. To be called before ``socket`` is closed."""
        with contextlib.suppress(OSError):
            if _identity(self._path) == self._file:
                self._path.unlink()


def _identity(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino


def _remove_dead(path: Path) -> None:
    """A socket that someone listens at stays, and whatever is none."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise UsageError(f"{path} is there, and no socket; give another path")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass  # so many wait there already that there is no room
    raise UsageError(f"another machine listens at {path}")
