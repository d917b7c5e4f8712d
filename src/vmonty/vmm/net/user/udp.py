"""UDP: a socket of the host's for each of the guest's ports. Source: RFC 768; RFC 4787 (NAT behaviour).

Mapping is endpoint-independent, filtering address- and port-dependent: only who was spoken to may answer.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vmonty.vmm.net.checksum import UDP, Buffer, checksum, correct, pseudo_header
from vmonty.vmm.net.user.icmp import HOST_UNREACHABLE, PORT_UNREACHABLE, PROHIBITED
from vmonty.vmm.net.user.ipv4 import Packet

if TYPE_CHECKING:
    from vmonty.vmm.net.user.backend import UserBackend
    from vmonty.vmm.net.user.hostfwd import HostForward

HEADER = struct.Struct("!HHHH")
MOST_PAYLOAD = 65535 - 20 - 8

# RFC 4787, 4.3: at least two minutes, five recommended.
MOST_SOCKETS, IDLE_SECONDS = 256, 300.0
MOST_PEERS = 64
MOST_FORWARDED = 1024
BATCH = 32

# A service inside: gets (packet, source port, destination port, payload).
Service = Callable[[Packet, int, int, memoryview], None]


@dataclass
class _Mapping:
    socket: socket.socket
    guest: tuple[bytes, int]
    used: float
    # What the outside is called there → what the guest calls it.
    peers: dict[tuple[str, int], tuple[bytes, int]] = field(default_factory=dict)


class Udp:
    """The datagrams of all guests."""

    def __init__(self, stack: UserBackend) -> None:
        self._stack = stack
        self._mappings: dict[tuple[bytes, int], _Mapping] = {}
        self._services: dict[tuple[bytes, int], Service] = {}
        # (guest, its port, the port at the gateway) → the forwarded port that speaks through it.
        self._forwards: dict[tuple[bytes, int, int], HostForward] = {}

    def serve(self, address: bytes, port: int, service: Service) -> None:
        """What goes to *port* at *address* is *service*'s."""
        self._services[address, port] = service

    def forwarded(self, guest: tuple[bytes, int], port: int, forward: HostForward) -> None:
        """What *guest* sends to *port* of the gateway is an answer for *forward*."""
        if len(self._forwards) >= MOST_FORWARDED:
            self._forwards.pop(next(iter(self._forwards)))
        self._forwards[(*guest, port)] = forward

    def input(self, packet: Packet) -> None:
        """A datagram from a guest; dropped when malformed."""
        if len(packet.payload) < HEADER.size:
            return
        source, target, length, value = HEADER.unpack_from(packet.payload)
        if not HEADER.size <= length <= len(packet.payload):
            return
        datagram = packet.payload[:length]
        if value and not packet.trusted:
            addresses = packet.source + packet.target
            if not correct(datagram, pseudo_header(addresses, UDP, length)):
                return
        forward = self._forwards.get((packet.source, source, target)) if packet.target == self._stack.gateway else None
        if forward is not None and forward.reply(target, datagram[HEADER.size :]):
            return
        service = self._services.get((packet.target, target)) or self._services.get((b"", target))
        if service is not None:
            service(packet, source, target, datagram[HEADER.size :])
        elif packet.target in self._stack.mine and packet.target not in self._stack.gateways:
            self._stack.unreachable(packet, PORT_UNREACHABLE)
        elif source and target and self._stack.may_reach(packet.target):
            self._forward(packet, source, target, datagram[HEADER.size :])

    def _forward(self, packet: Packet, source: int, target: int, payload: memoryview) -> None:
        mapping = self._mappings.get((packet.source, source)) or self._make(packet, source)
        if mapping is None:
            return
        mapping.used = self._stack.clock()
        outside = self._stack.outside_address(packet.target), target
        if outside not in mapping.peers:
            if len(mapping.peers) >= MOST_PEERS:
                mapping.peers.pop(next(iter(mapping.peers)))
            mapping.peers[outside] = packet.target, target
        try:
            mapping.socket.sendto(payload, outside)
        except BlockingIOError:
            return  # lost, as datagrams are
        except OSError as error:
            code = {errno.ECONNREFUSED: PORT_UNREACHABLE, errno.EACCES: PROHIBITED, errno.EPERM: PROHIBITED}
            self._stack.unreachable(packet, code.get(error.errno or 0, HOST_UNREACHABLE))

    def _make(self, packet: Packet, source: int) -> _Mapping | None:
        try:
            family = socket.AF_INET6 if len(packet.source) == 16 else socket.AF_INET
            outside = socket.socket(family, socket.SOCK_DGRAM)
        except OSError:
            return None  # no file descriptor left
        return self.adopt(outside, (packet.source, source))

    def adopt(self, outside: socket.socket, guest: tuple[bytes, int]) -> _Mapping:
        """Let *outside* be the socket of the guest's port."""
        self._expire()
        if len(self._mappings) >= MOST_SOCKETS:
            self._drop(min(self._mappings.values(), key=lambda mapping: mapping.used))
        outside.setblocking(False)
        mapping = _Mapping(outside, guest, self._stack.clock())
        self._mappings[guest] = mapping
        self._stack.loop.watch(outside.fileno(), lambda: self._readable(mapping))
        return mapping

    def _readable(self, mapping: _Mapping) -> None:
        for _ in range(BATCH):
            if self._mappings.get(mapping.guest) is not mapping:
                return
            try:
                data, sender = mapping.socket.recvfrom(65535)
            except OSError:
                return
            peer = mapping.peers.get(sender[:2])
            # Datagrams that the guest cannot take now are lost, rather than kept.
            if peer is not None and not self._stack.congested:
                mapping.used = self._stack.clock()
                self.send(*peer, *mapping.guest, data)

    def send(
        self,
        source: bytes,
        source_port: int,
        target: bytes,
        target_port: int,
        payload: Buffer,
        mac: bytes | None = None,
    ) -> None:
        """Send a datagram to a guest, at *mac* if it has no address; more than a datagram holds is dropped."""
        length = HEADER.size + len(payload)
        if len(payload) > MOST_PAYLOAD:
            return
        start = pseudo_header(source + target, UDP, length)
        plain = HEADER.pack(source_port, target_port, length, 0)
        value = checksum(plain + bytes(payload), start) or 0xFFFF
        self._stack.send_ip(
            source, target, UDP, HEADER.pack(source_port, target_port, length, value) + bytes(payload), mac
        )

    def _expire(self) -> None:
        now = self._stack.clock()
        for mapping in [m for m in self._mappings.values() if m.used + IDLE_SECONDS < now]:
            self._drop(mapping)

    def _drop(self, mapping: _Mapping) -> None:
        del self._mappings[mapping.guest]
        self._stack.loop.unwatch(mapping.socket.fileno())
        mapping.socket.close()

    def close(self) -> None:
        """Close all sockets."""
        for mapping in list(self._mappings.values()):
            self._drop(mapping)
