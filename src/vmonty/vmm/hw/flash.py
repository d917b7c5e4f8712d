"""A parallel flash chip with Intel's command set, whose contents are a file.

Source: Common Flash Interface specification; Intel StrataFlash (28F256) data sheet, "Command Definitions", "Status
Register". The status is zero until an operation was carried out, as firmware for virtual machines expects.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from enum import Enum

from vmonty.base.ram import Ram

BLOCK = 4096
STATUS_READY, STATUS_ERASE_ERROR, STATUS_SEQUENCE_ERROR = 0x80, 0x20, 0x30
PROGRAM = frozenset((0x10, 0x40))
ERASE, CONFIRM, CLEAR_STATUS, READ_STATUS, READ_IDENTITY, READ_ARRAY = 0x20, 0xD0, 0x50, 0x70, 0x90, 0xFF
WRITE_BUFFER, BUFFER = 0xE8, 64
MANUFACTURER, DEVICE = 0x89, 0x18
ERASED = 0xFF


class _Mode(Enum):
    ARRAY = "array"
    STATUS = "status"
    IDENTITY = "identity"
    PROGRAM = "program"  # the next write is data
    ERASE = "erase"  # the next write confirms
    COUNT = "count"  # the next write is a number of bytes, less one
    FILL = "fill"  # the next writes fill the buffer, then one confirms


class Flash:
    """*ram* holds what the guest reads; what is programmed goes to the file *fd* as well.

    *show* is told whether reads find the array: then a memory slot may show *ram*, read-only; else they come here.
    *written* (offset, size) says that *ram* was changed. Raises OSError never: a file that cannot be written is a
    program error in the status.
    """

    def __init__(self, ram: Ram, fd: int, show: Callable[[bool], None], written: Callable[[int, int], None]) -> None:
        self._ram = ram
        self._fd = fd
        self._show = show
        self._written = written
        self._lock = threading.Lock()
        self._mode = _Mode.ARRAY
        self._status = 0
        self._buffer: dict[int, int] = {}
        self._expected = 0
        show(True)

    def read(self, offset: int, size: int) -> int:
        """The array, the status in each byte, or the chip's identity."""
        with self._lock:
            if self._mode is _Mode.ARRAY:
                return int.from_bytes(self._ram.read(offset, size), "little")
            if self._mode is _Mode.IDENTITY:
                return (MANUFACTURER, DEVICE)[offset & 1] if offset & 0xFF < 2 else 0
            return int.from_bytes(bytes((self._status,)) * size, "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """A command, or the data that belongs to one."""
        with self._lock:
            before = self._mode
            self._mode = self._next(offset, size, value & (1 << 8 * size) - 1)
            if (before is _Mode.ARRAY) != (self._mode is _Mode.ARRAY):
                self._show(self._mode is _Mode.ARRAY)

    def _next(self, offset: int, size: int, value: int) -> _Mode:
        match self._mode:
            case _Mode.PROGRAM:
                self._program(offset, value.to_bytes(size, "little"))
                return _Mode.STATUS
            case _Mode.ERASE:
                if value & 0xFF == CONFIRM:
                    self._erase(offset)
                else:
                    self._status |= STATUS_READY | STATUS_SEQUENCE_ERROR
                return _Mode.STATUS
            case _Mode.COUNT:
                self._expected, self._buffer = (value & 0xFF) + 1, {}
                if self._expected > BUFFER:
                    self._status |= STATUS_READY | STATUS_SEQUENCE_ERROR
                    return _Mode.STATUS
                return _Mode.FILL
            case _Mode.FILL:
                return self._fill(offset, size, value)
        return self._command(value & 0xFF)

    def _command(self, command: int) -> _Mode:
        if command in PROGRAM:
            return _Mode.PROGRAM
        if command == CLEAR_STATUS:
            self._status = 0
            return _Mode.ARRAY
        if command == WRITE_BUFFER:
            self._status |= STATUS_READY
        return {
            ERASE: _Mode.ERASE, READ_STATUS: _Mode.STATUS, READ_IDENTITY: _Mode.IDENTITY, WRITE_BUFFER: _Mode.COUNT,
        }.get(command, _Mode.ARRAY)  # fmt: skip

    def _fill(self, offset: int, size: int, value: int) -> _Mode:
        if len(self._buffer) < self._expected:
            for at, byte in enumerate(value.to_bytes(size, "little")):
                if offset + at < self._ram.size:
                    self._buffer[offset + at] = byte
            return _Mode.FILL
        if value & 0xFF == CONFIRM:
            for at, byte in self._buffer.items():
                self._program(at, bytes((byte,)))
        else:
            self._status |= STATUS_READY | STATUS_SEQUENCE_ERROR
        return _Mode.STATUS

    # ---- the array ------------------------------------------------------------------------------------------------

    def _program(self, offset: int, data: bytes) -> None:
        """Bits go from one to zero only."""
        old = self._ram.read(offset, len(data))
        self._store(offset, bytes(one & other for one, other in zip(old, data, strict=True)))

    def _erase(self, offset: int) -> None:
        self._store(offset & -BLOCK, bytes((ERASED,)) * BLOCK)

    def _store(self, offset: int, data: bytes) -> None:
        self._status |= STATUS_READY
        try:
            os.pwrite(self._fd, data, offset)
        except OSError:
            self._status |= STATUS_ERASE_ERROR
            return
        self._ram.write(offset, data)
        self._written(offset, len(data))
