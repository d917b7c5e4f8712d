"""Events between a guest and an event loop, past the vCPUs' threads: ioeventfd in, irqfd out.

Source: Documentation/virt/kvm/api.rst, KVM_IOEVENTFD, KVM_IRQFD.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from vmonty.base.errors import HandleClosed
from vmonty.kvm.api import Vm
from vmonty.vmm.eventloop import EventLoop


class Doorbell:
    """Calls *rung* on *loop*'s thread when the guest writes where the doorbell ``hangs``; no vCPU waits for it.

    Writes in quick succession may be one call. While *quick* says that the call takes no longer than waking the loop,
    and the loop has nothing to do, the vCPU's thread makes it in the loop's place, where KVM is in this process.
    """

    def __init__(self, vm: Vm, loop: EventLoop, rung: Callable[[], None], quick: Callable[[], bool]) -> None:
        self._vm = vm
        self._loop = loop
        self._rung = rung
        self._quick = quick
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._place: tuple[int, int, int | None, bool] | None = None
        loop.watch(self._fd, self._ready)

    def _ready(self) -> None:
        # Empty: another reader was first, or the doorbell is closed.
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)
            self._rung()

    def _at_once(self) -> bool:
        return self._quick() and self._loop.borrow(self._rung)

    def hang(self, address: int, size: int, datamatch: int | None = None, pio: bool = False) -> None:
        """Answer to writes of *size* bytes (0: any) at *address*, with *datamatch* only of that value.

        It leaves its place before. Raises KvmError when another stands there.
        """
        self.take_down()
        self._vm.ioeventfd(self._fd, address, size, datamatch, pio, at_once=self._at_once)
        self._place = (address, size, datamatch, pio)

    def take_down(self) -> None:
        """Answer to nothing."""
        if self._place is not None:
            place, self._place = self._place, None
            with contextlib.suppress(HandleClosed):
                self._vm.ioeventfd(self._fd, *place, deassign=True)

    def close(self) -> None:
        """Take it down and give up the eventfd. A second call does nothing."""
        if self._fd >= 0:
            self.take_down()
            self._loop.unwatch(self._fd)
            fd, self._fd = self._fd, -1
            os.close(fd)


class IrqfdLine:
    """An edge-triggered interrupt line, GSI *gsi* of *vm*: called with 1 it pulses, and 0 means nothing."""

    def __init__(self, vm: Vm, gsi: int) -> None:
        self._vm = vm
        self._gsi = gsi
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            vm.irqfd(self._fd, gsi)
        except BaseException:
            os.close(self._fd)
            raise

    def __call__(self, level: int) -> None:
        """Pulse. From any thread; nothing after ``close``."""
        if level and self._fd >= 0:
            os.eventfd_write(self._fd, 1)

    def close(self) -> None:
        """Give up line and eventfd; the devices that drive it must have stopped. A second call does nothing."""
        if self._fd >= 0:
            with contextlib.suppress(HandleClosed):
                self._vm.irqfd(self._fd, self._gsi, deassign=True)
            fd, self._fd = self._fd, -1
            os.close(fd)
