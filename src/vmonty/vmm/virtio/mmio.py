"""The memory-mapped transport, version 2. Source: virtio 1.2, 4.2 "Virtio Over MMIO"."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from vmonty.kvm.api import Vm
from vmonty.vmm.eventfds import Doorbell
from vmonty.vmm.virtio.device import FEATURES_OK, VirtioDevice
from vmonty.vmm.virtio.queue import Queue

SIZE = 0x200


class Register:
    """4.2.2 "MMIO Device Register Layout"; 64-bit ones are two."""

    MAGIC_VALUE, VERSION, DEVICE_ID, VENDOR_ID = 0x00, 0x04, 0x08, 0x0C
    DEVICE_FEATURES, DEVICE_FEATURES_SEL, DRIVER_FEATURES, DRIVER_FEATURES_SEL = 0x10, 0x14, 0x20, 0x24
    QUEUE_SEL, QUEUE_NUM_MAX, QUEUE_NUM, QUEUE_READY, QUEUE_NOTIFY = 0x30, 0x34, 0x38, 0x44, 0x50
    INTERRUPT_STATUS, INTERRUPT_ACK, STATUS = 0x60, 0x64, 0x70
    QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE = 0x80, 0x90, 0xA0
    SHM_LEN, SHM_LEN_HIGH, SHM_BASE, SHM_BASE_HIGH = 0xB0, 0xB4, 0xB8, 0xBC
    CONFIG_GENERATION, CONFIG = 0xFC, 0x100


MAGIC = 0x74726976  # "virt"
VENDOR = 0x59544D56  # "VMTY"
USED_BUFFER, CONFIG_CHANGE = 1, 2
NO_REGION = 0xFFFF_FFFF_FFFF_FFFF
_ADDRESSES = {
    Register.QUEUE_DESC: "descriptors", Register.QUEUE_DESC + 4: "descriptors",
    Register.QUEUE_DRIVER: "driver", Register.QUEUE_DRIVER + 4: "driver",
    Register.QUEUE_DEVICE: "device", Register.QUEUE_DEVICE + 4: "device",
}  # fmt: skip


class MmioTransport:
    """A BusDevice of SIZE bytes that carries *device*.

    *irq* is called with 1 at each new interrupt and with 0 when the driver has acknowledged all: a line of either
    trigger mode will do. A notification may also come past the bus, by ``notify``.
    """

    def __init__(self, device: VirtioDevice, irq: Callable[[int], None]) -> None:
        self.device = device
        self._irq = irq
        self._lock = threading.Lock()
        self._pending = 0
        self._feature_word = self._driver_word = self._selected = 0
        self._doorbells: list[Doorbell] = []
        device.transport = self

    def connect(self, vm: Vm, base: int) -> None:
        """The board placed this at *base* of *vm*'s memory space: take notifications by ioeventfd, off the vCPU."""
        for queue in self.device.queues:
            bell = Doorbell(vm, self.device.loop, partial(self.device.notified, queue.index), self.device.quick)
            self._doorbells.append(bell)
            bell.hang(base + Register.QUEUE_NOTIFY, 4, datamatch=queue.index)

    def close(self) -> None:
        """Take no notifications any more."""
        for bell in self._doorbells:
            bell.close()
        self._doorbells.clear()

    # ---- the device's side -----------------------------------------------------------------------------

    def interrupt_queue(self, index: int) -> None:
        """Raise the line for used buffers."""
        self._interrupt(USED_BUFFER)

    def interrupt_config(self) -> None:
        """Raise the line for a change of the configuration."""
        self._interrupt(CONFIG_CHANGE)

    def _interrupt(self, cause: int) -> None:
        with self._lock:
            self._pending |= cause
            self._irq(1)

    def notify(self, index: int) -> None:
        """The driver notified queue *index*. From any thread."""
        self.device.loop.call_soon(lambda: self.device.notified(index))

    # ---- the driver's side -----------------------------------------------------------------------------

    def _queue(self) -> Queue | None:
        queues = self.device.queues
        return queues[self._selected] if self._selected < len(queues) else None

    def read(self, offset: int, size: int) -> int:
        """A register, which must be read as 4 bytes (others read as 0), or bytes of configuration space."""
        if offset >= Register.CONFIG:
            return self.device.read_config(offset - Register.CONFIG, size)
        return self._read(offset) if size == 4 else 0

    def _read(self, offset: int) -> int:
        device = self.device
        match offset:
            case Register.INTERRUPT_STATUS:
                return self._pending
            case Register.MAGIC_VALUE:
                return MAGIC
            case Register.VERSION:
                return 2
            case Register.DEVICE_ID:
                return device.device_id
            case Register.VENDOR_ID:
                return VENDOR
            case Register.DEVICE_FEATURES:
                return device.features >> 32 * self._feature_word & 0xFFFF_FFFF if self._feature_word < 2 else 0
            case Register.QUEUE_NUM_MAX:
                return queue.max_size if (queue := self._queue()) else 0
            case Register.QUEUE_READY:
                return int(queue.enabled) if (queue := self._queue()) else 0
            case Register.STATUS:
                return device.status
            case Register.SHM_LEN | Register.SHM_BASE:
                return NO_REGION & 0xFFFF_FFFF
            case Register.SHM_LEN_HIGH | Register.SHM_BASE_HIGH:
                return NO_REGION >> 32
            case Register.CONFIG_GENERATION:
                return device.config_generation
            case _:
                return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """A register, 4 bytes (others are ignored), or bytes of configuration space."""
        device = self.device
        if offset >= Register.CONFIG:
            device.loop.run(lambda: device.config_written(offset - Register.CONFIG, size, value))
        elif size != 4:
            return
        elif offset == Register.QUEUE_NOTIFY:
            self.notify(value)
        elif offset == Register.INTERRUPT_ACK:
            self._acknowledge(value)
        elif offset == Register.STATUS:
            device.loop.run(lambda: self._set_status(value))
        elif offset == Register.DEVICE_FEATURES_SEL:
            self._feature_word = value
        elif offset == Register.DRIVER_FEATURES_SEL:
            self._driver_word = value
        elif offset == Register.DRIVER_FEATURES and self._driver_word < 2:
            shift = 32 * self._driver_word
            device.set_driver_features(device.driver_features & ~(0xFFFF_FFFF << shift) | value << shift)
        elif offset == Register.QUEUE_SEL:
            self._selected = value
        elif (queue := self._queue()) is not None:
            self._set_up(queue, offset, value)

    def _set_up(self, queue: Queue, offset: int, value: int) -> None:
        if offset == Register.QUEUE_READY:
            if not value & 1:
                # 4.2.3.2: a driver stops a queue so before it sets it up again.
                self.device.loop.run(lambda: self.device.disable_queue(queue.index))
            elif self.device.status & FEATURES_OK and not queue.enabled:
                self.device.loop.run(lambda: self.device.enable_queue(queue.index))
        elif queue.enabled:
            return
        elif offset == Register.QUEUE_NUM:
            queue.size = value & 0xFFFF
        elif name := _ADDRESSES.get(offset):
            shift = 8 * (offset & 4)
            setattr(queue, name, getattr(queue, name) & ~(0xFFFF_FFFF << shift) | value << shift)

    def _acknowledge(self, value: int) -> None:
        with self._lock:
            self._pending &= ~value
            if not self._pending:
                self._irq(0)

    def _set_status(self, value: int) -> None:
        self.device.set_status(value)
        if value == 0:
            self._acknowledge(USED_BUFFER | CONFIG_CHANGE)
            self._feature_word = self._driver_word = self._selected = 0
