"""What `vmonty run` shows of its machine: counters that other processes may read, a trace of exits, a control socket.

The counters are the binary statistics of KVM_GET_STATS_FD. The software KVM keeps them in the pages of their file from
the moment that it is opened; so another process of the same user reads them through /proc without a word to this one.
"""

from __future__ import annotations

import json
import queue
import threading
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

from vmonty.base.errors import KvmUnsupported, UsageError
from vmonty.vmm import accel, inspection
from vmonty.vmm.inspection import Counters, StateError
from vmonty.vmm.machine import Machine
from vmonty.vmm.tracing import Tracers, fields

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


class Observation:
    """Counters open and exits traced, for one machine, while the block lasts."""

    def __init__(self, machine: Machine, tracers: Tracers) -> None:
        self._tracers = tracers
        self.counters = Counters(machine)
        try:
            tracers.attach(machine.vm)
        except KvmUnsupported as error:
            self.counters.close()
            raise UsageError(f"--trace: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tracers.detach()
        self.counters.close()


class Media(Protocol):
    """Whoever has the discs."""

    def media(self) -> dict[str, str | None]: ...
    def change_medium(self, name: str, path: Path | None, *, force: bool = False) -> None: ...


class Session(Protocol):
    """What runs one machine after another, as far as a control socket needs it."""

    tracers: Tracers
    choice: accel.Choice
    machine: Machine | None
    observation: Observation | None

    @property
    def media(self) -> Media: ...

    def stop(self, status: int | None = None) -> None: ...
    def power_down(self, status: int) -> None: ...


class SessionControl:
    """A session as its control socket has it."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.tracers = session.tracers
        self._lock = threading.Lock()
        self._paused: Machine | None = None

    def machine(self) -> Machine:
        """The one that runs. Raises StateError between two."""
        machine = self._session.machine
        if machine is None or self._session.observation is None:
            raise StateError("no machine runs at this moment; try again")
        return machine

    def _is_paused(self) -> bool:
        return self._paused is not None and self._paused is self._session.machine

    def status(self) -> dict[str, Any]:
        machine = self.machine()
        state = "paused" if self._is_paused() else "ended" if machine.wait(0) is not None else "running"
        return {"state": state, "accelerator": self._session.choice.reason, **inspection.description(machine)}

    def media(self) -> dict[str, str | None]:
        return self._session.media.media()

    def change_medium(self, drive: str, path: Path | None, *, force: bool = False) -> None:
        self.machine()
        self._session.media.change_medium(drive, path, force=force)

    def counters(self) -> dict[str, dict[str, int]]:
        self.machine()
        observation = self._session.observation
        return {} if observation is None else observation.counters.read()

    def registers(self, cpu: int) -> dict[str, int]:
        with self._lock:
            machine = self.machine()
            vcpu = inspection.vcpu_of(machine, cpu)
            if self._is_paused():
                return inspection.registers(vcpu)
            inspection.pause(machine)
            try:
                return inspection.registers(vcpu)
            finally:
                inspection.resume(machine)

    def pause(self) -> None:
        with self._lock:
            if self._is_paused():
                raise StateError("the machine is paused already")
            machine = self.machine()
            inspection.pause(machine)
            self._paused = machine

    def resume(self) -> None:
        with self._lock:
            if not self._is_paused():
                raise StateError("the machine is not paused")
            inspection.resume(self.machine())
            self._paused = None

    def reset(self) -> None:
        self.machine().reset()

    def power_down(self) -> None:
        if self._is_paused():
            raise StateError("the machine is paused: nobody would see the power button")
        self.machine()
        self._session.power_down(0)

    def quit(self) -> None:
        self._session.stop(0)
