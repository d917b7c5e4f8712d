"""Keyboard and mouse of a viewer, for the machine's PS/2 ones."""

from __future__ import annotations

from typing import Protocol

from vmonty.vmm.display.keys import scan_code
from vmonty.vmm.hw.vmmouse import HIGHEST

# Buttons as RFB numbers them, 1 left, 2 middle, 3 right, 4 and 5 the wheel up and down, and their PS/2 masks.
_BUTTONS = ((0x01, 1), (0x02, 4), (0x04, 2))
WHEEL_UP, WHEEL_DOWN = 0x08, 0x10
# Of the viewers' relative mode: a position is the middle plus the motion.
MIDDLE = 0x7FFF
MOST_MOTION = 4096


class Keyboard(Protocol):
    """See Ps2Keyboard."""

    def key(self, code: int, pressed: bool) -> None:
        """A key of set 1 went down or up."""
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
    """What one viewer types and points at. A viewer that goes away lets go of what it held."""

    def __init__(self, keyboard: Keyboard, mouse: Mouse) -> None:
        self._keyboard = keyboard
        self._mouse = mouse
        self._held: set[int] = set()
        self._at: tuple[int, int] | None = None
        self._share: tuple[int, int] | None = None  # where it put the guest's pointer, if it did
        self._wheel = 0
        self._buttons = 0

    def keysym(self, keysym: int, pressed: bool) -> None:
        """A key by its X11 name; one that a PC lacks does nothing."""
        if (code := scan_code(keysym)) is not None:
            self.code(code, pressed)

    def code(self, code: int, pressed: bool) -> None:
        """A key by its scan code."""
        if pressed:
            self._held.add(code)
        else:
            self._held.discard(code)
        self._keyboard.key(code, pressed)

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
        for code in sorted(self._held):
            self._keyboard.key(code, False)
        self._held.clear()
        if self._buttons:
            self._buttons = 0
            if self._share is not None:
                self._mouse.place(*self._share)
            self._mouse.move(0, 0)


def _share(at: int, size: int) -> int:
    """Pixel *at* of *size*, as a place of the mouse."""
    return min(at, size - 1) * HIGHEST // max(size - 1, 1)
