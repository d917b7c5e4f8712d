"""Ports by which firmware and test guests talk to whoever watches: POST codes, a debug console, an exit with a status.

Source: IBM PC AT Technical Reference, "POST" (port 0x80); the other two are QEMU's isa-debugcon and isa-debug-exit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

# What firmware that probes for the debug console wants to read.
DEBUG_CONSOLE, DEBUG_CONSOLE_PRESENT = 0x402, 0xE9
POST_CODES = 64


class PostPort:
    """Port 0x80: the last codes are kept in ``codes``."""

    def __init__(self) -> None:
        self.codes: deque[int] = deque(maxlen=POST_CODES)

    def read(self, offset: int, size: int) -> int:
        """The last code."""
        return self.codes[-1] if self.codes else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """A new code. Linux writes here to wait: only changes are kept."""
        if not self.codes or self.codes[-1] != value & 0xFF:
            self.codes.append(value & 0xFF)


class DebugConsole:
    """Port 0x402: each byte written goes to *output*, on the vCPU's thread."""

    def __init__(self, output: Callable[[bytes], None]) -> None:
        self._output = output

    def read(self, offset: int, size: int) -> int:
        """Says that it is there."""
        return DEBUG_CONSOLE_PRESENT

    def write(self, offset: int, size: int, value: int) -> None:
        """One character; of wider writes the low byte."""
        self._output(bytes((value & 0xFF,)))


class DebugExit:
    """isa-debug-exit: a write ends the machine by *leave* with status ``value << 1 | 1``."""

    def __init__(self, leave: Callable[[int], None]) -> None:
        self._leave = leave

    def read(self, offset: int, size: int) -> int:
        """Nothing."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """The guest has its result."""
        self._leave((value << 1 | 1) & 0xFF)
