"""Address decoding: windows of devices that the guest switches on, off and moves while it runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import Enum
from typing import Protocol

from vmonty.base.errors import UsageError
from vmonty.base.record import Record
from vmonty.vmm.bus import Bus, BusDevice, Range


class Space(Enum):
    """Which address space a window lies in."""

    IO = "io"
    MEMORY = "memory"


class Window(Record):
    """*size* addresses at which *device* answers, once the guest gave them a base.

    ``moved`` is told each base that takes effect, None when the window no longer decodes; on the thread of the vCPU
    that caused it.
    """

    name: str
    space: Space
    size: int
    device: BusDevice
    moved: Callable[[int | None], None] | None = None
    base: int | None = None  # what the guest wants; None: decodes nothing
    placed: Range | None = None


class Decoding(Protocol):
    """Where windows go: the machine's buses, or a bridge on the way to them."""

    def move(self, window: Window, base: int | None) -> None:
        """Let *window* decode from *base* on; None switches it off."""
        ...


class Decoder:
    """Puts windows onto the port and memory buses of a machine.

    A guest may write any address into a base register. A window that would lie over another device, or outside the
    bus, answers nowhere until its place is free: the first one there wins, as nothing else could be said of two
    devices that drive one bus.
    """

    def __init__(self, ports: Bus, mmio: Bus) -> None:
        self._buses = {Space.IO: ports, Space.MEMORY: mmio}
        self._waiting: list[Window] = []
        self._lock = threading.RLock()

    def move(self, window: Window, base: int | None) -> None:
        """Let *window* decode from *base* on; None switches it off."""
        with self._lock:
            if window.base == base:
                return
            window.base = base
            if window in self._waiting:
                self._waiting.remove(window)
            freed = window.placed is not None
            if window.placed is not None:
                self._buses[window.space].remove(window.placed)
                window.placed = None
                self._tell(window, None)
            if base is not None:
                self._waiting.append(window)
            if freed or base is not None:
                self._waiting = [waiting for waiting in self._waiting if not self._place(waiting)]

    def _place(self, window: Window) -> bool:
        assert window.base is not None
        try:
            window.placed = self._buses[window.space].place(window.base, window.size, window.device, window.name)
        except UsageError:
            return False
        self._tell(window, window.base)
        return True

    @staticmethod
    def _tell(window: Window, base: int | None) -> None:
        if window.moved is not None:
            window.moved(base)
