"""MC146818 real-time clock and its CMOS memory. Source: the MC146818 data sheet, "Address Map", "Registers"."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime

REGISTER_A, REGISTER_B, REGISTER_C, REGISTER_D = 10, 11, 12, 13
RATE_32KHZ_1024HZ = 0x26
MODE_24_HOURS, MODE_BINARY = 2, 4
VALID_RAM = 0x80
HOURS, PM = 4, 0x80
CENTURY = 0x32


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Cmos:
    """Index port at offset 0, data port at offset 1. The clock shows *now()*; writes to it are not kept."""

    def __init__(self, now: Callable[[], datetime] = _utc_now) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._index = 0
        self._memory = bytearray(128)
        self._memory[REGISTER_A] = RATE_32KHZ_1024HZ
        self._memory[REGISTER_B] = MODE_24_HOURS
        self._memory[REGISTER_D] = VALID_RAM

    def read(self, offset: int, size: int) -> int:
        """The index reads as all ones, as the port is write-only on a PC."""
        with self._lock:
            return self._register(self._index) if offset == 1 else 0xFF

    def _register(self, index: int) -> int:
        now = self._now()
        clock = {
            0: now.second, 2: now.minute, HOURS: now.hour, 6: now.isoweekday() % 7 + 1, 7: now.day, 8: now.month,
            9: now.year % 100, CENTURY: now.year // 100,
        }  # fmt: skip
        if (value := clock.get(index)) is None:
            return self._memory[index]
        mode, afternoon = self._memory[REGISTER_B], 0
        if index == HOURS and not mode & MODE_24_HOURS:
            value, afternoon = value % 12 or 12, PM if value >= 12 else 0
        return (value if mode & MODE_BINARY else value // 10 << 4 | value % 10) | afternoon

    def write(self, offset: int, size: int, value: int) -> None:
        """Select a register (bit 7, the NMI mask, is ignored), or write it."""
        with self._lock:
            if offset == 0:
                self._index = value & 0x7F
            elif self._index not in (REGISTER_C, REGISTER_D):
                self._memory[self._index] = value & 0xFF
