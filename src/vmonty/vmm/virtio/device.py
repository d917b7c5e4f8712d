"""What all virtio devices share: status, feature negotiation, configuration space, queues.

A device never knows its transport; a transport never knows what device it carries.
Source: virtio 1.2, 2 "Basic Facilities of a Virtio Device", 3 "General Initialization And Device Operation".
"""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

from vmonty.vmm.eventloop import EventLoop
from vmonty.vmm.memory import GuestMemory
from vmonty.vmm.virtio.queue import FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, BrokenRing, Chain, Queue

# 2.1 "Device Status Field".
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128

# 6 "Reserved Feature Bits".
FEATURE_VERSION_1 = 1 << 32
EVERY_DEVICE = FEATURE_VERSION_1 | FEATURE_INDIRECT_DESC | FEATURE_EVENT_IDX

# After so many buffers of one queue the others have their turn.
MOST_AT_ONCE = 1024
# And after so many a vCPU goes on, which does them in its loop's place.
MOST_FOR_VCPU = 64
# So many nanoseconds of a batch may pass before the driver is told of what is done: it goes on while the rest is.
UNTOLD_NS = 60_000


class Transport(Protocol):
    """How a device reaches its driver. Both may be called from any thread."""

    def interrupt_queue(self, index: int) -> None:
        """Tell the driver that queue *index* has used buffers."""
        ...

    def interrupt_config(self) -> None:
        """Tell the driver that the configuration or the status changed."""
        ...


class _Unplugged:
    def interrupt_queue(self, index: int) -> None:
        """Nobody listens."""

    def interrupt_config(self) -> None:
        """Nobody listens."""


class VirtioDevice(ABC):
    """Base of all devices. A subclass gives ``device_id`` and ``name``, and overrides ``handle`` at least.

    *features* are those that it offers beside EVERY_DEVICE, *config* its configuration space, *queue_sizes* the
    largest size of each queue. Everything is called on *loop*'s thread, but ``read_config``, which any may call.
    """

    device_id: ClassVar[int]
    name: ClassVar[str]
    pci_class: ClassVar[int] = 0x00FF00  # base class, subclass, interface, for the PCI transport

    def __init__(
        self,
        memory: GuestMemory,
        loop: EventLoop,
        queue_sizes: Sequence[int],
        features: int = 0,
        config: bytes = b"",
    ) -> None:
        self.memory = memory
        self.loop = loop
        self.features = features | EVERY_DEVICE
        self.driver_features = 0
        self.config = bytearray(config)
        self.config_generation = 0
        self.status = 0
        self.failure: str | None = None  # why NEEDS_RESET is set
        self.queues = [Queue(memory, index, size) for index, size in enumerate(queue_sizes)]
        self._coming_back: set[int] = set()
        self.transport: Transport = _Unplugged()

    # ---- what a device overrides -----------------------------------------------------------------------

    @abstractmethod
    def handle(self, queue: Queue) -> None:
        """The driver may have made buffers of *queue* available. BrokenRing that it raises breaks the device."""

    def quick(self) -> bool:
        """Whether a notification is answered sooner than *loop*'s thread would wake up. From any thread."""
        return False

    def accepts(self, features: int) -> bool:
        """Whether this set of features, all of them offered, makes sense together."""
        return True

    def started(self) -> None:
        """The driver is ready (DRIVER_OK); ``driver_features`` are settled."""

    def stopped(self) -> None:
        """A reset begins, or a queue is taken away: end what is in flight, forget chains that are kept."""

    def config_written(self, offset: int, size: int, value: int) -> None:
        """The driver wrote configuration space. By default nothing there can be written."""

    def close(self) -> None:
        """The machine ends: stop, and give up what the device holds."""
        self.stopped()

    # ---- what a device uses ----------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether the driver is ready and the device not broken."""
        return self.status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK

    def has(self, feature: int) -> bool:
        """Whether *feature* (a bit mask) was negotiated."""
        return self.driver_features & feature == feature

    def serve(self, queue: Queue, handle: Callable[[Chain], int | None]) -> None:
        """Hand each available buffer to *handle*, which returns the number of bytes it wrote: then it is used.

        With None the device keeps it, and pushes it later. The driver is told at the end; and, if this is not its own
        vCPU's time, before that when it has waited for a while.
        """
        budget = MOST_FOR_VCPU if self.loop.lent else MOST_AT_ONCE
        due = sys.maxsize if self.loop.lent else time.perf_counter_ns() + UNTOLD_NS
        while budget:
            queue.suppress_notifications()
            while budget and (chain := queue.pop()) is not None:
                budget -= 1
                written = handle(chain)
                if written is not None:
                    queue.push(chain, written)
                    if (now := time.perf_counter_ns()) > due:
                        self.signal(queue)
                        due = now + UNTOLD_NS
            if budget and queue.wait_for_more():
                break
        else:
            self._come_back(queue.index)
        self.signal(queue)

    def _come_back(self, index: int) -> None:
        """Others on the loop first; once, however often the driver has notified meanwhile."""
        if index not in self._coming_back:
            self._coming_back.add(index)
            self.loop.call_soon(lambda: self._come(index))

    def _come(self, index: int) -> None:
        self._coming_back.discard(index)
        self.notified(index)

    def signal(self, queue: Queue) -> None:
        """Interrupt for what was pushed to *queue*, if the driver wants that. From any thread."""
        if queue.wants_interrupt() and self.running:
            self.transport.interrupt_queue(queue.index)

    def change_config(self, config: bytes) -> None:
        """Replace configuration space and tell the driver. From any thread."""
        self.config[:] = config
        self.config_generation = self.config_generation + 1 & 0xFFFF_FFFF
        if self.status & DRIVER_OK:
            self.transport.interrupt_config()

    def fail(self, reason: str) -> None:
        """The driver broke the protocol: do nothing more until it resets the device (2.1.2)."""
        self.failure = reason
        self.status |= NEEDS_RESET
        if self.status & DRIVER_OK:
            self.transport.interrupt_config()

    # ---- what a transport calls ------------------------------------------------------------------------

    def notified(self, index: int) -> None:
        """The driver notified queue *index*; one that there is not is ignored."""
        if self.running and 0 <= index < len(self.queues) and self.queues[index].enabled:
            try:
                self.handle(self.queues[index])
            except BrokenRing as error:
                self.fail(str(error))

    def set_driver_features(self, features: int) -> None:
        """The driver's choice; settled by FEATURES_OK."""
        if not self.status & FEATURES_OK:
            self.driver_features = features

    def set_status(self, value: int) -> None:
        """The driver wrote the status: 0 resets, other values can only set bits (2.1.1)."""
        if value == 0:
            self.reset()
            return
        added = value & ~self.status & (ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED)
        if added & FEATURES_OK and not self._settle():
            added &= ~FEATURES_OK
        if added & DRIVER_OK and not (self.status | added) & FEATURES_OK:
            # A driver of the time before version 1, which we offer nothing.
            added &= ~DRIVER_OK
        self.status |= added
        if added & DRIVER_OK and self.running:
            self.started()
            for queue in self.queues:
                self.notified(queue.index)

    def _settle(self) -> bool:
        chosen = self.driver_features
        return not chosen & ~self.features and bool(chosen & FEATURE_VERSION_1) and self.accepts(chosen)

    def enable_queue(self, index: int) -> None:
        """The driver set up queue *index*. Bad rings break the device."""
        try:
            self.queues[index].enable(self.driver_features)
        except BrokenRing as error:
            self.fail(str(error))

    def disable_queue(self, index: int) -> None:
        """The driver takes queue *index* back. What was in flight has ended on return."""
        self.stopped()
        self.queues[index].reset()

    def reset(self) -> None:
        """As after power-on. What was in flight has ended on return."""
        self.status &= ~DRIVER_OK
        self.stopped()
        for queue in self.queues:
            queue.reset()
        self.status = 0
        self.failure = None
        self.driver_features = 0

    def read_config(self, offset: int, size: int) -> int:
        """Configuration space as the driver reads it; zeroes behind its end."""
        return int.from_bytes(self.config[offset : offset + size], "little")
