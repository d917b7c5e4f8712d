"""Cables without a host: two backends joined, a hub of many, and one that returns what it gets."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from vmonty.vmm.net.backend import Accepts, NetBackend, Offload, Receive
from vmonty.vmm.net.checksum import Buffer
from vmonty.vmm.net.segment import finish

# Frames that wait for a guest; more are dropped, as a switch does.
MOST_WAITING = 256


class HubPort(NetBackend):
    """A place for one guest's device at a Hub. Made by ``Hub.port()``."""

    offloads = True

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._receive: Receive | None = None
        self._accepts = Accepts.NOTHING
        self._waiting: deque[tuple[Buffer, Offload | None]] = deque()
        self._lock = threading.Lock()

    def start(self, receive: Receive) -> None:
        self._receive = receive

    def guest_accepts(self, accepts: Accepts) -> None:
        self._accepts = accepts

    def send(self, frame: Sequence[Buffer], offload: Offload | None) -> None:
        self._hub.broadcast(self, b"".join(frame), offload)

    def deliver(self, frame: bytes, offload: Offload | None) -> None:
        """Give *frame* to this port's guest, finished as it needs it; dropped when that is impossible."""
        if self._receive is None:
            return
        try:
            pieces = finish(frame, offload, self._accepts)
        except ValueError:
            return  # another guest's nonsense
        with self._lock:
            self._waiting.extend(pieces[: MOST_WAITING - len(self._waiting)])
        self.ready()

    def ready(self) -> None:
        with self._lock:
            while self._waiting and self._receive is not None and self._receive(*self._waiting[0]):
                self._waiting.popleft()

    def close(self) -> None:
        with self._lock:
            self._receive = None
            self._waiting.clear()
        self._hub.remove(self)


class Hub:
    """Sends what one port's guest sends to the guests of all others."""

    def __init__(self) -> None:
        self._ports: list[HubPort] = []
        self._lock = threading.Lock()

    def port(self) -> HubPort:
        """One more place. From any thread."""
        made = HubPort(self)
        with self._lock:
            self._ports.append(made)
        return made

    def remove(self, port: HubPort) -> None:
        """Forget *port*. From any thread."""
        with self._lock:
            if port in self._ports:
                self._ports.remove(port)

    def broadcast(self, source: HubPort | None, frame: bytes, offload: Offload | None) -> None:
        """Give *frame* to all ports but *source*."""
        with self._lock:
            others = [port for port in self._ports if port is not source]
        for port in others:
            port.deliver(frame, offload)


class LoopbackBackend(NetBackend):
    """Returns each frame to the guest that sent it, unfinished as it came; for tests and measurements."""

    offloads = True

    def __init__(self) -> None:
        hub = Hub()
        self._inside, self._outside = hub.port(), hub.port()
        self._inside.guest_accepts(~Accepts.NOTHING)
        self._outside.guest_accepts(~Accepts.NOTHING)

        def back(frame: Buffer, offload: Offload | None) -> bool:
            self._outside.send((frame,), offload)
            return True

        self._outside.start(back)

    def start(self, receive: Receive) -> None:
        self._inside.start(receive)

    def guest_accepts(self, accepts: Accepts) -> None:
        self._inside.guest_accepts(accepts)

    def send(self, frame: Sequence[Buffer], offload: Offload | None) -> None:
        self._inside.send(frame, offload)

    def ready(self) -> None:
        self._inside.ready()

    def close(self) -> None:
        self._inside.close()
        self._outside.close()
