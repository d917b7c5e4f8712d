"""Draws what is in video memory: pixels of four bytes, blue, green, red and one that is 0.

Fenced: it works on raw pointers. That is safe because sizes of *out* and of the palette are checked first, and every
place in video memory is reduced to its size (a power of two) where it is read. The guest may write meanwhile: a
picture may then be torn, as on a screen.

Source: IBM Personal System/2 Hardware Interface Technical Reference, "Video Subsystem", "Alphanumeric Modes",
"Graphics Modes"; a pixel of 15, 16, 24 or 32 bits is as VESA's "VBE Core Functions" 3.0, "Direct Color Fields", has it.
"""

from __future__ import annotations

import cython

_PLANE_MASK = cython.declare(cython.int, 0xFFFF)


def text_cells(memory, start, pitch, scale, columns, rows):  # type: ignore[no-untyped-def]
    """Each row's cells as bytes: character and attribute in turn. *memory* is the four planes, 256 KiB."""
    planes: cython.const[cython.uchar][::1] = memory
    if planes.shape[0] < 0x40000:
        raise ValueError("four planes are 256 KiB")
    row: cython.int
    column: cython.int
    found = []
    for row in range(rows):
        cells = bytearray(2 * columns)
        for column in range(columns):
            at: cython.size_t = cython.cast(cython.size_t, (start + row * pitch + column) * scale & 0xFFFF) * 4
            cells[2 * column] = planes[at]
            cells[2 * column + 1] = planes[at + 1]
        found.append(bytes(cells))
    return found


def _glyph_line(at, bits, width, ink, paper, repeat_last):  # type: ignore[no-untyped-def]
    dot: cython.int
    for dot in range(8):
        at[dot] = ink if bits & (cython.cast(cython.uint, 0x80) >> dot) else paper
    if width == 9:
        at[8] = ink if repeat_last and bits & 1 else paper


def draw_text(  # type: ignore[no-untyped-def]
    out, memory, start, pitch, scale, columns, rows, width, height, font, second_font, palette, cursor, cursor_first,
    cursor_last, line_graphics, blink,
):  # fmt: skip
    """Fill *out* with a text screen: see scanout.TextMode for the rest."""
    pixels: cython.uchar[::1] = out
    planes: cython.const[cython.uchar][::1] = memory
    colours: cython.const[cython.uchar][::1] = palette
    across: cython.int = columns
    down: cython.int = rows
    cell_width: cython.int = width
    cell_height: cython.int = height
    if planes.shape[0] < 0x40000 or colours.shape[0] < 64 or cell_width not in (8, 9) or not 0 < cell_height <= 32:
        raise ValueError("no text mode")
    if across <= 0 or down <= 0 or pixels.shape[0] < 4 * across * cell_width * down * cell_height:
        raise ValueError("the picture is too small for the mode")
    ink: cython.pointer[cython.const[uint32_t]] = cython.cast(
        cython.pointer[cython.const[uint32_t]], cython.address(colours[0])
    )
    target: cython.pointer[uint32_t] = cython.cast(cython.pointer[uint32_t], cython.address(pixels[0]))
    stride: cython.size_t = across * cell_width
    first: cython.uint = start
    step: cython.uint = pitch
    factor: cython.uint = scale
    fonts: cython.uint[2]
    fonts[0] = second_font
    fonts[1] = font
    cursor_at: cython.longlong = cursor
    top: cython.int = cursor_first
    bottom: cython.int = cursor_last
    graphics: cython.bint = line_graphics
    blinking: cython.bint = blink
    row: cython.int
    column: cython.int
    line: cython.int
    with cython.nogil:
        for row in range(down):
            for column in range(across):
                counter: cython.uint = (first + row * step + column) & 0xFFFF
                place: cython.size_t = cython.cast(cython.size_t, counter * factor & 0xFFFF) * 4
                character: cython.uint = planes[place]
                attribute: cython.uint = planes[place + 1]
                # With both maps the same, bit 3 is brightness only.
                glyphs: cython.uint = fonts[0] if attribute & 8 else fonts[1]
                front: uint32_t = ink[attribute & 15]
                back: uint32_t = ink[attribute >> 4 & 7 if blinking else attribute >> 4 & 15]
                repeat: cython.bint = graphics and character & 0xE0 == 0xC0
                shown: cython.bint = cursor_at == counter
                at: cython.pointer[uint32_t] = target + (row * cell_height) * stride + column * cell_width
                for line in range(cell_height):
                    glyph: cython.size_t = cython.cast(cython.size_t, (glyphs + character * 32 + line) & 0xFFFF) * 4 + 2
                    bits: cython.uint = planes[glyph]
                    if shown and top <= line <= bottom:
                        bits = 0xFF
                    _glyph_line(at, bits, cell_width, front, back, repeat)
                    at += stride


def _planar_line(at, memory, size, place, width, planes, palette):  # type: ignore[no-untyped-def]
    x: cython.int
    bit: cython.int
    for x in range(0, width, 8):
        four: cython.size_t = (place + (x >> 3)) * 4 & (size - 1)
        a: cython.uint = memory[four]
        b: cython.uint = memory[four + 1]
        c: cython.uint = memory[four + 2]
        d: cython.uint = memory[four + 3]
        for bit in range(8):
            shift: cython.int = 7 - bit
            colour: cython.uint = (
                (a >> shift & 1) | (b >> shift & 1) << 1 | (c >> shift & 1) << 2 | (d >> shift & 1) << 3
            )
            at[x + bit] = palette[colour & planes]


def _cga_line(at, memory, size, place, width, palette):  # type: ignore[no-untyped-def]
    x: cython.int
    for x in range(width):
        # Eight pixels of a counter's step: four in plane 0, four in plane 1.
        four: cython.size_t = (place + (x >> 3) * 2) * 4 & (size - 1)
        byte: cython.uint = memory[four + (x >> 2 & 1)]
        at[x] = palette[byte >> (6 - 2 * (x & 3)) & 3]


def _packed_line(at, memory, size, place, width, kind, palette):  # type: ignore[no-untyped-def]
    x: cython.int
    mask: cython.size_t = size - 1
    value: cython.uint
    if kind == RGB32 and place + 4 * cython.cast(cython.size_t, width) <= size:
        words: cython.pointer[cython.const[uint32_t]] = cython.cast(
            cython.pointer[cython.const[uint32_t]], memory + place
        )
        for x in range(width):
            at[x] = words[x] & 0xFFFFFF
        return
    for x in range(width):
        if kind == INDEXED:
            at[x] = palette[memory[(place + x) & mask]]
        elif kind == RGB32:
            value = memory[(place + 4 * x) & mask]
            value |= cython.cast(cython.uint, memory[(place + 4 * x + 1) & mask]) << 8
            at[x] = value | cython.cast(cython.uint, memory[(place + 4 * x + 2) & mask]) << 16
        elif kind == RGB24:
            value = memory[(place + 3 * x) & mask]
            value |= cython.cast(cython.uint, memory[(place + 3 * x + 1) & mask]) << 8
            at[x] = value | cython.cast(cython.uint, memory[(place + 3 * x + 2) & mask]) << 16
        else:
            value = memory[(place + 2 * x) & mask] | cython.cast(cython.uint, memory[(place + 2 * x + 1) & mask]) << 8
            blue: cython.uint = (value & 31) << 3 | (value & 31) >> 2
            green: cython.uint
            red: cython.uint
            if kind == RGB15:
                green = (value >> 5 & 31) << 3 | (value >> 5 & 31) >> 2
                red = (value >> 10 & 31) << 3 | (value >> 10 & 31) >> 2
            else:
                green = (value >> 5 & 63) << 2 | (value >> 5 & 63) >> 4
                red = (value >> 11 & 31) << 3 | (value >> 11 & 31) >> 2
            at[x] = blue | green << 8 | red << 16


def _widen(at, width):  # type: ignore[no-untyped-def]
    """Each pixel twice, in place: the last first."""
    x: cython.int
    for x in range(width - 1, -1, -1):
        at[2 * x + 1] = at[2 * x] = at[x]


def draw_pixels(  # type: ignore[no-untyped-def]
    out, memory, kind, columns, lines, wide, high, start, pitch, split, banked, planes, palette
):
    """Fill *out* with a graphics screen: see scanout.PixelMode for the rest."""
    pixels: cython.uchar[::1] = out
    video: cython.const[cython.uchar][::1] = memory
    colours: cython.const[cython.uchar][::1] = palette or bytes(4)
    across: cython.int = columns
    down: cython.int = lines
    times: cython.int = wide
    repeated: cython.int = high
    how: cython.int = kind
    size: cython.size_t = video.shape[0]
    if size < 0x40000 or size & (size - 1):
        raise ValueError("video memory is a power of two, 256 KiB or more")
    if colours.shape[0] < (1024 if how == INDEXED else 64 if how <= CGA else 4):
        raise ValueError("the palette is too small for the mode")
    if not (0 < across <= 4096 and 0 < down <= 4096 and 0 < times <= 2 and 0 < repeated <= 64):
        raise ValueError("no graphics mode")
    if pixels.shape[0] < 4 * across * times * down * repeated or (how == PLANAR and across & 7):
        raise ValueError("the picture does not fit the mode")
    ink: cython.pointer[cython.const[uint32_t]] = cython.cast(
        cython.pointer[cython.const[uint32_t]], cython.address(colours[0])
    )
    source: cython.pointer[cython.const[uint8_t]] = cython.address(video[0])
    target: cython.pointer[uint32_t] = cython.cast(cython.pointer[uint32_t], cython.address(pixels[0]))
    begin: cython.size_t = start
    step: cython.size_t = pitch
    second: cython.int = min(split, 0x7FFFFFFF)
    banks: cython.bint = banked
    enabled: cython.int = planes
    stride: cython.size_t = across * times
    y: cython.int
    copy: cython.int
    with cython.nogil:
        for y in range(down):
            number: cython.int = y - second if y >= second else y
            base: cython.size_t = 0 if y >= second else begin
            if banks:
                base = base + (number >> 1) * step + cython.cast(cython.size_t, (number & 1) * 0x2000)
            else:
                base = base + number * step
            if how == PLANAR:
                _planar_line(target, source, size, base, across, enabled, ink)
            elif how == CGA:
                _cga_line(target, source, size, base, across, ink)
            else:
                _packed_line(target, source, size, base, across, how, ink)
            if times == 2:
                _widen(target, across)
            for copy in range(1, repeated):
                memcpy(target + copy * stride, target, 4 * stride)
            target += stride * repeated
