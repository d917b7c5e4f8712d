"""A bench for one device: guest memory, an event loop, and a driver in Python on either transport."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from vmonty.testing.virtio import Interrupts, MmioAccess, VirtioDriver
from vmonty.vmm.eventloop import EventLoop
from vmonty.vmm.memory import GuestMemory
from vmonty.vmm.virtio.device import VirtioDevice
from vmonty.vmm.virtio.mmio import MmioTransport


class Bench:
    """Makes drivers for devices; devices are built with ``memory`` and ``loop``."""

    def __init__(self) -> None:
        self.memory = GuestMemory(16 << 20)
        self.loop = EventLoop("I/O under test")
        self.loop.start()
        self.interrupts = Interrupts()
        self._devices: list[VirtioDevice] = []

    def driver(self, device: VirtioDevice, attach: Callable[..., VirtioDriver] | None = None) -> VirtioDriver:
        """A driver of *device*, not started yet."""
        self._devices.append(device)
        transport = MmioTransport(device, self.interrupts.line)
        return VirtioDriver(self.memory, MmioAccess(transport), self.interrupts)

    def settle(self) -> None:
        """Return when the loop has done what was asked of it before."""
        self.loop.run(lambda: None)

    def close(self) -> None:
        for device in self._devices:
            self.loop.run(device.close)
        self.loop.stop()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()
