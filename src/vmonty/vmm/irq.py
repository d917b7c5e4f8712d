"""Interrupt lines of a machine: each may be driven by several devices, and is raised while any of them raises it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from vmonty.base.errors import HandleClosed
from vmonty.kvm.api import Vm

Line = Callable[[int], None]


class InterruptLines:
    """The GSIs of *vm*, as wired-OR lines. Raising a line of a machine that is closed does nothing."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._lock = threading.Lock()
        self._raised: dict[int, set[int]] = {}
        self._sources = 0

    def source(self, gsi: int) -> Line:
        """One device's end of line *gsi*: call it with 1 to raise and 0 to lower, from any thread."""
        self._sources += 1
        number, raised = self._sources, self._raised.setdefault(gsi, set())

        def drive(level: int) -> None:
            with self._lock:
                before = bool(raised)
                (raised.add if level else raised.discard)(number)
                if bool(raised) == before and before:
                    return
                # Input may still arrive while the machine is being closed.
                with contextlib.suppress(HandleClosed):
                    self._vm.irq_line(gsi, int(bool(raised)))

        return drive
