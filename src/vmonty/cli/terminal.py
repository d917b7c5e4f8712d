"""The user's terminal as the guest's serial console: raw mode, the Ctrl-A escapes, and plain streams."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import sys
import termios
import threading
import tty
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, TextIO

ESCAPE = 0x01  # Ctrl-A

HELP = (
    b"\r\nCtrl-A h   this help\r\nCtrl-A x   end the virtual machine\r\n"
    b"Ctrl-A c   switch between the guest and the monitor\r\nCtrl-A Ctrl-A   send Ctrl-A\r\n"
)

# A stream may be endless and the guest slow: this many bytes may wait for it before reading pauses.
MOST_BACKLOG = 1 << 16
PAUSE_SECONDS = 0.02


def _descriptor(stream: TextIO | None) -> int | None:
    """The stream's fd; None when this process was started with it closed."""
    return stream.fileno() if stream is not None else None


def _reopen(fd: int) -> int | None:
    """The terminal *fd* once more, non-blocking: a stop between select and write must not hold the writer.

    On a file description of its own, because the flag would hit everybody who shares *fd*. None if it cannot be opened.
    """
    try:
        return os.open(os.ttyname(fd), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return None


class Keys(Protocol):
    """Who else may have the terminal: `vmonty.cli.monitor`."""

    def show(self) -> None: ...
    def hide(self) -> None: ...
    def keys(self, data: bytes) -> None: ...


class Console:
    """Reads standard input on its own thread and writes guest output to standard output. Use it with ``with``.

    On a terminal: raw mode while it is open, restored on the way out whatever happens; Ctrl-A x calls *quit*.
    Otherwise bytes go through as they are, and the end of input is not the end of the guest. The loss of
    standard output also calls *quit*; ``failure`` then says why, unless the reader only went away.
    *backlog* tells how many bytes the guest has yet to take. Ctrl-A c gives the keys to what *monitor* makes of
    a function that writes, from any thread and until ``release()``; and back. What the guest prints is shown all the
    time.
    """

    def __init__(
        self,
        receive: Callable[[bytes], None],
        quit: Callable[[], None],  # noqa: A002
        backlog: Callable[[], int] = lambda: 0,
        monitor: Callable[[Callable[[bytes], None]], Keys] | None = None,
    ) -> None:
        self.receive = receive
        self.failure: str | None = None
        self._quit = quit
        self._backlog = backlog
        self._input, self._output = _descriptor(sys.stdin), _descriptor(sys.stdout)
        # Asked now: a terminal that has hung up says that it is none.
        self._on_terminal = self._output is not None and os.isatty(self._output)
        self._reopened = _reopen(self._output) if self._output is not None and self._on_terminal else None
        if self._reopened is not None:
            self._output = self._reopened
        self._saved: Any = None
        self._wake_read, self._wake_write = os.pipe()
        self._release_read, self._release_write = os.pipe()
        self._released = False
        self._telling = threading.Lock()  # held while the monitor writes
        self._escaped = False
        self._make_monitor = monitor
        self._monitor: Keys | None = None
        self._monitored = False  # are the keys the monitor's?
        self._thread = threading.Thread(target=self._read_loop, name="console", daemon=True)

    @property
    def interactive(self) -> bool:
        """Whether standard input is a terminal."""
        return self._input is not None and os.isatty(self._input)

    def __enter__(self) -> Console:
        if self._input is not None and self.interactive:
            self._saved = termios.tcgetattr(self._input)
            tty.setraw(self._input)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()  # nobody waits for a terminal that is stopped
        os.write(self._wake_write, b"x")
        self._thread.join()
        if self._input is not None and self._saved is not None:
            with contextlib.suppress(termios.error):  # it may have hung up
                # Not TCSADRAIN: a stopped terminal never drains.
                termios.tcsetattr(self._input, termios.TCSANOW, self._saved)
        with self._telling:  # a command of the monitor's may end at any time, now and later
            for fd in (self._wake_read, self._wake_write, self._release_read, self._release_write, self._reopened):
                if fd is not None:
                    os.close(fd)

    def release(self) -> None:
        """From now on drop what standard output does not take at once, and what the monitor says.

        From any thread, also in a signal handler.
        """
        self._released = True
        os.write(self._release_write, b"x")

    def write(self, data: bytes) -> None:
        """Show what the guest sent; waits for a slow reader until ``release()``. Without standard output: nothing."""
        view = memoryview(data)
        while view and self._output is not None:
            _, ready, _ = select.select([self._release_read], [self._output], [])
            if not ready:
                return
            try:
                view = view[os.write(self._output, view) :]
            except BlockingIOError:
                continue
            except OSError as error:
                self._output = None
                if error.errno == errno.EIO and self._on_terminal:
                    # The terminal is gone. Its SIGHUP may be on the way; either way the end is that of a hang-up.
                    os.kill(os.getpid(), signal.SIGHUP)
                    return
                if not isinstance(error, BrokenPipeError) and self.failure is None:
                    self.failure = f"standard output cannot be written: {error.strerror}"
                self._quit()

    def _tell(self, data: bytes) -> None:
        """Show what the monitor says."""
        with self._telling:
            if not self._released:
                self.write(data)

    def _read_loop(self) -> None:
        while self._input is not None:
            full = self._saved is None and self._backlog() >= MOST_BACKLOG
            watched = [self._wake_read] if full else [self._input, self._wake_read]
            ready, _, _ = select.select(watched, [], [], PAUSE_SECONDS if full else None)
            if self._wake_read in ready:
                return
            if not ready:
                continue
            try:
                data = os.read(self._input, 4096)
            except BlockingIOError:
                continue
            except OSError:
                return  # the terminal hung up, or this is no stream to read from
            if not data:
                return
            if self._saved is not None:
                self._escapes(data)
            else:
                self.receive(data)

    def _pass(self, passed: bytearray) -> None:
        """Give the keys to whose they are."""
        data = bytes(passed)
        passed.clear()
        if data and self._monitored and self._monitor is not None:
            self._monitor.keys(data)
        elif data:
            self.receive(data)

    def _switch(self) -> None:
        if self._monitor is None and self._make_monitor is not None:
            self._monitor = self._make_monitor(self._tell)
        if self._monitor is None:
            return
        self._monitored = not self._monitored
        if self._monitored:
            self._monitor.show()
        else:
            self._monitor.hide()

    def _escapes(self, data: bytes) -> None:
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
                    self.write(HELP)
                case 0x63 | 0x43:  # c
                    self._pass(passed)
                    self._switch()
                case 0x01:
                    passed.append(ESCAPE)
                case _:
                    pass  # any other key after Ctrl-A is dropped, as QEMU does
        self._pass(passed)
