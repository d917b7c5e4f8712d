"""Who is told of a machine's exits: any number of sinks, that come and go while it runs.

With no sink the KVM has no tracer at all, and its exits cost what they always cost. A machine that was reset is another
one: the sinks stay.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from vmonty.kvm.api import Vm
from vmonty.kvm.exit_record import ExitRecord

# Called on a vCPU's thread, so it must not wait.
Sink = Callable[[ExitRecord], None]


def record_of(fields: dict[str, Any]) -> ExitRecord:
    """An exit from what fields() made. Raises KeyError, ValueError, TypeError."""
    left = int(fields["time_ns"])
    return ExitRecord(
        int(fields["vcpu"]), left - int(fields["guest_ns"]), left, int(fields["reason"]), str(fields["exit"]),
        int(fields["qualification"], 16), int(fields["rip"], 16),
    )  # fmt: skip


def fields(record: ExitRecord) -> dict[str, Any]:
    """An exit as JSON has it, in files and on control sockets."""
    return {
        "time_ns": record.left_ns, "vcpu": record.vcpu, "exit": record.name, "reason": record.reason,
        "qualification": f"{record.qualification:#x}", "rip": f"{record.rip:#x}",
        "guest_ns": record.left_ns - record.entered_ns,
    }  # fmt: skip


class Tracers:
    """The sinks, and the VM whose exits they get."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sinks: tuple[Sink, ...] = ()
        self._vm: Vm | None = None

    def attach(self, vm: Vm) -> None:
        """From here on its exits. Raises KvmUnsupported when there are sinks and the KVM cannot tell."""
        with self._lock:
            self._vm = vm
            if self._sinks:
                vm.trace(self)

    def detach(self) -> None:
        """The VM goes."""
        with self._lock:
            self._vm = None

    def add(self, sink: Sink) -> None:
        """Tell *sink*, too. Raises KvmUnsupported."""
        with self._lock:
            if self._vm is not None and not self._sinks:
                self._vm.trace(self)
            self._sinks = (*self._sinks, sink)

    def remove(self, sink: Sink) -> None:
        """No longer; nothing when it is not there."""
        with self._lock:
            before, self._sinks = self._sinks, tuple(other for other in self._sinks if other is not sink)
            if self._vm is not None and before and not self._sinks and not self._vm.closed:
                self._vm.trace(None)

    @property
    def active(self) -> bool:
        """Whether anybody is told."""
        return bool(self._sinks)

    def __call__(self, record: ExitRecord) -> None:
        for sink in self._sinks:
            sink(record)
