"""Encodings of rectangles: how pixels travel.

Source: RFC 6143, 7.7 "Encodings"; the RFB protocol's community description for "Tight Encoding" and pseudo-encodings.
Each encoder belongs to one viewer: streams of zlib go on from rectangle to rectangle.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from enum import IntEnum

from vmonty.vmm.display.vnc.pixels import Picture, PixelFormat, colour, compact_colour


class Encoding(IntEnum):
    """Encodings, and pseudo-encodings that say what a viewer understands."""

    RAW = 0
    COPY_RECT = 1
    HEXTILE = 5
    TIGHT = 7
    ZRLE = 16
    DESKTOP_SIZE = -223
    POINTER_TYPE_CHANGE = -257
    EXTENDED_KEY_EVENT = -258
    EXTENDED_DESKTOP_SIZE = -308


ZLIB_LEVEL = 1
# Hextile's subencoding mask.
HEX_RAW, HEX_BACKGROUND, HEX_FOREGROUND, HEX_RECTANGLES, HEX_COLOURED = 1, 2, 4, 8, 16
ZRLE_TILE, HEX_TILE = 64, 16
ZRLE_SOLID = 1
# Tight's control byte.
TIGHT_FILL, TIGHT_FILTER = 0x80, 0x40
FILTER_PALETTE = 1
TIGHT_RAW_BELOW = 12  # less data than this travels as it is
TIGHT_WIDTH = 2048
TIGHT_COLOURS = 32
STREAM_FULL, STREAM_INDEXED = 0, 1

Encoder = Callable[[Picture, int, int, int, int], bytes]


def rectangle(x: int, y: int, width: int, height: int, encoding: int, body: bytes = b"") -> bytes:
    """A rectangle's header and contents."""
    return struct.pack(">HHHHi", x, y, width, height, encoding) + body


def _tiles(x: int, y: int, width: int, height: int, size: int) -> Iterator[tuple[int, int, int, int]]:
    for top in range(y, y + height, size):
        for left in range(x, x + width, size):
            yield left, top, min(size, x + width - left), min(size, y + height - top)


class Raw:
    """Pixels as they are."""

    encoding = Encoding.RAW

    def __init__(self, form: PixelFormat) -> None:
        self.form = form

    def encode(self, picture: Picture, x: int, y: int, width: int, height: int) -> bytes:
        """The rectangle's contents."""
        return picture.raw(x, y, width, height, self.form)


class Hextile:
    """Tiles of 16 by 16: a background and what differs from it."""

    encoding = Encoding.HEXTILE

    def __init__(self, form: PixelFormat) -> None:
        self.form = form

    def encode(self, picture: Picture, x: int, y: int, width: int, height: int) -> bytes:
        """The rectangle's contents."""
        return b"".join(self._tile(picture, *tile) for tile in _tiles(x, y, width, height, HEX_TILE))

    def _tile(self, picture: Picture, x: int, y: int, width: int, height: int) -> bytes:
        form = self.form
        colours = picture.palette(x, y, width, height, HEX_TILE)
        whole = width * height * form.size
        if colours is not None:
            if len(colours) == 1:
                return bytes((HEX_BACKGROUND,)) + colour(colours[0], form)
            made = self._rectangles(picture, x, y, width, height, colours)
            if made is not None and len(made) <= whole:
                return made
        return bytes((HEX_RAW,)) + picture.raw(x, y, width, height, form)

    def _rectangles(
        self, picture: Picture, x: int, y: int, width: int, height: int, colours: list[int]
    ) -> bytes | None:
        form = self.form
        parts = picture.runs(x, y, width, height, colours[0])
        if len(parts) > 255:
            return None
        mask = HEX_BACKGROUND | HEX_RECTANGLES
        head = colour(colours[0], form)
        if len(colours) == 2:
            mask |= HEX_FOREGROUND
            head += colour(colours[1], form)
        else:
            mask |= HEX_COLOURED
        body = bytearray()
        for ink, left, top, across, down in parts:
            if mask & HEX_COLOURED:
                body += colour(ink, form)
            body += bytes((left << 4 | top, (across - 1) << 4 | (down - 1)))
        return bytes((mask,)) + head + bytes((len(parts),)) + bytes(body)


class Zrle:
    """Tiles of 64 by 64, each with a palette where it has few colours, all in one stream of zlib."""

    encoding = Encoding.ZRLE

    def __init__(self, form: PixelFormat) -> None:
        self.form = form
        self._stream = zlib.compressobj(ZLIB_LEVEL)

    def encode(self, picture: Picture, x: int, y: int, width: int, height: int) -> bytes:
        """The rectangle's contents."""
        tiles = b"".join(self._tile(picture, *tile) for tile in _tiles(x, y, width, height, ZRLE_TILE))
        data = self._stream.compress(tiles) + self._stream.flush(zlib.Z_SYNC_FLUSH)
        return struct.pack(">I", len(data)) + data

    def _tile(self, picture: Picture, x: int, y: int, width: int, height: int) -> bytes:
        form = self.form
        colours = picture.palette(x, y, width, height, 16)
        if colours is None:
            return b"\0" + picture.compact(x, y, width, height, form)
        if len(colours) == 1:
            return bytes((ZRLE_SOLID,)) + compact_colour(colours[0], form)
        bits = 1 if len(colours) == 2 else 2 if len(colours) <= 4 else 4
        palette = b"".join(compact_colour(value, form) for value in colours)
        return bytes((len(colours),)) + palette + picture.indices(x, y, width, height, colours, bits)


class Tight:
    """One colour, a palette, or pixels, each in a stream of zlib of its own. No JPEG: what is sent is exact."""

    encoding = Encoding.TIGHT

    def __init__(self, form: PixelFormat) -> None:
        self.form = form
        self._streams = [zlib.compressobj(ZLIB_LEVEL) for _ in range(2)]

    def encode(self, picture: Picture, x: int, y: int, width: int, height: int) -> bytes:
        """The contents of a rectangle of up to 2048 pixels' width."""
        form = self.form
        colours = picture.palette(x, y, width, height, TIGHT_COLOURS)
        if colours is None:
            pixels = picture.compact(x, y, width, height, form, True)
            return bytes((STREAM_FULL << 4,)) + self._compress(STREAM_FULL, pixels)
        if len(colours) == 1:
            return bytes((TIGHT_FILL,)) + compact_colour(colours[0], form, True)
        palette = b"".join(compact_colour(value, form, True) for value in colours)
        indices = picture.indices(x, y, width, height, colours, 1 if len(colours) == 2 else 8)
        head = bytes((TIGHT_FILTER | STREAM_INDEXED << 4, FILTER_PALETTE, len(colours) - 1))
        return head + palette + self._compress(STREAM_INDEXED, indices)

    def _compress(self, stream: int, data: bytes) -> bytes:
        if len(data) < TIGHT_RAW_BELOW:
            return data
        compressor = self._streams[stream]
        packed = compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH)
        return compact_length(len(packed)) + packed


def compact_length(length: int) -> bytes:
    """A length below 2^22 in one to three bytes of 7, 7 and 8 bits."""
    if length < 1 << 7:
        return bytes((length,))
    if length < 1 << 14:
        return bytes((length & 0x7F | 0x80, length >> 7))
    return bytes((length & 0x7F | 0x80, length >> 7 & 0x7F | 0x80, length >> 14))


# What the server can send; a viewer names those that it understands, the best first.
ENCODERS: dict[int, type[Raw] | type[Hextile] | type[Zrle] | type[Tight]] = {
    Encoding.RAW: Raw, Encoding.HEXTILE: Hextile, Encoding.TIGHT: Tight, Encoding.ZRLE: Zrle,
}  # fmt: skip
