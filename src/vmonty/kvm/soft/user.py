"""The argument of an ioctl, as user space gave it: a number, an address, or a buffer.

Every byte is copied once, at the door: what a handler has read cannot change under it.
"""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING, Any, TypeVar

from vmonty.base import hostcall

if TYPE_CHECKING:
    from typing_extensions import Buffer

T = TypeVar("T", bound=ctypes.Structure)


class Argument:
    """One ioctl's argument. Reading or writing past its memory raises OSError with EFAULT."""

    def __init__(self, value: int | Buffer | None, size: int) -> None:
        self._view: memoryview | None = None
        self.number = 0
        # False for a null pointer, which some requests know.
        self.given = bool(value) if isinstance(value, int) else value is not None
        if value is None or isinstance(value, int):
            self.number = (value or 0) & 0xFFFF_FFFF_FFFF_FFFF
        else:
            self._view = memoryview(value).cast("B")
            if len(self._view) < size:
                raise OSError(errno.EFAULT, "the buffer is shorter than the request's argument")

    def read(self, size: int, offset: int = 0) -> bytes:
        """A copy of *size* bytes at *offset*."""
        if self._view is None:
            return hostcall.read_memory(self.number + offset, size)
        if offset + size > len(self._view):
            raise OSError(errno.EFAULT, "beyond the buffer's end")
        return bytes(self._view[offset : offset + size])

    def write(self, data: bytes, offset: int = 0) -> None:
        """Copy *data* to *offset*."""
        if self._view is None:
            hostcall.write_memory(self.number + offset, data)
        elif offset + len(data) > len(self._view):
            raise OSError(errno.EFAULT, "beyond the buffer's end")
        else:
            self._view[offset : offset + len(data)] = data

    def get(self, layout: type[T]) -> T:
        """A copy of the argument as *layout*."""
        return layout.from_buffer_copy(self.read(ctypes.sizeof(layout)))

    def put(self, value: ctypes.Structure | ctypes._SimpleCData[Any]) -> None:
        """Copy *value* out."""
        self.write(bytes(value))

    def entries(self, header: type[Any], element: type[T], count: int) -> list[T]:
        """Copies of the *count* elements that follow *header*."""
        start, step = ctypes.sizeof(header), ctypes.sizeof(element)
        data = self.read(step * count, start)
        return [element.from_buffer_copy(data, at) for at in range(0, len(data), step)]
