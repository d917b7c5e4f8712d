"""ACPI power management registers: the PM1 blocks and the PM timer.

Source: ACPI Specification 6.5, "ACPI Hardware Features" (PM1 Event and Control Grouping, Power Management Timer).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# Offsets inside the block that the FADT announces.
PM1_STATUS, PM1_ENABLE, PM1_CONTROL, PM_TIMER = 0, 2, 4, 8
SIZE = 12

STATUS_POWER_BUTTON = 1 << 8
CONTROL_SCI_ENABLE = 1
CONTROL_SLEEP_TYPE_SHIFT = 10
CONTROL_SLEEP_ENABLE = 1 << 13
TIMER_HZ = 3_579_545

# The SLP_TYP that the DSDT's _S5 package gives for soft-off.
SLEEP_TYPE_S5 = 5


class AcpiPm:
    """The registers, in ACPI mode from the start (SCI_EN set, no SMI command port).

    *power_off* is called on a write of SLP_EN with the type of S5; *sci* with the level of the SCI.
    """

    def __init__(self, power_off: Callable[[], None], sci: Callable[[int], None]) -> None:
        self._power_off = power_off
        self._sci = sci
        self._lock = threading.Lock()
        self._status = self._enable = self._control = 0

    def press_power_button(self) -> None:
        """Ask the guest to shut down, as the button of a PC does. From any thread."""
        with self._lock:
            self._status |= STATUS_POWER_BUTTON
            self._update()

    def _update(self) -> None:
        self._sci(int(bool(self._status & self._enable)))

    def read(self, offset: int, size: int) -> int:
        """Registers may be read in any width."""
        with self._lock:
            ticks = time.monotonic_ns() * TIMER_HZ // 1_000_000_000
            block = (
                self._status
                | self._enable << 16
                | (self._control | CONTROL_SCI_ENABLE) << 32
                | (ticks & 0xFFFF_FFFF) << 64
            )
            return block >> 8 * offset

    def write(self, offset: int, size: int, value: int) -> None:
        """PM1 status bits clear where ones are written; the timer is read-only."""
        off = False
        with self._lock:
            for at in range(size):
                byte = value >> 8 * at & 0xFF
                register, shift = (offset + at) & ~1, 8 * ((offset + at) & 1)
                if register == PM1_STATUS:
                    self._status &= ~(byte << shift)
                elif register == PM1_ENABLE:
                    self._enable = self._enable & ~(0xFF << shift) | byte << shift
                elif register == PM1_CONTROL:
                    self._control = self._control & ~(0xFF << shift) | byte << shift
            if self._control & CONTROL_SLEEP_ENABLE:
                # SLP_EN reads as zero.
                self._control &= ~CONTROL_SLEEP_ENABLE
                off = self._control >> CONTROL_SLEEP_TYPE_SHIFT & 7 == SLEEP_TYPE_S5
            self._update()
        if off:
            self._power_off()
