"""A driver for the display adapter: sets modes by its ports, as a video BIOS does."""

from __future__ import annotations

from vmonty.vmm.hw.vga.card import VgaCard
from vmonty.vmm.hw.vga.registers import FIRST_PORT

# Sequencer, miscellaneous output, CRTC, attribute controller, graphics controller: IBM's PS/2 Hardware Interface
# Technical Reference, "Video Subsystem", the tables of register values for each mode.
TEXT_80X25 = (
    "00 03 00 02", "67", "5f 4f 50 82 55 81 bf 1f 00 4f 0d 0e 00 00 00 00 9c 8e 8f 28 1f 96 b9 a3 ff",
    "00 01 02 03 04 05 14 07 38 39 3a 3b 3c 3d 3e 3f 0c 00 0f 08 00", "00 00 00 00 00 10 0e 0f ff",
)  # fmt: skip
MODE_12 = (
    "01 0f 00 06", "e3", "5f 4f 50 82 54 80 0b 3e 00 40 00 00 00 00 00 00 ea 8c df 28 00 e7 04 e3 ff",
    "00 01 02 03 04 05 14 07 38 39 3a 3b 3c 3d 3e 3f 01 00 0f 00 00", "00 00 00 00 00 00 05 0f ff",
)  # fmt: skip
MODE_13 = (
    "01 0f 00 0e", "63", "5f 4f 50 82 54 80 bf 1f 00 41 00 00 00 00 00 00 9c 8e 8f 28 40 96 b9 a3 ff",
    "00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f 41 00 0f 00 00", "00 00 00 00 00 40 05 0f ff",
)  # fmt: skip
MODE_4 = (
    "09 03 00 02", "63", "2d 27 28 90 2b 80 bf 1f 00 c1 00 00 00 00 00 00 9c 8e 8f 14 00 96 b9 a2 ff",
    "00 13 15 17 02 04 06 07 10 11 12 13 14 15 16 17 01 00 03 00 00", "00 00 00 00 00 30 0f 0f ff",
)  # fmt: skip
Tables = tuple[str, str, str, str, str]


def unplaced(ram: object, address: int | None, *, writable: bool = True) -> None:
    """The frame buffer of a card that is in no machine is nowhere."""


def unseen(ram: object, address: int | None, start: int, size: int) -> None:
    """Nor is its window."""


class Driver:
    """The card's ports and its window, by their addresses."""

    def __init__(self) -> None:
        self.card = VgaCard(unplaced, unseen)

    def out(self, port: int, value: int, size: int = 1) -> None:
        self.card.registers.write(port - FIRST_PORT, size, value)

    def inb(self, port: int) -> int:
        return self.card.registers.read(port - FIRST_PORT, 1)

    def indexed(self, port: int, index: int, value: int) -> None:
        self.out(port, index | value << 8, 2)

    def poke(self, address: int, data: bytes) -> None:
        for at, byte in enumerate(data):
            self.card.window.write(address - 0xA0000 + at, 1, byte)

    def peek(self, address: int, size: int) -> bytes:
        return bytes(self.card.window.read(address - 0xA0000 + at, 1) for at in range(size))

    def set_mode(self, tables: Tables) -> None:
        sequencer, misc, crtc, attribute, graphics = (bytes.fromhex(table) for table in tables)
        self.out(0x3C2, misc[0])
        self.indexed(0x3D4, 0x11, 0)
        for index, value in enumerate(sequencer, 1):
            self.indexed(0x3C4, index, value)
        for index, value in enumerate(crtc):
            self.indexed(0x3D4, index, value)
        for index, value in enumerate(graphics):
            self.indexed(0x3CE, index, value)
        self.inb(0x3DA)
        self.out(0x3C0, 0)
        self.inb(0x3DA)
        for index, value in enumerate(attribute):
            self.out(0x3C0, index)
            self.out(0x3C0, value)
        self.out(0x3C0, 0x20)
        self.out(0x3C6, 0xFF)
        self.out(0x3C8, 0)
        for index in range(256):
            for component in range(3):
                self.out(0x3C9, index * (component + 1) & 0x3F)

    def load_font(self, glyphs: dict[int, bytes]) -> None:
        """As a video BIOS: plane 2 alone, linear at 0xA0000."""
        for port, index, value in ((0x3C4, 2, 4), (0x3C4, 4, 6), (0x3CE, 5, 0), (0x3CE, 6, 4)):
            self.indexed(port, index, value)
        for character, glyph in glyphs.items():
            self.poke(0xA0000 + 32 * character, glyph)
        for port, index, value in ((0x3C4, 2, 3), (0x3C4, 4, 2), (0x3CE, 5, 0x10), (0x3CE, 6, 0xE)):
            self.indexed(port, index, value)

    def dispi(self, index: int, value: int) -> None:
        self.card.dispi.write(0, 2, index)
        self.card.dispi.write(1, 2, value)

    def dispi_read(self, index: int) -> int:
        self.card.dispi.write(0, 2, index)
        return self.card.dispi.read(1, 2)

    def set_linear(self, width: int, height: int, bits: int) -> None:
        self.out(0x3C0, 0x20)
        for index, value in ((4, 0), (1, width), (2, height), (3, bits), (4, 0x41)):
            self.dispi(index, value)
