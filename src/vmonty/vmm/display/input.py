"""Keyboard and mouse of a viewer, for the machine's PS/2 ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from vmonty.vmm.display.keys import KEYPAD_DIGITS, SHIFTED, scan_code
from vmonty.vmm.hw.vmmouse import HIGHEST

# Buttons as RFB numbers them, 1 left, 2 middle, 3 right, 4 and 5 the wheel up and down, and their PS/2 masks.
_BUTTONS = ((0x01, 1), (0x02, 4), (0x04, 2))
WHEEL_UP, WHEEL_DOWN = 0x08, 0x10
# Of the viewers' relative mode: a position is the middle plus the motion.
MIDDLE = 0x7FFF
MOST_MOTION = 4096
# Scan codes.
KEY_CAPS_LOCK, KEY_SHIFT = 0x3A, 0x2A
_SHIFTS = frozenset((KEY_SHIFT, 0x36))
_CHORDS = frozenset((0x1D, 0xE01D, 0x38, 0xE038, 0xE05B, 0xE05C))  # Ctrl, Alt, Super: what is held with them is no text
LED_NUM, LED_CAPS = 2, 4
# So long a guest may take from Caps Lock to its light.
LIGHT_SECONDS = 1.0
# Keypad keys by name, which are digits or not as Num Lock has it: keys that are always what the name says.
_KEYPAD_DIGITS = {0xFFAE: scan_code(ord(".")), **{KEYPAD_DIGITS[n]: scan_code(ord("0") + n) for n in range(10)}}
_KEYPAD_MOTIONS = dict(zip(range(0xFF95, 0xFFA0), (
    0xE047, 0xE04B, 0xE048, 0xE04D, 0xE050, 0xE049, 0xE051, 0xE04F, None, 0xE052, 0xE053), strict=True))  # fmt: skip


class Keyboard(Protocol):
    """See Ps2Keyboard."""

    def key(self, code: int, pressed: bool) -> None:
        """A key of set 1 went down or up."""
        ...

    @property
    def leds(self) -> int:
        """Which lights the guest has switched on: 1 Scroll Lock, 2 Num Lock, 4 Caps Lock."""
        ...


class Mouse(Protocol):
    """See Ps2Mouse and VmMouse."""

    @property
    def absolute(self) -> bool:
        """Is it told of places, not of motion?"""
        ...

    def move(self, dx: int, dy: int, dz: int = 0, buttons: int = 0) -> None:
        """Motion with y upwards, the wheel downwards, buttons that are down."""
        ...

    def place(self, x: int, y: int, dz: int = 0, buttons: int = 0) -> None:
        """A place from 0 to HIGHEST in both directions, y downwards."""
        ...


class Input:
    """What one viewer types and points at. A viewer that goes away lets go of what it held.

    A viewer that names what it types has Caps Lock and Num Lock of its own, or, as a phone, not even Shift. The guest's
    locks are left alone: instead its Shift goes down, or up, for a character that needs that, and keys of the keypad
    become others where Num Lock stands against them. See RFC 6143, 7.5.4 "KeyEvent".
    """

    def __init__(self, keyboard: Keyboard, mouse: Mouse, clock: Callable[[], float] = time.monotonic) -> None:
        self._keyboard = keyboard
        self._mouse = mouse
        self._clock = clock
        self._held: set[int] = set()
        self._shifts: set[int] = set()  # those of the guest's that are down because of this viewer
        self._keypad: dict[int, int] = {}  # which other key is down for one of the keypad
        self._caps: bool | None = None  # what its Caps Lock should have made of the guest's
        self._caps_time = 0.0
        self._dark, self._last = False, False  # did the light not follow the key, which should have made it the latter?
        self._at: tuple[int, int] | None = None
        self._share: tuple[int, int] | None = None  # where it put the guest's pointer, if it did
        self._wheel = 0
        self._buttons = 0

    def keysym(self, keysym: int, pressed: bool) -> None:
        """A key by its X11 name; one that a PC lacks does nothing."""
        self._settle_caps()
        if (code := scan_code(keysym)) is None:
            return
        if not pressed:
            self.code(self._keypad.pop(code, code), False)
            return
        self._hold_shift(self._needs_shift(keysym))
        if (other := self._for_keypad(keysym)) is not None:
            self._keypad[code] = other
        self._key(self._keypad.get(code, code), True)

    def code(self, code: int, pressed: bool) -> None:
        """A key by its scan code."""
        self._hold_shift(None)
        self._key(code, pressed)

    def _key(self, code: int, pressed: bool) -> None:
        if code == KEY_CAPS_LOCK and pressed and code not in self._held:
            now = self._last if self._dark else self._lit(LED_CAPS)
            self._caps = not (now if self._caps is None else self._caps)
            self._caps_time = self._clock()
        for keys in (self._held, self._shifts) if code in _SHIFTS else (self._held,):
            if pressed:
                keys.add(code)
            else:
                keys.discard(code)
        self._keyboard.key(code, pressed)

    def _lit(self, led: int) -> bool:
        return bool(self._keyboard.leds & led)

    def _caps_lock(self) -> bool | None:
        """Is the guest's on? None when its light does not tell: it did not follow the key."""
        self._settle_caps()
        if self._caps is not None:
            return self._caps
        return None if self._dark else self._lit(LED_CAPS)

    def _settle_caps(self) -> None:
        """Whether the light followed is seen once: later it changes by others, and by resets."""
        if self._caps is not None and self._clock() - self._caps_time >= LIGHT_SECONDS:
            self._dark, self._last, self._caps = self._lit(LED_CAPS) != self._caps, self._caps, None

    def _needs_shift(self, keysym: int) -> bool | None:
        """Does the guest need Shift for this character? None when it may have it as the viewer does."""
        if self._held & _CHORDS:
            return None
        if keysym < 0x80 and chr(keysym).isalpha():
            caps = self._caps_lock()
            return None if caps is None else (keysym in SHIFTED) is not caps
        return keysym in SHIFTED if keysym < 0x80 else None

    def _for_keypad(self, keysym: int) -> int | None:
        """The key that types it, when Num Lock lets the keypad's key do the opposite."""
        if self._held & (_CHORDS | _SHIFTS):
            return None
        return (_KEYPAD_MOTIONS if self._lit(LED_NUM) else _KEYPAD_DIGITS).get(keysym)

    def _hold_shift(self, down: bool | None) -> None:
        """Have the guest's Shift down or up for the next key; None for as the viewer has it."""
        held = self._held & _SHIFTS
        wanted = held if down is None else (held or {KEY_SHIFT}) if down else set()
        for code in sorted(self._shifts - wanted):
            self._keyboard.key(code, False)
        for code in sorted(wanted - self._shifts):
            self._keyboard.key(code, True)
        self._shifts = set(wanted)

    @property
    def absolute(self) -> bool:
        """Does the guest's pointer stand where the viewer's does?"""
        return self._mouse.absolute

    def point(self, x: int, y: int, buttons: int, relative: bool, size: tuple[int, int]) -> None:
        """The pointer, in pixels of a screen of *size*; *relative* positions are motions around the middle of all."""
        absolute = self._mouse.absolute and not relative
        before, self._share = self._share, (_share(x, size[0]), _share(y, size[1])) if absolute else None
        if relative:
            dx, dy = x - MIDDLE, y - MIDDLE
        elif self._at is None:
            dx = dy = 0
        else:
            dx, dy = x - self._at[0], y - self._at[1]
        self._at = None if relative else (x, y)
        wheel = bool(buttons & WHEEL_DOWN & ~self._wheel) - bool(buttons & WHEEL_UP & ~self._wheel)
        self._wheel = buttons
        down = sum(ours for theirs, ours in _BUTTONS if buttons & theirs)
        if self._share is not None:
            if self._share != before or wheel or down != self._buttons:
                self._mouse.place(*self._share, wheel, down)
        elif dx or dy or wheel or down != self._buttons:
            limit = MOST_MOTION
            self._mouse.move(max(-limit, min(limit, dx)), -max(-limit, min(limit, dy)), wheel, down)
        self._buttons = down

    def release(self) -> None:
        """Let go of everything."""
        self._hold_shift(None)
        for code in sorted(self._held):
            self._keyboard.key(code, False)
        self._held.clear()
        self._shifts.clear()
        self._keypad.clear()
        if self._buttons:
            self._buttons = 0
            if self._share is not None:
                self._mouse.place(*self._share)
            self._mouse.move(0, 0)


def _share(at: int, size: int) -> int:
    """Pixel *at* of *size*, as a place of the mouse."""
    return min(at, size - 1) * HIGHEST // max(size - 1, 1)
