"""The in-kernel I/O buses: devices at ranges of ports or guest-physical addresses.

As virt/kvm's kvm_io_bus: an access reaches the devices whose range contains all of it, in the order of their
registration, until one takes it; several may lie on one range (ioeventfds with different data). A range of length
0 is a wildcard: it is reached by accesses of any size that start at its address. What nobody takes goes to user
space. Values are little-endian integers of the access's size.

Accesses of one size at one address repeat, so their candidates are remembered; registration forgets them. The
registry is read without a lock: it is replaced as a whole, never changed in place.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

from vmonty.base.record import Record, made

__all__ = ["NR_IOBUS_DEVS", "IoDevice", "KvmIoBus", "KvmIoBuses"]

# How many devices fit on a bus; ioeventfds have limits of their own (open files) and don't count.
NR_IOBUS_DEVS = 1000
# A guest chooses addresses and sizes: bound what is remembered.
_MOST_REMEMBERED = 4096


class IoDevice(Protocol):
    """What can be registered on a bus. Handlers must take any size and value that a guest may use."""

    def read(self, address: int, size: int) -> int | None:
        """The value at *address*, or None: not mine."""
        ...

    def write(self, address: int, size: int, value: int) -> bool:
        """Take *value*, or return False: not mine."""
        ...


class _Range(NamedTuple):
    start: int
    length: int
    device: IoDevice
    counted: bool

    def contains(self, address: int, size: int) -> bool:
        if self.length == 0:
            return address == self.start
        return self.start <= address and address + size <= self.start + self.length


class KvmIoBus:
    """One bus: ports, or guest-physical addresses."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Told of each range before it is there, and that one is there.
        self.registering: Callable[[int, int], None] | None = None
        self.registered: Callable[[], None] | None = None
        self._ranges: tuple[_Range, ...] = ()
        self._remembered: dict[tuple[int, int], tuple[IoDevice, ...]] = {}

    def register(self, address: int, length: int, device: IoDevice, counted: bool = True, starts: int = 0) -> None:
        """Put *device* at *length* bytes from *address* (0: a wildcard). Raises OSError with ENOSPC when full.

        *starts*: what it takes begins at one of so many addresses, 0 for any.
        """
        with self._lock:
            if counted and sum(entry.counted for entry in self._ranges) >= NR_IOBUS_DEVS:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self.registering is not None:
                self.registering(address, starts or length)
            self._ranges = (*self._ranges, _Range(address, length, device, counted))
            self._remembered = {}
            if self.registered is not None:
                self.registered()

    def unregister(self, device: IoDevice) -> None:
        """Take *device* off all its ranges; nothing happens if it has none."""
        with self._lock:
            self._ranges = tuple(entry for entry in self._ranges if entry.device is not device)
            self._remembered = {}

    def candidates(self, address: int, size: int) -> tuple[IoDevice, ...]:
        """The devices that an access of *size* bytes at *address* would be offered to, in order."""
        remembered = self._remembered
        found = remembered.get((address, size))
        if found is None:
            found = tuple(entry.device for entry in self._ranges if entry.contains(address, size))
            if len(remembered) >= _MOST_REMEMBERED:
                remembered.clear()
            # If the registry has changed meanwhile, this dictionary is no longer the bus's.
            remembered[address, size] = found
        return found

    def is_empty(self, first: int, size: int) -> bool:
        """Whether no device has anything of the *size* addresses from *first*."""
        return not any(
            entry.start < first + size and first < entry.start + max(entry.length, 1) for entry in self._ranges
        )

    def read(self, address: int, size: int) -> int | None:
        """What the first device that answers says, or None: nobody did, user space must."""
        for device in self.candidates(address, size):
            value = device.read(address, size)
            if value is not None:
                return value & ((1 << (8 * size)) - 1)
        return None

    def write(self, address: int, size: int, value: int) -> bool:
        """Offer *value* to the devices; whether one took it."""
        return any(device.write(address, size, value) for device in self.candidates(address, size))


class KvmIoBuses(Record):
    """The buses of a VM. Wildcard ioeventfds are on ``fast_mmio`` too, where no data is needed to find them."""

    pio: KvmIoBus = made(factory=KvmIoBus)
    mmio: KvmIoBus = made(factory=KvmIoBus)
    fast_mmio: KvmIoBus = made(factory=KvmIoBus)
