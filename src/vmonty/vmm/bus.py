"""A bus: address ranges and the devices that answer there."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Protocol

from vmonty.base.errors import UsageError


class BusDevice(Protocol):
    """What a bus needs of a device. *offset* counts from where the board placed it; *size* is 1, 2, 4 or 8 bytes.

    Both are called on the vCPU's thread, several at once when there are several vCPUs.
    """

    def read(self, offset: int, size: int) -> int:
        """The value that the guest reads; bits above *size* bytes are ignored."""
        ...

    def write(self, offset: int, size: int, value: int) -> None:
        """The guest wrote *value*."""
        ...


@dataclass(frozen=True, order=True)
class Range:
    """Where a device stands: *size* addresses from *base*."""

    base: int
    size: int
    name: str

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.base + self.size


class Bus:
    """Ports or memory-mapped I/O. Nobody home: reads give all ones, writes vanish, as on a PC."""

    def __init__(self, name: str, limit: int) -> None:
        self.name = name
        self.limit = limit
        self._ranges: list[Range] = []
        self._bases: list[int] = []
        self._devices: dict[Range, BusDevice] = {}

    def place(self, base: int, size: int, device: BusDevice, name: str) -> Range:
        """Let *device* answer at *size* addresses from *base*. Raises UsageError on an overlap or outside the bus."""
        added = Range(base, size, name)
        if base < 0 or size <= 0 or added.end > self.limit:
            raise UsageError(f"{name} at {base:#x}, size {size:#x}, is outside {self.name}")
        at = bisect_right(self._bases, base)
        for neighbour in self._ranges[max(at - 1, 0) : at + 1]:
            if neighbour.base < added.end and base < neighbour.end:
                raise UsageError(
                    f"{name} at {base:#x}, size {size:#x}, overlaps {neighbour.name} at {neighbour.base:#x}"
                )
        self._ranges.insert(at, added)
        self._bases.insert(at, base)
        self._devices[added] = device
        return added

    def ranges(self) -> list[Range]:
        """Everything that is placed, by address."""
        return list(self._ranges)

    def _find(self, address: int, size: int) -> tuple[BusDevice, int] | None:
        at = bisect_right(self._bases, address) - 1
        if at >= 0 and address + size <= self._ranges[at].end:
            return self._devices[self._ranges[at]], address - self._bases[at]
        return None

    def read(self, address: int, size: int) -> int:
        """What the guest reads at *address*. An access that leaves its device's range finds nobody."""
        if found := self._find(address, size):
            device, offset = found
            return device.read(offset, size) & ((1 << 8 * size) - 1)
        return (1 << 8 * size) - 1

    def write(self, address: int, size: int, value: int) -> None:
        """The guest writes *value* at *address*."""
        if found := self._find(address, size):
            device, offset = found
            device.write(offset, size, value)
