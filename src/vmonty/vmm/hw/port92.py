"""System control port A, 0x92: the fast A20 gate and the fast reset. Source: IBM PS/2 Hardware Interface Technical
Reference, "System Control Port A"."""

from __future__ import annotations

from collections.abc import Callable

FAST_RESET, A20_GATE = 1, 2


class Port92:
    """One byte. Addresses are never wrapped at 1 MiB here: the gate is kept and reads back, and that is all."""

    def __init__(self, reset: Callable[[], None]) -> None:
        self._reset = reset
        self._value = A20_GATE

    def read(self, offset: int, size: int) -> int:
        """What was written last."""
        return self._value

    def write(self, offset: int, size: int, value: int) -> None:
        """Bit 0 rising resets the processor."""
        rising = value & ~self._value & FAST_RESET
        self._value = value & (A20_GATE | FAST_RESET)
        if rising:
            self._reset()
