"""Who has which address. Source: RFC 826, "Packet Reception"; RFC 5227 for gratuitous ones."""

from __future__ import annotations

import struct
from collections.abc import Callable

from vmonty.vmm.net.checksum import Buffer

HEADER = struct.Struct("!HHBBH6s4s6s4s")
ETHERNET, IPV4, REQUEST, REPLY = 1, 0x0800, 1, 2
BROADCAST = b"\xff" * 6
SIZE = 14 + HEADER.size

MOST_NEIGHBOURS, MOST_WAITING = 256, 64


class Arp:
    """Answers for *mine*, the addresses (4 bytes) that are served here, all with *mac*; remembers guests of the net."""

    def __init__(
        self,
        mac: bytes,
        mine: tuple[bytes, ...],
        belongs: Callable[[bytes], bool],
        transmit: Callable[[bytes], None],
    ) -> None:
        self._mac = mac
        self._mine = mine
        self._belongs = belongs
        self._transmit = transmit
        self._known: dict[bytes, bytes] = {}
        self._waiting: list[tuple[bytes, Callable[[], None]]] = []

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

    def learn(self, address: bytes, mac: bytes) -> None:
        """*address* is at *mac*, unless it is ours, not of the network, or the MAC is no station's."""
        if self._known.get(address) == mac:
            return
        if address in self._mine or not self._belongs(address) or mac[0] & 1 or not any(mac):
            return
        if len(self._known) >= MOST_NEIGHBOURS and address not in self._known:
            self._known.pop(next(iter(self._known)))  # the oldest
        self._known[address] = mac
        ready = [fn for wanted, fn in self._waiting if wanted == address]
        self._waiting = [entry for entry in self._waiting if entry[0] != address]
        for fn in ready:
            fn()

    def lookup(self, address: bytes) -> bytes | None:
        """The MAC of *address*, None when it is not known."""
        return self._known.get(address)

    def request(self, address: bytes) -> None:
        """Ask the guests who *address* is."""
        ask = HEADER.pack(ETHERNET, IPV4, 6, 4, REQUEST, self._mac, self._mine[0], b"\0" * 6, address)
        self._transmit(BROADCAST + self._mac + b"\x08\x06" + ask)

    def when_known(self, address: bytes, fn: Callable[[], None]) -> None:
        """Call *fn* once *address* is known; asks for it. With too many that wait, the oldest is forgotten."""
        if address in self._known:
            fn()
            return
        self._waiting = [*self._waiting[-MOST_WAITING + 1 :], (address, fn)]
        self.request(address)
