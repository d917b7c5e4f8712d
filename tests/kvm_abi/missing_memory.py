"""Guest memory that blocks whoever touches it until the test gives it: userfaultfd(2), as post-copy has it."""

from __future__ import annotations

import ctypes
import os
import select
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vmonty.base import hostcall
from vmonty.base.errors import KvmError
from vmonty.base.ram import PAGE_SIZE, Ram
from vmonty.kvm.api import Vm

# linux/userfaultfd.h, asm/unistd_64.h.
SYS_USERFAULTFD = 323
UFFDIO_API, UFFDIO_REGISTER, UFFDIO_COPY = 0xC018AA3F, 0xC020AA00, 0xC028AA03
UFFD_API, REGISTER_MODE_MISSING, EVENT_PAGEFAULT, USER_MODE_ONLY = 0xAA, 1, 0x12, 1
MESSAGE = struct.Struct("<B7xQQ8x")
# As long as the guests' own limit.
WAIT_MS = 30_000


class MissingMemory:
    """*ram*, of which only those pages are there that somebody has touched.

    *user_mode*: as without privileges. The kernel does not wait for a page, on whoever's behalf: it fails with EFAULT.
    """

    def __init__(self, ram: Ram, user_mode: bool = False) -> None:
        self.ram = ram
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.syscall(SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | (USER_MODE_ONLY if user_mode else 0))
        if self._fd < 0:
            pytest.skip(f"userfaultfd: {os.strerror(ctypes.get_errno())}")
        self._request(UFFDIO_API, struct.pack("<QQQ", UFFD_API, 0, 0))
        where = struct.pack("<QQ", self.ram.address, self.ram.size)
        self._request(UFFDIO_REGISTER, where + struct.pack("<QQ", REGISTER_MODE_MISSING, 0))

    def fileno(self) -> int:
        """The userfaultfd, which somebody else may serve."""
        return self._fd

    def _request(self, number: int, data: bytes) -> None:
        result = hostcall.ioctl(self._fd, number, bytearray(data))
        if result < 0:
            raise KvmError(-result, f"userfaultfd request {number:#x}")

    def wanted(self) -> int:
        """Wait until somebody needs a page that nobody has asked for yet: its number."""
        ready = select.poll()
        ready.register(self._fd, select.POLLIN)
        assert ready.poll(WAIT_MS), "nobody touched the memory"
        event, _, address = MESSAGE.unpack(os.read(self._fd, MESSAGE.size))
        assert event == EVENT_PAGEFAULT
        return (address - self.ram.address) // PAGE_SIZE

    def give(self, page: int, value: int) -> None:
        """*page* is there from now on, and begins with *value*; whoever waits for it goes on."""
        source = ctypes.create_string_buffer(struct.pack("<Q", value), 2 * PAGE_SIZE)
        begin = -(-ctypes.addressof(source) // PAGE_SIZE) * PAGE_SIZE
        ctypes.memmove(begin, struct.pack("<Q", value), 8)
        at = self.ram.address + page * PAGE_SIZE
        self._request(UFFDIO_COPY, struct.pack("<QQQQq", at, begin, PAGE_SIZE, 0, 0))

    def close(self) -> None:
        """Whoever still waits goes on, and finds zeros."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@contextmanager
def missing_slot(vm: Vm, slot: int, gpa: int, pages: int) -> Iterator[MissingMemory]:
    """Missing memory as a slot of *vm*."""
    memory = MissingMemory(Ram(pages * PAGE_SIZE))
    try:
        vm.set_user_memory_region(slot, gpa, memory.ram)
        yield memory
    finally:
        memory.close()
