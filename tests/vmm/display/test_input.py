"""What a viewer names, typed on a guest's keyboard: characters keep their case, whatever the locks say."""

from __future__ import annotations

import pytest
from tests.vmm.display.conftest import Recorder

from vmonty.vmm.display.input import KEY_CAPS_LOCK, KEY_SHIFT, LED_CAPS, LED_NUM, LIGHT_SECONDS, Input
from vmonty.vmm.display.keys import scan_code
from vmonty.vmm.hw.ps2 import KEY_PAUSE, Ps2Keyboard

SHIFT_L, SHIFT_R, CAPS_LOCK, NUM_LOCK, CONTROL_L = 0xFFE1, 0xFFE2, 0xFFE5, 0xFF7F, 0xFFE3
KP_7, KP_HOME, KP_DECIMAL, KP_DELETE = 0xFFB7, 0xFF95, 0xFFAE, 0xFF9F
A, B, HOME, DELETE = 0x1E, 0x30, 0xE047, 0xE053


class Guest(Recorder):
    """A PC's keyboard as a guest understands it. *lights*: does it switch them on?"""

    def __init__(self, lights: bool = True) -> None:
        super().__init__()
        self.lights = lights
        self.caps = False
        self.down: set[int] = set()
        self.typed = ""
        self.now = 100.0
        self.input = Input(self, self, lambda: self.now)

    def key(self, code: int, pressed: bool) -> None:
        super().key(code, pressed)
        if pressed and code == KEY_CAPS_LOCK and code not in self.down:
            self.caps = not self.caps
            self.leds ^= LED_CAPS * self.lights
        (self.down.add if pressed else self.down.discard)(code)
        if pressed and code in (A, B):
            letter = {A: "a", B: "b"}[code]
            self.typed += letter.upper() if bool(self.down & {KEY_SHIFT, 0x36}) != self.caps else letter

    def press(self, *keysyms: int) -> None:
        """One after the other."""
        for keysym in keysyms:
            self.input.keysym(keysym, True)
            self.input.keysym(keysym, False)

    def write(self, text: str) -> None:
        self.press(*map(ord, text))

    def wait(self) -> None:
        self.now += LIGHT_SECONDS


def test_case_without_shift() -> None:
    """A phone's viewer, or one whose Caps Lock was on before it came."""
    guest = Guest()
    guest.write("abABab")
    assert guest.typed == "abABab"
    assert not guest.down
    assert (KEY_CAPS_LOCK, True) not in guest.keys


def test_case_with_the_viewers_shift() -> None:
    guest = Guest()
    for shift in (SHIFT_L, SHIFT_R):
        guest.input.keysym(shift, True)
        guest.write("AB")
        guest.input.keysym(shift, False)
        guest.write("ab")
    assert guest.typed == "ABabABab"
    events = [(code, True) for code in (0x2A, A)] + [(A, False), (B, True), (B, False), (0x2A, False)]
    assert guest.keys[:6] == events, "nothing is added"


def test_shift_against_the_viewers_caps_lock() -> None:
    guest = Guest()
    guest.input.keysym(SHIFT_L, True)
    guest.write("ab")
    assert KEY_SHIFT in guest.down, "it is held again"
    guest.write("A")
    guest.input.keysym(SHIFT_L, False)
    assert guest.typed == "abA"
    assert not guest.down


def test_keys_that_overlap() -> None:
    guest = Guest()
    for keysym, pressed in (("A", True), ("b", True), ("A", False), ("B", True), ("b", False), ("B", False)):
        guest.input.keysym(ord(keysym), pressed)
    assert guest.typed == "AbB"
    assert not guest.down


def test_caps_lock_of_guest_and_viewer() -> None:
    guest = Guest()
    guest.press(CAPS_LOCK)
    guest.write("AbA")
    guest.wait()
    guest.write("AbA")
    guest.press(CAPS_LOCK)
    guest.write("aB")
    assert guest.typed == "AbAAbAaB"
    guest.wait()
    guest.write("b")
    guest.caps, guest.leds = True, LED_CAPS  # by someone else
    guest.write("aB")
    assert guest.typed == "AbAAbAaBbaB"


def test_a_light_that_comes_late() -> None:
    guest = Guest(lights=False)
    guest.press(CAPS_LOCK)
    guest.write("Ab")
    guest.press(CAPS_LOCK)
    guest.leds = LED_CAPS  # of the first time
    guest.write("aB")
    guest.press(CAPS_LOCK)
    guest.leds = 0
    guest.write("Ab")
    assert guest.typed == "AbaBAb"
    guest.wait()
    guest.leds = LED_CAPS
    guest.write("Ab")
    assert guest.typed == "AbaBAbAb"


def test_a_guest_without_lights() -> None:
    """Its Caps Lock works as ever: what the light does not tell is left to the viewer."""
    guest = Guest(lights=False)
    guest.write("aA")
    guest.press(CAPS_LOCK)
    guest.wait()
    guest.keys.clear()
    guest.write("AB")
    assert [code for code, _ in guest.keys] == [A, A, B, B]
    guest.press(CAPS_LOCK)
    guest.wait()
    guest.write("aB")
    assert guest.typed == "aAABaB"


def test_another_viewer_or_a_reset_may_change_the_light() -> None:
    guest = Guest()
    guest.press(CAPS_LOCK)
    guest.write("A")
    guest.wait()
    guest.write("A")
    guest.caps, guest.leds = False, 0
    guest.write("Ab")
    assert guest.typed == "AAAb"


def test_signs_that_another_layout_has_with_shift() -> None:
    """German 7 with Shift is a slash, which needs none here."""
    guest = Guest()
    guest.input.keysym(SHIFT_L, True)
    guest.press(ord("/"))
    assert guest.keys == [(KEY_SHIFT, True), (KEY_SHIFT, False), (0x35, True), (KEY_SHIFT, True), (0x35, False)]
    guest.input.keysym(SHIFT_L, False)
    assert not guest.down


def test_what_is_held_with_control_is_no_text() -> None:
    guest = Guest()
    guest.input.keysym(CONTROL_L, True)
    guest.press(ord("A"), KP_7)
    assert guest.keys == [(0x1D, True), (A, True), (A, False), (0x47, True), (0x47, False)]


def test_signs_without_shift() -> None:
    guest = Guest()
    guest.press(ord("!"), ord("1"))
    assert [event for event in guest.keys if event[1]] == [(KEY_SHIFT, True), (0x02, True), (0x02, True)]
    assert not guest.down


@pytest.mark.parametrize(
    ("keysym", "leds", "code"),
    [
        (KP_7, LED_NUM, 0x47), (KP_7, 0, 0x08), (KP_DECIMAL, LED_NUM, 0x53), (KP_DECIMAL, 0, 0x34),
        (KP_HOME, 0, 0x47), (KP_HOME, LED_NUM, HOME), (KP_DELETE, 0, 0x53), (KP_DELETE, LED_NUM, DELETE),
        (0xFF9D, LED_NUM, 0x4C), (0xFFAB, 0, 0x4E),
    ],
)  # fmt: skip
def test_keypad(keysym: int, leds: int, code: int) -> None:
    guest = Guest()
    guest.leds = leds
    guest.press(keysym)
    assert guest.keys == [(code, True), (code, False)]


def test_num_lock_while_a_key_of_the_keypad_is_held() -> None:
    guest = Guest()
    guest.input.keysym(KP_7, True)
    guest.leds = LED_NUM
    guest.input.keysym(KP_HOME, False)
    assert guest.keys == [(0x08, True), (0x08, False)]


def test_the_keypad_with_shift_is_the_guests() -> None:
    guest = Guest()
    guest.input.keysym(SHIFT_L, True)
    guest.press(KP_7)
    assert guest.keys == [(KEY_SHIFT, True), (0x47, True), (0x47, False)]


@pytest.mark.parametrize("held", [[ord("A")], [SHIFT_L, ord("a")], [KP_7], [SHIFT_L, SHIFT_R, ord("B")]])
def test_a_viewer_that_leaves_lets_go(held: list[int]) -> None:
    guest = Guest()
    for keysym in held:
        guest.input.keysym(keysym, True)
    guest.input.release()
    assert not guest.down


def test_pause_and_print_with_their_modifiers() -> None:
    """X has names of their own for Ctrl+Pause and Alt+Print."""
    assert scan_code(0xFF6B) == KEY_PAUSE
    keyboard = Ps2Keyboard()
    code = scan_code(0xFF15)
    assert code == 0x54
    keyboard.key(code, True)
    assert keyboard.take() == 0x84
