"""Fakes of the network: a loop whose clock the test moves, a lossy cable, and a guest made of frames."""

from __future__ import annotations

import heapq
import itertools
import random
import select
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence

from vmonty.vmm.net.backend import Accepts, NetBackend, Offload, Receive
from vmonty.vmm.net.checksum import TCP, UDP, Buffer, checksum, pseudo_header

# How long a test waits for the host before it is called broken.
GENEROUS_SECONDS = 20.0


class FakeTimer:
    """A call that is due at *when*."""

    def __init__(self, when: float, fn: Callable[[], None]) -> None:
        self.when = when
        self.fn: Callable[[], None] | None = fn

    def cancel(self) -> None:
        """Make it not happen."""
        self.fn = None


class FakeLoop:
    """A loop on the caller's thread: ``settle`` makes calls, ``advance`` moves time, ``until`` waits for files."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._calls: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, FakeTimer]] = []
        self._count = itertools.count()
        self.watched: dict[int, tuple[Callable[[], None], bool, bool]] = {}

    def clock(self) -> float:
        """The loop's time in seconds."""
        return self.now

    def watch(self, fd: int, callback: Callable[[], None], *, read: bool = True, write: bool = False) -> None:
        """Call *callback* when *fd* is ready, in ``until``."""
        self.watched[fd] = callback, read, write

    def unwatch(self, fd: int) -> None:
        """Forget *fd*."""
        self.watched.pop(fd, None)

    def call_soon(self, fn: Callable[[], None]) -> None:
        """Call *fn* in the next ``settle``."""
        self._calls.append(fn)

    def run(self, function: Callable[[], None]) -> None:
        """Call *function* now."""
        function()

    def call_later(self, seconds: float, fn: Callable[[], None]) -> FakeTimer:
        """Call *fn* when ``advance`` has moved *seconds*."""
        timer = FakeTimer(self.now + seconds, fn)
        heapq.heappush(self._timers, (timer.when, next(self._count), timer))
        return timer

    def settle(self) -> None:
        """Make all calls, those too that these ask for."""
        while self._calls:
            self._calls.popleft()()

    def advance(self, seconds: float) -> None:
        """Let *seconds* pass, with the timers in them."""
        end = self.now + seconds
        self.settle()
        while self._timers and self._timers[0][0] <= end:
            when, _, timer = heapq.heappop(self._timers)
            self.now = max(self.now, when)
            if timer.fn is not None:
                timer.fn()
            self.settle()
        self.now = end

    def until(self, condition: Callable[[], object]) -> None:
        """Serve the watched files until *condition*. Raises TimeoutError after a generous time."""
        deadline = time.monotonic() + GENEROUS_SECONDS
        self.settle()
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError("what the test waits for did not happen")
            self.poll(0.02)

    def poll(self, seconds: float = 0.0) -> None:
        """Serve what is ready within *seconds*."""
        reads = [fd for fd, (_, read, _) in self.watched.items() if read]
        writes = [fd for fd, (_, _, write) in self.watched.items() if write]
        ready, writable, _ = select.select(reads, writes, [], seconds)
        for fd in {*ready, *writable}:
            if fd in self.watched:
                self.watched[fd][0]()
        self.settle()


class LossyBackend(NetBackend):
    """Any backend behind a bad cable: in each direction some frames are lost, and some are overtaken by the next."""

    def __init__(self, inner: NetBackend, seed: int, loss: float, reorder: float) -> None:
        self.offloads = inner.offloads
        self.lost = self.reordered = 0
        self._inner = inner
        self._loss, self._reorder = loss, reorder
        self._random = random.Random(seed)
        self._held: dict[str, tuple[bytes, Offload | None]] = {}

    def _pass(self, way: str, frame: bytes, offload: Offload | None) -> list[tuple[bytes, Offload | None]]:
        if self._random.random() < self._loss:
            self.lost += 1
            return []
        held = self._held.pop(way, None)
        if held is None and self._random.random() < self._reorder:
            self.reordered += 1
            self._held[way] = frame, offload
            return []
        return [(frame, offload)] if held is None else [(frame, offload), held]

    def start(self, receive: Receive) -> None:
        def lossy(frame: Buffer, offload: Offload | None) -> bool:
            for one in self._pass("in", bytes(frame), offload):
                receive(*one)
            return True

        self._inner.start(lossy)

    def guest_accepts(self, accepts: Accepts) -> None:
        self._inner.guest_accepts(accepts)

    def send(self, frame: Sequence[Buffer], offload: Offload | None) -> None:
        for data, metadata in self._pass("out", b"".join(frame), offload):
            self._inner.send([data], metadata)

    def ready(self) -> None:
        self._inner.ready()

    def close(self) -> None:
        self._inner.close()


class FrameGuest:
    """A guest as far as a backend sees one: it makes frames, and keeps those that it gets."""

    MAC, IP = bytes.fromhex("525400123456"), bytes((10, 0, 2, 15))
    GATEWAY, DNS, GATEWAY_MAC = bytes((10, 0, 2, 2)), bytes((10, 0, 2, 3)), bytes.fromhex("52550a000202")

    def __init__(self, backend: NetBackend) -> None:
        self.backend = backend
        self.frames: list[bytes] = []
        self.room: int | None = None  # frames that it still takes; None is all

        backend.start(self._receive)

    def _receive(self, frame: Buffer, offload: Offload | None) -> bool:
        if self.room is not None:
            if not self.room:
                return False
            self.room -= 1
        self.frames.append(bytes(frame))
        return True

    def send_ip(
        self, target: bytes, protocol: int, payload: bytes, source: bytes = IP, fragment: int = 0, number: int = 1
    ) -> None:
        """Send an IPv4 packet to the gateway."""
        fields = (0x45, 0, 20 + len(payload), number, fragment, 64, protocol)
        value = checksum(struct.pack("!BBHHHBBH4s4s", *fields, 0, source, target))
        header = struct.pack("!BBHHHBBH4s4s", *fields, value, source, target)
        self.backend.send([self.GATEWAY_MAC + self.MAC + b"\x08\x00", header, payload], None)

    def send_udp(self, target: bytes, ports: tuple[int, int], payload: bytes, source: bytes = IP) -> None:
        """Send a datagram from ports[0] to ports[1]."""
        length = 8 + len(payload)
        start = pseudo_header(source + target, UDP, length)
        value = checksum(struct.pack("!HHHH", *ports, length, 0) + payload, start) or 0xFFFF
        self.send_ip(target, UDP, struct.pack("!HHHH", *ports, length, value) + payload, source)

    def send_tcp(
        self, target: bytes, ports: tuple[int, int], seq: int, ack: int, flags: int, payload: bytes = b"",
        window: int = 0xFFFF, options: bytes = b"",
    ) -> None:  # fmt: skip
        """Send a segment."""
        head = (*ports, seq, ack, (20 + len(options)) << 2, flags, window)
        start = pseudo_header(self.IP + target, TCP, 20 + len(options) + len(payload))
        value = checksum(struct.pack("!HHIIBBHHH", *head, 0, 0) + options + payload, start)
        self.send_ip(target, TCP, struct.pack("!HHIIBBHHH", *head, value, 0) + options + payload)

    def take(self) -> list[bytes]:
        """The frames that came since the last call."""
        taken, self.frames = self.frames, []
        return taken

    def payloads(self, protocol: int) -> list[bytes]:
        """What followed the IP headers of *protocol*'s packets since the last call."""
        return [frame[34:] for frame in self.take() if frame[12:14] == b"\x08\x00" and frame[23] == protocol]

    def datagrams(self) -> list[tuple[int, int, bytes]]:
        """(source port, target port, payload) of the datagrams since the last call."""
        return [(*struct.unpack("!HH", data[:4]), data[8:]) for data in self.payloads(UDP)]

    def segments(self) -> list[tuple[int, int, int, bytes]]:
        """(flags, seq, ack, payload) of the segments since the last call."""
        found = []
        for data in self.payloads(TCP):
            seq, ack, words, flags = struct.unpack_from("!IIBB", data, 4)
            found.append((flags, seq, ack, data[words >> 4 << 2 :]))
        return found
