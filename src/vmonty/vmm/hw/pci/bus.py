"""A PCI bus: slots, and the way to their configuration spaces."""

from __future__ import annotations

import threading
from collections.abc import Callable

from vmonty.base.errors import UsageError
from vmonty.vmm.hw.pci.decode import Decoding
from vmonty.vmm.hw.pci.device import PciDevice, Slot

SLOTS, FUNCTIONS = 32, 8


class PciBus:
    """32 slots of 8 functions.

    *intx* is called with (slot, pin, level) when a pin of a slot changes, which all functions of the slot share;
    *send_msi* with (address, data).
    """

    def __init__(
        self, name: str, decoder: Decoding, intx: Callable[[int, int, int], None], send_msi: Callable[[int, int], None]
    ) -> None:
        self.name = name
        self.decoder = decoder
        self._intx = intx
        self._send_msi = send_msi
        self._functions: dict[tuple[int, int], PciDevice] = {}
        # Guests serialise configuration accesses; a hostile one that does not must find whole registers.
        self.lock = threading.RLock()
        self._pin_lock = threading.Lock()
        self._pins: dict[tuple[int, int], set[tuple[int, int]]] = {}

    def add(self, device: PciDevice, slot: int | None = None, function: int = 0) -> int:
        """Plug *device* into *slot*, or the first free one; returns the slot. Raises UsageError when it is taken."""
        with self.lock:
            if slot is None:
                slot = next((free for free in range(1, SLOTS) if not self.slot_used(free)), SLOTS)
                if slot == SLOTS:
                    raise UsageError(f"{self.name} has no free slot for {device.name}")
            if not 0 <= slot < SLOTS or not 0 <= function < FUNCTIONS:
                raise UsageError(f"{device.name}: there is no slot {slot:#x}.{function:x} on {self.name}")
            if other := self._functions.get((slot, function)):
                raise UsageError(f"{device.name}: slot {slot:#x}.{function:x} of {self.name} holds {other.name}")
            self._functions[slot, function] = device
            where = slot

            def intx(pin: int, level: int) -> None:
                self._drive(where, pin, (function, -1), level)

            def forward(pin: int, source: int, level: int) -> None:
                self._drive(where, pin, (function, source), level)

            device.attach(Slot(self.decoder, intx, forward, self._send_msi))
            return slot

    def _drive(self, slot: int, pin: int, source: tuple[int, int], level: int) -> None:
        with self._pin_lock:
            raised = self._pins.setdefault((slot, pin), set())
            before = bool(raised)
            (raised.add if level else raised.discard)(source)
            if bool(raised) != before:
                self._intx(slot, pin, int(bool(raised)))

    def remove(self, device: PciDevice) -> None:
        """Unplug *device*. Raises UsageError when it is not here."""
        with self.lock:
            for place, other in self._functions.items():
                if other is device:
                    del self._functions[place]
                    device.detach()
                    return
        raise UsageError(f"{device.name} is not on {self.name}")

    def slot_used(self, slot: int) -> bool:
        """Is there any function in *slot*?"""
        return any(place == slot for place, _ in self._functions)

    def devices(self) -> dict[tuple[int, int], PciDevice]:
        """(slot, function) → device, in order."""
        return dict(sorted(self._functions.items()))

    def find(self, bus: int, slot: int, function: int) -> PciDevice | None:
        """The function at a configuration address; this bus is number 0 there."""
        with self.lock:
            if bus == 0:
                return self._functions.get((slot, function))
            for device in self._functions.values():
                if found := device.behind(bus, slot, function):
                    return found
            return None

    def config_read(self, bus: int, slot: int, function: int, offset: int, size: int) -> int:
        """A guest's read: all ones where nobody is."""
        with self.lock:
            device = self.find(bus, slot, function)
            return (1 << 8 * size) - 1 if device is None else device.config_read(offset, size)

    def config_write(self, bus: int, slot: int, function: int, offset: int, size: int, value: int) -> None:
        """A guest's write: it vanishes where nobody is."""
        with self.lock:
            if (device := self.find(bus, slot, function)) is not None:
                device.config_write(offset, size, value)
