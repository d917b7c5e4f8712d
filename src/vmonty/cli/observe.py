"""What `vmonty run` shows of its machine: counters that other processes may read, and a trace of exits.

The counters are the binary statistics of KVM_GET_STATS_FD. The software KVM keeps them in the pages of their file from
the moment that it is opened; so another process of the same user reads them through /proc without a word to this one.
"""

from __future__ import annotations

import json
import queue
import threading
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from vmonty.base.errors import KvmUnsupported, UsageError
from vmonty.kvm.uapi import Cap
from vmonty.vmm.machine import Machine

# How many exits may wait for the writer before they are dropped (and counted): a guest must not wait for a disk.
BACKLOG = 100_000


class TraceFile:
    """Writes exits to *path* on a thread of its own: a Chrome trace for ``.json``, else JSON lines; ``-`` is stderr.

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
                self._file.write(self._line(record) + "\n")
                continue
            for event in self._events(record):
                self._file.write(("" if first else ",\n") + json.dumps(event))
                first = False
        if self._chrome:
            self._file.write("\n]\n")

    @staticmethod
    def _line(record: Any) -> str:
        return json.dumps(
            {
                "time_ns": record.left_ns, "vcpu": record.vcpu, "exit": record.name, "reason": record.reason,
                "qualification": f"{record.qualification:#x}", "rip": f"{record.rip:#x}",
                "guest_ns": record.left_ns - record.entered_ns,
            }
        )  # fmt: skip

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


class Observation:
    """Counters opened and exits traced, for one machine, while the block lasts."""

    def __init__(self, machine: Machine, trace: TraceFile | None) -> None:
        self._stack = ExitStack()
        if machine.vm.check_extension(Cap.BINARY_STATS_FD) > 0:
            self._stack.enter_context(machine.vm.stats())
            for thread in machine.vcpus:
                self._stack.enter_context(thread.vcpu.stats())
        if trace is not None:
            try:
                machine.vm.trace(trace)
            except KvmUnsupported as error:
                raise UsageError(f"--trace: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
