"""Guest RAM: a memfd mapped shared, with typed, bounds-checked access and zero-copy views.

Fenced: accesses go through a raw pointer. That is safe because every access is checked against the size
of the mapping first, and the mapping cannot go away while an object that uses it lives.
"""

from __future__ import annotations

import errno
import mmap
import os

import cython

from vmonty.base.errors import GuestMemoryError, HostMemoryError, UsageError
from vmonty.base.hostcall import address_of, map_over

PAGE_SIZE: int = 4096
LARGE_PAGES = (2 << 20, 1 << 30)
MAP_NORESERVE: int = 0x4000  # of x86 Linux; Python's mmap has it from 3.13 on


class Ram:
    """*size* bytes of guest RAM, a multiple of 4096, in a memfd called *name*.

    Pages are allocated by the host when they are first touched. ``address`` is where it is mapped in this
    process; ``fileno()`` is the memfd. Raises UsageError when *size* is no positive multiple of the page size,
    HostMemoryError when it is more than the host can map.
    """

    def __init__(self, size: int, name: str = "vmonty-ram") -> None:
        if size <= 0 or size % PAGE_SIZE:
            raise UsageError(f"RAM of {size} bytes: the size must be a positive multiple of {PAGE_SIZE}")
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            # So that large pages of the guest are large pages in the host's tables.
            align: int = max((step for step in LARGE_PAGES if step <= size), default=0)
            self._at = 0
            if align:
                self._mapping = mmap.mmap(-1, size + align, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
                begin: int = address_of(self._mapping)
                self._at = -begin % align
                map_over(begin + self._at, fd, size)
            else:
                self._mapping = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError, OverflowError) as error:
            os.close(fd)
            code: int = getattr(error, "errno", None) or errno.ENOMEM
            raise HostMemoryError(code, f"RAM of {size} bytes cannot be mapped: {error}") from error
        self._fd = fd
        self.size = size
        self._view = memoryview(self._mapping)[self._at : self._at + size]
        buffer: Py_buffer
        PyObject_GetBuffer(self._view, cython.address(buffer), PyBUF_WRITABLE)
        self._base = cython.cast(cython.p_uchar, buffer.buf)
        PyBuffer_Release(cython.address(buffer))
        self.address = cython.cast(cython.ulong, self._base)

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        return f"<Ram {self.size >> 10} KiB at {self.address:#x}>"

    def fileno(self) -> int:
        """The memfd; it stays open as long as this object lives."""
        return self._fd

    def __dealloc__(self) -> None:
        # The mapping itself goes when the last view of it goes.
        if self._fd > 0:
            close(self._fd)

    def _check(self, offset, size):  # type: ignore[no-untyped-def]  # typed in the .pxd
        at: cython.longlong
        length: cython.longlong
        try:
            at, length = offset, size
        except OverflowError:
            # A guest may hand out addresses that no C integer holds: they are outside as well.
            at = length = -1
        if at < 0 or length < 0 or length > self.size or at > self.size - length:
            raise GuestMemoryError(offset, size, f"RAM of {self.size:#x} bytes")
        return self._base + at

    def view(self, offset: int, size: int) -> memoryview:
        """A writable zero-copy view of *size* bytes at *offset*; it keeps the mapping alive."""
        self._check(offset, size)
        return self._view[offset : offset + size]

    def read(self, offset: int, size: int) -> bytes:
        """A copy of *size* bytes at *offset*."""
        pointer: cython.p_uchar = self._check(offset, size)
        return PyBytes_FromStringAndSize(cython.cast(cython.p_char, pointer), size)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Copy *data*, any contiguous bytes, to *offset*."""
        view = memoryview(data).cast("B")
        self._check(offset, len(view))
        self._view[offset : offset + len(view)] = view

    def fill(self, offset: int, size: int, value: int = 0) -> None:
        """Set *size* bytes at *offset* to *value*."""
        pointer: cython.p_uchar = self._check(offset, size)
        memset(pointer, value & 0xFF, size)

    def discard(self, offset: int, size: int) -> None:
        """Give whole pages back to the host; they read as zeroes from now on. Raises UsageError for parts of pages."""
        self._check(offset, size)
        if (offset | size) % PAGE_SIZE:
            raise UsageError(f"{size:#x} bytes at {offset:#x}: only whole pages can be discarded")
        if size:
            self._mapping.madvise(mmap.MADV_REMOVE, self._at + offset, size)

    def read_u8(self, offset: int) -> int:
        """The byte at *offset*."""
        return self._check(offset, 1)[0]

    def read_u16(self, offset: int) -> int:
        """The little-endian 16-bit value at *offset*, which need not be aligned."""
        value: uint16_t
        memcpy(cython.address(value), self._check(offset, 2), 2)
        return value

    def read_u32(self, offset: int) -> int:
        """The little-endian 32-bit value at *offset*, which need not be aligned."""
        value: uint32_t
        memcpy(cython.address(value), self._check(offset, 4), 4)
        return value

    def read_u64(self, offset: int) -> int:
        """The little-endian 64-bit value at *offset*, which need not be aligned."""
        value: uint64_t
        memcpy(cython.address(value), self._check(offset, 8), 8)
        return value

    def write_u8(self, offset: int, value: int) -> None:
        """Store the low 8 bits of *value*."""
        self._check(offset, 1)[0] = value & 0xFF

    def write_u16(self, offset: int, value: int) -> None:
        """Store the low 16 bits of *value*, little-endian."""
        bits: uint16_t = value & 0xFFFF
        memcpy(self._check(offset, 2), cython.address(bits), 2)

    def write_u32(self, offset: int, value: int) -> None:
        """Store the low 32 bits of *value*, little-endian."""
        bits: uint32_t = value & 0xFFFFFFFF
        memcpy(self._check(offset, 4), cython.address(bits), 4)

    def write_u64(self, offset: int, value: int) -> None:
        """Store the low 64 bits of *value*, little-endian."""
        bits: uint64_t = value & 0xFFFFFFFFFFFFFFFF
        memcpy(self._check(offset, 8), cython.address(bits), 8)
