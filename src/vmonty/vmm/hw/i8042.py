"""8042 keyboard controller, without keyboard: what a PC needs for reset and for a driver to find nothing quickly.

Source: the IBM PS/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device Controller".
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

STATUS_OUTPUT_FULL, STATUS_SYSTEM, STATUS_COMMAND, STATUS_UNLOCKED, STATUS_TIMEOUT = 1, 4, 8, 0x10, 0x40

READ_COMMAND_BYTE, WRITE_COMMAND_BYTE = 0x20, 0x60
SELF_TEST, TEST_KEYBOARD, TEST_AUXILIARY = 0xAA, 0xAB, 0xA9
READ_OUTPUT_PORT, WRITE_OUTPUT_PORT, WRITE_KEYBOARD_BUFFER = 0xD0, 0xD1, 0xD2
SELF_TEST_PASSED, LINE_STUCK_LOW = 0x55, 1
OUTPUT_PORT_NOT_RESET, OUTPUT_PORT_A20 = 1, 2

# A guest that asks and never reads loses the oldest replies.
REPLIES = 16


class I8042:
    """Data port at offset 0, status and command port at offset 4. *reset* is called when the guest pulses the line."""

    def __init__(self, reset: Callable[[], None]) -> None:
        self._reset = reset
        self._lock = threading.Lock()
        self._replies: deque[int] = deque(maxlen=REPLIES)
        self._command_byte = STATUS_SYSTEM
        self._output_port = OUTPUT_PORT_NOT_RESET | OUTPUT_PORT_A20
        self._parameter_of: int | None = None
        self._last_was_command = False
        self._timeout = False

    def read(self, offset: int, size: int) -> int:
        """The reply queue, or the status."""
        with self._lock:
            if offset == 0:
                return self._replies.popleft() if self._replies else 0
            return (
                STATUS_UNLOCKED
                | self._command_byte & STATUS_SYSTEM
                | (STATUS_OUTPUT_FULL if self._replies else 0)
                | (STATUS_COMMAND if self._last_was_command else 0)
                | (STATUS_TIMEOUT if self._timeout else 0)
            )

    def write(self, offset: int, size: int, value: int) -> None:
        """A command, its parameter, or a byte for the keyboard that is not there (it times out)."""
        value &= 0xFF
        with self._lock:
            self._last_was_command = offset != 0
            reset = self._data(value) if offset == 0 else self._command(value)
        if reset:
            self._reset()

    def _data(self, value: int) -> bool:
        command, self._parameter_of = self._parameter_of, None
        match command:
            case 0x60:  # WRITE_COMMAND_BYTE
                self._command_byte = value
            case 0xD1:  # WRITE_OUTPUT_PORT
                self._output_port = value
                return not value & OUTPUT_PORT_NOT_RESET
            case 0xD2:  # WRITE_KEYBOARD_BUFFER
                self._replies.append(value)
            case _:
                self._timeout = True
        return False

    def _command(self, value: int) -> bool:
        self._parameter_of = None
        self._timeout = False
        if value == READ_COMMAND_BYTE:
            self._replies.append(self._command_byte)
        elif value == SELF_TEST:
            self._command_byte |= STATUS_SYSTEM
            self._replies.append(SELF_TEST_PASSED)
        elif value in (TEST_KEYBOARD, TEST_AUXILIARY):
            self._replies.append(LINE_STUCK_LOW)
        elif value == READ_OUTPUT_PORT:
            self._replies.append(self._output_port)
        elif value in (WRITE_COMMAND_BYTE, WRITE_OUTPUT_PORT, WRITE_KEYBOARD_BUFFER):
            self._parameter_of = value
        return value >= 0xF0 and not value & 1  # pulse of output line 0: reset
