"""A VNC viewer for tests: decodes each encoding to pixels of blue, green, red, nothing."""

from __future__ import annotations

import socket
import struct
import zlib
from collections.abc import Sequence

from vmonty.vmm.display.vnc.encodings import Encoding
from vmonty.vmm.display.vnc.security import response

NATIVE = struct.pack(">BBBBHHHBBBxxx", 32, 24, 0, 1, 255, 255, 255, 16, 8, 0)


class Client:
    """Connects and says hello; ``picture`` is what was received."""

    def __init__(
        self, port: int, encodings: Sequence[int] = (0,), *, password: str | None = None, shared: bool = True,
        version: bytes = b"RFB 003.008\n", form: bytes | None = None,
    ) -> None:  # fmt: skip
        self.socket = socket.create_connection(("127.0.0.1", port), 20)
        try:
            self._begin(encodings, password, shared, version, form)
        except BaseException:
            self.close()
            raise

    def _begin(
        self, encodings: Sequence[int], password: str | None, shared: bool, version: bytes, form: bytes | None
    ) -> None:
        self.result = 0
        assert self.read(12) == b"RFB 003.008\n"
        self.socket.sendall(version)
        if version == b"RFB 003.003\n":
            kind = struct.unpack(">I", self.read(4))[0]
        else:
            kind = self.read(self.read(1)[0])[0]
            self.socket.sendall(bytes((kind,)))
        if kind == 2:
            assert password is not None
            self.socket.sendall(response(password, self.read(16)))
        if kind == 2 or version >= b"RFB 003.008\n":
            self.result = struct.unpack(">I", self.read(4))[0]
            if self.result:
                return
        self.socket.sendall(bytes((shared,)))
        self.width, self.height = struct.unpack(">HH", self.read(4))
        self.format = self.read(16)
        self.name = self.read(struct.unpack(">I", self.read(4))[0]).decode()
        self.picture = bytearray(4 * self.width * self.height)
        self.seen: list[int] = []
        self._streams = [zlib.decompressobj() for _ in range(5)]
        if form is not None:
            self.socket.sendall(b"\0\0\0\0" + form)
        self.socket.sendall(struct.pack(f">BxH{len(encodings)}i", 2, len(encodings), *encodings))

    def read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            if not (part := self.socket.recv(size - len(data))):
                raise ConnectionError("the server closed the connection")
            data += part
        return bytes(data)

    def close(self) -> None:
        self.socket.close()

    def request(self, incremental: bool = True) -> None:
        self.socket.sendall(struct.pack(">BB4H", 3, incremental, 0, 0, self.width, self.height))

    def key(self, keysym: int, down: bool) -> None:
        self.socket.sendall(struct.pack(">BBxxI", 4, down, keysym))

    def point(self, buttons: int, x: int, y: int) -> None:
        self.socket.sendall(struct.pack(">BBHH", 5, buttons, x, y))

    def update(self, incremental: bool = True) -> list[tuple[int, int, int, int, int]]:
        """Ask for an update and take it in; returns the rectangles with their encodings."""
        self.request(incremental)
        return self.receive()

    def receive(self) -> list[tuple[int, int, int, int, int]]:
        kind, count = struct.unpack(">BxH", self.read(4))
        assert kind == 0
        found = []
        for _ in range(count):
            x, y, width, height, encoding = struct.unpack(">HHHHi", self.read(12))
            found.append((x, y, width, height, encoding))
            self._rectangle(x, y, width, height, encoding)
        return found

    def _rectangle(self, x: int, y: int, width: int, height: int, encoding: int) -> None:
        match encoding:
            case Encoding.RAW:
                self._put(x, y, width, height, self.read(4 * width * height))
            case Encoding.COPY_RECT:
                left, top = struct.unpack(">HH", self.read(4))
                rows = [self._row(left, top + line, width) for line in range(height)]
                self._put(x, y, width, height, b"".join(rows))
            case Encoding.HEXTILE:
                self._hextile(x, y, width, height)
            case Encoding.ZRLE:
                self._zrle(x, y, width, height)
            case Encoding.TIGHT:
                self._tight(x, y, width, height)
            case Encoding.DESKTOP_SIZE:
                self._resize(width, height)
            case Encoding.EXTENDED_DESKTOP_SIZE:
                self.read(4 + 16)
                if y == 0:
                    self._resize(width, height)
            case Encoding.POINTER_TYPE_CHANGE | Encoding.EXTENDED_KEY_EVENT:
                self.seen.append(encoding)
            case _:
                raise AssertionError(f"encoding {encoding} was not asked for")

    def _resize(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.picture = bytearray(4 * width * height)

    def _row(self, x: int, y: int, width: int) -> bytes:
        at = 4 * (y * self.width + x)
        return bytes(self.picture[at : at + 4 * width])

    def _put(self, x: int, y: int, width: int, height: int, pixels: bytes) -> None:
        assert len(pixels) == 4 * width * height
        for line in range(height):
            at = 4 * ((y + line) * self.width + x)
            self.picture[at : at + 4 * width] = pixels[4 * width * line : 4 * width * (line + 1)]

    def _hextile(self, x: int, y: int, width: int, height: int) -> None:
        back = fore = b""
        for top in range(y, y + height, 16):
            for left in range(x, x + width, 16):
                across, down = min(16, x + width - left), min(16, y + height - top)
                mask = self.read(1)[0]
                if mask & 1:
                    self._put(left, top, across, down, self.read(4 * across * down))
                    continue
                back = self.read(4) if mask & 2 else back
                fore = self.read(4) if mask & 4 else fore
                self._put(left, top, across, down, back * (across * down))
                for _ in range(self.read(1)[0] if mask & 8 else 0):
                    ink = self.read(4) if mask & 16 else fore
                    place, size = self.read(2)
                    w, h = (size >> 4) + 1, (size & 15) + 1
                    self._put(left + (place >> 4), top + (place & 15), w, h, ink * (w * h))

    def _zrle(self, x: int, y: int, width: int, height: int) -> None:
        data = self._streams[4].decompress(self.read(struct.unpack(">I", self.read(4))[0]))
        at = 0

        def take(size: int) -> bytes:
            nonlocal at
            at += size
            assert at <= len(data)
            return data[at - size : at]

        def pixel() -> bytes:
            return take(3) + b"\0"

        for top in range(y, y + height, 64):
            for left in range(x, x + width, 64):
                across, down = min(64, x + width - left), min(64, y + height - top)
                kind = take(1)[0]
                if kind == 0:
                    tile = b"".join(pixel() for _ in range(across * down))
                elif kind == 1:
                    tile = pixel() * (across * down)
                else:
                    assert kind <= 16
                    palette = [pixel() for _ in range(kind)]
                    bits = 1 if kind == 2 else 2 if kind <= 4 else 4
                    tile = b"".join(_unpack(take((across * bits + 7) // 8), across, bits, palette) for _ in range(down))
                self._put(left, top, across, down, tile)
        assert at == len(data)

    def _tight(self, x: int, y: int, width: int, height: int) -> None:
        def pixel(source: bytes) -> bytes:
            return bytes((source[2], source[1], source[0], 0))

        control = self.read(1)[0]
        if control >> 4 == 8:
            self._put(x, y, width, height, pixel(self.read(3)) * (width * height))
            return
        assert control < 0x80
        palette: list[bytes] = []
        size = 3 * width * height
        if control & 0x40:
            assert self.read(1) == b"\1"
            palette = [pixel(self.read(3)) for _ in range(self.read(1)[0] + 1)]
            size = height * ((width + 7) // 8 if len(palette) == 2 else width)
        if size < 12:
            data = self.read(size)
        else:
            length = shift = 0
            for number in range(3):
                byte = self.read(1)[0]
                length |= (byte if number == 2 else byte & 0x7F) << shift
                shift += 7
                if not byte & 0x80:
                    break
            data = self._streams[control >> 4 & 3].decompress(self.read(length))
        assert len(data) == size
        if not palette:
            made = b"".join(pixel(data[at : at + 3]) for at in range(0, size, 3))
        elif len(palette) == 2:
            per_line = (width + 7) // 8
            made = b"".join(
                _unpack(data[per_line * line : per_line * (line + 1)], width, 1, palette) for line in range(height)
            )
        else:
            made = b"".join(palette[index] for index in data)
        self._put(x, y, width, height, made)


def _unpack(data: bytes, count: int, bits: int, palette: list[bytes]) -> bytes:
    per_byte = 8 // bits
    mask = (1 << bits) - 1
    return b"".join(palette[data[at // per_byte] >> 8 - bits - bits * (at % per_byte) & mask] for at in range(count))
