"""PS/2 keyboard and mouse. Source: IBM PS/2 Hardware Interface Technical Reference, "Keyboards", "Mouse"; the
IntelliMouse's extension is Microsoft's "Mouse Wheel" (three sample rates in a row make it known)."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable

ACK, RESEND, SELF_TEST_PASSED, ECHO = 0xFA, 0xFE, 0xAA, 0xEE
RESET, SET_DEFAULTS, DISABLE, ENABLE, SET_RATE, IDENTIFY = 0xFF, 0xF6, 0xF5, 0xF4, 0xF3, 0xF2
SET_SCANCODES, SET_LEDS = 0xF0, 0xED
KEYBOARD_ID = (0xAB, 0x83)
BREAK, EXTENDED = 0xF0, 0xE0
PAUSE = bytes((0xE1, 0x14, 0x77, 0xE1, 0xF0, 0x14, 0xF0, 0x77))

SET_REMOTE, SET_WRAP, RESET_WRAP, READ_DATA, SET_STREAM, STATUS_REQUEST = 0xF0, 0xEE, 0xEC, 0xEB, 0xEA, 0xE9
SET_RESOLUTION, SCALING_2, SCALING_1 = 0xE8, 0xE7, 0xE6
WHEEL_KNOCK, BUTTONS_KNOCK = (200, 100, 80), (200, 200, 80)
MOUSE_ID, WHEEL_ID, BUTTONS_ID = 0, 3, 4
LEFT, RIGHT, MIDDLE, SIDE, EXTRA = 1, 2, 4, 8, 16

# A keyboard of that time keeps 16 bytes; a guest that does not read loses keys, not memory of ours.
KEYS = 64
# Room is kept for the releases of this many keys; those of more go in, too, as each was pressed once.
HELD_KEYS, LONGEST_BREAK = 8, 3
STEPS = 16  # of buttons that the guest has not been told of

# Scan codes of set 1, 0x01 to 0x58, as set 2 has them. IBM's reference, "Scan Code Tables"; 0 where there is no key.
_SET_2 = bytes.fromhex(
    "00 76 16 1e 26 25 2e 36 3d 3e 46 45 4e 55 66 0d"
    "15 1d 24 2d 2c 35 3c 43 44 4d 54 5b 5a 14 1c 1b"
    "23 2b 34 33 3b 42 4b 4c 52 0e 12 5d 1a 22 21 2a"
    "32 31 3a 41 49 4a 59 7c 11 29 58 05 06 04 0c 03"
    "0b 83 0a 01 09 77 7e 6c 75 7d 7b 6b 73 74 79 69"
    "72 7a 70 71 84 00 61 78 07"
)
KEY_PAUSE = 0xE046
EXTENDED_KEY = 0xE000


class Ps2Device(ABC):
    """What a port of the controller sees: ``write`` from the host, ``take`` to it; ``changed`` tells of new bytes."""

    def __init__(self) -> None:
        self.changed: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._replies: deque[int] = deque(maxlen=KEYS)
        self._parameter_of: int | None = None
        self._last = 0

    def take(self) -> int | None:
        """The next byte to the host, None when there is none."""
        with self._lock:
            if not self._replies:
                self._refill()
            if not self._replies:
                return None
            self._last = self._replies.popleft()
            return self._last

    def write(self, value: int) -> None:
        """A byte from the host. Replies and packets that were not taken are dropped: this one's must come first."""
        with self._lock:
            parameter_of, self._parameter_of = self._parameter_of, None
            self._replies.clear()
            if parameter_of is not None and value < 0xE6:
                self._parameter(parameter_of, value)
            elif value == RESEND:
                self._replies.append(self._last)
            else:
                self._command(value)
        self.changed()

    def _refill(self) -> None:
        """Say what there is besides replies: a key, or a packet of gathered motion."""

    @abstractmethod
    def _parameter(self, command: int, value: int) -> None: ...

    @abstractmethod
    def _command(self, command: int) -> None: ...


class Ps2Keyboard(Ps2Device):
    """Keys come in by ``key``; they go out in scan code set 2."""

    def __init__(self) -> None:
        super().__init__()
        self._scanning = True
        self._keys: deque[int] = deque()
        self._down: set[int] = set()  # keys whose make codes are in there, or were
        self.leds = 0

    def key(self, code: int, pressed: bool) -> None:
        """A key went down (or repeats), or up. From any thread. *code* is that of set 1, with 0xE000 for extended keys.

        A code that no key has is dropped; so is a key for which there is no room, as a whole.
        """
        self.offer(code, pressed)

    def offer(self, code: int, pressed: bool) -> bool:
        """As ``key``; False when nobody listens, or there is no room now."""
        if code == KEY_PAUSE:
            data = PAUSE if pressed else b""
        else:
            low = code & ~EXTENDED_KEY
            if not 0 < low < len(_SET_2):
                # The extended keys above the main block keep their own codes.
                make = {0x5B: 0x1F, 0x5C: 0x27, 0x5D: 0x2F}.get(low, 0) if code & EXTENDED_KEY else 0
            else:
                make = _SET_2[low]
            if not make:
                return True
            data = (
                bytes((EXTENDED,) if code & EXTENDED_KEY else ()) + bytes(() if pressed else (BREAK,)) + bytes((make,))
            )
        with self._lock:
            if not self._scanning:
                return False
            ends = not pressed and code in self._down
            # There is room for each key's release: a guest that is late must not see it held for ever.
            held = len(self._down | {code}) if pressed else len(self._down)
            if not ends and len(self._keys) + len(data) + LONGEST_BREAK * min(held, HELD_KEYS) > KEYS:
                return False
            self._keys.extend(data)
            if pressed and code != KEY_PAUSE:
                self._down.add(code)
            else:
                self._down.discard(code)
        self.changed()
        return True

    def _refill(self) -> None:
        if self._keys:
            self._replies.append(self._keys.popleft())

    def _parameter(self, command: int, value: int) -> None:
        self._replies.append(ACK)
        if command == SET_LEDS:
            self.leds = value & 7
        elif command == SET_SCANCODES and value == 0:
            self._replies.append(2)

    def _command(self, command: int) -> None:
        match command:
            case 0xEE:  # ECHO
                self._replies.append(ECHO)
            case 0xF2:  # IDENTIFY
                self._replies.extend((ACK, *KEYBOARD_ID))
            case 0xFF:  # RESET
                self._scanning, self.leds = True, 0
                self._keys.clear()
                self._replies.extend((ACK, SELF_TEST_PASSED))
            case 0xF4 | 0xF5 | 0xF6:  # ENABLE, DISABLE, SET_DEFAULTS
                self._scanning = command != DISABLE
                self._keys.clear()
                self._replies.append(ACK)
            case 0xED | 0xF0 | 0xF3:  # SET_LEDS, SET_SCANCODES, SET_RATE
                self._parameter_of = command
                self._replies.append(ACK)
            case 0xF7 | 0xF8 | 0xF9 | 0xFA:  # all keys typematic and so on: of set 3 only
                self._replies.append(ACK)
            case _:
                self._replies.append(RESEND)


class _Step:
    """Motion, and the buttons after it."""

    __slots__ = ("buttons", "dx", "dy", "dz")

    def __init__(self, buttons: int, dx: int = 0, dy: int = 0, dz: int = 0) -> None:
        self.buttons, self.dx, self.dy, self.dz = buttons, dx, dy, dz


class Ps2Mouse(Ps2Device):
    """Motion comes in by ``move``, in counts with y upwards; a wheel and two more buttons once the driver knocked."""

    def __init__(self) -> None:
        super().__init__()
        self._steps = deque((_Step(0),))  # the last one is where it is now
        self._rates: deque[int] = deque((0, 0, 0), maxlen=3)
        self._wrap = False
        self._defaults()
        self._id = MOUSE_ID

    def _defaults(self) -> None:
        self._rate, self._resolution, self._scaling = 100, 2, 0
        self._reporting = self._remote = False
        self._steps = deque((_Step(0),))
        self._told = 0  # which buttons
        self._nudged = False

    def move(self, dx: int, dy: int, dz: int = 0, buttons: int = 0) -> None:
        """The mouse moved, its wheel turned (downwards is positive), or *buttons* are now down. From any thread."""
        with self._lock:
            last = self._steps[-1]
            if buttons != last.buttons and self._moved() and len(self._steps) < STEPS:
                # A click that is over before the guest has read of it is one, nevertheless.
                self._steps.append(_Step(buttons, dx, dy, dz))
            else:
                last.dx, last.dy, last.dz, last.buttons = last.dx + dx, last.dy + dy, last.dz + dz, buttons
            if not self._reporting or self._remote:
                return
        self.changed()

    def nudge(self) -> None:
        """Send a packet, whether it moved or not: see vmmouse. From any thread."""
        with self._lock:
            self._nudged = True
        self.changed()

    def _moved(self) -> bool:
        first = self._steps[0]
        moved = first.dx or first.dy or (first.dz and self._id)
        return bool(self._nudged or moved or first.buttons != self._told or len(self._steps) > 1)

    def _refill(self) -> None:
        if self._reporting and not self._remote and self._moved():
            self._replies.extend(self._packet())

    def _packet(self) -> bytes:
        step = self._steps[0]
        dx, dy = (max(-255, min(255, count)) for count in (step.dx, step.dy))
        dz = max(-8, min(7, step.dz))
        step.dx, step.dy, step.dz = step.dx - dx, step.dy - dy, step.dz - dz if self._id else 0
        buttons = step.buttons
        self._told, self._nudged = buttons, False
        if len(self._steps) > 1 and not (step.dx or step.dy or step.dz):
            self._steps.popleft()
        first = 8 | buttons & 7 | (0x10 if dx < 0 else 0) | (0x20 if dy < 0 else 0)
        packet = [first, dx & 0xFF, dy & 0xFF]
        if self._id == WHEEL_ID:
            packet.append(dz & 0xFF)
        elif self._id == BUTTONS_ID:
            packet.append(dz & 0x0F | (buttons & (SIDE | EXTRA)) << 1)
        return bytes(packet)

    def _parameter(self, command: int, value: int) -> None:
        self._replies.append(ACK)
        if command == SET_RESOLUTION:
            self._resolution = value & 3
            return
        self._rate = value
        self._rates.append(value)
        if tuple(self._rates) == WHEEL_KNOCK:
            self._id = max(self._id, WHEEL_ID)
        elif tuple(self._rates) == BUTTONS_KNOCK:
            self._id = BUTTONS_ID

    def _command(self, command: int) -> None:
        if self._wrap and command not in (RESET, RESET_WRAP):
            self._replies.append(command)
            return
        self._replies.append(ACK)
        match command:
            case 0xFF:  # RESET
                self._defaults()
                self._id, self._wrap = MOUSE_ID, False
                self._replies.extend((SELF_TEST_PASSED, MOUSE_ID))
            case 0xF6:  # SET_DEFAULTS
                self._defaults()
            case 0xF4 | 0xF5:  # ENABLE, DISABLE
                self._reporting, self._nudged = command == ENABLE, False
                self._steps = deque((_Step(self._steps[-1].buttons),))
            case 0xF2:  # IDENTIFY
                self._replies.append(self._id)
            case 0xF3 | 0xE8:  # SET_RATE, SET_RESOLUTION
                self._parameter_of = command
            case 0xF0 | 0xEA:  # SET_REMOTE, SET_STREAM
                self._remote = command == SET_REMOTE
            case 0xEE | 0xEC:  # SET_WRAP, RESET_WRAP
                self._wrap = command == SET_WRAP
            case 0xEB:  # READ_DATA
                self._replies.extend(self._packet())
            case 0xE9:  # STATUS_REQUEST
                mode = (0x40 if self._remote else 0) | (0x20 if self._reporting else 0) | (0x10 if self._scaling else 0)
                held = self._steps[-1].buttons
                buttons = held & 1 | (held & MIDDLE) >> 1 | (held & RIGHT) << 1
                self._replies.extend((mode | buttons, self._resolution, self._rate & 0xFF))
            case 0xE6 | 0xE7:  # SCALING_1, SCALING_2
                self._scaling = int(command == SCALING_2)
            case _:
                self._replies.pop()
                self._replies.append(RESEND)
