"""System control port A, 0x92: the fast A20 gate and the fast reset. Source: IBM PS/2 Hardware Interface Technical
Reference, "System Control Port A"."""

from __future__ import annotations

from collections.abc import Callable

from vmonty.kvm.api import PortCell
from vmonty.vmm.bus import PlainCell

FAST_RESET, A20_GATE = 1, 2


class Port92:
    """One byte. Addresses are never wrapped at 1 MiB here: the gate is kept and reads back, and that is all.

    *cell* holds it where KVM answers in this device's place; there a write of the gate alone is all KVM's.
    """

    def __init__(self, reset: Callable[[], None], cell: PortCell | None = None) -> None:
        self._reset = reset
        self._cell = cell or PlainCell()
        self._cell.value = A20_GATE

    def read(self, offset: int, size: int) -> int:
        """What was written last."""
        return self._cell.value

    def write(self, offset: int, size: int, value: int) -> None:
        """Bit 0 rising resets the processor."""
        rising = value & ~self._cell.value & FAST_RESET
        self._cell.value = value & (A20_GATE | FAST_RESET)
        if rising:
            self._reset()
