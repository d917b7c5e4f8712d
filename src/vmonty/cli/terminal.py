"""The user's terminal as the guest's serial console: raw mode, the Ctrl-A escapes, and plain streams."""

from __future__ import annotations

import os
import select
import sys
import termios
import threading
import tty
from collections.abc import Callable
from types import TracebackType
from typing import Any

ESCAPE = 0x01  # Ctrl-A

HELP = b"\r\nCtrl-A h   this help\r\nCtrl-A x   end the virtual machine\r\nCtrl-A Ctrl-A   send Ctrl-A\r\n"


class Console:
    """Reads standard input on its own thread and writes guest output to standard output. Use it with ``with``.

    On a terminal: raw mode while it is open, restored on the way out whatever happens; Ctrl-A x calls *quit*.
    Otherwise bytes go through as they are, and the end of input is not the end of the guest.
    """

    def __init__(self, receive: Callable[[bytes], None], quit: Callable[[], None]) -> None:  # noqa: A002
        self.receive = receive
        self._quit = quit
        self._input, self._output = sys.stdin.fileno(), sys.stdout.fileno()
        self._saved: Any = None
        self._wake_read, self._wake_write = os.pipe()
        self._escaped = False
        self._thread = threading.Thread(target=self._read_loop, name="console", daemon=True)

    @property
    def interactive(self) -> bool:
        """Whether standard input is a terminal."""
        return os.isatty(self._input)

    def __enter__(self) -> Console:
        if self.interactive:
            self._saved = termios.tcgetattr(self._input)
            tty.setraw(self._input)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.write(self._wake_write, b"x")
        self._thread.join()
        if self._saved is not None:
            termios.tcsetattr(self._input, termios.TCSADRAIN, self._saved)
        os.close(self._wake_read)
        os.close(self._wake_write)

    def write(self, data: bytes) -> None:
        """Show what the guest sent. A reader that went away is no reason to stop the guest."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._output, view) :]
            except BlockingIOError:
                select.select([], [self._output], [])
            except BrokenPipeError:
                self._quit()
                return

    def _read_loop(self) -> None:
        while True:
            ready, _, _ = select.select([self._input, self._wake_read], [], [])
            if self._wake_read in ready:
                return
            data = os.read(self._input, 4096)
            if not data:
                return
            if self._saved is not None:
                data = self._escapes(data)
            if data:
                self.receive(data)

    def _escapes(self, data: bytes) -> bytes:
        passed = bytearray()
        for byte in data:
            if not self._escaped:
                self._escaped = byte == ESCAPE
                if not self._escaped:
                    passed.append(byte)
                continue
            self._escaped = False
            match byte:
                case 0x78 | 0x58:  # x
                    self._quit()
                case 0x68 | 0x48 | 0x3F:  # h ?
                    os.write(self._output, HELP)
                case 0x01:
                    passed.append(ESCAPE)
                case _:
                    pass  # any other key after Ctrl-A is dropped, as QEMU does
        return bytes(passed)
