"""ICMPv6: echo, errors, routers and neighbours. Source: RFC 4443; RFC 4861 (Neighbor Discovery); RFC 8106 (DNS).

The network is QEMU's: prefix fec0::/64 by router advertisements, the host at fec0::2, its name server at fec0::3.
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

from vmonty.vmm.net.checksum import checksum, correct, pseudo_header
from vmonty.vmm.net.loop import Timer
from vmonty.vmm.net.user import icmp
from vmonty.vmm.net.user.ipv4 import MTU, Packet
from vmonty.vmm.net.user.ipv6 import HOP_LIMIT_AT
from vmonty.vmm.net.user.neighbours import Neighbours

if TYPE_CHECKING:
    from vmonty.vmm.net.user.backend import UserBackend

PROTOCOL = socket.IPPROTO_ICMPV6
UNREACHABLE, ECHO_REQUEST, ECHO_REPLY = 1, 128, 129
ROUTER_SOLICITATION, ROUTER_ADVERTISEMENT, NEIGHBOUR_SOLICITATION, NEIGHBOUR_ADVERTISEMENT = 133, 134, 135, 136
# What ICMP calls it → the code of "destination unreachable" here.
CODES = {icmp.NET_UNREACHABLE: 0, icmp.HOST_UNREACHABLE: 3, icmp.PORT_UNREACHABLE: 4, icmp.PROHIBITED: 1}
MOST_QUOTED = 1232  # an error is no larger than the least MTU

SOURCE_LINK_LAYER, TARGET_LINK_LAYER, PREFIX, MTU_OPTION, RDNSS = 1, 2, 3, 5, 25
ON_LINK_AUTONOMOUS = 0xC0
ROUTER_SECONDS, PREFIX_SECONDS = 1800, 86400
ADVERTISE_SECONDS = 600.0
FROM_ROUTER_SOLICITED_OVERRIDE, FROM_ROUTER_OVERRIDE = 0xE000_0000, 0xA000_0000

UNSPECIFIED, MULTICAST = bytes(16), 0xFF
PREFIX_BYTES = bytes.fromhex("fec0000000000000")
GATEWAY, DNS = PREFIX_BYTES + bytes(7) + b"\x02", PREFIX_BYTES + bytes(7) + b"\x03"
LINK_LOCAL = bytes.fromhex("fe80") + bytes(13) + b"\x02"
MINE = (GATEWAY, DNS, LINK_LOCAL)
ALL_NODES, ALL_NODES_MAC = bytes.fromhex("ff02") + bytes(13) + b"\x01", bytes.fromhex("333300000001")
SOLICITED_NODE = bytes.fromhex("ff0200000000000000000001ff")


def belongs(address: bytes) -> bool:
    """Whether *address* is one of the network, or of the link."""
    return address[:8] == PREFIX_BYTES or (address[0] == 0xFE and address[1] & 0xC0 == 0x80)


class Icmp6(Neighbours):
    """Answers for the addresses that are served here, and tells guests of the network."""

    def __init__(self, stack: UserBackend) -> None:
        super().__init__(MINE, belongs)
        self._stack = stack
        self._timer: Timer | None = None

    def input(self, packet: Packet) -> None:
        """A message from a guest; dropped when malformed."""
        message = packet.payload
        addresses = packet.source + packet.target
        if len(message) < 8 or not correct(message, pseudo_header(addresses, PROTOCOL, len(message))):
            return
        kind, code = message[0], message[1]
        if kind == ECHO_REQUEST and packet.source != UNSPECIFIED:
            if packet.target in MINE:
                self._send(packet.target, packet.source, bytes((ECHO_REPLY, 0, 0, 0)) + message[4:])
            elif packet.target[0] != MULTICAST:
                self.unreachable(packet, icmp.PROHIBITED)  # echo goes no further than this
        # Who is not on the link cannot send what says 255. RFC 4861, 6.1 and 7.1.
        elif packet.header[HOP_LIMIT_AT] == 255 and code == 0:
            if kind == ROUTER_SOLICITATION:
                self._solicited(packet)
            elif kind == NEIGHBOUR_SOLICITATION and len(message) >= 24:
                self._neighbour_solicited(packet, bytes(message[8:24]))

    # ---- routers --------------------------------------------------------------------------------------------

    def _solicited(self, packet: Packet) -> None:
        if self._timer is None:
            self._timer = self._stack.loop.call_later(ADVERTISE_SECONDS, self._again)
        if packet.source == UNSPECIFIED:
            self._advertise()
        else:
            self._send(LINK_LOCAL, packet.source, self._advertisement(), packet.mac, 255)

    def _again(self) -> None:
        # What guests have learnt ends with its lifetime.
        self._timer = self._stack.loop.call_later(ADVERTISE_SECONDS, self._again)
        self._advertise()

    def _advertise(self) -> None:
        self._send(LINK_LOCAL, ALL_NODES, self._advertisement(), ALL_NODES_MAC, 255)

    def _advertisement(self) -> bytes:
        """RFC 4861, 4.2 and 4.6; RFC 8106, 5.1. Restricted, it is no default router."""
        lifetime = 0 if self._stack.config.restrict else ROUTER_SECONDS
        return b"".join(
            (
                struct.pack("!BBHBBHII", ROUTER_ADVERTISEMENT, 0, 0, 64, 0, lifetime, 0, 0),
                struct.pack("!BB6s", SOURCE_LINK_LAYER, 1, self._stack.mac),
                struct.pack("!BBHI", MTU_OPTION, 1, 0, MTU),
                struct.pack(
                    "!BBBBIII16s", PREFIX, 4, 64, ON_LINK_AUTONOMOUS, PREFIX_SECONDS, PREFIX_SECONDS, 0,
                    PREFIX_BYTES + bytes(8),
                ),
                struct.pack("!BBHI16s", RDNSS, 3, 0, ROUTER_SECONDS, DNS),
            )
        )  # fmt: skip

    # ---- neighbours -----------------------------------------------------------------------------------------

    def _neighbour_solicited(self, packet: Packet, target: bytes) -> None:
        if target not in MINE:
            return
        probe = packet.source == UNSPECIFIED  # somebody wants the address for itself
        flags = FROM_ROUTER_OVERRIDE if probe else FROM_ROUTER_SOLICITED_OVERRIDE
        message = struct.pack(
            "!BBHI16sBB6s", NEIGHBOUR_ADVERTISEMENT, 0, 0, flags, target, TARGET_LINK_LAYER, 1, self._stack.mac
        )
        if probe:
            self._send(target, ALL_NODES, message, ALL_NODES_MAC, 255)
        else:
            self._send(target, packet.source, message, packet.mac, 255)

    def request(self, address: bytes) -> None:
        """Ask the guests who *address* is."""
        message = struct.pack(
            "!BBHI16sBB6s", NEIGHBOUR_SOLICITATION, 0, 0, 0, address, SOURCE_LINK_LAYER, 1, self._stack.mac
        )
        mac = b"\x33\x33\xff" + address[13:]
        self._send(LINK_LOCAL, SOLICITED_NODE + address[13:], message, mac, 255)

    # ---- errors ---------------------------------------------------------------------------------------------

    def unreachable(self, packet: Packet, code: int) -> None:
        """Tell the sender of *packet* that it could not be delivered; *code* is ICMP's."""
        quoted = (packet.header + bytes(packet.payload))[: MOST_QUOTED - 8]
        self._send(GATEWAY, packet.source, bytes((UNREACHABLE, CODES[code], 0, 0, 0, 0, 0, 0)) + quoted)

    def _send(self, source: bytes, target: bytes, message: bytes, mac: bytes | None = None, hops: int = 64) -> None:
        value = checksum(message, pseudo_header(source + target, PROTOCOL, len(message)))
        whole = message[:2] + value.to_bytes(2, "big") + message[4:]
        self._stack.send_ip(source, target, PROTOCOL, whole, mac, hops)

    def close(self) -> None:
        """Advertise no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
