"""A provider for tests, around a real one: no run of a guest can hang the suite, and every ioctl is noted."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING

from vmonty.kvm.api.provider import Provider
from vmonty.kvm.uapi import Requests
from vmonty.kvm.uapi.ioctls import name_of

if TYPE_CHECKING:
    from typing_extensions import Buffer

# Far above what any test here needs, even where the KVM itself is emulated.
RUN_LIMIT_S = 30.0


class RunTooLong(AssertionError):
    """A KVM_RUN did not come back in time and was kicked out."""


class WatchedProvider:
    """Passes everything on. A KVM_RUN that takes longer than *limit_s* is kicked and raises RunTooLong.

    ``names`` counts the requests made, by their names, over the provider's life.
    """

    def __init__(self, inner: Provider, limit_s: float = RUN_LIMIT_S) -> None:
        self.inner = inner
        self.name = inner.name
        self.limit_s = limit_s
        self.names: Counter[str] = Counter()
        self._running: dict[int, float] = {}
        self._expired: set[int] = set()
        self._changed = threading.Condition()
        self._guard: threading.Thread | None = None
        self._stopped = False

    def open(self) -> int:
        return self.inner.open()

    def ioctl(self, fd: int, request: int, argument: int | Buffer | None) -> int:
        self.names[name_of(request)] += 1
        if request != Requests.KVM_RUN:
            return self.inner.ioctl(fd, request, argument)
        thread = threading.get_ident()
        self._watch(thread)
        try:
            return self.inner.ioctl(fd, request, argument)
        finally:
            with self._changed:
                del self._running[thread]
                expired = thread in self._expired
                self._expired.discard(thread)
            if expired:
                raise RunTooLong(f"KVM_RUN did not return within {self.limit_s:g} s")

    def mmap(self, fd: int, size: int, offset: int = 0) -> memoryview:
        return self.inner.mmap(fd, size, offset)

    def close(self, fd: int) -> None:
        self.inner.close(fd)

    def kick(self, thread: int) -> None:
        self.inner.kick(thread)

    def memory_written(self, address: int, size: int) -> None:
        self.inner.memory_written(address, size)

    def remedy(self, error: int, call: str) -> str:
        return self.inner.remedy(error, call)

    def stop(self) -> None:
        """End the guard's thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._guard is not None:
            self._guard.join()

    def _watch(self, thread: int) -> None:
        with self._changed:
            self._running[thread] = time.monotonic() + self.limit_s
            if self._guard is None:
                self._guard = threading.Thread(target=self._guard_runs, name="watchdog", daemon=True)
                self._guard.start()
            elif len(self._running) == 1:
                self._changed.notify()

    def _guard_runs(self) -> None:
        with self._changed:
            while not self._stopped:
                now = time.monotonic()
                for thread, deadline in self._running.items():
                    if deadline <= now:
                        self._expired.add(thread)
                        # Again and again: a signal that comes just before KVM_RUN is lost.
                        with contextlib.suppress(ProcessLookupError):
                            self.inner.kick(thread)
                if self._expired:
                    self._changed.wait(0.05)
                else:
                    self._changed.wait(min(self._running.values()) - now if self._running else None)
