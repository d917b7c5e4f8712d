"""The network's DHCP server. Source: RFC 2131, 3 and 4.3; RFC 2132 for the options; RFC 4578, 2 for PXE."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import TYPE_CHECKING

from vmonty.vmm.net.user.arp import BROADCAST
from vmonty.vmm.net.user.ipv4 import MTU, Packet

if TYPE_CHECKING:
    from vmonty.vmm.net.user.backend import UserBackend

SERVER_PORT, CLIENT_PORT = 67, 68
FIXED = struct.Struct("!BBBBIHH4s4s4s4s16s64s128s4s")
MAGIC = b"\x63\x82\x53\x63"
BOOTREQUEST, BOOTREPLY = 1, 2
DISCOVER, OFFER, REQUEST, DECLINE, ACK, NAK, RELEASE, INFORM = range(1, 9)

PAD, NETMASK, ROUTER, DNS, HOSTNAME, DOMAIN, INTERFACE_MTU, BROADCAST_ADDRESS = 0, 1, 3, 6, 12, 15, 26, 28
REQUESTED, LEASE, KIND, SERVER, RENEWAL, REBINDING = 50, 51, 53, 54, 58, 59
TFTP_SERVER, BOOTFILE, END = 66, 67, 255

LEASE_SECONDS = 86400
# A BOOTP message must not be shorter. RFC 1542, 2.1.
LEAST_MESSAGE = 300


def options(data: bytes | memoryview) -> Iterator[tuple[int, bytes]]:
    """(code, value) of each option; ends where they are malformed."""
    at = 0
    while at < len(data) and data[at] != END:
        if data[at] == PAD:
            at += 1
            continue
        if at + 2 > len(data) or at + 2 + data[at + 1] > len(data):
            return
        yield data[at], bytes(data[at + 2 : at + 2 + data[at + 1]])
        at += 2 + data[at + 1]


class Dhcp:
    """Gives each guest, by its MAC, an address of the pool; the one that it asks for when it is free."""

    def __init__(self, stack: UserBackend) -> None:
        self._stack = stack
        self._leases: dict[bytes, IPv4Address] = {}

    def input(self, packet: Packet, source_port: int, target_port: int, payload: memoryview) -> None:
        """A message of a client; what is malformed is dropped."""
        if len(payload) < FIXED.size or source_port != CLIENT_PORT:
            return
        operation, htype, hlen, _, xid, _, flags, ciaddr, _, _, giaddr, chaddr, _, _, magic = FIXED.unpack_from(payload)
        if operation != BOOTREQUEST or (htype, hlen) != (1, 6) or magic != MAGIC or any(giaddr):
            return
        mac = chaddr[:6]
        if mac[0] & 1 or not any(mac):
            return
        asked = dict(options(payload[FIXED.size :]))
        kind = asked.get(KIND, bytes((DISCOVER,)))[:1]  # none: plain BOOTP
        server = asked.get(SERVER)
        wanted = asked.get(REQUESTED, b"")
        wanted = wanted if len(wanted) == 4 else b""
        match kind[0] if kind else 0:
            case 1:
                self._answer(xid, flags, mac, self._lease(mac, wanted), OFFER if KIND in asked else 0, ciaddr)
            case 3:
                if server is not None and server != self._stack.gateway:
                    return  # another server was chosen
                address = self._lease(mac, wanted or ciaddr)
                claimed = wanted or ciaddr
                if address is None or (any(claimed) and address.packed != claimed):
                    self._answer(xid, flags | 0x8000, mac, None, NAK, bytes(4))
                else:
                    self._stack.arp.learn(address.packed, mac)
                    self._answer(xid, flags, mac, address, ACK, ciaddr)
            case 4 | 7:  # DECLINE, RELEASE
                self._leases.pop(mac, None)
            case 8:
                self._answer(xid, flags, mac, None, ACK, ciaddr)
            case _:
                pass

    def _lease(self, mac: bytes, wanted: bytes) -> IPv4Address | None:
        """The client's address. With none left, that of the oldest lease: a guest must not use them up for others."""
        pool = self._stack.config.leases
        if mac in self._leases:
            return self._leases[mac]
        taken = set(self._leases.values())
        free = [address for address in pool if address not in taken]
        if not free:
            free = [self._leases.pop(next(iter(self._leases)))]
        preferred = next((address for address in free if address.packed == wanted), free[0])
        self._leases[mac] = preferred
        return preferred

    def _answer(self, xid: int, flags: int, mac: bytes, address: IPv4Address | None, kind: int, ciaddr: bytes) -> None:
        if kind == OFFER and address is None:
            return
        stack = self._stack
        config = stack.config
        yours = address.packed if address is not None else bytes(4)
        bootfile = b"" if kind == NAK else config.bootfile.encode()
        message = FIXED.pack(
            BOOTREPLY, 1, 6, 0, xid, 0, flags, ciaddr, yours, bytes(4) if kind == NAK else stack.gateway, bytes(4),
            mac + bytes(10), b"", bootfile, MAGIC,
        )  # fmt: skip
        reply = bytearray(message)
        for code, value in self._options(kind, address is not None):
            reply += bytes((code, len(value))) + value
        reply.append(END)
        reply += bytes(max(LEAST_MESSAGE - len(reply), 0))
        # A client without an address may not take unicast: RFC 2131, 4.1; broadcast is always right on this cable.
        target, to = (ciaddr, mac) if any(ciaddr) and kind != NAK else (b"\xff" * 4, BROADCAST)
        stack.udp.send(stack.gateway, SERVER_PORT, target, CLIENT_PORT, bytes(reply), to)

    def _options(self, kind: int, leased: bool) -> Iterator[tuple[int, bytes]]:
        config = self._stack.config
        if kind:
            yield KIND, bytes((kind,))
            yield SERVER, self._stack.gateway
        if kind == NAK:
            return
        yield NETMASK, config.net.netmask.packed
        yield BROADCAST_ADDRESS, config.net.broadcast_address.packed
        yield INTERFACE_MTU, MTU.to_bytes(2, "big")
        if not config.restrict:
            yield ROUTER, self._stack.gateway
            yield DNS, self._stack.dns_address
        if leased and kind:
            for code, seconds in ((LEASE, 1.0), (RENEWAL, 0.5), (REBINDING, 0.875)):
                yield code, int(LEASE_SECONDS * seconds).to_bytes(4, "big")
        if config.hostname:
            yield HOSTNAME, config.hostname.encode()
        if config.domainname:
            yield DOMAIN, config.domainname.encode()
        if config.bootfile:
            yield TFTP_SERVER, str(config.host).encode()
            yield BOOTFILE, config.bootfile.encode()
