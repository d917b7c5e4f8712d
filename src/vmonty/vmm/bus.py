"""A bus: address ranges and the devices that answer there."""

from __future__ import annotations

import threading
from bisect import bisect_right
from typing import NamedTuple, Protocol

from vmonty.base.errors import UsageError


class BusDevice(Protocol):
    """What a bus needs of a device. *offset* counts from where the board placed it; *size* is 1, 2, 4 or 8 bytes.

    Both are called on the vCPU's thread, several at once when there are several vCPUs. A device of the port space may
    also have ``read_string`` and ``write_string`` (offset, size, data): a REP INS or OUTS as one call.
    """

    def read(self, offset: int, size: int) -> int:
        """The value that the guest reads; bits above *size* bytes are ignored."""
        ...

    def write(self, offset: int, size: int, value: int) -> None:
        """The guest wrote *value*."""
        ...


class Part:
    """The part of *device* that starts at *offset*: for devices whose registers do not stand side by side."""

    def __init__(self, device: BusDevice, offset: int) -> None:
        self._device = device
        self._offset = offset

    def read(self, offset: int, size: int) -> int:
        """As the device's, further on."""
        return self._device.read(self._offset + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """As the device's, further on."""
        self._device.write(self._offset + offset, size, value)


class PlainCell:
    """A port's value where KVM does not hold it: see vmonty.kvm.api.PortCell."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def hide(self) -> None:
        """Every access is an exit anyway."""


class Range(NamedTuple):
    """Where a device stands: *size* addresses from *base*."""

    base: int
    size: int
    name: str

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.base + self.size


class _Map(NamedTuple):
    """All that is placed at one moment, by address. Never changed: a reader needs no lock."""

    bases: tuple[int, ...] = ()
    ranges: tuple[Range, ...] = ()
    devices: tuple[BusDevice, ...] = ()


class Bus:
    """Ports or memory-mapped I/O. Nobody home: reads give all ones, writes vanish, as on a PC.

    Devices may come, go and move while vCPUs run: each access sees the bus before or after, never between.
    """

    def __init__(self, name: str, limit: int) -> None:
        self.name = name
        self.limit = limit
        self._map = _Map()
        self._changing = threading.Lock()

    def place(self, base: int, size: int, device: BusDevice, name: str) -> Range:
        """Let *device* answer at *size* addresses from *base*. Raises UsageError on an overlap or outside the bus."""
        added = Range(base, size, name)
        if base < 0 or size <= 0 or added.end > self.limit:
            raise UsageError(f"{name} at {base:#x}, size {size:#x}, is outside {self.name}")
        with self._changing:
            old = self._map
            at = bisect_right(old.bases, base)
            for neighbour in old.ranges[max(at - 1, 0) : at + 1]:
                if neighbour.base < added.end and base < neighbour.end:
                    raise UsageError(
                        f"{name} at {base:#x}, size {size:#x}, overlaps {neighbour.name} at {neighbour.base:#x}"
                    )
            self._map = _Map(
                (*old.bases[:at], base, *old.bases[at:]),
                (*old.ranges[:at], added, *old.ranges[at:]),
                (*old.devices[:at], device, *old.devices[at:]),
            )
        return added

    def remove(self, placed: Range) -> None:
        """Take away what place() returned as *placed*. Raises UsageError when it is not there.

        A vCPU that found the device a moment ago may still be inside it.
        """
        with self._changing:
            old = self._map
            at = bisect_right(old.bases, placed.base) - 1
            if at < 0 or old.ranges[at] is not placed:
                raise UsageError(f"{placed.name} at {placed.base:#x} is not in {self.name}")
            self._map = _Map(
                old.bases[:at] + old.bases[at + 1 :],
                old.ranges[:at] + old.ranges[at + 1 :],
                old.devices[:at] + old.devices[at + 1 :],
            )

    def ranges(self) -> list[Range]:
        """Everything that is placed, by address."""
        return list(self._map.ranges)

    def find(self, address: int, size: int) -> tuple[BusDevice, int] | None:
        """Who answers an access of *size* bytes at *address*, and at which offset; None where nobody does."""
        current = self._map
        at = bisect_right(current.bases, address) - 1
        if at >= 0 and address + size <= current.ranges[at].end:
            return current.devices[at], address - current.bases[at]
        return None

    def read(self, address: int, size: int) -> int:
        """What the guest reads at *address*. An access that leaves its device's range finds nobody."""
        if found := self.find(address, size):
            device, offset = found
            return device.read(offset, size) & ((1 << 8 * size) - 1)
        return (1 << 8 * size) - 1

    def write(self, address: int, size: int, value: int) -> None:
        """The guest writes *value* at *address*."""
        if found := self.find(address, size):
            device, offset = found
            device.write(offset, size, value)
