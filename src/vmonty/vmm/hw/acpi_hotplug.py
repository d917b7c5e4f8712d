"""Registers of ACPI hot-plug: a general purpose event block, and what changed in the slots of the PCI root bus.

Source: ACPI Specification 6.5, "General-Purpose Event Register Blocks". The second block is between our DSDT and us.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

# The event block: 16 status bits, then 16 enable bits.
GPE_STATUS, GPE_ENABLE, GPE_SIZE = 0, 2, 4
# Of the slots, a bit each: what came, what shall go, and where the guest says that it has let go.
SLOTS_UP, SLOTS_DOWN, SLOTS_EJECT, SLOTS_SIZE = 0, 4, 8, 12
EVENT_PCI = 1


class GeneralEvents:
    """The GPE0 block. *sci* is called with the level of the interrupt."""

    def __init__(self, sci: Callable[[int], None]) -> None:
        self._sci = sci
        self._lock = threading.Lock()
        self._status = self._enable = 0

    def happen(self, event: int) -> None:
        """Set the status bit of *event*. From any thread."""
        with self._lock:
            self._status |= 1 << event
            self._update()

    def _update(self) -> None:
        self._sci(int(bool(self._status & self._enable)))

    def read(self, offset: int, size: int) -> int:
        """In any width."""
        with self._lock:
            return (self._status | self._enable << 16) >> 8 * offset

    def write(self, offset: int, size: int, value: int) -> None:
        """Status bits clear where ones are written."""
        with self._lock:
            bits = (value & (1 << 8 * size) - 1) << 8 * offset
            written = ((1 << 8 * size) - 1) << 8 * offset
            self._status &= ~bits & 0xFFFF
            self._enable = (self._enable & ~(written >> 16) | bits >> 16) & 0xFFFF
            self._update()


class SlotEvents:
    """Slots of the root bus, a bit each. *eject* is called with each slot that the guest has let go of."""

    def __init__(self, eject: Callable[[int], None]) -> None:
        self._eject = eject
        self._lock = threading.Lock()
        self._up = self._down = 0

    def came(self, slot: int) -> None:
        """There is a new device in *slot*."""
        with self._lock:
            self._up |= 1 << slot

    def shall_go(self, slot: int) -> None:
        """The device in *slot* is asked for."""
        with self._lock:
            self._down |= 1 << slot

    def read(self, offset: int, size: int) -> int:
        """The DSDT reads whole registers, and each change once."""
        with self._lock:
            if (offset, size) == (SLOTS_UP, 4):
                bits, self._up = self._up, 0
                return bits
            if (offset, size) == (SLOTS_DOWN, 4):
                bits, self._down = self._down, 0
                return bits
            return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Let go of slots."""
        if (offset, size) == (SLOTS_EJECT, 4):
            for slot in range(32):
                if value >> slot & 1:
                    self._eject(slot)
