"""Keyboard and mouse through the controller, as a driver reads them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmonty.vmm.hw import i8042, ps2
from vmonty.vmm.hw.i8042 import I8042
from vmonty.vmm.hw.ps2 import Ps2Keyboard, Ps2Mouse

DATA, COMMAND = 0, 4
INTERRUPTS = i8042.INTERRUPT_KEYBOARD | i8042.INTERRUPT_AUXILIARY | i8042.SYSTEM_FLAG


class Pc:
    """The chip with both devices. ``lines`` records (irq, level)."""

    def __init__(self, command_byte: int = INTERRUPTS) -> None:
        self.keyboard, self.mouse = Ps2Keyboard(), Ps2Mouse()
        self.lines: list[tuple[int, int]] = []
        self.chip = I8042(
            lambda: None, self.keyboard, self.mouse,
            keyboard_irq=lambda level: self.lines.append((1, level)),
            mouse_irq=lambda level: self.lines.append((12, level)),
        )  # fmt: skip
        self.chip.write(COMMAND, 1, i8042.WRITE_COMMAND_BYTE)
        self.chip.write(DATA, 1, command_byte)

    @property
    def status(self) -> int:
        return self.chip.read(COMMAND, 1)

    def read_all(self) -> bytes:
        found = bytearray()
        while self.status & i8042.STATUS_OUTPUT_FULL:
            found.append(self.chip.read(DATA, 1))
        return bytes(found)

    def tell_keyboard(self, *values: int) -> bytes:
        return b"".join(self.chip.write(DATA, 1, value) or self.read_all() for value in values)

    def tell_mouse(self, *values: int) -> bytes:
        answers = b""
        for value in values:
            self.chip.write(COMMAND, 1, i8042.WRITE_AUXILIARY)
            self.chip.write(DATA, 1, value)
            assert self.status & i8042.STATUS_AUXILIARY
            answers += self.read_all()
        return answers


@pytest.fixture
def pc() -> Pc:
    return Pc()


def test_both_ports_are_there(pc: Pc) -> None:
    for test in (i8042.TEST_KEYBOARD, i8042.TEST_AUXILIARY):
        pc.chip.write(COMMAND, 1, test)
        assert pc.read_all() == b"\0"


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ((0xFF,), b"\xfa\xaa"), ((0xF2,), b"\xfa\xab\x83"), ((0xEE,), b"\xee"), ((0xED, 7), b"\xfa\xfa"),
        ((0xF0, 0), b"\xfa\xfa\x02"), ((0xF3, 0x20), b"\xfa\xfa"), ((0x00,), b"\xfe"), ((0xEE, 0xFE), b"\xee\xee"),
    ],
)  # fmt: skip
def test_keyboard_commands(pc: Pc, said: tuple[int, ...], answer: bytes) -> None:
    assert pc.tell_keyboard(*said) == answer


def test_leds(pc: Pc) -> None:
    pc.tell_keyboard(ps2.SET_LEDS, 5)
    assert pc.keyboard.leds == 5


@pytest.mark.parametrize(
    ("key", "make", "release"),
    [(0x1E, "1c", "f01c"), (0x01, "76", "f076"), (0x58, "07", "f007"), (0xE01D, "e014", "e0f014"),
     (0xE04B, "e06b", "e0f06b"), (0xE05B, "e01f", "e0f01f"), (ps2.KEY_PAUSE, "e11477e1f014f077", "")],
)  # fmt: skip
def test_keys_in_set_2(pc: Pc, key: int, make: str, release: str) -> None:
    pc.keyboard.key(key, True)
    assert pc.read_all().hex() == make
    pc.keyboard.key(key, False)
    assert pc.read_all().hex() == release


@pytest.mark.parametrize("extended", [0, ps2.EXTENDED_KEY])
def test_translation_gives_set_1_back(extended: int) -> None:
    pc = Pc(INTERRUPTS | i8042.TRANSLATE)
    for key in range(1, 0x59):
        pc.keyboard.key(extended | key, True)
        pc.keyboard.key(extended | key, False)
        prefix = b"\xe0" if extended else b""
        if key == 0x55 or (extended and key == 0x46):
            pc.read_all()
            continue  # no key, and Pause
        assert pc.read_all() == prefix + bytes((key,)) + prefix + bytes((key | 0x80,))


def test_a_key_interrupts_and_each_byte_anew(pc: Pc) -> None:
    pc.keyboard.key(0x1E, False)
    assert pc.lines == [(1, 1)]
    pc.chip.read(DATA, 1)
    assert pc.lines == [(1, 1), (1, 0), (1, 1)]
    pc.chip.read(DATA, 1)
    assert pc.lines[-1] == (1, 0)


def test_a_disabled_keyboard_waits(pc: Pc) -> None:
    pc.chip.write(COMMAND, 1, i8042.DISABLE_KEYBOARD)
    pc.keyboard.key(0x1E, True)
    assert not pc.status & i8042.STATUS_OUTPUT_FULL
    pc.chip.write(COMMAND, 1, i8042.ENABLE_KEYBOARD)
    assert pc.read_all() == b"\x1c"


def test_keys_that_nobody_reads_do_not_pile_up(pc: Pc) -> None:
    for _ in range(1000):
        pc.keyboard.key(0x1E, True)
    assert len(pc.read_all()) <= ps2.KEYS + 1


@pytest.mark.parametrize("said", [(ps2.SET_LEDS, 2), (ps2.SET_RATE, 0x20), (ps2.SET_SCANCODES, 0)])
def test_what_was_typed_follows_a_reply(pc: Pc, said: tuple[int, int]) -> None:
    """A driver lights the LED of a key while its user types on."""
    for pressed in (True, False):
        pc.keyboard.key(0xE04B, pressed)
    command, parameter = said
    pc.chip.write(DATA, 1, command)
    first = bytes(pc.chip.read(DATA, 1) for _ in range(2))
    assert first == bytes((ps2.EXTENDED, ps2.ACK)), "the output buffer's byte was out before"
    pc.chip.write(DATA, 1, parameter)
    # The next byte lay in the output buffer by then, too.
    assert pc.read_all().replace(b"\xfa\x02", b"\xfa") == b"\x6b\xfa\xe0\xf0\x6b"


@pytest.mark.parametrize("command", [ps2.RESET, ps2.ENABLE, ps2.DISABLE, ps2.SET_DEFAULTS])
def test_commands_that_drop_what_was_typed(pc: Pc, command: int) -> None:
    for _ in range(3):
        pc.keyboard.key(0x1E, True)
    assert pc.tell_keyboard(command).rstrip(b"\xaa") == b"\x1c\xfa"


def test_a_guest_that_is_late_sees_no_key_held(pc: Pc) -> None:
    """What has no room is left out as a whole; a release always has it."""
    pc.keyboard.key(0x2A, True)  # Shift
    for key in list(range(2, 14)) * 10:
        pc.keyboard.key(key, True)
        pc.keyboard.key(key, False)
    pc.keyboard.key(0x2A, False)
    codes = pc.read_all()
    assert len(codes) <= ps2.KEYS + 1
    held: set[int] = set()
    for before, code in zip(b"\0" + codes, codes, strict=False):
        if before == ps2.BREAK:
            held.remove(code)
        elif code != ps2.BREAK:
            held.add(code)
    assert held == set()
    assert codes.endswith(b"\xf0\x12")


def test_many_keys_held_do_not_stop_the_keyboard(pc: Pc) -> None:
    for key in range(2, 0x54):
        pc.keyboard.key(key, True)
        pc.read_all()
    assert pc.keyboard.offer(0x57, True)
    for key in range(2, 0x54):
        pc.keyboard.key(key, False)
    assert len(pc.read_all()) == 1 + 2 * (0x54 - 2)


def test_nobody_listens(pc: Pc) -> None:
    pc.tell_keyboard(ps2.DISABLE)
    assert not pc.keyboard.offer(0x1E, True)


def test_a_second_read_gives_the_same_byte(pc: Pc) -> None:
    """Programs that hook the keyboard's interrupt read the port, and so does the firmware after them."""
    pc.keyboard.key(0x1E, True)
    assert [pc.chip.read(DATA, 1) for _ in range(3)] == [0x1C] * 3
    assert not pc.status & i8042.STATUS_OUTPUT_FULL


@pytest.mark.parametrize("key", [0, 0x55, 0x59, 0x7F, 0xE07F, 1 << 40, -1])
def test_no_such_key(pc: Pc, key: int) -> None:
    pc.keyboard.key(key, True)
    assert pc.read_all() == b""


def test_mouse_reset_and_identity(pc: Pc) -> None:
    assert pc.tell_mouse(0xFF) == b"\xfa\xaa\x00"
    assert pc.tell_mouse(0xF2) == b"\xfa\x00"
    assert pc.tell_mouse(0xF3, 200, 0xF3, 100, 0xF3, 80, 0xF2)[-1] == ps2.WHEEL_ID
    assert pc.tell_mouse(0xF3, 200, 0xF3, 200, 0xF3, 80, 0xF2)[-1] == ps2.BUTTONS_ID


def test_motion(pc: Pc) -> None:
    pc.mouse.move(5, 5)
    assert pc.read_all() == b"", "not before it is enabled"
    pc.tell_mouse(0xF4)
    pc.lines.clear()
    pc.mouse.move(10, -3, buttons=ps2.LEFT)
    assert pc.lines == [(12, 1)]
    assert pc.read_all() == bytes((8 | 1 | 0x20, 10, 0xFD))
    pc.mouse.move(600, 0, buttons=ps2.LEFT)
    packets = pc.read_all()
    assert [packets[at + 1] for at in range(0, len(packets), 3)] == [255, 255, 90], "long ways take several packets"


def test_the_wheel(pc: Pc) -> None:
    pc.tell_mouse(0xF3, 200, 0xF3, 100, 0xF3, 80, 0xF4)
    pc.mouse.move(0, 0, -1)
    assert pc.read_all() == b"\x08\x00\x00\xff"


def test_motion_gathers_while_nobody_reads(pc: Pc) -> None:
    pc.tell_mouse(0xF4)
    for _ in range(1000):
        pc.mouse.move(1, 0)
    packets = pc.read_all()
    assert sum(packets[at + 1] for at in range(0, len(packets), 3)) == 1000


@given(st.lists(st.tuples(st.sampled_from([0xD4, 0x60, 0xAD, 0xA7, 0xAE, 0xA8, None]), st.integers(0, 255))))
def test_no_byte_is_wrong(said: list[tuple[int | None, int]]) -> None:
    pc = Pc()
    for command, value in said:
        if command is not None:
            pc.chip.write(COMMAND, 1, command)
        pc.chip.write(DATA, 1, value)
        pc.keyboard.key(value, bool(value & 1))
        pc.mouse.move(value, -value, value & 3, value & 31)
        assert 0 <= pc.chip.read(DATA, 1) <= 0xFF


def test_a_quick_click_is_one(pc: Pc) -> None:
    pc.tell_mouse(ps2.ENABLE)
    pc.mouse.move(5, 5)
    pc.mouse.move(0, 0, 0, ps2.LEFT)
    pc.mouse.move(1, 0, 0, ps2.LEFT)
    pc.mouse.move(0, 0)
    pc.mouse.move(3, 0)
    assert pc.read_all() == bytes((8, 5, 5, 9, 1, 0, 8, 3, 0))
    assert pc.read_all() == b""


def test_clicks_that_nobody_reads_do_not_pile_up(pc: Pc) -> None:
    pc.tell_mouse(ps2.ENABLE)
    for number in range(1000):
        pc.mouse.move(0, 0, 0, number & 1)
    packets = pc.read_all()
    assert len(packets) <= 3 * (ps2.STEPS + 1)
    assert packets[-3:] == bytes((9, 0, 0)), "what it is now comes last"
    pc.tell_mouse(ps2.SET_DEFAULTS, ps2.ENABLE)
    pc.mouse.move(300, 0, 0, ps2.RIGHT)
    assert pc.read_all() == bytes((10, 255, 0, 10, 45, 0))
