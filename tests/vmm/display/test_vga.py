"""The display adapter, driven by its ports and its window."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.vmm.display.card import MODE_4, MODE_12, MODE_13, TEXT_80X25, Driver, unplaced, unseen

from vmonty.base.errors import UsageError
from vmonty.vmm.bus import Bus
from vmonty.vmm.display.screen import Screen
from vmonty.vmm.hw.vga import dispi, scanout
from vmonty.vmm.hw.vga.card import VgaCard
from vmonty.vmm.hw.vga.planes import PlaneWindow
from vmonty.vmm.hw.vga.scanout import Kind, PixelMode, TextMode

GLYPH_A = bytes((0x18, 0x3C, 0x66, 0xC3, 0xFF, 0xC3, 0xC3, 0xC3)) + bytes(8)


@pytest.fixture
def driver() -> Driver:
    return Driver()


def screen_of(driver: Driver) -> Screen:
    return Screen(driver.card.mode, driver.card.memory)


def pixel(screen: Screen, x: int, y: int) -> tuple[int, int, int]:
    frame = screen.frame()
    at = 4 * (y * frame.width + x)
    blue, green, red, _ = frame.pixels[at : at + 4]
    return red, green, blue


def six(value: int) -> int:
    return value << 2 | value >> 4


def test_text_is_read_from_the_cells_that_the_guest_wrote(driver: Driver) -> None:
    driver.set_mode(TEXT_80X25)
    driver.poke(0xB8000, b"".join(bytes((code, 7)) for code in b"Hello, \x01world"))
    driver.poke(0xB8000 + 160 * 24, b"e\x07n\x07d\x07")
    screen = screen_of(driver)
    assert screen.is_text
    assert screen.text().split("\n")[0] == "Hello,  world"
    assert screen.text().split("\n")[24] == "end"
    assert driver.peek(0xB8000, 4) == b"H\x07e\x07"
    assert screen.size == (720, 400)


def test_start_address_scrolls_the_text(driver: Driver) -> None:
    driver.set_mode(TEXT_80X25)
    driver.poke(0xB8000 + 160, b"x\x07")
    driver.indexed(0x3D4, 0xD, 80)
    assert screen_of(driver).text().split("\n")[0] == "x"


def test_a_character_is_drawn_with_the_font_of_plane_2(driver: Driver) -> None:
    driver.set_mode(TEXT_80X25)
    driver.load_font({ord("A"): GLYPH_A, 0xC4: bytes(8) + b"\xff" + bytes(7)})
    driver.indexed(0x3D4, 0xA, 0x20)
    driver.poke(0xB8000, bytes((ord("A"), 0x1F, 0xC4, 0x04)))
    screen = screen_of(driver)
    paper, ink = (six(1), six(2), six(3)), (six(0x3F), six(2 * 0x3F & 0x3F), six(3 * 0x3F & 0x3F))
    for y, bits in enumerate(GLYPH_A):
        for x in range(8):
            assert pixel(screen, x, y) == (ink if bits & 0x80 >> x else paper), (x, y)
    assert pixel(screen, 8, 4) == paper, "the ninth column of a letter is empty"
    red = (six(4), six(8), six(12))
    assert [pixel(screen, 9 + x, 8) for x in range(9)] == [red] * 9, "a line goes on to its neighbour"


def test_the_cursor_covers_its_lines(driver: Driver) -> None:
    driver.set_mode(TEXT_80X25)
    driver.poke(0xB8000, b" \x07 \x07")
    driver.indexed(0x3D4, 0xF, 1)
    screen = screen_of(driver)
    light, dark = pixel(screen, 9, 13), pixel(screen, 9, 12)
    assert light == (six(7), six(14), six(21))
    assert dark == (0, 0, 0)
    driver.indexed(0x3D4, 0xA, 0x2D)
    assert pixel(screen, 9, 13) == (0, 0, 0)


def test_two_fonts_are_chosen_by_the_bright_bit(driver: Driver) -> None:
    driver.set_mode(TEXT_80X25)
    driver.load_font({ord("A"): bytes((0xFF,) * 16), 512 + ord("A"): bytes((0x0F,) * 16)})
    driver.indexed(0x3C4, 3, 0x04)  # map A (bit 3 on) at 16 KiB, map B (off) at 0
    driver.poke(0xB8000, b"A\x0fA\x07")
    screen = screen_of(driver)
    assert pixel(screen, 0, 0) == (0, 0, 0)
    assert pixel(screen, 4, 0) != (0, 0, 0)
    assert pixel(screen, 9, 0) != (0, 0, 0)


def test_sixteen_colours_by_set_reset_and_bit_mask(driver: Driver) -> None:
    driver.set_mode(MODE_12)
    screen = screen_of(driver)
    assert screen.size == (640, 480)
    driver.indexed(0x3CE, 1, 0xF)
    driver.indexed(0x3CE, 0, 0x9)
    driver.indexed(0x3CE, 8, 0x40)
    driver.peek(0xA0000 + 80 * 100 + 2, 1)  # fills the latches
    driver.poke(0xA0000 + 80 * 100 + 2, b"\0")
    assert pixel(screen, 17, 100) == (six(0x39), six(2 * 0x39 & 0x3F), six(3 * 0x39 & 0x3F))
    assert pixel(screen, 16, 100) == pixel(screen, 18, 100) == (0, 0, 0)


@pytest.mark.parametrize(("function", "expected"), [(0, 0x0F), (1, 0x03), (2, 0x3F), (3, 0x3C)])
def test_the_function_mixes_with_the_latch(driver: Driver, function: int, expected: int) -> None:
    driver.set_mode(MODE_12)
    driver.poke(0xA0000, b"\x33")
    driver.peek(0xA0000, 1)
    driver.indexed(0x3CE, 3, function << 3)
    driver.poke(0xA0000, b"\x0f")
    driver.indexed(0x3CE, 3, 0)
    assert driver.peek(0xA0000, 1)[0] == expected


def test_write_modes(driver: Driver) -> None:
    driver.set_mode(MODE_12)
    driver.indexed(0x3CE, 5, 2)
    driver.poke(0xA0000, b"\x05")  # the colour into all eight pixels
    planes = []
    for plane in range(4):
        driver.indexed(0x3CE, 4, plane)
        planes.append(driver.peek(0xA0000, 1)[0])
    assert planes == [0xFF, 0, 0xFF, 0]
    driver.indexed(0x3CE, 5, 1)
    driver.poke(0xA0010, b"\0")  # the latches, copied
    driver.indexed(0x3CE, 4, 2)
    assert driver.peek(0xA0010, 1)[0] == 0xFF
    driver.indexed(0x3CE, 5, 3)
    driver.indexed(0x3CE, 0, 0x2)
    driver.peek(0xA0020, 1)
    driver.poke(0xA0020, b"\xc3")  # the byte is the mask, the colour set/reset's
    driver.indexed(0x3CE, 4, 1)
    assert driver.peek(0xA0020, 1)[0] == 0xC3


def test_colour_compare_reads_where_the_colour_is(driver: Driver) -> None:
    driver.set_mode(MODE_12)
    driver.indexed(0x3C4, 2, 0b0101)
    driver.poke(0xA0000, b"\xf0")
    driver.indexed(0x3CE, 5, 0x08)
    driver.indexed(0x3CE, 2, 0b0101)
    driver.indexed(0x3CE, 7, 0b1111)
    assert driver.peek(0xA0000, 1)[0] == 0xF0
    driver.indexed(0x3CE, 7, 0b0010)
    assert driver.peek(0xA0000, 1)[0] == 0xFF, "plane 1 is 0 everywhere, as asked for, and others don't matter"


@given(
    st.integers(0, 3), st.integers(0, 255), st.integers(0, 255), st.integers(0, 15), st.integers(0, 15),
    st.integers(0, 31), st.integers(0, 15), st.binary(min_size=4, max_size=4),
)  # fmt: skip
def test_a_planar_write_is_the_manuals(
    mode: int, value: int, bits: int, set_reset: int, enable: int, rotate: int, mask: int, latch: bytes
) -> None:
    """Against a model that goes bit by bit through the manual's description."""
    driver = Driver()
    driver.set_mode(MODE_12)
    driver.card.memory.write(0, latch)
    registers = ((0x3CE, 5, mode), (0x3CE, 8, bits), (0x3CE, 0, set_reset), (0x3CE, 1, enable), (0x3CE, 3, rotate))
    for port, index, setting in (*registers, (0x3C4, 2, mask)):
        driver.indexed(port, index, setting)
    driver.peek(0xA0000, 1)
    driver.poke(0xA0000, bytes((value,)))
    for plane in range(4):
        for bit in range(8):
            old = latch[plane] >> bit & 1
            rotated = value >> (bit + (rotate & 7)) % 8 & 1
            colour = set_reset >> plane & 1
            source = {0: colour if enable >> plane & 1 else rotated, 1: 0, 2: value >> plane & 1, 3: colour}[mode]
            mixed = (source, source & old, source | old, source ^ old)[rotate >> 3]
            open_bit = bits >> bit & 1 & (rotated if mode == 3 else 1)
            new = old if mode == 1 or not open_bit else mixed
            expected = new if mask >> plane & 1 else old
            assert driver.card.memory.read_u8(plane) >> bit & 1 == expected


def test_256_colours_are_linear(driver: Driver) -> None:
    driver.set_mode(MODE_13)
    driver.poke(0xA0000 + 320 * 199 + 319, b"\x07")
    screen = screen_of(driver)
    assert screen.size == (640, 400)
    for x, y in ((638, 398), (639, 398), (638, 399), (639, 399)):
        assert pixel(screen, x, y) == (six(7), six(14), six(21))
    assert pixel(screen, 637, 399) == (0, 0, 0)
    assert driver.card.memory.read_u8(320 * 199 + 319) == 7


def test_cga_lines_alternate_between_two_banks(driver: Driver) -> None:
    driver.set_mode(MODE_4)
    screen = screen_of(driver)
    assert screen.size == (640, 400)
    driver.poke(0xB8000, b"\x1b")  # colours 0 1 2 3
    driver.poke(0xB8001, b"\xff")
    driver.poke(0xB8000 + 0x2000 + 79, b"\x03")
    colours = [(six(entry), six(2 * entry & 63), six(3 * entry & 63)) for entry in (0, 0x13, 0x15, 0x17)]
    assert [pixel(screen, 2 * x + 1, 1) for x in range(8)] == [*colours, *(colours[3],) * 4]
    assert pixel(screen, 639, 3) == colours[3]


def test_dispi_sets_linear_modes(driver: Driver) -> None:
    assert driver.dispi_read(0) == 0xB0C5
    assert driver.dispi_read(0xA) == 256
    driver.set_mode(TEXT_80X25)
    driver.card.memory.write(0, b"\xff" * 64)
    driver.set_linear(1024, 768, 32)
    screen = screen_of(driver)
    assert screen.size == (1024, 768)
    assert pixel(screen, 0, 0) == (0, 0, 0), "setting a mode clears"
    driver.card.memory.write(4 * (1024 * 767 + 1023), bytes((1, 2, 3, 255)))
    assert pixel(screen, 1023, 767) == (3, 2, 1)
    with pytest.raises(UsageError, match="graphics"):
        screen.text()


@pytest.mark.parametrize(
    ("bits", "data", "expected"),
    [
        (8, b"\x07", (six(7), six(14), six(21))), (15, b"\x1f\x7c", (255, 0, 255)), (16, b"\xe0\x07", (0, 255, 0)),
        (24, b"\x01\x02\x03", (3, 2, 1)), (32, b"\x01\x02\x03\x04", (3, 2, 1)),
    ],
)  # fmt: skip
def test_dispi_depths(driver: Driver, bits: int, data: bytes, expected: tuple[int, int, int]) -> None:
    driver.set_mode(TEXT_80X25)
    driver.set_linear(640, 480, bits)
    driver.dispi(6, 800)  # a virtual width
    driver.dispi(8, 8)
    driver.dispi(9, 2)
    size = (bits + 7) // 8
    driver.card.memory.write((800 * 3 + 9) * size, data)
    assert pixel(screen_of(driver), 1, 1) == expected


def test_the_window_reaches_the_bank(driver: Driver) -> None:
    driver.set_mode(TEXT_80X25)
    driver.set_linear(640, 480, 8)
    driver.dispi(4, 0x01)
    driver.dispi(5, 3)
    driver.poke(0xA0010, b"z")
    assert driver.card.memory.read(3 * 65536 + 0x10, 1) == b"z"


@pytest.mark.parametrize("enabled", [0x01, 0x41], ids=["banked", "linear"])
def test_sixteen_colours_of_dispi_lie_in_planes(driver: Driver, enabled: int) -> None:
    """VBE's mode 0x104: VGA's registers address the planes, in the bank that DISPI has."""
    driver.set_mode(MODE_12)
    for index, value in ((4, 0), (1, 1024), (2, 768), (3, 4), (4, enabled)):
        driver.dispi(index, value)
    screen = screen_of(driver)
    assert screen.size == (1024, 768)
    driver.indexed(0x3C4, 2, 0b0100)
    driver.poke(0xA0000, b"\xff")
    assert driver.card.memory.read(0, 4) == b"\0\0\xff\0"
    driver.dispi(5, 1)
    driver.indexed(0x3C4, 2, 0b1001)
    driver.indexed(0x3CE, 8, 0x40)
    line, rest = divmod(65536 + 5, 128)
    driver.peek(0xA0005, 1)
    driver.poke(0xA0005, b"\xff")
    driver.indexed(0x3CE, 8, 0xFF)
    assert pixel(screen, 0, 0) == (six(4), six(8), six(12))
    assert [pixel(screen, 8 * rest + x, line) for x in range(3)] == [
        (0, 0, 0), (six(0x39), six(2 * 0x39 & 0x3F), six(3 * 0x39 & 0x3F)), (0, 0, 0)]  # fmt: skip
    assert driver.peek(0xA0005, 1) == b"\x40"
    driver.dispi(4, 0)
    assert driver.peek(0xA0000, 1) == b"\0", "VGA's own modes have no bank"
    driver.indexed(0x3CE, 4, 2)
    assert driver.peek(0xA0000, 1) == b"\xff"


def test_a_bank_that_goes_while_it_is_used(driver: Driver) -> None:
    """Another vCPU ends the mode in the middle of an access."""

    class Going(PlaneWindow):
        looks = 0

        @property
        def bank(self) -> int | None:
            self.looks += 1
            return 3 if self.looks == 1 else None

        @bank.setter
        def bank(self, value: int | None) -> None:
            pass

    window = Going(driver.card.registers, driver.card.memory, driver.card.aperture)
    assert window._banked(0x10) == 3 * 65536 + 0x10


def test_every_port_of_dispi_takes_16_bits(driver: Driver) -> None:
    ports = Bus("ports", 0x10000)
    ports.place(dispi.INDEX_PORT, dispi.PORTS, driver.card.dispi, "dispi")
    for data in (0x1CF, 0x1D0):
        ports.write(0x1CE, 2, 1)
        ports.write(data, 2, data)
        assert (ports.read(0x1CE, 2), ports.read(data, 2), driver.dispi_read(1)) == (1, data & ~7, data & ~7)


def test_frame_is_the_same_object_while_nothing_changes(driver: Driver) -> None:
    driver.set_mode(TEXT_80X25)
    screen = screen_of(driver)
    first = screen.frame()
    assert screen.frame() is first
    driver.poke(0xB8000, b"x\x07")
    assert screen.frame() is not first


def test_a_dark_screen(driver: Driver) -> None:
    driver.set_mode(TEXT_80X25)
    driver.indexed(0x3C4, 1, 0x23)
    screen = screen_of(driver)
    assert not any(screen.frame().pixels)
    with pytest.raises(UsageError):
        screen.text()


def test_picture_is_saved(driver: Driver, tmp_path: Any) -> None:
    from PIL import Image

    driver.set_mode(TEXT_80X25)
    driver.set_linear(64, 32, 32)
    driver.card.memory.write(0, bytes((10, 20, 30, 0)))
    screen_of(driver).save(tmp_path / "screen.png")
    with Image.open(tmp_path / "screen.png") as image:
        assert image.size == (64, 32)
        assert image.getpixel((0, 0)) == (30, 20, 10)
    with pytest.raises(UsageError, match="cannot be written"):
        screen_of(driver).save(tmp_path / "missing" / "screen.png")


def test_registers_answer_where_the_emulation_says(driver: Driver) -> None:
    driver.out(0x3C2, 0x00)
    assert driver.inb(0x3D5) == 0xFF
    driver.indexed(0x3B4, 0x0F, 7)
    assert driver.inb(0x3B5) == 7
    driver.out(0x3C2, 0x01)
    assert driver.inb(0x3D5) == 7
    assert driver.inb(0x3CC) == 1


def test_the_crtc_protects_its_first_registers(driver: Driver) -> None:
    driver.set_mode(TEXT_80X25)
    driver.indexed(0x3D4, 0x11, 0x8E)
    driver.indexed(0x3D4, 1, 0)
    driver.indexed(0x3D4, 7, 0xFF)
    mode = driver.card.mode()
    assert isinstance(mode, TextMode)
    assert (mode.columns, mode.rows) == (80, 25)


def test_rom_is_in_its_bar() -> None:
    card = VgaCard(unplaced, unseen, rom=b"\x55\xaa" + bytes(3000))
    assert card.bars[-1].size == 4096
    assert card.bars[-1].window.device.read(0, 2) == 0xAA55


PORTS = st.sampled_from([*range(0x3B4, 0x3B6), *range(0x3C0, 0x3D0), *range(0x3D4, 0x3DB)])


@given(
    st.lists(st.tuples(PORTS, st.integers(0, 0xFFFF), st.sampled_from((1, 2, 4))), max_size=60),
    st.lists(st.tuples(st.integers(0, 11), st.integers(0, 0xFFFF)), max_size=30),
    st.sampled_from((None, TEXT_80X25, MODE_12, MODE_13, MODE_4)),
)
def test_nothing_that_a_guest_sets_breaks_the_picture(
    writes: list[tuple[int, int, int]], modes: list[tuple[int, int]], tables: Any
) -> None:
    driver = Driver()
    if tables is not None:
        driver.set_mode(tables)
    for port, value, size in writes:
        driver.out(port, value, size)
    for index, value in modes:
        driver.dispi(index, value)
    driver.out(0x3C0, 0x20)
    mode = driver.card.mode()
    screen = screen_of(driver)
    frame = screen.frame()
    assert len(frame.pixels) == 4 * frame.width * frame.height
    assert frame.width <= scanout.MOST_WIDTH
    assert frame.height <= scanout.MOST_HEIGHT
    if isinstance(mode, PixelMode):
        assert mode.kind in Kind
    driver.poke(0xB8000, b"\xff\xff")
    driver.peek(0xA0000, 4)
