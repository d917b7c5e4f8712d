"""Screen, keyboard and mouse of a machine as its users have them: over resets, each of which makes a new machine."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vmonty.base.errors import UsageError
from vmonty.vmm.display.keys import type_keys
from vmonty.vmm.display.screen import DARK_HEIGHT, DARK_WIDTH, Frame, Screen

if TYPE_CHECKING:
    from vmonty.vmm.hw.ps2 import Ps2Keyboard
    from vmonty.vmm.machine import Machine

# As a quick typist: a keyboard's buffer is small, and its guest has to keep up.
KEY_SECONDS = 0.01
PATIENCE_S = 5.0  # for a guest that does not


def screen_of(machine: Machine) -> Screen:
    """Its screen. Raises UsageError when it has none."""
    if machine.screen is None:
        raise UsageError("this machine has no screen: add one with --vnc or --device VGA")
    return machine.screen


def type_text(machine: Machine, text: str) -> None:
    """Write *text* on its keyboard, as fast as the guest reads it.

    Raises UsageError for a character without a key, without a keyboard, and when the guest does not go on reading, or
    ends.
    """
    keyboard = _keyboard_of(machine)
    try:
        events = type_keys(text)
    except ValueError as error:
        raise UsageError(str(error)) from error
    held: set[int] = set()
    try:
        for number, (code, pressed) in enumerate(events):
            until = time.monotonic() + PATIENCE_S
            while (has_ended := machine.wait(0) is not None) or not keyboard.offer(code, pressed):
                if has_ended or time.monotonic() > until:
                    why = "has ended" if has_ended else "does not read its keyboard"
                    raise UsageError(f"the guest {why}: it got {100 * number // len(events)} % of the text")
                time.sleep(KEY_SECONDS)
            (held.add if pressed else held.discard)(code)
            time.sleep(KEY_SECONDS)
    finally:
        for code in held:
            keyboard.key(code, False)


def _keyboard_of(machine: Machine) -> Ps2Keyboard:
    if machine.keyboard is None:
        raise UsageError(f"a {machine.name} has no keyboard; take pc or q35")
    return machine.keyboard


class DisplayConsole:
    """What a VNC server shows and tells, of whichever machine there is. From any thread."""

    def __init__(self) -> None:
        self._machine: Machine | None = None
        self._last = Frame(DARK_WIDTH, DARK_HEIGHT, bytearray(4 * DARK_WIDTH * DARK_HEIGHT))

    def connect(self, machine: Machine | None) -> None:
        """Show *machine* from now on; without one what was seen last stays."""
        if machine is None:
            self._last = self.frame()
        self._machine = machine

    def frame(self) -> Frame:
        """The picture now; dark where there was none yet."""
        machine = self._machine
        return self._last if machine is None or machine.screen is None else machine.screen.frame()

    def key(self, code: int, pressed: bool) -> None:
        """See Ps2Keyboard."""
        if (machine := self._machine) is not None and machine.keyboard is not None:
            machine.keyboard.key(code, pressed)

    @property
    def leds(self) -> int:
        """Which the guest lights: see Ps2Keyboard."""
        machine = self._machine
        return machine.keyboard.leds if machine is not None and machine.keyboard is not None else 0

    @property
    def absolute(self) -> bool:
        """Does the guest want to know where the pointer is, by ``place``, not how it moved?"""
        machine = self._machine
        return machine is not None and machine.pointer is not None and machine.pointer.absolute

    def place(self, x: int, y: int, dz: int = 0, buttons: int = 0) -> None:
        """See VmMouse."""
        if (machine := self._machine) is not None and machine.pointer is not None:
            machine.pointer.place(x, y, dz, buttons)

    def move(self, dx: int, dy: int, dz: int = 0, buttons: int = 0) -> None:
        """See Ps2Mouse."""
        if (machine := self._machine) is not None and machine.mouse is not None:
            machine.mouse.move(dx, dy, dz, buttons)
