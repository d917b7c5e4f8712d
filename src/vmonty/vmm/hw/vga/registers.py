"""VGA's registers behind ports 0x3B0 to 0x3DF.

Source: IBM Personal System/2 Hardware Interface Technical Reference, "Video Subsystem". A value from the guest is
masked to the register's bits when it is stored, so whoever reads the tables here finds only what a register can hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable

FIRST_PORT, PORTS = 0x3B0, 0x30

# Sequencer.
CLOCKING, MAP_MASK, CHARACTER_MAP, MEMORY_MODE = 1, 2, 3, 4
CLOCKING_8_DOTS, CLOCKING_HALF, CLOCKING_SCREEN_OFF = 0x01, 0x08, 0x20
MEMORY_NO_ODD_EVEN, MEMORY_CHAIN_4 = 0x04, 0x08
# Graphics controller.
SET_RESET, ENABLE_SET_RESET, COLOUR_COMPARE, DATA_ROTATE, READ_MAP, MODE, MISCELLANEOUS, DONT_CARE, BIT_MASK = range(9)
MODE_WRITE = 0x03
MODE_READ_COMPARE, MODE_ODD_EVEN, MODE_CGA, MODE_256 = 0x08, 0x10, 0x20, 0x40
MISCELLANEOUS_GRAPHICS = 0x01
# CRT controller.
HORIZONTAL_END, OVERFLOW, MAXIMUM_SCAN_LINE, CURSOR_START, CURSOR_END = 0x01, 0x07, 0x09, 0x0A, 0x0B
START_HIGH, START_LOW, CURSOR_HIGH, CURSOR_LOW = 0x0C, 0x0D, 0x0E, 0x0F
VERTICAL_RETRACE_END, VERTICAL_END, OFFSET, UNDERLINE, CRTC_MODE, LINE_COMPARE = 0x11, 0x12, 0x13, 0x14, 0x17, 0x18
RETRACE_PROTECT = 0x80
LINE_COMPARE_8 = 0x10  # of OVERFLOW; the register's other bits are protected with 0 to 6
# Attribute controller: 16 palette entries, then
ATTRIBUTE_MODE, OVERSCAN, PLANE_ENABLE, PANNING, COLOUR_SELECT = 0x10, 0x11, 0x12, 0x13, 0x14
ATTRIBUTE_LINE_GRAPHICS, ATTRIBUTE_BLINK, ATTRIBUTE_256, ATTRIBUTE_P54 = 0x04, 0x08, 0x40, 0x80
ATTRIBUTE_VIDEO_ON = 0x20  # of its index
MISC_COLOUR = 0x01

SEQUENCER_BITS = bytes((0x03, 0x3D, 0x0F, 0x3F, 0x0E, 0, 0, 0))
GRAPHICS_BITS = bytes((0x0F, 0x0F, 0x0F, 0x1F, 0x03, 0x7B, 0x0F, 0x0F, 0xFF, 0, 0, 0, 0, 0, 0, 0))
ATTRIBUTE_BITS = bytes((*(0x3F,) * 16, 0xEF, 0xFF, 0x3F, 0x0F, 0x0F, *(0,) * 11))
CRTC_COUNT = 0x19

STATUS_DISPLAY_OFF, STATUS_RETRACE = 0x01, 0x08
# 70 frames a second, of 449 lines with 400 shown, 100 clocks a line with 80 shown.
LINE_NS, LINES, LINES_SHOWN, CLOCK_NS, CLOCKS_SHOWN = 31_778, 449, 400, 318, 80


class VgaRegisters:
    """The registers, as a bus device whose offset 0 is port 0x3B0. Rows of bytes that the picture is derived from.

    *addressing_changed* is called when one of those has a new value that say how memory is reached.
    """

    def __init__(self, addressing_changed: Callable[[], None]) -> None:
        self._addressing_changed = addressing_changed
        self.misc = MISC_COLOUR
        self.sequencer = bytearray(8)
        self.graphics = bytearray(16)
        self.crtc = bytearray(32)
        self.attribute = bytearray(32)
        self.dac = bytearray(768)
        self.dac_mask = 0xFF
        self.dac_8_bits = False  # DISPI's; else each component has 6
        self._indices = {0x3C4: 0, 0x3CE: 0, 0x3D4: 0}
        self._attribute_index = 0
        self._attribute_data_next = False
        self._dac_read = self._dac_write = 0  # the component's index, three to a colour
        self._dac_reading = False
        self._enabled = 1

    @property
    def video_on(self) -> bool:
        """Does the attribute controller let the picture through, and the sequencer?"""
        return bool(self._attribute_index & ATTRIBUTE_VIDEO_ON) and not self.sequencer[CLOCKING] & CLOCKING_SCREEN_OFF

    def read(self, offset: int, size: int) -> int:
        """Ports of a byte; wider reads take several in a row."""
        return sum(self._read(FIRST_PORT + offset + at) << 8 * at for at in range(size))

    def write(self, offset: int, size: int, value: int) -> None:
        """As read: a 16-bit write to an index port writes the data port also."""
        for at in range(size):
            self._write(FIRST_PORT + offset + at, value >> 8 * at & 0xFF)

    def _standard(self, port: int) -> int | None:
        """*port* with the CRTC's at 0x3Dx; None for the one of the two places that is switched off."""
        if 0x3B0 <= port <= 0x3BF:
            return None if self.misc & MISC_COLOUR else port + 0x20
        if 0x3D0 <= port <= 0x3DF:
            return port if self.misc & MISC_COLOUR else None
        return port

    def _read(self, port: int) -> int:
        match self._standard(port):
            case 0x3C0:
                return self._attribute_index
            case 0x3C1:
                return self.attribute[self._attribute_index & 0x1F]
            case 0x3C2:
                return 0x10  # the switch sense: a colour monitor
            case 0x3C3:
                return self._enabled
            case 0x3C5:
                return self.sequencer[self._indices[0x3C4] & 7]
            case 0x3C6:
                return self.dac_mask
            case 0x3C7:
                return 3 if self._dac_reading else 0
            case 0x3C8:
                return self._dac_write // 3
            case 0x3C9:
                value = self.dac[self._dac_read]
                self._dac_read = (self._dac_read + 1) % 768
                return value
            case 0x3CC:
                return self.misc
            case 0x3CF:
                return self.graphics[self._indices[0x3CE] & 15]
            case 0x3D5:
                index = self._indices[0x3D4]
                return self.crtc[index] if index < CRTC_COUNT else 0xFF
            case 0x3DA:
                self._attribute_data_next = False
                return self._status()
            case (0x3C4 | 0x3CE | 0x3D4) as index_port:
                return self._indices[index_port]
            case 0x3CA:
                return 0  # the feature control
        return 0xFF

    @staticmethod
    def _status() -> int:
        """Where the beam is: guests wait for the retrace, and for its end."""
        line, rest = divmod(time.monotonic_ns() % (LINE_NS * LINES), LINE_NS)
        if line >= LINES_SHOWN:
            return STATUS_DISPLAY_OFF | (STATUS_RETRACE if line - LINES_SHOWN < 16 else 0)
        return 0 if rest < CLOCK_NS * CLOCKS_SHOWN else STATUS_DISPLAY_OFF

    def _write(self, port: int, value: int) -> None:
        match self._standard(port):
            case 0x3C0:
                self._write_attribute(value)
            case 0x3C2:
                self.misc = value & 0xEF
            case 0x3C3:
                self._enabled = value & 1
            case 0x3C5:
                index = self._indices[0x3C4] & 7
                self._set(self.sequencer, index, value & SEQUENCER_BITS[index])
            case 0x3C6:
                self.dac_mask = value
            case 0x3C7:
                self._dac_read, self._dac_reading = value * 3, True
            case 0x3C8:
                self._dac_write, self._dac_reading = value * 3, False
            case 0x3C9:
                self.dac[self._dac_write] = value if self.dac_8_bits else value & 0x3F
                self._dac_write = (self._dac_write + 1) % 768
            case 0x3CF:
                index = self._indices[0x3CE] & 15
                self._set(self.graphics, index, value & GRAPHICS_BITS[index])
            case 0x3D5:
                self._write_crtc(self._indices[0x3D4], value)
            case (0x3C4 | 0x3CE | 0x3D4) as index_port:
                self._indices[index_port] = value

    def _set(self, row: bytearray, index: int, value: int) -> None:
        if row[index] != value:
            row[index] = value
            self._addressing_changed()

    def _write_attribute(self, value: int) -> None:
        if self._attribute_data_next:
            index = self._attribute_index & 0x1F
            # While the palette drives the screen its entries cannot be written.
            if index >= 16 or not self._attribute_index & ATTRIBUTE_VIDEO_ON:
                self.attribute[index] = value & ATTRIBUTE_BITS[index]
        else:
            self._attribute_index = value & 0x3F
        self._attribute_data_next = not self._attribute_data_next

    def _write_crtc(self, index: int, value: int) -> None:
        if index >= CRTC_COUNT:
            return
        if index <= OVERFLOW and self.crtc[VERTICAL_RETRACE_END] & RETRACE_PROTECT:
            if index == OVERFLOW:
                self.crtc[OVERFLOW] = self.crtc[OVERFLOW] & ~LINE_COMPARE_8 | value & LINE_COMPARE_8
            return
        self.crtc[index] = value
