"""What the registers say is on the screen: a text mode or a pixel mode, with all that is needed to draw it.

Source: IBM Personal System/2 Hardware Interface Technical Reference, "Video Subsystem", "CRT Controller Registers"
and "Attribute Controller Registers".
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from vmonty.base.ram import Ram
from vmonty.vmm.hw.vga import dispi as vbe
from vmonty.vmm.hw.vga import raster
from vmonty.vmm.hw.vga import registers as vga
from vmonty.vmm.hw.vga.dispi import Dispi
from vmonty.vmm.hw.vga.registers import VgaRegisters

# No monitor shows more; the registers can ask for any size up to 2048 by 2048.
MOST_WIDTH, MOST_HEIGHT = vbe.MOST_X, vbe.MOST_Y
# The character map select field → offset of the font in plane 2.
_FONTS = (0x0000, 0x4000, 0x8000, 0xC000, 0x2000, 0x6000, 0xA000, 0xE000)
_ALL_PLANES = 0x1_0000


class Kind(IntEnum):
    """How pixels lie in memory."""

    PLANAR = 0  # a bit in each of four planes
    CGA = 1  # two bits, bytes alternating between two planes
    INDEXED = 2  # a byte
    RGB15 = 3
    RGB16 = 4
    RGB24 = 5
    RGB32 = 6


_DISPI_KINDS = {
    4: Kind.PLANAR, 8: Kind.INDEXED, 15: Kind.RGB15, 16: Kind.RGB16, 24: Kind.RGB24, 32: Kind.RGB32,
}  # fmt: skip


@dataclass(frozen=True)
class TextMode:
    """Cells of a character and an attribute. *start* and *pitch* count cells; *cursor* is a cell, None when hidden.

    *palette* is sixteen colours of four bytes: blue, green, red, nothing.
    """

    columns: int
    rows: int
    cell_width: int
    cell_height: int
    start: int
    pitch: int
    scale: int  # plane bytes from one cell to the next: 2 where the CRTC counts words
    font: int
    second_font: int
    cursor: int | None
    cursor_first: int
    cursor_last: int
    line_graphics: bool
    blink: bool
    palette: bytes

    @property
    def width(self) -> int:
        """In pixels."""
        return self.columns * self.cell_width

    @property
    def height(self) -> int:
        """In pixels."""
        return self.rows * self.cell_height

    def cells(self, memory: Ram) -> list[bytes]:
        """Each row's cells: character and attribute, one after the other."""
        return raster.text_cells(
            memory.view(0, 4 * _ALL_PLANES), self.start, self.pitch, self.scale, self.columns, self.rows
        )

    def draw(self, memory: Ram, out: bytearray) -> None:
        """Fill *out*, four bytes for each pixel."""
        raster.draw_text(
            out, memory.view(0, 4 * _ALL_PLANES), self.start, self.pitch, self.scale, self.columns, self.rows,
            self.cell_width, self.cell_height, self.font, self.second_font, self.palette,
            -1 if self.cursor is None else self.cursor, self.cursor_first, self.cursor_last,
            self.line_graphics, self.blink,
        )  # fmt: skip


@dataclass(frozen=True)
class PixelMode:
    """Pixels. *start* and *pitch* are in bytes, of one plane for planar modes.

    *columns* and *lines* are those in memory; each is shown *across* and *down* times. Lines
    from *split* on begin at address 0. Where *banked*, bit 13 of the address is the line's lowest. A *linear* mode has
    all of video memory, VGA's have the four planes.
    """

    kind: Kind
    columns: int
    lines: int
    across: int
    down: int
    start: int
    pitch: int
    split: int
    banked: bool
    linear: bool
    planes: int
    palette: bytes

    @property
    def width(self) -> int:
        """In pixels of the screen."""
        return self.columns * self.across

    @property
    def height(self) -> int:
        """In pixels of the screen."""
        return self.lines * self.down

    def draw(self, memory: Ram, out: bytearray) -> None:
        """Fill *out*, four bytes for each pixel."""
        raster.draw_pixels(
            out, memory.view(0, memory.size if self.linear else 4 * _ALL_PLANES), self.kind, self.columns, self.lines,
            self.across, self.down, self.start, self.pitch, self.split, self.banked, self.planes, self.palette,
        )  # fmt: skip


Mode = TextMode | PixelMode


def describe(registers: VgaRegisters, dispi: Dispi) -> Mode | None:
    """The mode now; None when the screen is dark."""
    if not registers.video_on:
        return None
    if dispi.enabled:
        return _dispi_mode(registers, dispi)
    crtc = registers.crtc
    half = bool(registers.sequencer[vga.CLOCKING] & vga.CLOCKING_HALF)
    characters = crtc[vga.HORIZONTAL_END] + 1
    overflow = crtc[vga.OVERFLOW]
    lines = (crtc[vga.VERTICAL_END] | overflow << 7 & 0x100 | overflow << 3 & 0x200) + 1
    if registers.graphics[vga.MISCELLANEOUS] & vga.MISCELLANEOUS_GRAPHICS:
        return _graphics_mode(registers, characters, lines)
    return _text_mode(registers, characters, lines, half)


def _start(registers: VgaRegisters) -> int:
    return registers.crtc[vga.START_HIGH] << 8 | registers.crtc[vga.START_LOW]


def _colour(registers: VgaRegisters, index: int) -> bytes:
    """A colour of the DAC as four bytes."""
    at = 3 * (index & registers.dac_mask)
    red, green, blue = registers.dac[at : at + 3]
    if registers.dac_8_bits:
        return bytes((blue, green, red, 0))
    return bytes((component << 2 | component >> 4) & 0xFF for component in (blue, green, red)) + b"\0"


def _all_colours(registers: VgaRegisters) -> bytes:
    return b"".join(_colour(registers, index) for index in range(256))


def _sixteen(registers: VgaRegisters) -> bytes:
    """The attribute controller's palette, through the DAC."""
    select, mode = registers.attribute[vga.COLOUR_SELECT], registers.attribute[vga.ATTRIBUTE_MODE]
    colours = []
    for entry in registers.attribute[:16]:
        if mode & vga.ATTRIBUTE_P54:
            entry = entry & 0x0F | select << 4 & 0x30
        colours.append(_colour(registers, entry | select << 4 & 0xC0))
    return b"".join(colours)


def _text_mode(registers: VgaRegisters, columns: int, lines: int, half: bool) -> TextMode | None:
    crtc, attribute = registers.crtc, registers.attribute[vga.ATTRIBUTE_MODE]
    height = (crtc[vga.MAXIMUM_SCAN_LINE] & 0x1F) + 1
    if crtc[vga.MAXIMUM_SCAN_LINE] & 0x80:
        lines //= 2
    width = 8 if registers.sequencer[vga.CLOCKING] & vga.CLOCKING_8_DOTS else 9
    rows = lines // height
    if not rows or columns * width > MOST_WIDTH or rows * height > MOST_HEIGHT:
        return None
    fonts = registers.sequencer[vga.CHARACTER_MAP]
    hidden = crtc[vga.CURSOR_START] & 0x20
    cursor = crtc[vga.CURSOR_HIGH] << 8 | crtc[vga.CURSOR_LOW]
    return TextMode(
        columns, rows, width, height, _start(registers), 2 * crtc[vga.OFFSET],
        1 if crtc[vga.CRTC_MODE] & 0x40 else 2,
        font=_FONTS[fonts & 3 | fonts >> 2 & 4], second_font=_FONTS[fonts >> 2 & 3 | fonts >> 3 & 4],
        cursor=None if hidden else cursor,
        cursor_first=crtc[vga.CURSOR_START] & 0x1F, cursor_last=crtc[vga.CURSOR_END] & 0x1F,
        line_graphics=bool(attribute & vga.ATTRIBUTE_LINE_GRAPHICS), blink=bool(attribute & vga.ATTRIBUTE_BLINK),
        palette=_sixteen(registers),
    )  # fmt: skip


def _graphics_mode(registers: VgaRegisters, characters: int, lines: int) -> PixelMode | None:
    crtc, mode = registers.crtc, registers.graphics[vga.MODE]
    scan = crtc[vga.MAXIMUM_SCAN_LINE]
    banked = not crtc[vga.CRTC_MODE] & 1
    # Two banks of lines are not a line shown twice.
    repeat = (1 if banked else (scan & 0x1F) + 1) * (2 if scan & 0x80 else 1)
    compare = crtc[vga.LINE_COMPARE] | crtc[vga.OVERFLOW] << 4 & 0x100 | scan << 3 & 0x200
    unit = 1 if crtc[vga.CRTC_MODE] & 0x40 else 2
    if mode & vga.MODE_256:
        kind, width, unit, palette = Kind.INDEXED, characters * 4, 4, _all_colours(registers)
    elif mode & vga.MODE_CGA:
        kind, width, palette = Kind.CGA, characters * 8, _sixteen(registers)
    else:
        kind, width, palette = Kind.PLANAR, characters * 8, _sixteen(registers)
    height = lines // repeat
    # Two dots of the monitor's make one of 320 pixels.
    across = 2 if mode & vga.MODE_256 or registers.sequencer[vga.CLOCKING] & vga.CLOCKING_HALF else 1
    if not height or width * across > MOST_WIDTH or height * repeat > MOST_HEIGHT:
        return None
    return PixelMode(
        kind, width, height, across, repeat, unit * _start(registers), unit * 2 * crtc[vga.OFFSET],
        compare // repeat + 1, banked, False, registers.attribute[vga.PLANE_ENABLE], palette,
    )  # fmt: skip


def _dispi_mode(registers: VgaRegisters, dispi: Dispi) -> PixelMode | None:
    bits, width, height = dispi[vbe.BITS], dispi[vbe.X], dispi[vbe.Y]
    pitch, x = dispi.line_size, dispi[vbe.X_OFFSET]
    if not width or not height:
        return None
    kind = _DISPI_KINDS[bits]
    palette = b""
    if kind is Kind.PLANAR:
        palette = _sixteen(registers)
    elif kind is Kind.INDEXED:
        palette = _all_colours(registers)
    across = x // 8 if bits == 4 else x * ((bits + 7) // 8)
    return PixelMode(
        kind, width, height, 1, 1, pitch * dispi[vbe.Y_OFFSET] + across, pitch, height + 1, False, True, 15, palette
    )  # fmt: skip
