"""The driver's side of virtio: a guest's driver in Python, that negotiates and writes descriptors as a guest would.

It reaches the device by registers only, and the rings by guest memory only. Source: virtio 1.2, 2.7, 3.1, 4.2.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vmonty.vmm.bus import BusDevice
from vmonty.vmm.hw.pci.config import CAPABILITIES
from vmonty.vmm.memory import GuestMemory
from vmonty.vmm.virtio import device as virtio
from vmonty.vmm.virtio import pci
from vmonty.vmm.virtio.mmio import Register
from vmonty.vmm.virtio.pci import VirtioPci
from vmonty.vmm.virtio.queue import FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC

NEXT, WRITE, INDIRECT = 1, 2, 4

# No wait lasts longer; then the test fails.
LIMIT_S = 30.0


class Interrupts:
    """Counts interrupts; ``wait`` ends when a condition holds that they may have brought about."""

    def __init__(self) -> None:
        self.count = 0
        self._changed = threading.Condition()

    def raised(self) -> None:
        """Called by the transport, from any thread."""
        with self._changed:
            self.count += 1
            self._changed.notify_all()

    def line(self, level: int) -> None:
        """As ``raised``, for an interrupt line."""
        if level:
            self.raised()

    def wait(self, condition: Callable[[], bool]) -> None:
        """Raises AssertionError when it takes too long: then an interrupt was not sent."""
        with self._changed:
            if not self._changed.wait_for(condition, LIMIT_S):
                raise AssertionError("the device never interrupted, or not for what was waited for")


class Access(Protocol):
    """The registers of one transport, as a driver uses them."""

    def features(self) -> int: ...
    def set_features(self, features: int) -> None: ...
    def status(self) -> int: ...
    def set_status(self, status: int) -> None: ...
    def queue_size(self, index: int) -> int: ...
    def set_queue(self, index: int, size: int, descriptors: int, driver: int, device: int) -> None: ...
    def notify(self, index: int) -> None: ...
    def acknowledge(self) -> int: ...
    def config(self, offset: int, size: int) -> int: ...
    def set_config(self, offset: int, size: int, value: int) -> None: ...


class MmioAccess:
    """4.2: the registers of *device*, which is a MmioTransport on some bus."""

    def __init__(self, device: BusDevice) -> None:
        self._device = device

    def _read(self, offset: int) -> int:
        return self._device.read(offset, 4)

    def _write(self, offset: int, value: int) -> None:
        self._device.write(offset, 4, value)

    def features(self) -> int:
        """What the device offers."""
        value = 0
        for word in range(2):
            self._write(Register.DEVICE_FEATURES_SEL, word)
            value |= self._read(Register.DEVICE_FEATURES) << 32 * word
        return value

    def set_features(self, features: int) -> None:
        """What the driver takes."""
        for word in range(2):
            self._write(Register.DRIVER_FEATURES_SEL, word)
            self._write(Register.DRIVER_FEATURES, features >> 32 * word & 0xFFFF_FFFF)

    def status(self) -> int:
        """The device status field."""
        return self._read(Register.STATUS)

    def set_status(self, status: int) -> None:
        """Write the status; 0 resets."""
        self._write(Register.STATUS, status)

    def queue_size(self, index: int) -> int:
        """The largest size of a queue, 0 when there is no such queue."""
        self._write(Register.QUEUE_SEL, index)
        return self._read(Register.QUEUE_NUM_MAX)

    def set_queue(self, index: int, size: int, descriptors: int, driver: int, device: int) -> None:
        """Give a queue its rings and enable it."""
        self._write(Register.QUEUE_SEL, index)
        self._write(Register.QUEUE_NUM, size)
        for register, address in (
            (Register.QUEUE_DESC, descriptors), (Register.QUEUE_DRIVER, driver), (Register.QUEUE_DEVICE, device)
        ):  # fmt: skip
            self._write(register, address & 0xFFFF_FFFF)
            self._write(register + 4, address >> 32)
        self._write(Register.QUEUE_READY, 1)

    def notify(self, index: int) -> None:
        """Say that a queue has new buffers."""
        self._write(Register.QUEUE_NOTIFY, index)

    def acknowledge(self) -> int:
        """Read and clear the causes of interrupts."""
        causes = self._read(Register.INTERRUPT_STATUS)
        self._write(Register.INTERRUPT_ACK, causes)
        return causes

    def config(self, offset: int, size: int) -> int:
        """Read configuration space."""
        return self._device.read(Register.CONFIG + offset, size)

    def set_config(self, offset: int, size: int, value: int) -> None:
        """Write configuration space."""
        self._device.write(Register.CONFIG + offset, size, value)


class PciAccess:
    """4.1: the structures of *function*, found by its capabilities and reached through its BARs."""

    def __init__(self, function: VirtioPci) -> None:
        self._function = function
        self._places: dict[int, tuple[BusDevice, int]] = {}
        bars = {bar.index: bar.window.device for bar in function.bars}
        at = function.config_read(CAPABILITIES, 1)
        while at:
            if function.config_read(at, 1) == pci.VENDOR_SPECIFIC:
                kind, bar = function.config_read(at + 3, 1), function.config_read(at + pci.CAP_BAR, 1)
                if kind != pci.PCI_CFG:
                    self._places[kind] = bars[bar], function.config_read(at + pci.CAP_OFFSET, 4)
                if kind == pci.NOTIFY_CFG:
                    self._multiplier = function.config_read(at + 16, 4)
            at = function.config_read(at + 1, 1)

    def read(self, kind: int, offset: int, size: int) -> int:
        """Read from one of the structures."""
        device, base = self._places[kind]
        return device.read(base + offset, size)

    def write(self, kind: int, offset: int, size: int, value: int) -> None:
        """Write to one of the structures."""
        device, base = self._places[kind]
        device.write(base + offset, size, value)

    def _read(self, offset: int, size: int) -> int:
        return self.read(pci.COMMON_CFG, offset, size)

    def _write(self, offset: int, size: int, value: int) -> None:
        self.write(pci.COMMON_CFG, offset, size, value)

    def features(self) -> int:
        """What the device offers."""
        value = 0
        for word in range(2):
            self._write(pci.Register.DEVICE_FEATURE_SELECT, 4, word)
            value |= self._read(pci.Register.DEVICE_FEATURE, 4) << 32 * word
        return value

    def set_features(self, features: int) -> None:
        """What the driver takes."""
        for word in range(2):
            self._write(pci.Register.DRIVER_FEATURE_SELECT, 4, word)
            self._write(pci.Register.DRIVER_FEATURE, 4, features >> 32 * word & 0xFFFF_FFFF)

    def status(self) -> int:
        """The device status field."""
        return self._read(pci.Register.DEVICE_STATUS, 1)

    def set_status(self, status: int) -> None:
        """Write the status; 0 resets."""
        self._write(pci.Register.DEVICE_STATUS, 1, status)

    def queue_size(self, index: int) -> int:
        """The largest size of a queue, 0 when there is no such queue."""
        self._write(pci.Register.QUEUE_SELECT, 2, index)
        return self._read(pci.Register.QUEUE_SIZE, 2)

    def set_vector(self, index: int | None, vector: int) -> int:
        """Give a queue, or with None the configuration, its MSI-X vector; returns what the device took."""
        if index is None:
            self._write(pci.Register.CONFIG_MSIX_VECTOR, 2, vector)
            return self._read(pci.Register.CONFIG_MSIX_VECTOR, 2)
        self._write(pci.Register.QUEUE_SELECT, 2, index)
        self._write(pci.Register.QUEUE_MSIX_VECTOR, 2, vector)
        return self._read(pci.Register.QUEUE_MSIX_VECTOR, 2)

    def set_queue(self, index: int, size: int, descriptors: int, driver: int, device: int) -> None:
        """Give a queue its rings and enable it."""
        self._write(pci.Register.QUEUE_SELECT, 2, index)
        self._write(pci.Register.QUEUE_SIZE, 2, size)
        for register, address in (
            (pci.Register.QUEUE_DESC, descriptors), (pci.Register.QUEUE_DRIVER, driver),
            (pci.Register.QUEUE_DEVICE, device),
        ):  # fmt: skip
            self._write(register, 4, address & 0xFFFF_FFFF)
            self._write(register + 4, 4, address >> 32)
        self._write(pci.Register.QUEUE_ENABLE, 2, 1)

    def notify(self, index: int) -> None:
        """Say that a queue has new buffers."""
        self._write(pci.Register.QUEUE_SELECT, 2, index)
        place = self._read(pci.Register.QUEUE_NOTIFY_OFF, 2) * self._multiplier
        self.write(pci.NOTIFY_CFG, place, 2, index)

    def acknowledge(self) -> int:
        """Read and clear the causes of interrupts."""
        return self.read(pci.ISR_CFG, 0, 1)

    def config(self, offset: int, size: int) -> int:
        """Read configuration space."""
        return self.read(pci.DEVICE_CFG, offset, size)

    def set_config(self, offset: int, size: int, value: int) -> None:
        """Write configuration space."""
        self.write(pci.DEVICE_CFG, offset, size, value)


@dataclass
class Buffer:
    """What was put into a queue: where the device may write, and once it is used, how much it says that it wrote."""

    head: int
    writable: list[tuple[int, int]]
    written: int | None = None
    memory: GuestMemory | None = field(default=None, repr=False)

    def data(self) -> bytes:
        """The bytes that the device wrote."""
        assert self.written is not None
        assert self.memory is not None
        whole = b"".join(self.memory.read(address, size) for address, size in self.writable)
        return whole[: self.written]


class DriverQueue:
    """One virtqueue, its rings at guest-physical *base*; ``add`` and ``collect`` are the driver's two ends."""

    def __init__(self, driver: VirtioDriver, index: int, size: int, base: int) -> None:
        self._driver = driver
        self._memory = driver.memory
        self.index = index
        self.size = size
        self.descriptors = base
        self.available = base + 16 * size
        self.used = (self.available + 6 + 2 * size + 3) & ~3
        self.end = self.used + 6 + 8 * size
        self.available_index = 0
        self._seen = 0
        self._free = list(range(size - 1, -1, -1))
        self._taken: dict[int, list[int]] = {}
        self._buffers: dict[int, Buffer] = {}
        self._memory.write(base, bytes(self.end - base))

    def add(
        self, readable: Sequence[bytes] = (), writable: Sequence[int] = (), indirect: bool = False, notify: bool = True
    ) -> Buffer:
        """Make a buffer available: copies of *readable* to be read, and room of the sizes *writable*."""
        pieces = []
        for data in readable:
            address = self._driver.allocate(len(data))
            self._memory.write(address, data)
            pieces.append((address, len(data), 0))
        for size in writable:
            address = self._driver.allocate(size)
            self._memory.write(address, b"\xa5" * size)
            pieces.append((address, size, WRITE))
        places = [(address, size) for address, size, flags in pieces if flags]
        if indirect:
            table = b"".join(
                struct.pack("<QIHH", address, size, flags | (NEXT if at + 1 < len(pieces) else 0), at + 1)
                for at, (address, size, flags) in enumerate(pieces)
            )
            address = self._driver.allocate(len(table))
            self._memory.write(address, table)
            pieces = [(address, len(table), INDIRECT)]
        slots = [self._free.pop() for _ in pieces]
        for at, (slot, (address, size, flags)) in enumerate(zip(slots, pieces, strict=True)):
            last = at + 1 == len(slots)
            self.describe(slot, address, size, flags | (0 if last else NEXT), 0 if last else slots[at + 1])
        buffer = Buffer(slots[0], places, memory=self._memory)
        self._taken[slots[0]], self._buffers[slots[0]] = slots, buffer
        self.offer(slots[0])
        if notify:
            self._driver.access.notify(self.index)
        return buffer

    def describe(self, slot: int, address: int, size: int, flags: int = 0, following: int = 0) -> None:
        """Write one descriptor, sound or not."""
        self._memory.write(self.descriptors + 16 * slot, struct.pack("<QIHH", address, size, flags, following))

    def offer(self, head: int) -> None:
        """Put *head* into the available ring and raise its index."""
        self._memory.write(self.available + 4 + 2 * (self.available_index % self.size), struct.pack("<H", head))
        self.set_index(self.available_index + 1)

    def set_index(self, index: int) -> None:
        """Write the available ring's index, sound or not."""
        self.available_index = index & 0xFFFF
        self._memory.write(self.available + 2, struct.pack("<H", self.available_index))

    def used_index(self) -> int:
        """The device's index."""
        return self._word(self.used + 2)

    def _word(self, address: int) -> int:
        return int.from_bytes(self._memory.read(address, 2), "little")

    def collect(self) -> list[Buffer]:
        """The buffers that the device has used since this was last called; asks for an interrupt at the next."""
        found = []
        while self._seen != self.used_index():
            at = self.used + 4 + 8 * (self._seen % self.size)
            head, written = struct.unpack("<II", self._memory.read(at, 8))
            buffer = self._buffers.pop(head)
            buffer.written = written
            self._free += reversed(self._taken.pop(head))
            found.append(buffer)
            self._seen = self._seen + 1 & 0xFFFF
            self._memory.write(self.available + 4 + 2 * self.size, struct.pack("<H", self._seen))
        return found

    def wait(self, count: int = 1) -> list[Buffer]:
        """Wait for interrupts until *count* buffers are used; returns them. Raises AssertionError after LIMIT_S."""
        found: list[Buffer] = []

        def enough() -> bool:
            found.extend(self.collect())
            return len(found) >= count

        self._driver.interrupts.wait(enough)
        return found


class VirtioDriver:
    """A driver of the device behind *access*; it allocates from guest-physical *base* upwards."""

    def __init__(self, memory: GuestMemory, access: Access, interrupts: Interrupts, base: int = 0x1000) -> None:
        self.memory = memory
        self.access = access
        self.interrupts = interrupts
        self.features = 0
        self.queues: list[DriverQueue] = []
        self._base = self._free = base

    def allocate(self, size: int, alignment: int = 16) -> int:
        """Guest-physical memory; it comes back with the next ``start``."""
        at = -(-self._free // alignment) * alignment
        self._free = at + size
        if self._free > self.memory.low_end:
            raise AssertionError("this test needs more guest memory")
        return at

    def start(self, features: int | None = None, size: int = 64, queues: int | None = None) -> VirtioDriver:
        """3.1.1: reset, take *features* (all that are offered, by default), set up the queues, DRIVER_OK."""
        access = self.access
        self._free = self._base
        access.set_status(0)
        access.set_status(virtio.ACKNOWLEDGE)
        access.set_status(virtio.ACKNOWLEDGE | virtio.DRIVER)
        self.features = access.features() if features is None else features | virtio.FEATURE_VERSION_1
        access.set_features(self.features)
        status = virtio.ACKNOWLEDGE | virtio.DRIVER | virtio.FEATURES_OK
        access.set_status(status)
        if not access.status() & virtio.FEATURES_OK:
            raise AssertionError(f"the device refuses features {self.features:#x}")
        self.queues = []
        while (queues is None or len(self.queues) < queues) and (most := access.queue_size(len(self.queues))):
            queue = DriverQueue(self, len(self.queues), min(size, most), self.allocate(0, 4096))
            self._free = queue.end
            access.set_queue(queue.index, queue.size, queue.descriptors, queue.available, queue.used)
            self.queues.append(queue)
        access.set_status(status | virtio.DRIVER_OK)
        return self

    @property
    def indirect(self) -> bool:
        """Were indirect descriptors negotiated?"""
        return bool(self.features & FEATURE_INDIRECT_DESC)

    @property
    def event_idx(self) -> bool:
        """Was the event index negotiated?"""
        return bool(self.features & FEATURE_EVENT_IDX)

    @property
    def broken(self) -> bool:
        """Does the device ask for a reset?"""
        return bool(self.access.status() & virtio.NEEDS_RESET)
