"""What a machine shows, for scripts and for viewers."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vmonty.base.errors import UsageError
from vmonty.base.ram import Ram
from vmonty.vmm.hw.vga.scanout import Mode, TextMode

# What a viewer gets while the adapter shows nothing.
DARK_WIDTH, DARK_HEIGHT = 640, 400


@dataclass(frozen=True)
class Frame:
    """A picture: *pixels* has four bytes for each, blue, green, red and one that means nothing; lines from the top."""

    width: int
    height: int
    pixels: bytearray


class Screen:
    """The screen of one display adapter. *mode* tells what its registers say, *memory* is its video memory."""

    def __init__(self, mode: Callable[[], Mode | None], memory: Ram) -> None:
        self._mode = mode
        self._memory = memory
        self._lock = threading.Lock()
        self._drawn: tuple[TextMode, bytes] | None = None
        self._frame: Frame | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        mode = self._mode()
        return (DARK_WIDTH, DARK_HEIGHT) if mode is None else (mode.width, mode.height)

    @property
    def is_text(self) -> bool:
        """Is this a text mode, which ``text`` can read?"""
        return isinstance(self._mode(), TextMode)

    def frame(self) -> Frame:
        """The picture now. From any thread. The same object again while a text screen has not changed."""
        with self._lock:
            mode = self._mode()
            if mode is None:
                self._drawn = None
                return Frame(DARK_WIDTH, DARK_HEIGHT, bytearray(4 * DARK_WIDTH * DARK_HEIGHT))
            if isinstance(mode, TextMode):
                # Characters, attributes and fonts all lie in the four planes: 256 KiB are compared in no time.
                contents = bytes(self._memory.view(0, 0x40000))
                if self._frame is not None and self._drawn == (mode, contents):
                    return self._frame
                self._drawn = mode, contents
            else:
                self._drawn = None
            pixels = bytearray(4 * mode.width * mode.height)
            mode.draw(self._memory, pixels)
            self._frame = Frame(mode.width, mode.height, pixels)
            return self._frame

    def text(self) -> str:
        """The characters of a text mode, a line for each row without blanks at its end.

        What code page 437 has no letter for is a blank. Raises UsageError in a graphics mode or on a dark screen.
        """
        mode = self._mode()
        if not isinstance(mode, TextMode):
            raise UsageError("the screen shows no text now, but graphics or nothing; look at its picture instead")
        rows = [cells[::2].translate(_PRINTABLE).decode("cp437").rstrip() for cells in mode.cells(self._memory)]
        return "\n".join(rows)

    def png(self) -> bytes:
        """The picture as a PNG file has it."""
        from PIL import Image

        frame = self.frame()
        image = Image.frombytes("RGB", (frame.width, frame.height), bytes(frame.pixels), "raw", "BGRX")
        made = io.BytesIO()
        image.save(made, format="PNG")
        return made.getvalue()

    def save(self, path: str | Path) -> None:
        """Write the picture as a PNG file. Raises UsageError when that cannot be written."""
        save(path, self.png())


def save(path: str | Path, picture: bytes) -> None:
    """Write a picture. Raises UsageError when that is not possible."""
    try:
        Path(path).write_bytes(picture)
    except OSError as error:
        raise UsageError(f"the screenshot {path} cannot be written: {error.strerror}") from error


# Below 0x20 the code page has pictures, which Python's codec takes for control characters.
_PRINTABLE = bytes(code if 0x20 <= code != 0x7F else 0x20 for code in range(256))
