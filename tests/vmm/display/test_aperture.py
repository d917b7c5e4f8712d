"""The window at 0xA0000 as a memory slot: a guest cannot tell it from one whose every access is an exit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmonty.base.ram import Ram
from vmonty.vmm.hw.vga import aperture
from vmonty.vmm.hw.vga.card import VgaCard
from vmonty.vmm.hw.vga.registers import BIT_MASK, MAP_MASK, MEMORY_MODE, MISCELLANEOUS, MODE

from .card import MODE_4, MODE_12, MODE_13, TEXT_80X25, Driver, Tables, unplaced

TEXT, GRAPHICS = 0xB8000, 0xA0000
MODES = (TEXT_80X25, MODE_4, MODE_12, MODE_13)
X, Y, BITS, ENABLE, BANK = 1, 2, 3, 4, 5


class SlotDriver(Driver):
    """As a guest in a machine: what a memory slot shows is memory, the rest are exits."""

    def __init__(self) -> None:
        self.shown: tuple[Ram, int, int, int] | None = None
        self.card = VgaCard(unplaced, self._show)
        self.exits = 0

    def _show(self, ram: Ram, address: int | None, start: int, size: int) -> None:
        if address is not None:
            assert self.shown is None, "a slot over another"
            assert start + size <= ram.size
            assert address % 4096 == start % 4096 == size % 4096 == 0
        self.shown = None if address is None else (ram, address, start, size)

    def _memory(self, address: int) -> tuple[Ram, int] | None:
        if self.shown is None:
            return None
        ram, base, start, size = self.shown
        return (ram, start + address - base) if base <= address < base + size else None

    def poke(self, address: int, data: bytes) -> None:
        for at, byte in enumerate(data, address):
            if (place := self._memory(at)) is not None:
                place[0].write_u8(place[1], byte)
            else:
                self.exits += 1
                super().poke(at, bytes((byte,)))

    def peek(self, address: int, size: int) -> bytes:
        found = bytearray()
        for at in range(address, address + size):
            if (place := self._memory(at)) is not None:
                found.append(place[0].read_u8(place[1]))
            else:
                self.exits += 1
                found += super().peek(at, 1)
        return bytes(found)


def video_memory(driver: Driver) -> bytes:
    driver.card.mode()
    return driver.card.memory.read(0, 0x4_0000)


@pytest.mark.parametrize(
    ("tables", "address", "size"), [(TEXT_80X25, TEXT, 0x8000), (MODE_13, GRAPHICS, 0x1_0000)], ids=["text", "mode 13h"]
)
def test_a_plain_window_costs_no_exits(tables: Tables, address: int, size: int) -> None:
    driver = SlotDriver()
    driver.set_mode(tables)
    assert driver.shown is None
    driver.poke(address, bytes(range(200)))
    assert driver.exits == aperture.WORTH_A_SLOT
    assert driver.shown is not None
    assert driver.shown[1:] == (address, 0, size)
    assert driver.peek(address, 200) == bytes(range(200))
    assert driver.exits == aperture.WORTH_A_SLOT


def test_text_reaches_its_planes_and_comes_back() -> None:
    driver = SlotDriver()
    driver.set_mode(TEXT_80X25)
    driver.poke(TEXT, b"a\x07" * 100)
    driver.poke(TEXT, b"xyzw")
    assert driver.shown is not None
    memory = video_memory(driver)
    assert (memory[0:2], memory[8:10], memory[16:18]) == (b"xy", b"zw", b"a\x07")
    # A font is loaded through other modes; then the text is where it was.
    driver.load_font({65: bytes(range(32))})
    assert driver.shown is None
    assert driver.peek(TEXT, 100) == b"xyzw" + b"a\x07" * 48
    assert driver.shown is not None
    assert video_memory(driver)[4 * 32 * 65 + 2 :: 4][:32] == bytes(range(32))


def test_text_stays_out_of_a_linear_picture() -> None:
    """Linux's bochs driver switches DISPI on and leaves VGA's registers as they were."""
    driver = SlotDriver()
    driver.set_mode(TEXT_80X25)
    driver.poke(TEXT, b"a\x07" * 100)
    driver.poke(TEXT, b"new text")
    assert driver.shown is not None
    driver.set_linear(1024, 768, 32)
    assert driver.shown is None
    picture = bytes(range(256)) * (0x4_0000 // 256)
    driver.card.memory.write(0, picture)
    assert video_memory(driver) == picture
    driver.dispi(ENABLE, 0)
    driver.poke(TEXT, b"b\x07" * 100)
    assert driver.shown is not None, "and again"


def test_planar_modes_have_none() -> None:
    driver = SlotDriver()
    driver.set_mode(MODE_12)
    driver.poke(GRAPHICS, bytes(500))
    assert driver.shown is None


@pytest.mark.parametrize("enabled", [0x01, 0x41], ids=["banked", "linear"])
@pytest.mark.parametrize("tables", [TEXT_80X25, MODE_12, MODE_13], ids=["text", "mode 12h", "mode 13h"])
def test_planes_of_dispi_have_none(tables: Tables, enabled: int) -> None:
    """Whatever VGA's registers name: a slot would pass by the planes, or the bank."""
    driver = SlotDriver()
    driver.set_mode(tables)
    for index, value in ((X, 800), (Y, 600), (BITS, 4), (ENABLE, enabled)):
        driver.dispi(index, value)
    driver.poke(GRAPHICS, bytes(500))
    driver.poke(TEXT, bytes(500))
    assert driver.shown is None


def test_banks_move_the_slot() -> None:
    driver = SlotDriver()
    for index, value in ((X, 640), (Y, 480), (BITS, 32), (ENABLE, 1)):
        driver.dispi(index, value)
    driver.poke(GRAPHICS, bytes(100))
    driver.dispi(BANK, 3)
    assert driver.shown is None
    driver.poke(GRAPHICS, b"!" * 100)
    assert driver.shown is not None
    assert driver.shown[1:] == (GRAPHICS, 3 << 16, 0x1_0000)
    assert driver.card.memory.read(3 << 16, 101) == b"!" * 100 + b"\0"


def test_the_chipsets_memory_comes_first() -> None:
    driver = SlotDriver()
    driver.set_mode(TEXT_80X25)
    driver.poke(TEXT, bytes(200))
    driver.card.aperture.cover(True)
    driver.poke(TEXT, bytes(200))
    assert driver.shown is None
    driver.card.aperture.cover(False)
    driver.poke(TEXT, bytes(200))
    assert driver.shown is not None


NEAR = st.integers(0, 0x20) | st.integers(0, 0x7FF0)
CHANGES = st.one_of(
    st.tuples(st.just("mode"), st.sampled_from(MODES)),
    st.tuples(st.just("sequencer"), st.just(MAP_MASK), st.sampled_from([3, 15]) | st.integers(0, 15)),
    st.tuples(st.just("sequencer"), st.just(MEMORY_MODE), st.sampled_from([2, 14]) | st.integers(0, 15)),
    st.tuples(st.just("graphics"), st.sampled_from([*range(BIT_MASK + 1)]), st.integers(0, 255)),
    st.tuples(st.just("graphics"), st.just(MODE), st.sampled_from([0x10, 0x40]) | st.integers(0, 127)),
    st.tuples(st.just("graphics"), st.just(MISCELLANEOUS), st.sampled_from([5, 14]) | st.integers(0, 15)),
    st.tuples(
        st.just("dispi"), st.sampled_from([X, Y, BITS, ENABLE, BANK]), st.sampled_from([0, 1, 2, 4, 8, 0x41, 640])
    ),
    st.tuples(st.just("look")),
)
ROUNDS = st.lists(
    st.tuples(CHANGES, st.sampled_from([GRAPHICS, TEXT, 0xB0000]), NEAR, st.binary(min_size=4, max_size=9)), max_size=12
)


def both(change: str, to: tuple[Any, ...], base: int, near: int, data: bytes, drivers: tuple[SlotDriver, ...]) -> None:
    """The same for each of *drivers*, which then see the same."""
    seen = []
    for driver in drivers:
        match change:
            case "mode":
                driver.set_mode(*to)
            case "sequencer":
                driver.indexed(0x3C4, *to)
            case "graphics":
                driver.indexed(0x3CE, *to)
            case "dispi":
                driver.dispi(*to)
        # Reads of a slot do not fill the latches; what uses these fills them first.
        latched = driver.peek(GRAPHICS, 1) + driver.peek(TEXT, 1)
        driver.poke(base + near, data)
        seen.append(
            (latched, driver.peek(base, 16), driver.peek(base + near, 16), change == "look" and video_memory(driver))
        )
    assert seen[0] == seen[1]


@pytest.fixture
def drivers(monkeypatch: pytest.MonkeyPatch) -> tuple[SlotDriver, SlotDriver]:
    """One with a slot after three exits, one without."""
    monkeypatch.setattr(aperture, "WORTH_A_SLOT", 3)
    slot, exits = SlotDriver(), SlotDriver()
    exits.card.aperture.cover(True)
    return slot, exits


@pytest.mark.parametrize(("first", "base"), [(TEXT_80X25, TEXT), (MODE_13, GRAPHICS)], ids=["text", "mode 13h"])
def test_any_value_of_any_register(drivers: tuple[SlotDriver, SlotDriver], first: Tables, base: int) -> None:
    changes = [("sequencer", register, value) for register in (MAP_MASK, MEMORY_MODE) for value in range(16)]
    changes += [
        ("graphics", register, value)
        for register in range(BIT_MASK + 1)
        for value in (*range(32), 0x40, 0x55, 0xFE, 0xFF)
    ]
    for part, register, value in changes:
        both("mode", (first,), base, 0, b"some text", drivers)
        assert drivers[0].shown is not None
        both(part, (register, value), base, 3, b"other text", drivers)
        assert video_memory(drivers[0]) == video_memory(drivers[1]), (part, register, value)


@given(first=st.sampled_from(MODES), rounds=ROUNDS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_guest_sees_a_difference(
    drivers: tuple[SlotDriver, SlotDriver],
    first: Tables,
    rounds: list[tuple[tuple[str, *tuple[Any, ...]], int, int, bytes]],
) -> None:
    for driver in drivers:
        driver.dispi(ENABLE, 0)
    for (change, *to), base, near, data in [(("mode", first), TEXT, 0, bytes(4)), *rounds]:
        both(change, tuple(to), base, near, data, drivers)
    assert video_memory(drivers[0]) == video_memory(drivers[1])
    assert drivers[1].shown is None
