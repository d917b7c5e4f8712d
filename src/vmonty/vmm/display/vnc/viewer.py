"""One viewer: its messages, and its updates.

Source: RFC 6143, 7.3 "Initialization Messages", 7.5 "Client-to-Server Messages", 7.6 "Server-to-Client Messages"; the
RFB protocol's community description for QEMU's and desktop-size messages.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable

from vmonty.vmm.display.input import Input
from vmonty.vmm.display.screen import Frame
from vmonty.vmm.display.vnc.encodings import Encoding, rectangle
from vmonty.vmm.display.vnc.pixels import PixelFormat
from vmonty.vmm.display.vnc.updates import NATIVE, Updates
from vmonty.vmm.display.vnc.wire import ProtocolError, Stream
from vmonty.vmm.hw.ps2 import EXTENDED_KEY

SET_PIXEL_FORMAT, SET_ENCODINGS, UPDATE_REQUEST, KEY_EVENT, POINTER_EVENT, CUT_TEXT = 0, 2, 3, 4, 5, 6
SET_DESKTOP_SIZE, QEMU = 251, 255
QEMU_KEY_EVENT, QEMU_AUDIO = 0, 1
UPDATE, SET_COLOUR_MAP = 0, 1
# A clipboard of more ends the connection: it would be read and thrown away.
MOST_CUT_TEXT = 1 << 20
RESIZE_PROHIBITED = 1
# Between two looks at the screen: while it changes, and when it has not for a while.
FRAME_TIME, IDLE_TIME = 1 / 60, 1 / 30
CHANGES_FOR = 0.25
RELATIVE_FROM = 0x4000  # viewers in relative mode send positions around MIDDLE; no screen is this wide


class Viewer:
    """A connection after its handshake. *frame* gives the picture; ``run``, after ``shares``, ends when it does."""

    def __init__(self, stream: Stream, name: str, frame: Callable[[], Frame], keys: Input) -> None:
        self._stream = stream
        self._name = name
        self._frame = frame
        self._input = keys
        self._updates = Updates()
        self._asked = asyncio.Event()
        self._everything = False
        self._news: list[bytes] = []  # pseudo-rectangles for the next update
        self._sending = asyncio.Lock()
        self._absolute: bool | None = None  # what it was told that the mouse is
        self._size = 0, 0  # the screen's, of which it may see a part

    async def shares(self) -> bool:
        """Its part of the initialization: whether others may see the screen as well."""
        return bool((await self._stream.read(1))[0])

    async def _introduce(self) -> None:
        frame = self._frame()
        name = self._name.encode()
        head = struct.pack(">HH", frame.width, frame.height) + describe(NATIVE)
        await self._stream.send(head + struct.pack(">I", len(name)) + name)
        self._size = frame.width, frame.height
        self._updates.announce(*self._size)

    async def run(self) -> None:
        """The server's part of it, and serve until it ends. Raises Disconnected or ProtocolError."""
        await self._introduce()
        updating = asyncio.create_task(self._update())
        listening = asyncio.create_task(self._listen())
        try:
            done, _ = await asyncio.wait((updating, listening), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            updating.cancel()
            listening.cancel()
            await asyncio.gather(updating, listening, return_exceptions=True)
            self._input.release()
            self._stream.close()

    # ---- to the viewer ----------------------------------------------------------------------------------------

    async def _update(self) -> None:
        clock = asyncio.get_running_loop().time
        due = changed = clock()
        while True:
            await self._asked.wait()
            if self._everything:
                self._everything = False
                self._updates.forget()
            self._tell_pointer()
            frame = self._frame()
            self._size = frame.width, frame.height
            rectangles = self._news + self._updates.difference(frame)
            self._news = []
            if rectangles:
                self._asked.clear()
                changed = clock()
                await self._send(struct.pack(">BxH", UPDATE, len(rectangles)) + b"".join(rectangles))
            # No viewer gets more frames than this, however often it asks.
            now = clock()
            due = max(due + (FRAME_TIME if now - changed < CHANGES_FOR else IDLE_TIME), now)
            await asyncio.sleep(due - now)

    async def _send(self, data: bytes) -> None:
        async with self._sending:
            await self._stream.send(data)

    # ---- from the viewer --------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        read = self._stream.read
        while True:
            kind = (await read(1))[0]
            match kind:
                case 0:  # SET_PIXEL_FORMAT
                    await self._set_format(await read(19))
                case 2:  # SET_ENCODINGS
                    (count,) = struct.unpack(">xH", await read(3))
                    self._set_encodings(struct.unpack(f">{count}i", await read(4 * count)))
                case 3:  # UPDATE_REQUEST
                    incremental = struct.unpack(">B4H", await read(9))[0]
                    self._everything |= not incremental
                    self._asked.set()
                case 4:  # KEY_EVENT
                    down, keysym = struct.unpack(">BxxI", await read(7))
                    self._input.keysym(keysym, bool(down))
                case 5:  # POINTER_EVENT
                    buttons, x, y = struct.unpack(">BHH", await read(5))
                    relative = self._absolute is not None and max(x, y) >= RELATIVE_FROM
                    self._input.point(x, y, buttons, relative, self._size)
                case 6:  # CUT_TEXT
                    await self._cut_text()
                case 251:  # SET_DESKTOP_SIZE
                    screens = struct.unpack(">x2HBx", await read(7))[-1]
                    await read(16 * screens)
                    self._refuse_size()
                case 255:  # QEMU
                    await self._extension()
                case _:
                    raise ProtocolError(f"message {kind} is unknown")

    async def _set_format(self, message: bytes) -> None:
        bits, depth, big, true_colour, *colours = struct.unpack(">xxxBBBBHHHBBBxxx", message)
        if not true_colour:
            await self._map_colours(bits)
            return
        try:
            form = PixelFormat(
                bits // 8 if bits in (8, 16, 32) else 0, depth, big, tuple(colours[:3]), tuple(colours[3:])
            )
        except ValueError as error:
            raise ProtocolError(f"an impossible pixel format: {error}") from error
        self._updates.set_format(form)

    async def _map_colours(self, bits: int) -> None:
        """A viewer with a colour map gets a fixed one: blue, green and red in 2, 3 and 3 bits."""
        if bits != 8:
            raise ProtocolError(f"a colour map for pixels of {bits} bits")
        colours = b"".join(
            struct.pack(">HHH", (value & 7) * 65535 // 7, (value >> 3 & 7) * 65535 // 7, (value >> 6) * 65535 // 3)
            for value in range(256)
        )
        self._updates.set_format(PixelFormat(1, 8, False, (7, 7, 3), (0, 3, 6)))
        await self._send(struct.pack(">BxHH", SET_COLOUR_MAP, 0, 256) + colours)

    def _set_encodings(self, encodings: tuple[int, ...]) -> None:
        self._updates.set_encodings(encodings)
        self._tell_pointer()
        if self._updates.understands(Encoding.EXTENDED_KEY_EVENT):
            self._tell(rectangle(0, 0, 0, 0, Encoding.EXTENDED_KEY_EVENT))

    def _tell_pointer(self) -> None:
        """Whether the mouse knows places, or motion alone: the guest's driver decides, at any time."""
        if self._updates.understands(Encoding.POINTER_TYPE_CHANGE) and self._absolute is not self._input.absolute:
            self._absolute = self._input.absolute
            self._tell(rectangle(int(self._absolute), 0, 0, 0, Encoding.POINTER_TYPE_CHANGE))

    def _tell(self, news: bytes) -> None:
        if news not in self._news:
            self._news.append(news)

    async def _cut_text(self) -> None:
        (length,) = struct.unpack(">xxxi", await self._stream.read(7))
        # Negative: the extended clipboard's messages, which nobody was offered.
        if not 0 <= length <= MOST_CUT_TEXT:
            raise ProtocolError(f"a clipboard of {length} bytes")
        await self._stream.read(length)

    def _refuse_size(self) -> None:
        frame = self._frame()
        screen = struct.pack(">BxxxIHHHHI", 1, 0, 0, 0, frame.width, frame.height, 0)
        head = struct.pack(">HHHHi", 1, RESIZE_PROHIBITED, frame.width, frame.height, Encoding.EXTENDED_DESKTOP_SIZE)
        self._tell(head + screen)

    async def _extension(self) -> None:
        (kind,) = await self._stream.read(1)
        if kind == QEMU_KEY_EVENT:
            down, _, code = struct.unpack(">HII", await self._stream.read(10))
            # A keycode is a scan code of set 1 with the extended keys above 0x80.
            if 0 < code <= 0xFF:
                self._input.code(EXTENDED_KEY | code & 0x7F if code & 0x80 else code, bool(down))
        elif kind == QEMU_AUDIO:
            raise ProtocolError("audio was not offered")
        else:
            raise ProtocolError(f"QEMU's message {kind} is unknown")


def describe(form: PixelFormat) -> bytes:
    """PIXEL_FORMAT of RFC 6143, 7.4."""
    return struct.pack(
        ">BBBBHHHBBBxxx", 8 * form.size, form.depth, form.big_endian, 1, *form.maxima, *form.shifts
    )  # fmt: skip
