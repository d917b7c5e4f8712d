"""An event loop on a thread of its own: file descriptors, timers, and calls from other threads.

Devices and backends do their work here, off the vCPUs' threads. Source for the mechanism: epoll(7), eventfd(2).
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import itertools
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

Callback = Callable[[], None]


class Timer:
    """A call that ``EventLoop.call_later`` will make, once."""

    def __init__(self, callback: Callback) -> None:
        self._callback: Callback | None = callback

    def cancel(self) -> None:
        """Do not make the call, if it has not begun. From any thread."""
        self._callback = None

    @property
    def active(self) -> bool:
        """Whether the call is still to come."""
        return self._callback is not None

    def _take(self) -> Callback | None:
        callback, self._callback = self._callback, None
        return callback


class Call:
    """A call of *function* that one thread makes and another waits for, who gets what it raises."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._failure: BaseException | None = None
        self._done = threading.Event()

    def __call__(self) -> None:
        try:
            self._function()
        except BaseException as error:
            self._failure = error
        finally:
            self._done.set()

    def wait(self, seconds: float) -> bool:
        """Whether it is made within *seconds*."""
        return self._done.wait(seconds)

    def result(self) -> None:
        """After wait(): raise what the function raised."""
        if self._failure is not None:
            raise self._failure


class EventLoop:
    """One thread, called *name*, that waits by epoll. All callbacks run on it, but what ``borrow`` makes; all methods
    work from any thread.

    A callback that raises is reported by ``threading.excepthook``, and the loop goes on. What is watched or
    called before ``start()`` waits for it; after ``stop()`` nothing is called any more.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._lock = threading.Lock()
        self._turn = threading.Lock()  # whoever makes callbacks holds it
        self._borrower = 0
        self._watched: dict[int, tuple[Callback, int]] = {}
        self._calls: deque[Callback] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._count = itertools.count()
        self._stopping = False
        self._closed = False
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread; call it once."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the callback that it is in, and wait for that; on the thread itself only ask.

        Calls queued by ``call_soon`` before this are still made. A second call does nothing.
        """
        self._stopping = True
        self._signal()
        if self.on_thread():
            return
        if self._thread.ident is not None:
            self._thread.join()
        self._close()

    def on_thread(self) -> bool:
        """Whether the caller runs on the loop's thread, or in its place."""
        return threading.get_ident() in (self._thread.ident, self._borrower)

    @property
    def lent(self) -> bool:
        """Whether it is another thread that makes callbacks now; for callbacks."""
        return self._borrower != 0

    def borrow(self, callback: Callback) -> bool:
        """Call *callback* here and now, in place of the loop's thread, which has nothing to do; False when it has.

        As on the thread, no other callback runs meanwhile. It spares waking that; the caller waits instead.
        """
        if self._calls or self._thread.ident is None or not self._turn.acquire(blocking=False):
            return False
        try:
            # Asked now: once the thread has had its last turn nothing may be called.
            if self._stopping:
                return False
            self._borrower = threading.get_ident()
            self._call(callback)
            return True
        finally:
            self._borrower = 0
            self._turn.release()

    def watch(self, fd: int, callback: Callback, *, read: bool = True, write: bool = False) -> None:
        """Call *callback* whenever *fd* is ready to *read* or *write*, or has an error or hung up; level-triggered.

        A second call for the same fd replaces the first. Raises OSError for what epoll cannot watch.
        """
        events = (select.EPOLLIN if read else 0) | (select.EPOLLOUT if write else 0)
        with self._lock:
            if self._closed:
                return
            try:
                self._epoll.register(fd, events)
            except FileExistsError:
                self._epoll.modify(fd, events)
            self._watched[fd] = callback, events

    def unwatch(self, fd: int) -> None:
        """Stop watching *fd*; nothing happens when it is not watched. Call it before the fd is closed.

        On the loop's thread its callback is not called again. From another thread one call may be under way.
        """
        with self._lock:
            if self._watched.pop(fd, None) is not None and not self._closed:
                # ENOENT, EBADF: it was closed before.
                with contextlib.suppress(OSError):
                    self._epoll.unregister(fd)

    def call_soon(self, callback: Callback) -> None:
        """Call *callback* on the loop's thread, after those that were given before."""
        self._calls.append(callback)
        self._signal()

    def call_later(self, seconds: float, callback: Callback) -> Timer:
        """Call *callback* after *seconds* of the monotonic clock."""
        timer = Timer(callback)
        with self._lock:
            entry = (time.monotonic() + max(seconds, 0.0), next(self._count), timer)
            heapq.heappush(self._timers, entry)
            first = self._timers[0] is entry
        if first and threading.get_ident() != self._thread.ident:
            self._signal()
        return timer

    def run(self, function: Callable[[], Any]) -> None:
        """Call *function* on the loop's thread and wait for its end; here and now when that is not running, or is ours.

        What the function raises is raised here. Don't hold a lock that a callback of the loop takes.
        """
        if self.on_thread() or self._thread.ident is None or not self._thread.is_alive():
            function()
            return
        call = Call(function)
        self.call_soon(call)
        while not call.wait(0.1):
            if not self._thread.is_alive() and not call.wait(0):
                call()
        call.result()

    # ---- the thread -------------------------------------------------------------------------------------

    def _signal(self) -> None:
        with self._lock:
            if not self._closed:
                # EAGAIN: the counter is full, so it is signalled.
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_write(self._wake, 1)

    def _main(self) -> None:
        while not self._stopping:
            ready = self._wait()
            with self._turn:
                self._serve(ready)
                self._make_calls()
                self._fire()
        with self._turn:
            self._make_calls()

    def _wait(self) -> list[tuple[int, int]]:
        try:
            return self._epoll.poll(self._timeout())
        except OSError as error:
            if error.errno == errno.EINTR:
                return []
            raise

    def _serve(self, ready: list[tuple[int, int]]) -> None:
        # Looked up first: an fd that a callback closes may be another's number by the time its turn comes.
        batch = [(fd, self._watched.get(fd)) for fd, _ in ready]
        for fd, entry in batch:
            if fd == self._wake:
                os.eventfd_read(self._wake)
            elif entry is not None and self._watched.get(fd) is entry and not self._stopping:
                self._call(entry[0])

    def _timeout(self) -> float:
        if self._calls:
            return 0.0
        if not self._timers:
            return -1.0  # who adds the first one wakes us
        with self._lock:
            while self._timers and not self._timers[0][2].active:
                heapq.heappop(self._timers)
            return max(self._timers[0][0] - time.monotonic(), 0.0) if self._timers else -1.0

    def _make_calls(self) -> None:
        # Not those that these add: files must have their turn.
        for _ in range(len(self._calls)):
            self._call(self._calls.popleft())

    def _fire(self) -> None:
        now = time.monotonic()  # asked once: a timer that sets itself again at once must not hold the loop
        while not self._stopping:
            with self._lock:
                if not self._timers or self._timers[0][0] > now:
                    return
                timer = heapq.heappop(self._timers)[2]
            if callback := timer._take():
                self._call(callback)

    def _call(self, callback: Callback) -> None:
        try:
            callback()
        except BaseException:
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), self._thread)))

    def _close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                self._epoll.close()
                os.close(self._wake)
                self._watched.clear()
                self._timers.clear()
