"""Entropy device. Source: virtio 1.2, 5.4 "Entropy Device"."""

from __future__ import annotations

import os

from vmonty.vmm.eventloop import EventLoop
from vmonty.vmm.memory import GuestMemory
from vmonty.vmm.virtio.device import VirtioDevice
from vmonty.vmm.virtio.queue import Chain, Queue

# What one buffer gets at most; "one or more random bytes" is all that the specification asks for.
MOST_BYTES = 64 << 10


class Rng(VirtioDevice):
    """Fills the driver's buffers from the host's random number generator."""

    device_id, name = 4, "virtio-rng"

    def __init__(self, memory: GuestMemory, loop: EventLoop) -> None:
        super().__init__(memory, loop, (64,))

    def handle(self, queue: Queue) -> None:
        """Fill what is there."""
        self.serve(queue, self._fill)

    @staticmethod
    def _fill(chain: Chain) -> int:
        return chain.put(os.urandom(min(chain.writable_size, MOST_BYTES)))
