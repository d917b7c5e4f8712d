"""Text mode 3, 80 columns and 25 lines, as a video BIOS leaves it: for kernels that start without one.

Source: IBM Personal System/2 Hardware Interface Technical Reference, "Video Subsystem", the tables of register values
for each mode. The font is the one in the video BIOS; its first character but one is the smiling face of code page 437.
"""

from __future__ import annotations

from vmonty.base.ram import Ram
from vmonty.vmm.hw.vga.registers import FIRST_PORT, VgaRegisters

MODE, COLUMNS, LINES, FONT_LINES = 3, 80, 25, 16
MISC = 0x67
SEQUENCER = bytes.fromhex("03 00 03 00 02")
CRTC = bytes.fromhex("5f 4f 50 82 55 81 bf 1f 00 4f 0d 0e 00 00 00 00 9c 8e 8f 28 1f 96 b9 a3 ff")
GRAPHICS = bytes.fromhex("00 00 00 00 00 10 0e 0f ff")
ATTRIBUTE = bytes.fromhex("00 01 02 03 04 05 14 07 38 39 3a 3b 3c 3d 3e 3f 0c 00 0f 08 00")
COLOURS = 64  # of an EGA: two bits for each component
BLANK, GREY_ON_BLACK = 0x20, 0x07
TEXT_BYTES, GLYPH_ROOM, CHARACTERS = 0x8000, 32, 256
SMILE = bytes.fromhex("00 00 7e 81 a5 81 81 bd 99 81 81 7e 00 00 00 00")


def set_text_mode(registers: VgaRegisters, memory: Ram, rom: bytes) -> None:
    """Set the mode, clear the screen, load the font of *rom*."""

    def out(port: int, *values: int) -> None:
        for value in values:
            registers.write(port - FIRST_PORT, 1, value)

    def table(port: int, values: bytes) -> None:
        for index, value in enumerate(values):
            out(port, index)
            out(port + 1, value)

    out(0x3C2, MISC)
    table(0x3C4, SEQUENCER)
    table(0x3D4, CRTC)
    table(0x3CE, GRAPHICS)
    registers.read(0x3DA - FIRST_PORT, 1)  # the next byte is an index
    for index, value in enumerate(ATTRIBUTE):
        out(0x3C0, index, value)
    out(0x3C0, 0x20)  # the screen is on
    out(0x3C6, 0xFF)
    out(0x3C8, 0)
    for colour in range(COLOURS):
        out(0x3C9, *(0x2A * (colour >> shift & 1) + 0x15 * (colour >> shift + 3 & 1) for shift in (2, 1, 0)))
    # Byte n of plane p lies at 4n + p: characters and attributes at the even bytes of 0 and 1, the font in 2.
    contents = bytearray(4 * TEXT_BYTES)
    contents[0::8] = bytes((BLANK,)) * (TEXT_BYTES // 2)
    contents[1::8] = bytes((GREY_ON_BLACK,)) * (TEXT_BYTES // 2)
    contents[2 : 4 * GLYPH_ROOM * CHARACTERS : 4] = font(rom)
    memory.write(0, contents)


def font(rom: bytes) -> bytes:
    """The font of 8 by 16 in a video BIOS, as plane 2 has it; without one all is blank."""
    begin = rom.find(SMILE) - FONT_LINES
    glyphs = rom[begin : begin + FONT_LINES * CHARACTERS] if begin >= 0 else b""
    return b"".join(
        glyphs[FONT_LINES * number : FONT_LINES * (number + 1)].ljust(GLYPH_ROOM, b"\0") for number in range(CHARACTERS)
    )
