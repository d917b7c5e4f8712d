"""Exits of vCPUs in a file, written beside the guest."""

from __future__ import annotations

import json
import queue
import threading
from pathlib import Path
from typing import IO, Any

from vmonty.base.errors import UsageError
from vmonty.vmm.tracing import fields

# How many exits may wait for the writer before they are dropped (and counted): a guest must not wait for a disk.
BACKLOG = 100_000


class TraceFile:
    """A sink that writes exits to *path* on a thread of its own: a Chrome trace for ``.json``, else JSON lines.

    ``-`` is stderr.

    *names*: only exits so called; none: all. A Chrome trace opens in ui.perfetto.dev or chrome://tracing.
    """

    def __init__(self, path: Path, names: frozenset[str], errors: IO[str]) -> None:
        self._names = names
        self._chrome = path.suffix == ".json"
        try:
            self._file = errors if str(path) == "-" else path.open("w")
        except OSError as error:
            raise UsageError(f"--trace {path}: {error.strerror}") from error
        self._owned = str(path) != "-"
        self._queue: queue.Queue[Any] = queue.Queue(BACKLOG)
        self.dropped = 0
        self._left: dict[int, int] = {}
        self._thread = threading.Thread(target=self._write, name="trace", daemon=True)
        self._thread.start()

    def __call__(self, record: Any) -> None:
        """Take an exit; any thread."""
        if self._names and record.name not in self._names:
            return
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Write what waits, and end."""
        self._queue.put(None)
        self._thread.join()
        if self._owned:
            self._file.close()

    def _write(self) -> None:
        if self._chrome:
            self._file.write("[\n")
        first = True
        while (record := self._queue.get()) is not None:
            if not self._chrome:
                self._file.write(json.dumps(fields(record)) + "\n")
                continue
            for event in self._events(record):
                self._file.write(("" if first else ",\n") + json.dumps(event))
                first = False
        if self._chrome:
            self._file.write("\n]\n")

    def _events(self, record: Any) -> list[dict[str, Any]]:
        """The time in the guest, and before it that since the exit before. Times in microseconds."""
        common = {"pid": 0, "tid": record.vcpu, "ph": "X"}
        guest = {
            **common, "name": "guest", "ts": record.entered_ns / 1000,
            "dur": (record.left_ns - record.entered_ns) / 1000,
            "args": {"exit": record.name, "qualification": hex(record.qualification), "rip": hex(record.rip)},
        }  # fmt: skip
        before = self._left.get(record.vcpu)
        self._left[record.vcpu] = record.left_ns
        if before is None:
            return [guest]
        return [{**common, "name": "host", "ts": before / 1000, "dur": (record.entered_ns - before) / 1000}, guest]
