"""Signals end KVM_RUN, as in the kernel: a thread that runs guest code without the GIL must be told of them.

One daemon thread of the process reads a pipe. Python's own C handler writes to it whenever a signal arrives that has a
Python handler (those run on the main thread), and the kick signal's handler writes which thread it hit.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

from vmonty.base import hostcall

# How often a run whose signal mask lets a blocked signal through looks for one, in nanoseconds.
MASK_POLL_NS = 5_000_000
_IDENT_SIZE = 8


class SignalWatch:
    """Tells *arrived(thread ident)* of signals. Started with the first run; lives as long as the process."""

    def __init__(self, arrived: Callable[[int], None]) -> None:
        self._arrived = arrived
        self._main = threading.main_thread().ident or 0
        self._kicks = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._wakeups = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for fd in (self._kicks[0], self._wakeups[0]):
            os.set_blocking(fd, True)
        hostcall.report_kicks(self._kicks[1])
        for target in (self._read_kicks, self._read_wakeups):
            threading.Thread(target=target, name="kvm-signals", daemon=True).start()

    def _read_kicks(self) -> None:
        while data := os.read(self._kicks[0], _IDENT_SIZE):
            self._arrived(int.from_bytes(data, "little"))

    def _read_wakeups(self) -> None:
        while os.read(self._wakeups[0], 1):
            self._arrived(self._main)

    def enter(self) -> int | None:
        """Before a run: on the main thread, take over the wake-up descriptor; what to give to leave()."""
        if threading.get_ident() != self._main:
            return None
        return signal.set_wakeup_fd(self._wakeups[1], warn_on_full_buffer=False)

    def leave(self, previous: int | None) -> None:
        """After it: give the descriptor back."""
        if previous is not None:
            signal.set_wakeup_fd(previous)


def pending_through(mask: frozenset[int]) -> bool:
    """Whether a signal that the calling thread blocks is pending, and *mask* would let it through."""
    return any(int(number) not in mask for number in signal.sigpending())
