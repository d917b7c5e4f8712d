"""DISPI: modes beyond VGA's, by a few 16-bit registers behind an index.

Source: the Bochs project's documentation, "Bochs VBE Display Interface"; the version is 5, as QEMU's card has it.
"""

from __future__ import annotations

from collections.abc import Callable

ID, X, Y, BITS, ENABLE, BANK, VIRTUAL_WIDTH, VIRTUAL_HEIGHT, X_OFFSET, Y_OFFSET, MEMORY_64K = range(11)
VERSION_0, VERSION_5 = 0xB0C0, 0xB0C5
ENABLED, GET_CAPABILITIES, EIGHT_BIT_DAC, LINEAR, NO_CLEAR = 0x01, 0x02, 0x20, 0x40, 0x80
MOST_X, MOST_Y, MOST_BITS = 2560, 1600, 32
DEPTHS = (4, 8, 15, 16, 24, 32)

INDEX_PORT, PORTS = 0x1CE, 4  # a 16-bit access to the last one, too


class Dispi:
    """The registers for *memory* bytes of video memory. *changed* is called when a mode is set, with whether to clear.

    A mode or a part of it that does not fit is reduced to what does, as the documentation has it: what the
    registers hold always lies inside video memory.
    """

    def __init__(self, memory: int, changed: Callable[[bool], None]) -> None:
        self._memory = memory
        self._changed = changed
        self._index = 0
        self._registers = [VERSION_5, 0, 0, 0, 0, 0, 0, 0, 0, 0, memory >> 16]

    def __getitem__(self, index: int) -> int:
        return self._registers[index]

    @property
    def enabled(self) -> bool:
        """Is a DISPI mode on, rather than VGA's?"""
        return bool(self._registers[ENABLE] & ENABLED)

    @property
    def line_size(self) -> int:
        """Bytes from one line to the next; with 4 bits a pixel, of one plane."""
        bits = self._registers[BITS]
        width = self._registers[VIRTUAL_WIDTH]
        return width // 8 if bits == 4 else width * ((bits + 7) // 8)

    def read(self, offset: int, size: int) -> int:
        """Port 0x1CE is the index, both 0x1CF and 0x1D0 the data."""
        if offset == 0:
            return self._index
        return self.get(self._index)

    def write(self, offset: int, size: int, value: int) -> None:
        """As read. These are 16-bit ports."""
        if offset == 0:
            self._index = value & 0xFFFF
        else:
            self.set(self._index, value & 0xFFFF)

    def get(self, index: int) -> int:
        """What the guest reads of a register."""
        if self._registers[ENABLE] & GET_CAPABILITIES and index in (X, Y, BITS):
            return {X: MOST_X, Y: MOST_Y, BITS: MOST_BITS}[index]
        return self._registers[index] if index < len(self._registers) else 0

    def set(self, index: int, value: int) -> None:
        """The guest writes a register. What it cannot hold changes nothing."""
        registers = self._registers
        match index:
            case 0 if VERSION_0 <= value <= VERSION_5:
                registers[ID] = value
            case 1 if not self.enabled and 8 <= value <= MOST_X:
                registers[X] = value & ~7
            case 2 if not self.enabled and 0 < value <= MOST_Y:
                registers[Y] = value
            case 3 if not self.enabled and (value or 8) in DEPTHS:
                registers[BITS] = value or 8
            case 4:
                self._enable(value)
            case 5 if value < registers[MEMORY_64K]:
                registers[BANK] = value
                self._changed(False)
            case 6:
                registers[VIRTUAL_WIDTH] = value
                self._fit()
            case 8:
                registers[X_OFFSET] = value
                self._fit()
            case 9:
                registers[Y_OFFSET] = value
                self._fit()

    def _enable(self, value: int) -> None:
        registers = self._registers
        was = self.enabled
        complete = registers[X] and registers[Y] and registers[BITS]
        registers[ENABLE] = value & 0xE3 if complete else value & 0xE2
        if self.enabled and not was:
            registers[VIRTUAL_WIDTH] = registers[X]
            registers[X_OFFSET] = registers[Y_OFFSET] = registers[BANK] = 0
            self._fit()
        self._changed(self.enabled and not was and not value & NO_CLEAR)

    def _fit(self) -> None:
        registers = self._registers
        if not registers[BITS]:
            return
        registers[VIRTUAL_WIDTH] = min(max(registers[VIRTUAL_WIDTH] & ~7, registers[X], 8), 0x7FF8)
        planes = 4 if registers[BITS] == 4 else 1
        lines = self._memory // (self.line_size * planes)
        if lines < registers[Y]:
            registers[VIRTUAL_WIDTH] = max(registers[X], 8)
            lines = self._memory // (self.line_size * planes)
        registers[Y] = min(registers[Y], lines)
        registers[VIRTUAL_HEIGHT] = min(lines, 0xFFFF)
        registers[X_OFFSET] = min(registers[X_OFFSET], max(registers[VIRTUAL_WIDTH] - registers[X], 0))
        registers[Y_OFFSET] = min(registers[Y_OFFSET], lines - registers[Y])
