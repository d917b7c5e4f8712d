"""What stands behind a file descriptor of this KVM, and how its ioctls are found."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from vmonty.kvm.soft.user import Argument
from vmonty.kvm.uapi import Ioctl

Handler = Callable[[Any, Argument], int | None]
F = TypeVar("F", bound=Handler)


def answers(request: Ioctl) -> Callable[[F], F]:
    """Mark a method as the handler of *request*. It returns the ioctl's result (None: 0) or raises OSError."""

    def mark(handler: F) -> F:
        handler.__dict__.setdefault("requests", []).append(int(request))
        return handler

    return mark


class KvmFile:
    """An open file. Subclasses mark their handlers with ``answers``; unknown requests give ENOTTY."""

    handlers: ClassVar[dict[int, Handler]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        members = (member for base in reversed(cls.__mro__) for member in vars(base).values())
        cls.handlers = {request: member for member in members for request in getattr(member, "requests", ())}

    def ioctl(self, request: int, value: Any) -> int:
        """Handle one request; raises OSError with the errno that the kernel would give."""
        handler = self.handlers.get(request)
        if handler is None:
            raise OSError(errno.ENOTTY, "this file does not know the request")
        return handler(self, Argument(value, request >> 16 & 0x3FFF)) or 0

    def make_fd(self, name: str, size: int = 0) -> int:
        """A real descriptor to stand for this file: a memfd of *size* bytes."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            if size:
                os.ftruncate(fd, size)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def release(self) -> None:
        """The last descriptor was closed."""


def anon_inode_getfd(file: KvmFile, name: str, install: Install) -> int:
    """A descriptor for *file*, which is released if there is none to be had."""
    try:
        fd = file.make_fd(name)
    except BaseException:
        file.release()
        raise
    install(file, fd)
    return fd


# fd_install(): from here on the descriptor leads to the file. It cannot fail.
Install = Callable[[KvmFile, int], None]
