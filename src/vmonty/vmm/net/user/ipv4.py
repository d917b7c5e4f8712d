"""IPv4 packets and their fragments. Source: RFC 791, 3.1 "Internet Header Format" and 3.2 "Fragmentation"."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from vmonty.vmm.net.backend import ETHERNET_HEADER
from vmonty.vmm.net.checksum import Buffer, checksum, correct

HEADER = struct.Struct("!BBHHHBBH4s4s")
MORE_FRAGMENTS, OFFSET_MASK = 0x2000, 0x1FFF

MTU = 1500

# Datagrams that wait for their rest, and for how long: RFC 791 suggests 15 s as a first value.
MOST_INCOMPLETE, REASSEMBLY_SECONDS = 16, 15.0
MOST_FRAGMENTS = 64
MOST_DATAGRAM = 65535


@dataclass(slots=True)
class Packet:
    """A whole packet: addresses of 4 bytes, what follows the header, and whether its checksum may be taken as right."""

    source: bytes
    target: bytes
    protocol: int
    payload: memoryview
    mac: bytes
    trusted: bool
    header: bytes


@dataclass(slots=True)
class _Incomplete:
    expires: float
    parts: dict[int, bytes] = field(default_factory=dict)
    size: int | None = None
    held: int = 0


class Reassembly:
    """Puts fragments together, within bounds. One that overlaps another spoils its datagram (RFC 5722's answer)."""

    def __init__(self) -> None:
        self._incomplete: dict[tuple[bytes, bytes, int, int], _Incomplete] = {}

    def add(self, packet: Packet, identification: int, offset: int, more: bool, now: float) -> Packet | None:
        """The whole packet when this was the last missing piece. *offset* in bytes."""
        key = packet.source, packet.target, packet.protocol, identification
        payload = packet.payload
        if offset + len(payload) > MOST_DATAGRAM or not len(payload) or (more and len(payload) % 8):
            self._incomplete.pop(key, None)
            return None
        entry = self._incomplete.get(key)
        if entry is None or entry.expires < now:
            self._expire(now)
            if len(self._incomplete) >= MOST_INCOMPLETE:
                self._incomplete.pop(next(iter(self._incomplete)))
            entry = self._incomplete[key] = _Incomplete(now + REASSEMBLY_SECONDS)
        known = entry.parts.get(offset)
        if known is not None and known == payload:
            return None  # a duplicate
        end = offset + len(payload)
        overlaps = any(at < end and offset < at + len(part) for at, part in entry.parts.items())
        beyond = entry.size is not None and (end > entry.size or not more)
        if not more:
            beyond = beyond or any(at + len(part) > end for at, part in entry.parts.items())
            entry.size = end
        if overlaps or beyond or len(entry.parts) >= MOST_FRAGMENTS:
            del self._incomplete[key]
            return None
        entry.parts[offset] = bytes(payload)
        entry.held += len(payload)
        if entry.size is None or entry.held != entry.size:
            return None
        del self._incomplete[key]
        whole = b"".join(part for _, part in sorted(entry.parts.items()))
        return Packet(
            packet.source, packet.target, packet.protocol, memoryview(whole), packet.mac, False, packet.header
        )

    def _expire(self, now: float) -> None:
        for key in [key for key, entry in self._incomplete.items() if entry.expires < now]:
            del self._incomplete[key]


class Ipv4:
    """Parses what guests send."""

    def __init__(self) -> None:
        self._reassembly = Reassembly()

    def parse(self, frame: bytes, trusted: bool, now: float) -> Packet | None:
        """The packet of an Ethernet *frame*; None when it is malformed, or a fragment of what is not complete."""
        if len(frame) < ETHERNET_HEADER + 20:
            return None
        first, _, total, identification, fragment, _, protocol, _, source, target = HEADER.unpack_from(
            frame, ETHERNET_HEADER
        )
        size = (first & 0xF) * 4
        if first >> 4 != 4 or size < 20 or not size <= total <= len(frame) - ETHERNET_HEADER:
            return None
        header = frame[ETHERNET_HEADER : ETHERNET_HEADER + size]
        if not correct(header):
            return None
        payload = memoryview(frame)[ETHERNET_HEADER + size : ETHERNET_HEADER + total]
        packet = Packet(source, target, protocol, payload, frame[6:12], trusted, header)
        if fragment & (MORE_FRAGMENTS | OFFSET_MASK) == 0:
            return packet
        offset = (fragment & OFFSET_MASK) * 8
        return self._reassembly.add(packet, identification, offset, bool(fragment & MORE_FRAGMENTS), now)


class Builder:
    """Makes packets for the guest, in fragments when one is larger than the MTU."""

    def __init__(self, mac: bytes) -> None:
        self._mac = mac
        self._identification = 0

    def build(self, mac: bytes, source: bytes, target: bytes, protocol: int, payload: Buffer) -> list[bytes]:
        """The frames that carry *payload* of at most 65515 bytes to *mac*."""
        self._identification = identification = self._identification + 1 & 0xFFFF
        room = (MTU - 20) & ~7
        view = memoryview(payload)
        if len(view) <= MTU - 20:
            return [self._frame(mac, source, target, protocol, identification, 0, view)]
        frames = []
        for at in range(0, len(view), room):
            part = view[at : at + room]
            more = MORE_FRAGMENTS if at + room < len(view) else 0
            frames.append(self._frame(mac, source, target, protocol, identification, more | at >> 3, part))
        return frames

    def _frame(
        self, mac: bytes, source: bytes, target: bytes, protocol: int, identification: int, fragment: int, part: Buffer
    ) -> bytes:
        fields = (0x45, 0, 20 + len(part), identification, fragment, 64, protocol)
        value = checksum(HEADER.pack(*fields, 0, source, target))
        return b"".join((mac, self._mac, b"\x08\x00", HEADER.pack(*fields, value, source, target), part))
