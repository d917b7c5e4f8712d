"""A virtual machine monitor as a process: what it says on its serial console, its CPU time, its memory."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from vmonty.bench.compiler import PayloadError

_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) (\S+) (\d+)\s*(.*)")


def _environment() -> dict[str, str]:
    # As most users have it: with this set, a module that is younger than its bytecode would be compiled at each start.
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


class Process:
    """A child whose standard streams are the guest's console. Killed when the block ends; wall time counts from here.

    *arguments* is its command line; what it says on standard error is kept for the message when it fails.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self.name = Path(arguments[0]).name
        self._said = b""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by __exit__
        self.started = time.perf_counter()
        self._child = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, bufsize=0, env=_environment()
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._child.send_signal(signal.SIGKILL)
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout, self._errors):
            if stream is not None:
                stream.close()

    def wait_for(self, text: bytes, timeout: float) -> bytes:
        """What the guest says until *text*, which is taken too. Raises PayloadError when it does not come."""
        end = time.monotonic() + timeout
        while (at := self._said.find(text)) < 0:
            self._hear(end, f"say {text!r}")
        said, self._said = self._said[:at], self._said[at + len(text) :]
        return said

    def read(self, size: int, timeout: float) -> bytes:
        """The next *size* bytes that the guest says. Raises PayloadError when they do not come."""
        end = time.monotonic() + timeout
        while len(self._said) < size:
            self._hear(end, f"say {size} bytes")
        said, self._said = self._said[:size], self._said[size:]
        return said

    def write(self, text: bytes) -> None:
        """Type *text* on the guest's console."""
        assert self._child.stdin is not None
        self._child.stdin.write(text)

    def errors(self) -> str:
        """What it has said on its standard error."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")

    def wait(self, timeout: float) -> int:
        """Its exit status. Raises PayloadError when it does not end."""
        try:
            return self._child.wait(timeout)
        except subprocess.TimeoutExpired:
            raise PayloadError(f"{self.name} did not end in time{self._last()}") from None

    def _hear(self, end: float, wanted: str) -> None:
        assert self._child.stdout is not None
        ready, _, _ = select.select([self._child.stdout], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            raise PayloadError(f"{self.name}: the guest did not {wanted} in time{self._last()}")
        part = os.read(self._child.stdout.fileno(), 1 << 16)
        if not part:
            try:
                status = f"ended with {self._child.wait(10)}"
            except subprocess.TimeoutExpired:
                status = "closed its output"
            raise PayloadError(f"{self.name} {status} before its guest did {wanted}{self._last()}")
        self._said += part

    def _last(self) -> str:
        told = ""
        for where, text in (("standard error", self.errors()), ("console", self._said.decode(errors="replace"))):
            lines = text.strip().splitlines()
            told += f"; last on its {where}: {lines[-1]}" if lines else ""
        return told

    def wall_seconds(self) -> float:
        """Since the process was started."""
        return time.perf_counter() - self.started

    def cpu_seconds(self) -> float:
        """What the process has run, all threads together."""
        # The clock's number: clock_getcpuclockid(3), as Linux makes it.
        return time.clock_gettime(~self._child.pid << 3 | 2)

    def resident_beyond(self, ram: int) -> int:
        """Resident bytes without guest RAM, which is the mappings of *ram* bytes.

        A file's page that is mapped twice is one page: a code cache has a writable and an executable view.
        """
        resident: dict[tuple[str, ...], int] = {}
        key: tuple[str, ...] = ()
        for line in Path(f"/proc/{self._child.pid}/smaps").read_text().splitlines():
            if found := _MAPPING.match(line):
                begin, end, offset, device, inode, _ = found.groups()
                is_ram = int(end, 16) - int(begin, 16) == ram
                key = () if is_ram else (device, inode, offset) if inode != "0" else (begin,)
            elif key and line.startswith("Rss:"):
                resident[key] = max(resident.get(key, 0), int(line.split()[1]) << 10)
        return sum(resident.values())
