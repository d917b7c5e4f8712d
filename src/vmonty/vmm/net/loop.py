"""What a backend needs of an event loop; ``vmonty.vmm.eventloop.EventLoop`` has it, and so has a test's clock."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Protocol

# No descriptor or no memory left (accept(2), socket(2)), and in how many seconds there may be some.
FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
FULL_SECONDS = 1.0


class Timer(Protocol):
    """A call that is due."""

    def cancel(self) -> None:
        """Make it not happen."""


class Loop(Protocol):
    """One thread on which callbacks run."""

    def watch(self, fd: int, callback: Callable[[], None], *, read: bool = True, write: bool = False) -> None:
        """Call *callback* whenever *fd* is ready; a second call for *fd* replaces the first."""

    def unwatch(self, fd: int) -> None:
        """Forget *fd*."""

    def call_soon(self, fn: Callable[[], None]) -> None:
        """Call *fn* on the loop's thread. From any thread."""

    def run(self, function: Callable[[], None]) -> None:
        """Call *function* on the loop's thread and wait for its end."""

    def call_later(self, seconds: float, fn: Callable[[], None]) -> Timer:
        """Call *fn* on the loop's thread in *seconds*."""
