"""Ports of the host that lead to a guest."""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmonty.base.errors import UsageError
from vmonty.vmm.net.loop import FULL, FULL_SECONDS, Timer
from vmonty.vmm.net.user.config import Forward
from vmonty.vmm.net.user.tcp_proxy import LINGER_RESET

if TYPE_CHECKING:
    from vmonty.vmm.net.user.backend import UserBackend

# Connections that wait for a guest that has yet to come up, and for how many seconds.
MOST_WAITING, PATIENCE = 64, 60
ACCEPTS_AT_ONCE = 16
MOST_PEERS = 256


def listen(forwards: Sequence[Forward]) -> list[socket.socket]:
    """The host's port of each. Raises UsageError if one cannot be had."""
    with contextlib.ExitStack() as made:
        ports = [made.enter_context(_listen(forward)) for forward in forwards]
        made.pop_all()
    return ports


def _listen(forward: Forward) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM if forward.protocol == "tcp" else socket.SOCK_DGRAM)
    try:
        if forward.protocol == "tcp":
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((str(forward.host), forward.host_port))
        if forward.protocol == "tcp":
            made.listen(64)
    except OSError as error:
        made.close()
        raise UsageError(f"hostfwd={forward}: the host's port cannot be had: {error.strerror}") from error
    made.setblocking(False)
    return made


class HostForward:
    """One forwarded port, which *port* has (see listen) and this closes."""

    def __init__(self, stack: UserBackend, forward: Forward, port: socket.socket) -> None:
        self._stack = stack
        guest = forward.guest if forward.guest is not None else stack.config.leases[0]
        self._guest = guest.packed, forward.guest_port
        self._waiting: set[socket.socket] = set()
        self._pause: Timer | None = None
        self.socket = port
        self.port: int = port.getsockname()[1]
        # UDP: who spoke to the port → the port that stands for them at the gateway, and back.
        self._peers: dict[tuple[str, int], int] = {}
        self._ports: dict[int, tuple[str, int]] = {}
        self._tcp = forward.protocol == "tcp"

    def start(self) -> None:
        """Take connections from now on. On the loop's thread."""
        self._stack.loop.watch(self.socket.fileno(), self._accept if self._tcp else self._datagrams)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                outside, _ = self.socket.accept()
            except OSError as error:
                if error.errno in FULL:
                    self._wait()
                return
            if len(self._waiting) >= MOST_WAITING:
                outside.close()
                continue
            self._waiting.add(outside)
            self._knock(outside, PATIENCE)

    def _wait(self) -> None:
        """The host has no room for a connection, which stays pending: epoll would tell of it again and again."""
        self._stack.loop.unwatch(self.socket.fileno())
        self._pause = self._stack.loop.call_later(FULL_SECONDS, self.start)

    def _knock(self, outside: socket.socket, patience: int) -> None:
        """Open to the guest once its address is known; a guest that is still booting gets its time."""
        stack = self._stack
        if outside not in self._waiting:
            return  # closed meanwhile
        mac = stack.arp.lookup(self._guest[0])
        if mac is None and patience:
            stack.arp.request(self._guest[0])
            stack.loop.call_later(1.0 if patience < PATIENCE else 0.02, lambda: self._knock(outside, patience - 1))
            return
        self._waiting.discard(outside)
        if mac is None or stack.tcp.accepted(outside, self._guest, mac) is None:
            with contextlib.suppress(OSError):
                outside.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
            outside.close()

    def _datagrams(self) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                data, peer = self.socket.recvfrom(65535)
            except OSError:
                return
            port = self._peers.get(peer)
            if port is None:
                if len(self._peers) >= MOST_PEERS:
                    del self._ports[self._peers.pop(next(iter(self._peers)))]
                port = next(p for p in iter(lambda: 49152 + secrets.randbelow(16384), 0) if p not in self._ports)
                self._peers[peer], self._ports[port] = port, peer
                self._stack.udp.forwarded(self._guest, port, self)
            self._stack.udp.send(self._stack.gateway, port, *self._guest, data)

    def reply(self, port: int, payload: memoryview) -> bool:
        """The guest answers the peer that *port* at the gateway stands for; False when there is none any more."""
        peer = self._ports.get(port)
        if peer is None:
            return False
        with contextlib.suppress(OSError):  # lost, as datagrams are
            self.socket.sendto(payload, peer)
        return True

    def close(self) -> None:
        """Give the port back."""
        if self._pause is not None:
            self._pause.cancel()
        self._stack.loop.unwatch(self.socket.fileno())
        self.socket.close()
        for outside in self._waiting:
            outside.close()
        self._waiting.clear()
