"""High-resolution timers of a VM: the clock, one thread that waits, and the virtual clock that tests use instead.

Callbacks run with the VM's chip lock held, and only while their timer is still armed: so a chip that cancels or
re-arms a timer under that lock can be sure that the old callback will not run any more. A chip therefore needs no
generation counters, and a callback needs no locking of its own.

Order of locks: the chip lock, then the heap's own. Neither is held while the thread waits.
"""

from __future__ import annotations

import heapq
import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol

__all__ = ["Clock", "HrTimers", "MonotonicClock", "Timer", "VirtualClock", "VirtualTimers"]

# The longest single wait, in seconds: below what threading accepts, and guests may ask for centuries.
_LONGEST_WAIT_S = 3600.0
# Cancelled timers stay in the heap until they are due; a guest that re-arms all the time must not make it grow.
_MOST_CANCELLED = 64


class Clock(Protocol):
    """What tells the time."""

    def now_ns(self) -> int:
        """Nanoseconds since some fixed moment; never runs backwards."""
        ...


class MonotonicClock:
    """The host's CLOCK_MONOTONIC."""

    def now_ns(self) -> int:
        """CLOCK_MONOTONIC in nanoseconds."""
        return time.monotonic_ns()


class VirtualClock:
    """A clock that stands still until it is told the time."""

    def __init__(self, now_ns: int = 1_000_000_000) -> None:
        self.time_ns = now_ns

    def now_ns(self) -> int:
        """The time that was set last."""
        return self.time_ns


class Timer:
    """One deadline. ``armed`` until it has fired or was cancelled; it is never armed again."""

    __slots__ = ("_timers", "armed", "callback", "deadline_ns")

    def __init__(self, timers: HrTimers, deadline_ns: int, callback: Callable[[], None]) -> None:
        self._timers = timers
        self.deadline_ns = deadline_ns
        self.callback = callback
        self.armed = True

    def cancel(self) -> None:
        """See to it that the callback does not run. Exact when called with the chip lock held."""
        if self.armed:
            self.armed = False
            self._timers._forget()


class HrTimers:
    """The timers of one VM, served by one daemon thread that starts with the first of them.

    *lock* is the chip lock, held around each callback. An exception that leaves a callback goes to
    ``threading.excepthook``; the thread lives on.
    """

    def __init__(self, lock: threading.RLock | None = None, clock: Clock | None = None) -> None:
        self.lock = threading.RLock() if lock is None else lock
        self.clock: Clock = MonotonicClock() if clock is None else clock
        self._heap: list[tuple[int, int, Timer]] = []
        self._sequence = 0
        self._cancelled = 0
        self._changed = threading.Condition(threading.Lock())
        self._thread: threading.Thread | None = None
        self._closed = False

    def arm(self, deadline_ns: int, callback: Callable[[], None]) -> Timer:
        """Call *callback* when the clock reads *deadline_ns*, or soon after. After close() nothing will happen."""
        timer = Timer(self, deadline_ns, callback)
        with self._changed:
            if self._closed:
                timer.armed = False
                return timer
            self._sequence += 1
            heapq.heappush(self._heap, (deadline_ns, self._sequence, timer))
            if self._heap[0][2] is timer:
                self._wake()
        return timer

    def close(self) -> None:
        """End the thread and forget all timers. Call it without the chip lock; a second call does nothing."""
        with self._changed:
            self._closed = True
            for _, _, timer in self._heap:
                timer.armed = False
            self._heap.clear()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def run_due(self) -> int:
        """Run the callbacks of all timers that are due, in the order of their deadlines; return how many."""
        count = 0
        while (timer := self._pop_due()) is not None:
            with self.lock:
                if not timer.armed:
                    continue
                timer.armed = False
                count += 1
                timer.callback()
        return count

    def next_deadline_ns(self) -> int | None:
        """The earliest deadline of an armed timer."""
        with self._changed:
            self._drop_cancelled()
            return self._heap[0][0] if self._heap else None

    def __len__(self) -> int:
        with self._changed:
            return sum(timer.armed for _, _, timer in self._heap)

    # ---- the heap and its thread ---------------------------------------------------------------------

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="kvm-hrtimer", daemon=True)
            self._thread.start()
        else:
            self._changed.notify()

    def _forget(self) -> None:
        with self._changed:
            self._cancelled += 1
            if self._cancelled > _MOST_CANCELLED and self._cancelled * 2 > len(self._heap):
                self._heap = [entry for entry in self._heap if entry[2].armed]
                heapq.heapify(self._heap)
                self._cancelled = 0

    def _drop_cancelled(self) -> None:
        while self._heap and not self._heap[0][2].armed:
            heapq.heappop(self._heap)

    def _pop_due(self) -> Timer | None:
        with self._changed:
            self._drop_cancelled()
            if self._heap and self._heap[0][0] <= self.clock.now_ns():
                return heapq.heappop(self._heap)[2]
            return None

    def _serve(self) -> None:
        while self._wait():
            try:
                self.run_due()
            except Exception:
                threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))

    def _wait(self) -> bool:
        """Sleep until a timer is due; False when it is time to end."""
        with self._changed:
            while not self._closed:
                self._drop_cancelled()
                if not self._heap:
                    self._changed.wait()
                    continue
                delay_ns = self._heap[0][0] - self.clock.now_ns()
                if delay_ns <= 0:
                    return True
                # Compare integers first: a deadline may be too large for a float.
                bounded = delay_ns < int(_LONGEST_WAIT_S * 1e9)
                self._changed.wait(delay_ns / 1e9 if bounded else _LONGEST_WAIT_S)
            return False


class VirtualTimers(HrTimers):
    """Timers without a thread, on a virtual clock: ``advance`` moves the time and runs what becomes due."""

    def __init__(self, lock: threading.RLock | None = None, now_ns: int = 1_000_000_000) -> None:
        self.virtual = VirtualClock(now_ns)
        super().__init__(lock, self.virtual)

    def advance(self, ns: int) -> int:
        """Let *ns* nanoseconds pass; each callback sees the time of its deadline. Return how many ran."""
        end = self.virtual.time_ns + ns
        count = 0
        while (deadline := self.next_deadline_ns()) is not None and deadline <= end:
            self.virtual.time_ns = max(self.virtual.time_ns, deadline)
            count += self.run_due()
        self.virtual.time_ns = end
        return count

    def _wake(self) -> None:
        """There is no thread to wake."""
