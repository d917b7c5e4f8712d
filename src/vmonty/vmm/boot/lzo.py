"""LZO1X, and the file format of lzop: what some kernels are compressed with.

Source: Linux, Documentation/staging/lzo.rst, "Byte sequences"; lzop's file header as lib/decompress_unlzo.c reads it.
"""

from __future__ import annotations

import struct

_MAGIC_BYTES = 9
_HAS_FILTER, _ADLER_D, _CRC_D, _ADLER_C, _CRC_C = 0x800, 1, 0x100, 2, 0x200
_BLOCK = 256 << 10


def decompress_file(data: bytes, size: int) -> bytes:
    """The *size* bytes in a file of lzop. Raises ValueError when it is damaged."""
    try:
        at = _header_end(data)
        out = bytearray()
        flags = struct.unpack_from(">I", data, 9 + 8)[0]
        while len(out) < size:
            plain, packed = struct.unpack_from(">II", data, at)
            if not 0 < packed <= plain <= _BLOCK or len(out) + plain > size:
                raise ValueError("a block's size cannot be")
            at += 8 + 4 * bool(flags & _ADLER_D) + 4 * bool(flags & _CRC_D)
            if packed < plain:
                at += 4 * bool(flags & _ADLER_C) + 4 * bool(flags & _CRC_C)
            if at + packed > len(data):
                raise ValueError("a block is cut off")
            block = data[at : at + packed]
            out += block if packed == plain else decompress(block, plain)
            at += packed
    except struct.error as error:
        raise ValueError("it is cut off") from error
    return bytes(out)


def _header_end(data: bytes) -> int:
    at = _MAGIC_BYTES
    version = struct.unpack_from(">H", data, at)[0]
    at += 2 + 2 + (2 if version >= 0x940 else 0) + 1 + (1 if version >= 0x940 else 0)
    flags = struct.unpack_from(">I", data, at)[0]
    at += 4 + (4 if flags & _HAS_FILTER else 0) + 4 + 4 + (4 if version >= 0x940 else 0)
    name_length = data[at] if at < len(data) else 0
    return at + 1 + name_length + 4


def decompress(data: bytes, size: int) -> bytes:
    """*size* bytes from one LZO1X block. Raises ValueError when it is damaged."""
    out = bytearray()
    try:
        _run(data, out, size)
    except IndexError as error:
        raise ValueError("a block ends too early") from error
    if len(out) != size:
        raise ValueError(f"a block has {len(out)} of {size} bytes")
    return bytes(out)


def _run(data: bytes, out: bytearray, size: int) -> None:
    at, state = 0, 0
    first = data[0]
    if first > 17:
        count = first - 17
        out += data[1 : 1 + count]
        at = 1 + count
        state = min(count, 4)
    while True:
        if len(out) > size:
            raise ValueError("a block is longer than it says")
        code = data[at]
        at += 1
        if code < 16:
            if state == 0:
                count, at = _long(data, at, code, 15)
                count += 3
                if at + count > len(data):
                    raise ValueError("a block ends too early")
                out += data[at : at + count]
                at += count
                state = 4
                continue
            distance = (data[at] << 2) + (code >> 2) + (2049 if state == 4 else 1)
            length = 3 if state == 4 else 2
            at += 1
            literals = code & 3
        elif code < 64:
            mask = 31 if code >= 32 else 7
            length, at = _long(data, at, code & mask, mask)
            length += 2
            low = data[at] | data[at + 1] << 8
            at += 2
            literals = low & 3
            distance = (low >> 2) + 1
            if code < 32:
                distance += 0x3FFF + ((code & 8) << 11)
                if distance == 0x4000:
                    return  # the end of the stream
        else:
            distance = (data[at] << 3) + (code >> 2 & 7) + 1
            length = (code >> 5) + 1
            at += 1
            literals = code & 3
        _copy(out, distance, length)
        out += data[at : at + literals]
        at += literals
        state = literals


def _long(data: bytes, at: int, value: int, mask: int) -> tuple[int, int]:
    """A length that zero bytes continue."""
    if value:
        return value, at
    start = at
    while data[at] == 0:
        at += 1
    return (at - start) * 255 + mask + data[at], at + 1


def _copy(out: bytearray, distance: int, length: int) -> None:
    start = len(out) - distance
    if start < 0:
        raise ValueError("a block refers to what is before its start")
    if distance >= length:
        out += out[start : start + length]
    else:
        piece = bytes(out[start:])
        out += (piece * (length // distance + 1))[:length]
