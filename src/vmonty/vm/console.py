"""The guest's serial console for a program: wait for what it says, answer."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vmonty.base.errors import UsageError, VmontyError

if TYPE_CHECKING:
    from vmonty.vmm.outputfile import OutputFile

# What is kept for ``text`` and ``expect``; older output is dropped (a log file has all).
MOST_KEPT = 16 << 20
SHOWN_IN_ERRORS = 400


class ConsoleTimeout(VmontyError, TimeoutError):
    """The guest did not say what was expected in time; the message ends with what it said last."""


class ConsoleEnded(VmontyError, EOFError):
    """The virtual machine ended before it said what was expected."""


class ConsoleSession:
    """Collects output, and sends input through *send*. Output comes on vCPU threads; all methods work on any.

    Every byte also goes to *output* and to the file *log*.
    """

    def __init__(
        self,
        send: Callable[[bytes], None],
        output: Callable[[bytes], None] | None = None,
        log: Path | None = None,
    ) -> None:
        self._send = send
        self._output = output
        self._changed = threading.Condition()
        self._kept = bytearray()
        self._dropped = 0  # bytes before _kept
        self._read_to = 0  # where the next expect() begins, counted from the first byte
        self._ended = False
        self._log = _log_file(log) if log is not None else None

    def feed(self, data: bytes) -> None:
        """The guest said *data*."""
        if self._output is not None:
            self._output(data)
        with self._changed:
            if self._log is not None:
                self._log.write(data)
            self._kept += data
            if (excess := len(self._kept) - MOST_KEPT) > MOST_KEPT // 4:
                del self._kept[:excess]
                self._dropped += excess
            self._changed.notify_all()

    def ended(self) -> None:
        """There is no more to come."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def close(self) -> None:
        """Complete the log."""
        with self._changed:
            if self._log is not None:
                self._log.close()
                self._log = None

    @property
    def text(self) -> str:
        """All that the guest said, as far as it is kept."""
        with self._changed:
            return self._kept.decode(errors="replace")

    def expect(self, pattern: str | bytes | re.Pattern[bytes], timeout: float = 60.0) -> re.Match[bytes]:
        """Wait until *pattern* is in what came after the last match; the match.

        A str or bytes is looked for as it is, a compiled pattern of bytes as a regular expression.
        Raises ConsoleTimeout after *timeout* seconds, ConsoleEnded when the machine ended before.
        """
        if isinstance(pattern, str):
            pattern = pattern.encode()
        wanted = re.compile(re.escape(pattern)) if isinstance(pattern, bytes) else pattern
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                begin = max(self._read_to - self._dropped, 0)
                if match := wanted.search(bytes(self._kept[begin:])):
                    self._read_to = self._dropped + begin + match.end()
                    return match
                left = deadline - time.monotonic()
                if self._ended or left <= 0:
                    said = bytes(self._kept[-SHOWN_IN_ERRORS:]).decode(errors="replace")
                    what = f"{wanted.pattern.decode(errors='replace')!r} did not come; the console's end: {said!r}"
                    if self._ended:
                        raise ConsoleEnded(f"the machine ended: {what}")
                    raise ConsoleTimeout(f"{timeout:g} s: {what}")
                self._changed.wait(left)

    def send(self, data: str | bytes) -> None:
        """Type *data*."""
        self._send(data.encode() if isinstance(data, str) else data)

    def sendline(self, text: str = "") -> None:
        """Type *text* and Enter."""
        self.send(text + "\n")


def _log_file(path: Path) -> OutputFile:
    from vmonty.vmm.outputfile import OutputFile  # with logging, which few need

    try:
        return OutputFile(path, "console_log", anew=False)
    except OSError as error:
        raise UsageError(f"console_log: {path} cannot be written: {error.strerror}") from error
