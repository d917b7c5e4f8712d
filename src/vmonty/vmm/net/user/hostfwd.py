"""Ports of the host that lead to a guest."""

from __future__ import annotations

import contextlib
import secrets
import socket
from typing import TYPE_CHECKING

from vmonty.base.errors import UsageError
from vmonty.vmm.net.user.config import Forward
from vmonty.vmm.net.user.tcp_proxy import LINGER_RESET

if TYPE_CHECKING:
    from vmonty.vmm.net.user.backend import UserBackend

# Connections that wait for a guest that has yet to come up, and for how many seconds.
MOST_WAITING, PATIENCE = 64, 60
ACCEPTS_AT_ONCE = 16
MOST_PEERS = 256


class HostForward:
    """One forwarded port. Raises UsageError if the host's port cannot be had."""

    def __init__(self, stack: UserBackend, forward: Forward) -> None:
        self._stack = stack
        guest = forward.guest if forward.guest is not None else stack.config.leases[0]
        self._guest = guest.packed, forward.guest_port
        kind = socket.SOCK_STREAM if forward.protocol == "tcp" else socket.SOCK_DGRAM
        self._waiting: set[socket.socket] = set()
        self.socket = socket.socket(socket.AF_INET, kind)
        try:
            if kind == socket.SOCK_STREAM:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind((str(forward.host), forward.host_port))
            if kind == socket.SOCK_STREAM:
                self.socket.listen(64)
        except OSError as error:
            self.socket.close()
            raise UsageError(f"hostfwd={forward}: the host's port cannot be had: {error.strerror}") from error
        self.socket.setblocking(False)
        self.port: int = self.socket.getsockname()[1]
        # UDP: who spoke to the port → the port that stands for them at the gateway, and back.
        self._peers: dict[tuple[str, int], int] = {}
        self._ports: dict[int, tuple[str, int]] = {}
        self._tcp = kind == socket.SOCK_STREAM

    def start(self) -> None:
        """Take connections from now on. On the loop's thread."""
        self._stack.loop.watch(self.socket.fileno(), self._accept if self._tcp else self._datagrams)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                outside, _ = self.socket.accept()
            except OSError:
                return
            if len(self._waiting) >= MOST_WAITING:
                outside.close()
                continue
            self._waiting.add(outside)
            self._knock(outside, PATIENCE)

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
        self._stack.loop.unwatch(self.socket.fileno())
        self.socket.close()
        for outside in self._waiting:
            outside.close()
        self._waiting.clear()
