"""Who has which address. Source: RFC 826, "Packet Reception"; RFC 5227 for gratuitous ones."""

from __future__ import annotations

import struct
from collections.abc import Callable

from vmonty.vmm.net.checksum import Buffer
from vmonty.vmm.net.user.neighbours import Neighbours

HEADER = struct.Struct("!HHBBH6s4s6s4s")
ETHERNET, IPV4, REQUEST, REPLY = 1, 0x0800, 1, 2
BROADCAST = b"\xff" * 6
SIZE = 14 + HEADER.size


class Arp(Neighbours):
    """Answers for *mine*, the addresses (4 bytes) that are served here, all with *mac*; remembers guests of the net."""

    def __init__(
        self,
        mac: bytes,
        mine: tuple[bytes, ...],
        belongs: Callable[[bytes], bool],
        transmit: Callable[[bytes], None],
    ) -> None:
        super().__init__(mine, belongs)
        self._mac = mac
        self._transmit = transmit

    def input(self, frame: Buffer) -> None:
        """An ARP frame from a guest; one that is malformed is dropped."""
        if len(frame) < SIZE:
            return
        kind, protocol, hlen, plen, operation, mac, address, _, target = HEADER.unpack_from(frame, 14)
        if (kind, protocol, hlen, plen) != (ETHERNET, IPV4, 6, 4):
            return
        if any(address):  # all zeros is a probe of one without an address
            self.learn(address, mac)
        if operation == REQUEST and target in self._mine and address != target:
            reply = HEADER.pack(ETHERNET, IPV4, 6, 4, REPLY, self._mac, target, mac, address)
            self._transmit(mac + self._mac + b"\x08\x06" + reply)

    def request(self, address: bytes) -> None:
        """Ask the guests who *address* is."""
        ask = HEADER.pack(ETHERNET, IPV4, 6, 4, REQUEST, self._mac, self._mine[0], b"\0" * 6, address)
        self._transmit(BROADCAST + self._mac + b"\x08\x06" + ask)
