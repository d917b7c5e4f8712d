"""The Internet checksum. Source: RFC 1071, "Computing the Internet Checksum"; RFC 1624 for its arithmetic.

A sum of 16-bit words in ones' complement is the number made of all the bytes, modulo 0xFFFF: one pass in C.
"""

from __future__ import annotations

import socket

Buffer = bytes | bytearray | memoryview

TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP


def partial_sum(data: Buffer, start: int = 0) -> int:
    """The folded ones' complement sum of *data*, zero-padded to words, added to *start*; 0 to 0xFFFF.

    0 only when everything was zero: that zero and 0xFFFF are the same number is the callers' business.
    """
    total = int.from_bytes(data, "big")
    if len(data) & 1:
        total <<= 8
    total += start
    return total % 0xFFFF or (0xFFFF if total else 0)


def checksum(data: Buffer, start: int = 0) -> int:
    """What to put into a checksum field that was zero in *data*."""
    return partial_sum(data, start) ^ 0xFFFF


def correct(data: Buffer, start: int = 0) -> bool:
    """Whether *data* with its checksum inside sums up as it must."""
    return partial_sum(data, start) == 0xFFFF


def pseudo_header(addresses: Buffer, protocol: int, length: int) -> int:
    """The sum of a pseudo header: *addresses* are source and destination, *length* is that of header and payload.

    RFC 9293, 3.1 "Header Format" for IPv4; RFC 8200, 8.1 for IPv6: the sum is the same.
    """
    return partial_sum(addresses, protocol + length)
