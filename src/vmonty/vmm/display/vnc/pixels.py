"""Rectangles of a picture in the form that a viewer asked for, and what its encodings need to know of them.

Fenced: it works on raw pointers; each method first checks that its rectangle lies inside the picture.
Source: RFC 6143, 7.4 "Pixel Format Data Structure", 7.7.5 and 7.7.6 for compact pixels; the RFB protocol's community
description, "Tight Encoding", for TPIXEL.
"""

from __future__ import annotations

import cython


class PixelFormat:
    """How a viewer wants pixels: *size* bytes (1, 2 or 4), and for red, green and blue its greatest value and place.

    ``compact`` is how many bytes a ZRLE pixel has, ``tight`` a Tight pixel; ``native`` means that nothing is converted.
    Raises ValueError for a format that no pixel of that size can have.
    """

    def __init__(self, size, depth, big_endian, maxima, shifts):  # type: ignore[no-untyped-def]
        if size not in (1, 2, 4) or not 0 < depth <= 8 * size:
            raise ValueError(f"a pixel of {size} bytes with {depth} bits of colour")
        taken = 0
        for greatest, shift in zip(maxima, shifts, strict=True):
            if not 0 < greatest <= 0xFFFF or greatest & (greatest + 1) or shift + greatest.bit_length() > 8 * size:
                raise ValueError(f"a colour of 0 to {greatest} at bit {shift} of a pixel of {size} bytes")
            taken |= greatest << shift
        self.size = size
        self.depth = depth
        self.big_endian = bool(big_endian)
        self.maxima = tuple(maxima)
        self.shifts = tuple(shifts)
        for part in range(3):
            self._max[part] = maxima[part]
            self._shift[part] = shifts[part]
        eight = self.maxima == (255, 255, 255)
        self.native = size == 4 and not self.big_endian and eight and self.shifts == (16, 8, 0)
        # Three bytes do where the colours lie in three of the four.
        low, high = taken < 1 << 24, not taken & 0xFF
        self.compact = 3 if size == 4 and depth <= 24 and (low or high) else size
        self._compact_from = 0 if low != self.big_endian else 1
        self._rgb = size == 4 and depth == 24 and eight

    @property
    def tight(self) -> int:
        """Bytes of a pixel in Tight encoding."""
        return 3 if self._rgb else self.size

    def _value(self, pixel):  # type: ignore[no-untyped-def]
        red: cython.uint = pixel >> 16 & 255
        green: cython.uint = pixel >> 8 & 255
        blue: cython.uint = pixel & 255
        return (
            (red * self._max[0] + 127) // 255 << self._shift[0]
            | (green * self._max[1] + 127) // 255 << self._shift[1]
            | (blue * self._max[2] + 127) // 255 << self._shift[2]
        )

    def _put(self, at, pixel):  # type: ignore[no-untyped-def]
        value: uint32_t = self._value(pixel)
        byte: cython.int
        for byte in range(self.size):
            at[byte] = (value >> (8 * (self.size - 1 - byte if self.big_endian else byte))) & 0xFF
        return at + self.size

    def _put_compact(self, at, pixel):  # type: ignore[no-untyped-def]
        four: uint8_t[4]
        self._put(four, pixel)
        if self.compact != 3:
            memcpy(at, four, self.size)
            return at + self.size
        memcpy(at, four + self._compact_from, 3)
        return at + 3

    def _put_tight(self, at, pixel):  # type: ignore[no-untyped-def]
        if not self._rgb:
            return self._put(at, pixel)
        at[0] = pixel >> 16 & 255
        at[1] = pixel >> 8 & 255
        at[2] = pixel & 255
        return at + 3


def colour(pixel, form: PixelFormat) -> bytes:  # type: ignore[no-untyped-def]
    """One of our pixels in the viewer's form."""
    four: uint8_t[4]
    form._put(four, pixel)
    return four[: form.size]


def compact_colour(pixel, form: PixelFormat, tight=False) -> bytes:  # type: ignore[no-untyped-def]
    """One of our pixels as ZRLE has it, or Tight."""
    four: uint8_t[4]
    if tight:
        form._put_tight(four, pixel)
        return four[: form.tight]
    form._put_compact(four, pixel)
    return four[: form.compact]


def _of_two(source, width, first, second):  # type: ignore[no-untyped-def]
    """Are all pixels one of two colours? Without a branch for each: text changes colour all the time."""
    others: uint32_t = 0
    column: cython.int
    for column in range(width):
        pixel: uint32_t = source[column] & 0xFFFFFF
        others |= (pixel != first) & (pixel != second)
    return not others


def _mark(at, source, width, colour):  # type: ignore[no-untyped-def]
    """A bit for each pixel that is of *colour*, the first highest."""
    column: cython.int
    byte: cython.uint = 0
    for column in range(width):
        byte = byte << 1 | ((source[column] & 0xFFFFFF) == colour)
        if column & 7 == 7:
            at[column >> 3] = byte & 0xFF
    if width & 7:
        at[width >> 3] = byte << (8 - (width & 7)) & 0xFF


class Picture:
    """A picture of four bytes a pixel: blue, green, red, nothing."""

    def __init__(self, pixels, width, height):  # type: ignore[no-untyped-def]
        view: cython.const[cython.uchar][::1] = pixels
        if not 0 < width <= 0xFFFF or not 0 < height <= 0xFFFF or view.shape[0] < 4 * width * height:
            raise ValueError("the picture is smaller than its size says")
        self._pixels = pixels
        self._view = view
        self._base = cython.cast(cython.pointer[cython.const[uint32_t]], cython.address(view[0]))
        self.width = width
        self.height = height

    def _check(self, x, y, width, height):  # type: ignore[no-untyped-def]
        if x < 0 or y < 0 or width <= 0 or height <= 0 or x + width > self.width or y + height > self.height:
            raise ValueError(f"{width}x{height} at {x},{y} is outside the picture")
        return 0

    def raw(self, x: cython.int, y: cython.int, width: cython.int, height: cython.int, form: PixelFormat) -> bytes:
        """The rectangle's pixels, line by line."""
        self._check(x, y, width, height)
        made = bytearray(width * height * form.size)
        out: cython.uchar[::1] = made
        at: cython.pointer[uint8_t] = cython.address(out[0])
        line: cython.int
        column: cython.int
        for line in range(y, y + height):
            source: cython.pointer[cython.const[uint32_t]] = self._base + line * self.width + x
            if form.native:
                memcpy(at, source, 4 * width)
                at += 4 * width
            else:
                for column in range(width):
                    at = form._put(at, source[column])
        return bytes(made)

    def compact(  # type: ignore[no-untyped-def]
        self, x: cython.int, y: cython.int, width: cython.int, height: cython.int, form: PixelFormat, tight=False
    ) -> bytes:
        """As raw, in ZRLE's or Tight's pixels."""
        self._check(x, y, width, height)
        made = bytearray(width * height * (form.tight if tight else form.compact))
        out: cython.uchar[::1] = made
        at: cython.pointer[uint8_t] = cython.address(out[0])
        line: cython.int
        column: cython.int
        fewer: cython.bint = tight
        for line in range(y, y + height):
            source: cython.pointer[cython.const[uint32_t]] = self._base + line * self.width + x
            for column in range(width):
                at = form._put_tight(at, source[column]) if fewer else form._put_compact(at, source[column])
        return bytes(made)

    def palette(self, x: cython.int, y: cython.int, width: cython.int, height: cython.int, most: cython.int):  # type: ignore[no-untyped-def]
        """The colours of the rectangle, in the order in which they appear; None when there are more than *most*."""
        self._check(x, y, width, height)
        colours: uint32_t[MOST_COLOURS]
        count: cython.int = 0
        line: cython.int
        column: cython.int
        known: cython.int
        limit: cython.int = min(most, MOST_COLOURS)
        last: uint32_t = 0
        for line in range(y, y + height):
            source: cython.pointer[cython.const[uint32_t]] = self._base + line * self.width + x
            if count >= 2 and _of_two(source, width, colours[0], colours[1]):
                continue
            for column in range(width):
                pixel: uint32_t = source[column] & 0xFFFFFF
                if count and pixel == last:
                    continue
                last = pixel
                for known in range(count):
                    if colours[known] == pixel:
                        break
                else:
                    if count == limit:
                        return None
                    colours[count] = pixel
                    count += 1
        return [colours[known] for known in range(count)]

    def indices(  # type: ignore[no-untyped-def]
        self, x: cython.int, y: cython.int, width: cython.int, height: cython.int, palette: list, bits: cython.int
    ) -> bytes:
        """Each pixel as its place in *palette*, in *bits* bits (1, 2, 4 or 8), the first highest; lines fill bytes."""
        self._check(x, y, width, height)
        if bits not in (1, 2, 4, 8) or not 0 < len(palette) <= 1 << bits:
            raise ValueError(f"{len(palette)} colours in {bits} bits")
        colours: uint32_t[MOST_COLOURS]
        count: cython.int = len(palette)
        known: cython.int
        for known in range(count):
            colours[known] = palette[known]
        per_line: cython.int = (width * bits + 7) // 8
        made = bytearray(per_line * height)
        out: cython.uchar[::1] = made
        line: cython.int
        column: cython.int
        last: uint32_t = colours[0]
        found: cython.int = 0
        for line in range(height):
            source: cython.pointer[cython.const[uint32_t]] = self._base + (y + line) * self.width + x
            at: cython.pointer[uint8_t] = cython.address(out[line * per_line])
            if count == 2 and bits == 1 and _of_two(source, width, colours[0], colours[1]):
                _mark(at, source, width, colours[1])
                continue
            place: cython.int = 0
            for column in range(width):
                pixel: uint32_t = source[column] & 0xFFFFFF
                if pixel != last:
                    for known in range(count):
                        if colours[known] == pixel:
                            found, last = known, pixel
                            break
                    else:
                        # The picture is not the one that the palette came from.
                        raise ValueError("a pixel is not in the palette")
                at[place >> 3] |= found << (8 - bits - (place & 7))
                place += bits
        return bytes(made)

    def runs(  # type: ignore[no-untyped-def]
        self, x: cython.int, y: cython.int, width: cython.int, height: cython.int, background
    ):
        """What is not *background*, as lines of one colour: (colour, x, y, width, height), places in the rectangle.

        Equal runs of neighbouring lines are one rectangle.
        """
        self._check(x, y, width, height)
        behind: uint32_t = background
        line: cython.int
        column: cython.int
        found = []
        above: dict = {}
        for line in range(height):
            source: cython.pointer[cython.const[uint32_t]] = self._base + (y + line) * self.width + x
            here: dict = {}
            column = 0
            while column < width:
                pixel: uint32_t = source[column] & 0xFFFFFF
                begin: cython.int = column
                while column < width and source[column] & 0xFFFFFF == pixel:
                    column += 1
                if pixel != behind:
                    key = pixel, begin, column - begin
                    if key in above:
                        number = above[key]
                        found[number] = (*found[number][:4], found[number][4] + 1)
                    else:
                        number = len(found)
                        found.append((pixel, begin, line, column - begin, 1))
                    here[key] = number
            above = here
        return found
