"""IPv6 packets and their fragments. Source: RFC 8200, 3 "IPv6 Header Format", 4 "IPv6 Extension Headers"."""

from __future__ import annotations

import struct

from vmonty.vmm.net.backend import ETHERNET_HEADER
from vmonty.vmm.net.checksum import Buffer
from vmonty.vmm.net.user.ipv4 import MTU, Packet, Reassembly

HEADER = struct.Struct("!IHBB16s16s")
FRAGMENT = struct.Struct("!BBHI")
ETHERTYPE = b"\x86\xdd"
HOP_LIMIT_AT = 7  # in the header

HOP_BY_HOP, ROUTING, FRAGMENTED, DESTINATION = 0, 43, 44, 60
_SKIPPED = (HOP_BY_HOP, ROUTING, DESTINATION)
MOST_EXTENSIONS = 8


class Ipv6:
    """Parses what guests send."""

    def __init__(self) -> None:
        self._reassembly = Reassembly()

    def parse(self, frame: bytes, trusted: bool, now: float) -> Packet | None:
        """The packet of an Ethernet *frame*; None when it is malformed, or a fragment of what is not complete."""
        begin = ETHERNET_HEADER + HEADER.size
        if len(frame) < begin:
            return None
        first, length, following, _, source, target = HEADER.unpack_from(frame, ETHERNET_HEADER)
        if first >> 28 != 6 or begin + length > len(frame):
            return None
        payload = memoryview(frame)[begin : begin + length]
        header = frame[ETHERNET_HEADER:begin]
        for _ in range(MOST_EXTENSIONS):
            if following == FRAGMENTED:
                if len(payload) < FRAGMENT.size:
                    return None
                following, _, field, identification = FRAGMENT.unpack_from(payload)
                packet = Packet(source, target, following, payload[FRAGMENT.size :], frame[6:12], False, header)
                if not field & ~6:  # the only one, RFC 6946
                    return packet
                return self._reassembly.add(packet, identification, field & ~7, bool(field & 1), now)
            if following not in _SKIPPED:
                return Packet(source, target, following, payload, frame[6:12], trusted, header)
            if len(payload) < 8 or len(payload) < (size := (payload[1] + 1) * 8):
                return None
            following, payload = payload[0], payload[size:]
        return None


class Builder6:
    """Makes packets for the guest, in fragments when one is larger than the MTU."""

    def __init__(self, mac: bytes) -> None:
        self._mac = mac
        self._identification = 0

    def build(
        self, mac: bytes, source: bytes, target: bytes, protocol: int, payload: Buffer, hops: int = 64
    ) -> list[bytes]:
        """The frames that carry *payload* of at most 65535 bytes to *mac*."""
        view = memoryview(payload)
        if len(view) <= MTU - HEADER.size:
            return [self._frame(mac, source, target, protocol, hops, b"", view)]
        self._identification = identification = self._identification + 1 & 0xFFFF_FFFF
        room = (MTU - HEADER.size - FRAGMENT.size) & ~7
        frames = []
        for at in range(0, len(view), room):
            part = view[at : at + room]
            extension = FRAGMENT.pack(protocol, 0, at | (at + room < len(view)), identification)
            frames.append(self._frame(mac, source, target, FRAGMENTED, hops, extension, part))
        return frames

    def _frame(
        self, mac: bytes, source: bytes, target: bytes, following: int, hops: int, extension: bytes, part: Buffer
    ) -> bytes:
        header = HEADER.pack(6 << 28, len(extension) + len(part), following, hops, source, target)
        return b"".join((mac, self._mac, ETHERTYPE, header, extension, part))
