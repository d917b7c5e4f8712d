"""The PCI transport, modern only. Source: virtio 1.2, 4.1 "Virtio Over PCI Bus".

BAR 1  MSI-X table and pending bits
BAR 4  0x0000 common configuration · 0x1000 ISR · 0x2000 device configuration · 0x3000 notifications, 4 bytes a queue
"""

from __future__ import annotations

import struct
import threading
from functools import partial

from vmonty.kvm.api import Vm
from vmonty.vmm.bus import Bus
from vmonty.vmm.eventfds import Doorbell
from vmonty.vmm.hw.pci import PciDevice
from vmonty.vmm.virtio.device import FEATURES_OK, VirtioDevice
from vmonty.vmm.virtio.queue import Queue

# 4.1.2 "PCI Device Discovery".
VENDOR, FIRST_DEVICE, REVISION = 0x1AF4, 0x1040, 1
SUBSYSTEM = 0x1100

# 4.1.4 "Virtio Structure PCI Capabilities".
VENDOR_SPECIFIC = 0x09
COMMON_CFG, NOTIFY_CFG, ISR_CFG, DEVICE_CFG, PCI_CFG = 1, 2, 3, 4, 5
MSIX_BAR, BAR = 1, 4
AREA = 0x1000
COMMON, ISR, DEVICE, NOTIFY, BAR_SIZE = 0, AREA, 2 * AREA, 3 * AREA, 4 * AREA
NOTIFY_MULTIPLIER = 4
NO_VECTOR = 0xFFFF
ISR_QUEUE, ISR_CONFIG = 1, 2

# Offsets in the PCI_CFG capability.
CAP_BAR, CAP_OFFSET, CAP_LENGTH, CAP_DATA = 4, 8, 12, 16


class Register:
    """4.1.4.3 "Common configuration structure layout"."""

    DEVICE_FEATURE_SELECT, DEVICE_FEATURE, DRIVER_FEATURE_SELECT, DRIVER_FEATURE = 0x00, 0x04, 0x08, 0x0C
    CONFIG_MSIX_VECTOR, NUM_QUEUES, DEVICE_STATUS, CONFIG_GENERATION = 0x10, 0x12, 0x14, 0x15
    QUEUE_SELECT, QUEUE_SIZE, QUEUE_MSIX_VECTOR, QUEUE_ENABLE, QUEUE_NOTIFY_OFF = 0x16, 0x18, 0x1A, 0x1C, 0x1E
    QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE = 0x20, 0x28, 0x30


_ADDRESSES = {Register.QUEUE_DESC: "descriptors", Register.QUEUE_DRIVER: "driver", Register.QUEUE_DEVICE: "device"}


class VirtioPci(PciDevice):
    """A PCI function that carries *device*. With *vm*, notifications come by ioeventfd, off the vCPUs' threads."""

    removable = True

    def __init__(self, device: VirtioDevice, vm: Vm | None = None) -> None:
        super().__init__(
            device.name, vendor_id=VENDOR, device_id=FIRST_DEVICE + device.device_id, class_code=device.pci_class,
            revision=REVISION, subsystem_vendor_id=VENDOR, subsystem_id=SUBSYSTEM, interrupt_pin=1,
        )  # fmt: skip
        self.device = device
        self._lock = threading.Lock()
        self._isr = 0
        self._feature_word = self._driver_word = self._selected = 0
        self._vectors = [NO_VECTOR] * (len(device.queues) + 1)  # of each queue, then of the configuration
        self._doorbells = [
            Doorbell(vm, device.loop, partial(device.notified, queue.index), device.quick)
            for queue in device.queues
            if vm
        ]
        self._area = Bus(f"{device.name}.bar{BAR}", BAR_SIZE)
        for offset, part, name in (
            (COMMON, _Common(self), "common"), (ISR, _Isr(self), "isr"), (DEVICE, _DeviceConfig(self), "device"),
            (NOTIFY, _Notify(self), "notify"),
        ):  # fmt: skip
            self._area.place(offset, AREA, part, name)
        self.add_msix(len(self._vectors), MSIX_BAR)
        self.add_bar(BAR, self._area, BAR_SIZE, wide=True, prefetchable=True, moved=self._moved)
        for kind, offset in ((COMMON_CFG, COMMON), (ISR_CFG, ISR), (DEVICE_CFG, DEVICE)):
            self._add_structure(kind, offset)
        self._add_structure(NOTIFY_CFG, NOTIFY, struct.pack("<I", NOTIFY_MULTIPLIER))
        writable = bytes((0, 0, 0xFF, 0, 0, 0)) + b"\xff" * 12
        self._window = self._add_structure(PCI_CFG, 0, bytes(4), writable, length=0, bar=0)
        device.transport = self

    def _add_structure(
        self, kind: int, offset: int, more: bytes = b"", writable: bytes = b"", length: int = AREA, bar: int = BAR
    ) -> int:
        body = struct.pack("<BBBBHII", 16 + len(more), kind, bar, 0, 0, offset, length) + more
        return self.add_capability(VENDOR_SPECIFIC, body, writable)

    def close(self) -> None:
        """Take no notifications any more."""
        for bell in self._doorbells:
            bell.close()
        self._doorbells.clear()

    def _moved(self, base: int | None) -> None:
        for index, bell in enumerate(self._doorbells):
            if base is None:
                bell.take_down()
            else:
                bell.hang(base + NOTIFY + NOTIFY_MULTIPLIER * index, 2)

    # ---- the device's side -----------------------------------------------------------------------------

    def interrupt_queue(self, index: int) -> None:
        """Send the queue's message, or raise INTx."""
        self._interrupt(index, ISR_QUEUE)

    def interrupt_config(self) -> None:
        """Send the configuration's message, or raise INTx."""
        self._interrupt(-1, ISR_CONFIG)

    def _interrupt(self, which: int, cause: int) -> None:
        assert self.msix is not None
        if self.msix.enabled:
            if (vector := self._vectors[which]) != NO_VECTOR:
                self.msix.notify(vector)
            return
        with self._lock:
            self._isr |= cause
            self.set_irq(1)

    # ---- the driver's side -----------------------------------------------------------------------------

    def read_isr(self) -> int:
        """4.1.4.5: reading the causes clears them, and INTx."""
        with self._lock:
            isr, self._isr = self._isr, 0
            self.set_irq(0)
        return isr

    def notify(self, index: int) -> None:
        """The driver notified queue *index*. From any thread."""
        self.device.loop.call_soon(lambda: self.device.notified(index))

    def _queue(self) -> Queue | None:
        queues = self.device.queues
        return queues[self._selected] if self._selected < len(queues) else None

    def read_common(self, offset: int, size: int) -> int:
        """A field of the common configuration, or a half of a 64-bit one."""
        device = self.device
        match offset:
            case Register.DEVICE_FEATURE_SELECT:
                return self._feature_word
            case Register.DEVICE_FEATURE:
                return device.features >> 32 * self._feature_word & 0xFFFF_FFFF if self._feature_word < 2 else 0
            case Register.DRIVER_FEATURE_SELECT:
                return self._driver_word
            case Register.DRIVER_FEATURE:
                return device.driver_features >> 32 * self._driver_word & 0xFFFF_FFFF if self._driver_word < 2 else 0
            case Register.CONFIG_MSIX_VECTOR:
                return self._vectors[-1]
            case Register.NUM_QUEUES:
                return len(device.queues)
            case Register.DEVICE_STATUS:
                return device.status
            case Register.CONFIG_GENERATION:
                return device.config_generation & 0xFF
            case Register.QUEUE_SELECT:
                return self._selected
        queue = self._queue()
        return 0 if queue is None else self._read_queue(queue, offset)

    def _read_queue(self, queue: Queue, offset: int) -> int:
        match offset:
            case Register.QUEUE_SIZE:
                return queue.size
            case Register.QUEUE_MSIX_VECTOR:
                return self._vectors[queue.index]
            case Register.QUEUE_ENABLE:
                return int(queue.enabled)
            case Register.QUEUE_NOTIFY_OFF:
                return queue.index
        if name := _ADDRESSES.get(offset & ~4):
            address: int = getattr(queue, name)
            return address >> 8 * (offset & 4)
        return 0

    def write_common(self, offset: int, size: int, value: int) -> None:
        """A field of the common configuration, or a half of a 64-bit one."""
        device = self.device
        match offset:
            case Register.DEVICE_FEATURE_SELECT:
                self._feature_word = value
            case Register.DRIVER_FEATURE_SELECT:
                self._driver_word = value
            case Register.DRIVER_FEATURE if self._driver_word < 2:
                shift = 32 * self._driver_word
                low = value & 0xFFFF_FFFF
                device.set_driver_features(device.driver_features & ~(0xFFFF_FFFF << shift) | low << shift)
            case Register.CONFIG_MSIX_VECTOR:
                self._vectors[-1] = self._vector(value)
            case Register.DEVICE_STATUS:
                device.loop.run(lambda: self._set_status(value & 0xFF))
            case Register.QUEUE_SELECT:
                self._selected = value & 0xFFFF
            case _ if (queue := self._queue()) is not None:
                self._write_queue(queue, offset, size, value)

    def _vector(self, value: int) -> int:
        """4.1.5.1.2: a vector that there is not is answered by NO_VECTOR."""
        return value if value < len(self._vectors) else NO_VECTOR

    def _write_queue(self, queue: Queue, offset: int, size: int, value: int) -> None:
        if offset == Register.QUEUE_MSIX_VECTOR:
            self._vectors[queue.index] = self._vector(value)
        elif queue.enabled:
            return
        elif offset == Register.QUEUE_SIZE:
            queue.size = value & 0xFFFF
        elif offset == Register.QUEUE_ENABLE:
            if value & 1 and self.device.status & FEATURES_OK:
                self.device.loop.run(lambda: self.device.enable_queue(queue.index))
        elif name := _ADDRESSES.get(offset & ~4):
            shift, mask = 8 * (offset & 4), (1 << 8 * size) - 1
            address: int = getattr(queue, name)
            setattr(queue, name, (address & ~(mask << shift) | (value & mask) << shift) & (1 << 64) - 1)

    def _set_status(self, value: int) -> None:
        self.device.set_status(value)
        if value == 0:
            self._vectors = [NO_VECTOR] * len(self._vectors)
            self._feature_word = self._driver_word = self._selected = 0
            self.read_isr()

    # ---- the window in configuration space, 4.1.4.9 --------------------------------------------------------

    def _window_target(self) -> tuple[int, int] | None:
        """Offset and length of what the window shows, if that is something."""
        bar = self.config.get(self._window + CAP_BAR, 1)
        offset = self.config.get(self._window + CAP_OFFSET, 4)
        length = self.config.get(self._window + CAP_LENGTH, 4)
        fits = bar == BAR and length in (1, 2, 4) and offset % length == 0
        return (offset, length) if fits else None

    def _in_window(self, offset: int, size: int) -> bool:
        data = self._window + CAP_DATA
        return offset < data + 4 and offset + size > data

    def config_read(self, offset: int, size: int) -> int:
        """A read of the window's data reads what it shows."""
        if self._in_window(offset, size) and (target := self._window_target()):
            self.config.put(self._window + CAP_DATA, 4, self._area.read(*target))
        return super().config_read(offset, size)

    def config_written(self, offset: int, size: int) -> None:
        """A write of the window's data writes what it shows."""
        if self._in_window(offset, size) and (target := self._window_target()):
            at, length = target
            self._area.write(at, length, self.config.get(self._window + CAP_DATA, length))


class _Common:
    def __init__(self, owner: VirtioPci) -> None:
        self.read = owner.read_common
        self.write = owner.write_common


class _Isr:
    def __init__(self, owner: VirtioPci) -> None:
        self._owner = owner

    def read(self, offset: int, size: int) -> int:
        """The causes, at the first byte only."""
        return self._owner.read_isr() if offset == 0 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Read-only."""


class _DeviceConfig:
    def __init__(self, owner: VirtioPci) -> None:
        self._device = owner.device

    def read(self, offset: int, size: int) -> int:
        """Bytes of the device's configuration."""
        return self._device.read_config(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """As read."""
        self._device.loop.run(lambda: self._device.config_written(offset, size, value))


class _Notify:
    def __init__(self, owner: VirtioPci) -> None:
        self._owner = owner

    def read(self, offset: int, size: int) -> int:
        """There is nothing to read."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """A notification that came past the ioeventfd: the place says which queue."""
        self._owner.notify(offset // NOTIFY_MULTIPLIER)
