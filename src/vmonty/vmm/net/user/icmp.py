"""Echo and errors. Source: RFC 792; for echo to the outside Linux's ping sockets, icmp(7) and ping_group_range."""

from __future__ import annotations

import errno
import socket
import struct
from typing import TYPE_CHECKING

from vmonty.vmm.net.checksum import checksum, correct
from vmonty.vmm.net.user.ipv4 import Packet

if TYPE_CHECKING:
    from vmonty.vmm.net.user.backend import UserBackend

ECHO_REPLY, UNREACHABLE, ECHO_REQUEST = 0, 3, 8
NET_UNREACHABLE, HOST_UNREACHABLE, PORT_UNREACHABLE, PROHIBITED = 0, 1, 3, 13
ECHO = struct.Struct("!BBHHH")

MOST_SOCKETS, IDLE_SECONDS = 32, 30.0


class Icmp:
    """Answers echo for the addresses that are served here, and passes others on."""

    def __init__(self, stack: UserBackend) -> None:
        self._stack = stack
        # (guest, identifier) → its socket; the kernel gives each an identifier of its own.
        self._sockets: dict[tuple[bytes, int], socket.socket] = {}
        self._used: dict[tuple[bytes, int], float] = {}

    def input(self, packet: Packet) -> None:
        """An ICMP message from a guest."""
        message = packet.payload
        if len(message) < ECHO.size or not (packet.trusted or correct(message)):
            return
        kind, _, _, identifier, _ = ECHO.unpack_from(message)
        if kind != ECHO_REQUEST:
            return
        if packet.target in self._stack.mine:
            reply = bytes((ECHO_REPLY, 0, 0, 0)) + message[4:]
            self._send(packet.target, packet.source, reply)
        elif self._stack.may_reach(packet.target):
            self._forward(packet, identifier)

    def _forward(self, packet: Packet, identifier: int) -> None:
        key = packet.source, identifier
        outside = self._sockets.get(key)
        if outside is None:
            self._expire()
            if len(self._sockets) >= MOST_SOCKETS:
                self._drop(min(self._used, key=self._used.__getitem__))
            try:
                outside = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
            except OSError:
                # This host's ping_group_range leaves us out.
                self.unreachable(packet, PROHIBITED)
                return
            outside.setblocking(False)
            self._sockets[key] = outside
            self._stack.loop.watch(outside.fileno(), lambda: self._reply(key))
        self._used[key] = self._stack.clock()
        try:
            outside.sendto(packet.payload, (socket.inet_ntoa(packet.target), 0))
        except OSError as error:
            if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
                self.unreachable(packet, HOST_UNREACHABLE)

    def _reply(self, key: tuple[bytes, int]) -> None:
        outside = self._sockets.get(key)
        if outside is None:
            return
        try:
            message, (address, _) = outside.recvfrom(65535)
        except OSError:
            return
        if len(message) < ECHO.size or message[0] != ECHO_REPLY:
            return
        self._send(socket.inet_aton(address), key[0], bytes((0, 0, 0, 0)) + key[1].to_bytes(2, "big") + message[6:])

    def _send(self, source: bytes, target: bytes, message: bytes) -> None:
        value = checksum(message)
        self._stack.send_ip(source, target, socket.IPPROTO_ICMP, message[:2] + value.to_bytes(2, "big") + message[4:])

    def unreachable(self, packet: Packet, code: int) -> None:
        """Tell the sender of *packet* that it could not be delivered."""
        quoted = packet.header + packet.payload[:8]
        self._send(self._stack.gateway, packet.source, bytes((UNREACHABLE, code, 0, 0, 0, 0, 0, 0)) + quoted)

    def _expire(self) -> None:
        now = self._stack.clock()
        for key in [key for key, used in self._used.items() if used + IDLE_SECONDS < now]:
            self._drop(key)

    def _drop(self, key: tuple[bytes, int]) -> None:
        outside = self._sockets.pop(key)
        del self._used[key]
        self._stack.loop.unwatch(outside.fileno())
        outside.close()

    def close(self) -> None:
        """Close all sockets."""
        for key in list(self._sockets):
            self._drop(key)
