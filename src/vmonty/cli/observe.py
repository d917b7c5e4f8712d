"""What `vmonty run` shows of its machine: counters that others may read, exits to who traces, a control socket.

The counters are the binary statistics of KVM_GET_STATS_FD. The software KVM keeps them in the pages of their file from
the moment that it is opened; so another process of the same user reads them through /proc without a word to this one.
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from vmonty.base.errors import KvmUnsupported, UsageError
from vmonty.vmm import accel, inspection
from vmonty.vmm.inspection import Counters, StateError
from vmonty.vmm.machine import Machine
from vmonty.vmm.tracing import Tracers


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
        self.machine().press_reset_button()

    def power_down(self) -> None:
        if self._is_paused():
            raise StateError("the machine is paused: nobody would see the power button")
        # The button alone: SIGTERM is for who wants an end in a given time.
        self.machine().press_power_button()

    def quit(self) -> None:
        self._session.stop(0)
