"""The interrupt router of a south bridge: PCI's pins to PIRQ lines, and those to ISA interrupts by registers.

Source: 82371SB (PIIX3) data sheet, "PIRQx# Route Control"; ICH9 data sheet, "PIRQ[n]_ROUT".
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

ROUTE_DISABLED = 0x80
# Of the 16 ISA interrupts, those that a PIRQ can reach; the others belong to the mainboard's own devices.
ROUTABLE = frozenset((3, 4, 5, 6, 7, 9, 10, 11, 12, 14, 15))


class PirqRouter:
    """*count* PIRQ lines. *isa* are the ends of ISA interrupts 0 to 15.

    *direct*, where the chipset has them, are pins of the I/O APIC that the lines reach whatever the routes say.
    """

    def __init__(
        self, count: int, isa: Sequence[Callable[[int], None]], direct: Sequence[Callable[[int], None]] = ()
    ) -> None:
        self._isa = isa
        self._direct = direct
        self._lock = threading.Lock()
        self._routes = [ROUTE_DISABLED] * count
        self._asserted: list[set[tuple[int, int]]] = [set() for _ in range(count)]
        self._levels = [0] * len(isa)

    def set(self, pirq: int, source: tuple[int, int], level: int) -> None:
        """(slot, pin) *source* drives *pirq*. From any thread."""
        with self._lock:
            line = self._asserted[pirq]
            before = bool(line)
            (line.add if level else line.discard)(source)
            if bool(line) == before:
                return
            if self._direct:
                self._direct[pirq](int(bool(line)))
            self._update()

    def route(self, pirq: int, register: int) -> None:
        """A route control register was written."""
        with self._lock:
            self._routes[pirq] = register
            self._update()

    def _update(self) -> None:
        levels = [0] * len(self._isa)
        for route, line in zip(self._routes, self._asserted, strict=True):
            irq = route & 15
            if line and not route & ROUTE_DISABLED and irq in ROUTABLE:
                levels[irq] = 1
        for irq, (old, new) in enumerate(zip(self._levels, levels, strict=True)):
            if old != new:
                self._isa[irq](new)
        self._levels = levels
