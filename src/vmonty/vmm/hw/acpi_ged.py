"""The registers of a hardware-reduced ACPI platform: events, sleep control and reset, in memory space.

Source: ACPI Specification 6.5, "Sleep Control and Status Registers", "Interrupt-based Events: Generic Event Device".
"""

from __future__ import annotations

import threading
from collections.abc import Callable

# Offsets: which events happened (reading clears them), then the registers that the FADT names.
EVENT_SELECT, SLEEP_CONTROL, SLEEP_STATUS, RESET = 0x00, 0x10, 0x11, 0x12
SIZE = 0x1000
POWER_BUTTON = 1
# The SLP_TYP of soft-off, as \_S5 gives it.
SLEEP_TYPE_S5 = 5
SLEEP_TYPE_SHIFT, SLEEP_ENABLE = 2, 1 << 5
RESET_VALUE = 0x42


class AcpiGed:
    """*irq* is pulsed for each event; *power_off* and *reset* are called when the guest asks."""

    def __init__(self, power_off: Callable[[], None], reset: Callable[[], None], irq: Callable[[int], None]) -> None:
        self._power_off = power_off
        self._reset = reset
        self._irq = irq
        self._lock = threading.Lock()
        self._events = 0

    def press_power_button(self) -> None:
        """Ask the guest to shut down. From any thread."""
        with self._lock:
            self._events |= POWER_BUTTON
        self._irq(1)
        self._irq(0)

    def read(self, offset: int, size: int) -> int:
        """The events, and none of them afterwards; everything else reads as zero."""
        if offset != EVENT_SELECT:
            return 0
        with self._lock:
            events, self._events = self._events, 0
        return events

    def write(self, offset: int, size: int, value: int) -> None:
        """Sleep (S5 only) or reset."""
        if offset == SLEEP_CONTROL and value & SLEEP_ENABLE and value >> SLEEP_TYPE_SHIFT & 7 == SLEEP_TYPE_S5:
            self._power_off()
        elif offset == RESET and value & 0xFF == RESET_VALUE:
            self._reset()
