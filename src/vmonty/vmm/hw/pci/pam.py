"""Programmable attribute map: which parts of 0xC0000 to 0xFFFFF are RAM, for reads and for writes; and SMRAM.

Source: Intel 82441FX data sheet, "PAM[6:0]" and "SMRAM"; the Q35's registers are the same ones elsewhere.
"""

from __future__ import annotations

from typing import Protocol

from vmonty.vmm.hw.pci.config import ConfigSpace

REGISTERS = 7
READ_ENABLE, WRITE_ENABLE = 1, 2
READ_WRITE = 0x33  # both segments of a register
# System management RAM at 0xA0000: open outside of SMM; locked, which closes it for good.
SMRAM_OPEN, SMRAM_LOCKED, SMRAM_ENABLED = 0x40, 0x10, 0x08
SMRAM_RESET, SMRAM_WRITABLE = 0x02, 0x78


class Attributes(Protocol):
    """The memory that the registers switch: see ``vmonty.vmm.shadow``."""

    def set(self, segment: int, readable: bool, writable: bool) -> None:
        """Segment 0 is 0xF0000 to 0xFFFFF, 1 to 12 are 16 KiB each from 0xC0000 on."""
        ...

    def set_screen_memory_open(self, is_open: bool) -> None:
        """RAM in place of the screen's memory at 0xA0000."""
        ...


class Pam:
    """The seven registers at *at* and the SMRAM register at *smram* of *config*."""

    def __init__(self, config: ConfigSpace, at: int, smram: int, memory: Attributes) -> None:
        self._config = config
        self._at = at
        self._smram = smram
        self._memory = memory
        mask = bytes((READ_WRITE & 0xF0,)) + bytes((READ_WRITE,)) * (REGISTERS - 1)
        config.set(at, REGISTERS, 0, writable=int.from_bytes(mask, "little"))
        config.set(smram, 1, SMRAM_RESET, writable=SMRAM_WRITABLE)

    def written(self, offset: int, size: int) -> None:
        """A guest wrote *size* bytes of configuration space at *offset*."""
        for register in range(REGISTERS):
            if offset <= self._at + register < offset + size:
                value = self._config.data[self._at + register]
                if register:
                    self._set(2 * register - 1, value)
                self._set(2 * register, value >> 4)
        if offset <= self._smram < offset + size:
            self._smram_written()

    def _set(self, segment: int, bits: int) -> None:
        self._memory.set(segment, bool(bits & READ_ENABLE), bool(bits & WRITE_ENABLE))

    def _smram_written(self) -> None:
        value = self._config.data[self._smram]
        if value & SMRAM_LOCKED:
            value &= ~SMRAM_OPEN
            self._config.set(self._smram, 1, value)
        self._memory.set_screen_memory_open(bool(value & SMRAM_OPEN))
