"""What a viewer has to be sent so that its picture is the screen's.

A viewer's picture is remembered as it was last sent: so nothing has to be noted for it between two updates.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from vmonty.vmm.display.frame import TILE, changed_tiles, find_scroll
from vmonty.vmm.display.screen import Frame
from vmonty.vmm.display.vnc.encodings import ENCODERS, TIGHT_WIDTH, Encoding, Raw, rectangle
from vmonty.vmm.display.vnc.pixels import Picture, PixelFormat

NATIVE = PixelFormat(4, 24, False, (255, 255, 255), (16, 8, 0))
# A scroll is looked for when at least this part of the tiles changed.
SCROLL_FROM = 0.25


class Updates:
    """One viewer's picture, and how it wants to be told of changes."""

    def __init__(self) -> None:
        self._encoder: Raw = Raw(NATIVE)
        self._streams: dict[int, Raw] = {Encoding.RAW: self._encoder}
        self._form = NATIVE
        self._encodings: tuple[int, ...] = ()
        self._sent: Frame | None = None
        self._size: tuple[int, int] | None = None

    def set_format(self, form: PixelFormat) -> None:
        """From now on pixels are of *form*; its streams of zlib begin anew only where no rectangle used them."""
        self._form = form
        for encoder in self._streams.values():
            encoder.form = form

    def set_encodings(self, encodings: Sequence[int]) -> None:
        """What the viewer understands, the best first."""
        self._encodings = tuple(encodings)
        best = next((number for number in encodings if number in ENCODERS), Encoding.RAW)
        if best not in self._streams:
            self._streams[best] = ENCODERS[best](self._form)  # type: ignore[assignment]
        self._encoder = self._streams[best]

    def understands(self, encoding: Encoding) -> bool:
        """Did the viewer name it?"""
        return encoding in self._encodings

    def announce(self, width: int, height: int) -> None:
        """The viewer was told this size when it began."""
        self._size = width, height

    def forget(self) -> None:
        """The viewer wants everything again."""
        self._sent = None

    def difference(self, frame: Frame) -> list[bytes]:
        """The rectangles that make the viewer's picture *frame*, none when it is so already.

        A viewer that does not understand a change of size sees the part that fits.
        """
        size = frame.width, frame.height
        if self._sent is frame:
            return []
        if size != self._size and (resize := self._resize(*size)) is not None:
            self._size, self._sent = size, None
            return [resize]
        made = []
        before = self._sent
        if before is not None and (before.width, before.height) != size:
            before = None
        if before is None:
            areas: Iterator[tuple[int, int, int, int]] = iter([(0, 0, frame.width, frame.height)])
        else:
            tiles = changed_tiles(before.pixels, frame.pixels, *size)
            if not any(tiles):
                self._sent = frame
                return []
            # A copy of what lies outside the viewer's picture would be of nothing.
            whole = size == self._size
            if whole and self.understands(Encoding.COPY_RECT) and _share(tiles, frame) > SCROLL_FROM:
                moved, rectangles = _scroll(before, frame)
                if rectangles:
                    made += rectangles
                    tiles = changed_tiles(moved.pixels, frame.pixels, *size)
            areas = _areas(tiles, frame)
        picture = Picture(frame.pixels, *size)
        for area in areas:
            for x, y, width, height in self._fitting(*area):
                body = self._encoder.encode(picture, x, y, width, height)
                made.append(rectangle(x, y, width, height, self._encoder.encoding, body))
        self._sent = frame
        return made

    def _fitting(self, x: int, y: int, width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
        """The part that the viewer's picture has, in pieces that every encoding can carry."""
        assert self._size is not None
        width, height = min(width, self._size[0] - x), min(height, self._size[1] - y)
        if width <= 0 or height <= 0:
            return
        for left in range(x, x + width, TIGHT_WIDTH):
            # A Tight rectangle's compressed data has to fit 22 bits.
            for top in range(y, y + height, 256):
                yield left, top, min(TIGHT_WIDTH, x + width - left), min(256, y + height - top)

    def _resize(self, width: int, height: int) -> bytes | None:
        if self.understands(Encoding.EXTENDED_DESKTOP_SIZE):
            screen = struct.pack(">BxxxIHHHHI", 1, 0, 0, 0, width, height, 0)
            return rectangle(0, 0, width, height, Encoding.EXTENDED_DESKTOP_SIZE, screen)
        if self.understands(Encoding.DESKTOP_SIZE):
            return rectangle(0, 0, width, height, Encoding.DESKTOP_SIZE)
        return None


def _share(tiles: list[int], frame: Frame) -> float:
    across = -(-frame.width // TILE[0])
    return sum(mask.bit_count() for mask in tiles) / (across * len(tiles))


def _scroll(before: Frame, frame: Frame) -> tuple[Frame, list[bytes]]:
    """What the viewer's picture is after a copy inside it, and the rectangle that says so."""
    found = find_scroll(before.pixels, frame.pixels, frame.width, frame.height)
    if found is None:
        return before, []
    first, lines, up = found
    pixels = bytearray(before.pixels)
    stride = 4 * frame.width
    source = (first + up) * stride
    pixels[first * stride : (first + lines) * stride] = memoryview(before.pixels)[source : source + lines * stride]
    body = struct.pack(">HH", 0, first + up)
    copy = rectangle(0, first, frame.width, lines, Encoding.COPY_RECT, body)
    return Frame(frame.width, frame.height, pixels), [copy]


def _areas(tiles: list[int], frame: Frame) -> Iterator[tuple[int, int, int, int]]:
    """Rectangles of changed tiles: runs of a row, joined with equal runs below."""
    across = -(-frame.width // TILE[0])
    row = 0
    while row < len(tiles):
        mask = tiles[row]
        rows = 1
        while row + rows < len(tiles) and tiles[row + rows] == mask:
            rows += 1
        top, height = row * TILE[1], min(rows * TILE[1], frame.height - row * TILE[1])
        first = 0
        while first < across:
            if not mask >> first & 1:
                first += 1
                continue
            end = first
            while end < across and mask >> end & 1:
                end += 1
            left = first * TILE[0]
            yield left, top, min((end - first) * TILE[0], frame.width - left), height
            first = end
        row += rows
