"""TCP segments as bytes. Source: RFC 9293, 3.1 "Header Format"; RFC 7323, 2.2; RFC 2018, "Sack-Permitted Option"."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vmonty.vmm.net.backend import Gso, Offload
from vmonty.vmm.net.checksum import TCP, Buffer, checksum, partial_sum
from vmonty.vmm.net.segment import ACK, FIN, PSH, RST, SYN

__all__ = ["ACK", "FIN", "PSH", "RST", "SYN", "Options", "Takes", "Template", "Template6", "template"]

OPTION_END, OPTION_NOP, OPTION_MSS, OPTION_SCALE, OPTION_SACK_PERMITTED, OPTION_SACK = range(6)

# What a guest gets that names no size, and the least that is believed. RFC 9293, 3.7.1 "Maximum Segment Size Option".
DEFAULT_MSS, LEAST_MSS = 536, 88
MOST_SCALE = 14

HEADERS = struct.Struct("!6s6sHBBHHHBBH4s4sHHIIBBHHH")
ETHERNET_IP, HEADERS_SIZE = 34, HEADERS.size
PARTIAL = Offload(needs_checksum=True, csum_start=ETHERNET_IP, csum_offset=16)

HEADERS6 = struct.Struct("!6s6sHIHBB16s16sHHIIBBHHH")
ETHERNET_IPV6 = 54
PARTIAL6 = Offload(needs_checksum=True, csum_start=ETHERNET_IPV6, csum_offset=16)

# Payload of one frame: what IPv4 can say with the longest TCP header.
MOST_PAYLOAD = 65535 - 20 - 60


@dataclass(frozen=True, slots=True)
class Options:
    """What a SYN offers; *scale* None without window scaling."""

    mss: int = DEFAULT_MSS
    scale: int | None = None
    sack: bool = False

    @classmethod
    def parse(cls, data: Buffer) -> Options:
        """From a header's options; what is malformed ends the list. RFC 9293, 3.2 "Specific Option Definitions"."""
        mss, scale, sack = DEFAULT_MSS, None, False
        at = 0
        while at < len(data):
            kind = data[at]
            if kind == OPTION_END:
                break
            if kind == OPTION_NOP:
                at += 1
                continue
            length = data[at + 1] if at + 1 < len(data) else 0
            if length < 2 or at + length > len(data):
                break
            if kind == OPTION_MSS and length == 4:
                mss = max(int.from_bytes(data[at + 2 : at + 4], "big"), LEAST_MSS)
            elif kind == OPTION_SCALE and length == 3:
                scale = min(data[at + 2], MOST_SCALE)
            elif kind == OPTION_SACK_PERMITTED and length == 2:
                sack = True
            at += length
        return cls(mss, scale, sack)

    def build(self) -> bytes:
        """As they stand in a header, padded to words."""
        made = struct.pack("!BBH", OPTION_MSS, 4, self.mss)
        if self.sack:
            made += bytes((OPTION_NOP, OPTION_NOP, OPTION_SACK_PERMITTED, 2))
        if self.scale is not None:
            made += bytes((OPTION_NOP, OPTION_SCALE, 3, self.scale))
        return made


def sack_option(blocks: list[tuple[int, int]]) -> bytes:
    """The blocks (start, end) that have arrived out of order; empty without any. RFC 2018, "Sack Option Format"."""
    if not blocks:
        return b""
    made = bytes((OPTION_NOP, OPTION_NOP, OPTION_SACK, 2 + 8 * len(blocks)))
    return made + b"".join(struct.pack("!II", start & 0xFFFF_FFFF, end & 0xFFFF_FFFF) for start, end in blocks)


@dataclass(slots=True)
class Takes:
    """Which unfinished segments the guest takes: without a checksum, and larger than its packets, by IPv4 or IPv6."""

    checksum: bool = False
    large: bool = False
    large6: bool = False


class Template:
    """Builds the frames of one direction of a connection; what stays the same is computed once.

    Addresses are 4 bytes, MACs 6.
    """

    __slots__ = ("_gso", "_ip_sum", "_prefix", "_pseudo", "_tail")

    def __init__(self, macs: tuple[bytes, bytes], source: bytes, target: bytes, ports: tuple[int, int]) -> None:
        self._prefix = macs
        self._tail = (source, target, *ports)
        self._ip_sum = partial_sum(source + target, 0x4500 + 0x4000 + (64 << 8 | TCP))
        self._pseudo = partial_sum(source + target, TCP)
        self._gso: dict[int, Offload] = {}

    def build(
        self, takes: Takes, mss: int, flags: int, seq: int, ack: int, window: int, options: bytes, payload: Buffer
    ) -> list[tuple[Buffer, Offload | None]]:
        """The frames that carry *payload*: one when the guest cuts it itself, else one for each *mss* bytes."""
        if len(payload) <= mss or self._large(takes):
            return [self._frame(takes, mss, flags, seq, ack, window, options, payload)]
        view = memoryview(payload)
        frames = []
        for at in range(0, len(view), mss):
            last = at + mss >= len(view)
            part = flags if last else flags & ~(FIN | PSH)
            frames.append(self._frame(takes, mss, part, seq + at, ack, window, options, view[at : at + mss]))
        return frames

    @staticmethod
    def _large(takes: Takes) -> bool:
        return takes.large

    def _frame(
        self, takes: Takes, mss: int, flags: int, seq: int, ack: int, window: int, options: bytes, payload: Buffer
    ) -> tuple[Buffer, Offload | None]:
        length = 20 + len(options) + len(payload)
        total = self._ip_sum + 20 + length
        ip_sum = ((total & 0xFFFF) + (total >> 16)) ^ 0xFFFF
        pseudo = self._pseudo + length
        pseudo = (pseudo & 0xFFFF) + (pseudo >> 16)
        destination, source = self._prefix
        here, there, port, peer_port = self._tail
        words = (5 + (len(options) >> 2)) << 4
        seq &= 0xFFFF_FFFF
        ack &= 0xFFFF_FFFF
        if takes.checksum:
            head = HEADERS.pack(
                destination, source, 0x0800, 0x45, 0, 20 + length, 0, 0x4000, 64, TCP, ip_sum, here, there,
                port, peer_port, seq, ack, words, flags, window, pseudo, 0,
            )  # fmt: skip
            if len(payload) <= mss:
                return b"".join((head, options, payload)), PARTIAL
            key = mss << 8 | len(options)
            offload = self._gso.get(key)
            if offload is None:
                header = HEADERS_SIZE + len(options)
                offload = self._gso[key] = Offload(True, ETHERNET_IP, 16, Gso.TCP4, mss, header)
            return b"".join((head, options, payload)), offload
        frame = bytearray(
            HEADERS.pack(
                destination, source, 0x0800, 0x45, 0, 20 + length, 0, 0x4000, 64, TCP, ip_sum, here, there,
                port, peer_port, seq, ack, words, flags, window, 0, 0,
            )
        )  # fmt: skip
        frame += options
        frame += payload
        value = checksum(memoryview(frame)[ETHERNET_IP:], self._pseudo + length)
        frame[ETHERNET_IP + 16 : ETHERNET_IP + 18] = value.to_bytes(2, "big")
        return frame, None


class Template6(Template):
    """The same over IPv6: addresses are 16 bytes, and there is no checksum of the header."""

    __slots__ = ()

    @staticmethod
    def _large(takes: Takes) -> bool:
        return takes.large6

    def _frame(
        self, takes: Takes, mss: int, flags: int, seq: int, ack: int, window: int, options: bytes, payload: Buffer
    ) -> tuple[Buffer, Offload | None]:
        length = 20 + len(options) + len(payload)
        pseudo = self._pseudo + length
        pseudo = (pseudo & 0xFFFF) + (pseudo >> 16)
        destination, source = self._prefix
        here, there, port, peer_port = self._tail
        words = (5 + (len(options) >> 2)) << 4
        head = HEADERS6.pack(
            destination, source, 0x86DD, 6 << 28, length, TCP, 64, here, there, port, peer_port,
            seq & 0xFFFF_FFFF, ack & 0xFFFF_FFFF, words, flags, window, pseudo if takes.checksum else 0, 0,
        )  # fmt: skip
        if not takes.checksum:
            frame = bytearray(head) + options + payload
            value = checksum(memoryview(frame)[ETHERNET_IPV6:], self._pseudo + length)
            frame[ETHERNET_IPV6 + 16 : ETHERNET_IPV6 + 18] = value.to_bytes(2, "big")
            return frame, None
        if len(payload) <= mss:
            return b"".join((head, options, payload)), PARTIAL6
        key = mss << 8 | len(options)
        offload = self._gso.get(key)
        if offload is None:
            header = HEADERS6.size + len(options)
            offload = self._gso[key] = Offload(True, ETHERNET_IPV6, 16, Gso.TCP6, mss, header)
        return b"".join((head, options, payload)), offload


def template(macs: tuple[bytes, bytes], source: bytes, target: bytes, ports: tuple[int, int]) -> Template:
    """One for addresses of either kind."""
    return (Template if len(source) == 4 else Template6)(macs, source, target, ports)
