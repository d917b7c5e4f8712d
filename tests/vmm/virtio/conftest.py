"""A bench for one device: guest memory, an event loop, and a driver in Python on either transport."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vmonty.testing.virtio import Interrupts, MmioAccess, PciAccess, VirtioDriver
from vmonty.vmm.bus import Bus
from vmonty.vmm.eventloop import EventLoop
from vmonty.vmm.hw.pci import Decoder, PciBus
from vmonty.vmm.memory import GuestMemory
from vmonty.vmm.virtio.device import VirtioDevice
from vmonty.vmm.virtio.mmio import MmioTransport
from vmonty.vmm.virtio.pci import VirtioPci


class Bench:
    """Makes drivers for devices; devices are built with ``memory`` and ``loop``."""

    def __init__(self, transport: str) -> None:
        self.transport = transport
        self.sent: list[tuple[int, int]] = []
        self.memory = GuestMemory(16 << 20)
        self.loop = EventLoop("I/O under test")
        self.loop.start()
        self.interrupts = Interrupts()
        self._devices: list[VirtioDevice] = []

    def driver(self, device: VirtioDevice) -> VirtioDriver:
        """A driver of *device*, not started yet."""
        self._devices.append(device)
        if self.transport == "mmio":
            mmio = MmioTransport(device, self.interrupts.line)
            return VirtioDriver(self.memory, MmioAccess(mmio), self.interrupts)
        function = VirtioPci(device)
        bus = PciBus(
            "pci.0",
            Decoder(Bus("ports", 1 << 16), Bus("memory", 1 << 40)),
            lambda slot, pin, level: self.interrupts.line(level),
            lambda address, data: self.messages(address, data),
        )
        bus.add(function, 3)
        return VirtioDriver(self.memory, PciAccess(function), self.interrupts)

    def messages(self, address: int, data: int) -> None:
        """An MSI-X message came."""
        self.sent.append((address, data))
        self.interrupts.raised()

    def settle(self) -> None:
        """Return when the loop has done what was asked of it before."""
        self.loop.run(lambda: None)

    def close(self) -> None:
        for device in self._devices:
            self.loop.run(device.close)
        self.loop.stop()


@pytest.fixture
def transport() -> str:
    """Which transport the bench has; a module that tests one overrides this."""
    return "mmio"


@pytest.fixture
def bench(transport: str) -> Iterator[Bench]:
    made = Bench(transport)
    yield made
    made.close()
