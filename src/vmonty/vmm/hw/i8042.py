"""8042 keyboard controller with two PS/2 ports.

Source: the IBM PS/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device Controller".
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

STATUS_OUTPUT_FULL, STATUS_SYSTEM, STATUS_COMMAND, STATUS_UNLOCKED = 1, 4, 8, 0x10
STATUS_AUXILIARY, STATUS_TIMEOUT = 0x20, 0x40

READ_COMMAND_BYTE, WRITE_COMMAND_BYTE = 0x20, 0x60
SELF_TEST, TEST_KEYBOARD, TEST_AUXILIARY = 0xAA, 0xAB, 0xA9
DISABLE_AUXILIARY, ENABLE_AUXILIARY, DISABLE_KEYBOARD, ENABLE_KEYBOARD = 0xA7, 0xA8, 0xAD, 0xAE
READ_INPUT_PORT, READ_OUTPUT_PORT, WRITE_OUTPUT_PORT = 0xC0, 0xD0, 0xD1
WRITE_KEYBOARD_BUFFER, WRITE_AUXILIARY_BUFFER, WRITE_AUXILIARY = 0xD2, 0xD3, 0xD4
CLEAR_A20, SET_A20 = 0xDD, 0xDF
WITH_PARAMETER = frozenset(
    (WRITE_COMMAND_BYTE, WRITE_OUTPUT_PORT, WRITE_KEYBOARD_BUFFER, WRITE_AUXILIARY_BUFFER, WRITE_AUXILIARY)
)
SELF_TEST_PASSED, LINE_STUCK_LOW, LINE_GOOD = 0x55, 1, 0
INPUT_PORT_UNLOCKED = 0x80
OUTPUT_PORT_NOT_RESET, OUTPUT_PORT_A20, OUTPUT_PORT_IRQ1, OUTPUT_PORT_IRQ12 = 1, 2, 0x10, 0x20

# The command byte.
INTERRUPT_KEYBOARD, INTERRUPT_AUXILIARY, SYSTEM_FLAG = 1, 2, 4
KEYBOARD_OFF, AUXILIARY_OFF, TRANSLATE = 0x10, 0x20, 0x40

# A guest that asks and never reads loses replies: the output buffer and this many behind it, less one, are kept.
REPLIES = 16

# Scan codes of set 2 as set 1 has them: what the controller makes of them while it translates.
_TRANSLATED = bytes.fromhex(
    "ff 43 41 3f 3d 3b 3c 58 64 44 42 40 3e 0f 29 59"
    "65 38 2a 70 1d 10 02 5a 66 71 2c 1f 1e 11 03 5b"
    "67 2e 2d 20 12 05 04 5c 68 39 2f 21 14 13 06 5d"
    "69 31 30 23 22 15 07 5e 6a 72 32 24 16 08 09 5f"
    "6b 33 25 17 18 0b 0a 60 6c 34 35 26 27 19 0c 61"
    "6d 73 28 74 1a 0d 62 6e 3a 36 1c 1b 75 2b 63 76"
    "55 56 77 78 79 7a 0e 7b 7c 4f 7d 4b 47 7e 7f 6f"
    "52 53 50 4c 4d 48 01 45 57 4e 51 4a 37 49 46 54"
    "80 81 82 41 54"
)
BREAK_PREFIX = 0xF0


class Port(Protocol):
    """A device on one of the two ports: see ps2.py."""

    changed: Callable[[], None]

    def take(self) -> int | None:
        """The next byte to the host."""
        ...

    def write(self, value: int) -> None:
        """A byte from the host."""
        ...


def _no_line(level: int) -> None:
    """An interrupt that is not wired."""


class I8042:
    """Data port at offset 0, status and command port at offset 4. *reset* is called when the guest pulses the line.

    Without *keyboard* or *mouse* a driver finds nothing on that port, quickly. *a20* is told of the gate.
    """

    def __init__(
        self, reset: Callable[[], None], keyboard: Port | None = None, mouse: Port | None = None, *,
        keyboard_irq: Callable[[int], None] = _no_line, mouse_irq: Callable[[int], None] = _no_line,
    ) -> None:  # fmt: skip
        self._reset = reset
        self._keyboard, self._mouse = keyboard, mouse
        self._keyboard_irq, self._mouse_irq = keyboard_irq, mouse_irq
        self._lock = threading.RLock()
        self._replies: deque[tuple[int, bool]] = deque(maxlen=REPLIES - 1)  # (byte, from the auxiliary port)
        self._output: tuple[int, bool] | None = None
        self._read_last = 0
        self._shown = (0, 0)
        self._breaking = False
        self._command_byte = STATUS_SYSTEM
        self._output_port = OUTPUT_PORT_NOT_RESET | OUTPUT_PORT_A20
        self._parameter_of: int | None = None
        self._last_was_command = False
        self._timeout = False
        for device in (keyboard, mouse):
            if device is not None:
                device.changed = self._changed

    def _changed(self) -> None:
        with self._lock:
            self._fill()

    # ---- the output buffer: one byte, from the controller, the keyboard or the mouse, in this order -------------

    def _fill(self) -> None:
        if self._output is None:
            if self._replies:
                self._output = self._replies.popleft()
            else:
                self._output = self._from_keyboard() or self._from_mouse()
        self._update()

    def _from_keyboard(self) -> tuple[int, bool] | None:
        while self._keyboard is not None and not self._command_byte & KEYBOARD_OFF:
            if (byte := self._keyboard.take()) is None:
                return None
            if not self._command_byte & TRANSLATE:
                return byte, False
            if byte == BREAK_PREFIX:
                self._breaking = True
                continue
            translated = _TRANSLATED[byte] if byte < len(_TRANSLATED) else byte
            if byte < len(_TRANSLATED) and self._breaking:
                translated |= 0x80
            if byte < 0xE0:
                self._breaking = False
            return translated, False
        return None

    def _from_mouse(self) -> tuple[int, bool] | None:
        if self._mouse is None or self._command_byte & AUXILIARY_OFF:
            return None
        byte = self._mouse.take()
        return None if byte is None else (byte, True)

    def _update(self) -> None:
        full = self._output is not None
        auxiliary = self._output is not None and self._output[1]
        command = self._command_byte
        shown = (
            int(full and not auxiliary and bool(command & INTERRUPT_KEYBOARD)),
            int(full and auxiliary and bool(command & INTERRUPT_AUXILIARY)),
        )
        before, self._shown = self._shown, shown
        if before[0] != shown[0]:
            self._keyboard_irq(shown[0])
        if before[1] != shown[1]:
            self._mouse_irq(shown[1])

    # ---- ports -----------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """The output buffer, or the status."""
        with self._lock:
            if offset == 0:
                # A second read gives the same: who hooks the interrupt reads, and lets the firmware read after it.
                byte = self._read_last = self._output[0] if self._output is not None else self._read_last
                # The line falls and rises again for the next byte: it is an edge-triggered interrupt.
                self._output = None
                self._update()
                self._fill()
                return byte
            return (
                STATUS_UNLOCKED
                | self._command_byte & STATUS_SYSTEM
                | (STATUS_OUTPUT_FULL if self._output is not None else 0)
                | (STATUS_AUXILIARY if self._output is not None and self._output[1] else 0)
                | (STATUS_COMMAND if self._last_was_command else 0)
                | (STATUS_TIMEOUT if self._timeout else 0)
            )

    def write(self, offset: int, size: int, value: int) -> None:
        """A command, its parameter, or a byte for the keyboard (which times out when there is none)."""
        value &= 0xFF
        target: Port | None = None
        with self._lock:
            self._last_was_command = offset != 0
            if offset:
                reset = self._command(value)
            else:
                reset, target = self._data(value)
            self._fill()
        if target is not None:
            target.write(value)
        if reset:
            self._reset()

    def _data(self, value: int) -> tuple[bool, Port | None]:
        """Whether this resets the machine, and the device that takes the byte."""
        command, self._parameter_of = self._parameter_of, None
        match command:
            case 0x60:  # WRITE_COMMAND_BYTE
                self._command_byte = value
            case 0xD1:  # WRITE_OUTPUT_PORT
                self._output_port = value
                return not value & OUTPUT_PORT_NOT_RESET, None
            case 0xD2:  # WRITE_KEYBOARD_BUFFER
                self._replies.append((value, False))
            case 0xD3:  # WRITE_AUXILIARY_BUFFER
                self._replies.append((value, True))
            case 0xD4 if self._mouse is not None:  # WRITE_AUXILIARY
                return False, self._mouse
            case None if self._keyboard is not None:
                self._command_byte &= ~KEYBOARD_OFF
                return False, self._keyboard
            case _:
                self._timeout = True
        return False, None

    def _command(self, value: int) -> bool:
        self._parameter_of = value if value in WITH_PARAMETER else None
        self._timeout = False
        if (reply := self._answer(value)) is not None:
            self._replies.append((reply, False))
        match value:
            case 0xAA:  # SELF_TEST
                self._command_byte |= SYSTEM_FLAG
            case 0xA7:  # DISABLE_AUXILIARY
                self._command_byte |= AUXILIARY_OFF
            case 0xA8:  # ENABLE_AUXILIARY
                self._command_byte &= ~AUXILIARY_OFF
            case 0xAD:  # DISABLE_KEYBOARD
                self._command_byte |= KEYBOARD_OFF
            case 0xAE:  # ENABLE_KEYBOARD
                self._command_byte &= ~KEYBOARD_OFF
            case 0xDD:  # CLEAR_A20
                self._output_port &= ~OUTPUT_PORT_A20
            case 0xDF:  # SET_A20
                self._output_port |= OUTPUT_PORT_A20
        return value >= 0xF0 and not value & 1  # pulse of output line 0: reset

    def _answer(self, command: int) -> int | None:
        match command:
            case 0x20:  # READ_COMMAND_BYTE
                return self._command_byte
            case 0xAA:  # SELF_TEST
                return SELF_TEST_PASSED
            case 0xAB:  # TEST_KEYBOARD
                return LINE_STUCK_LOW if self._keyboard is None else LINE_GOOD
            case 0xA9:  # TEST_AUXILIARY
                return LINE_STUCK_LOW if self._mouse is None else LINE_GOOD
            case 0xC0:  # READ_INPUT_PORT
                return INPUT_PORT_UNLOCKED
            case 0xD0:  # READ_OUTPUT_PORT
                lines = (OUTPUT_PORT_IRQ1 if self._shown[0] else 0) | (OUTPUT_PORT_IRQ12 if self._shown[1] else 0)
                return self._output_port | lines
        return None
