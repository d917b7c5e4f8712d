"""How a long step reports its progress: one callback, so that the library needs no terminal."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called as a step advances; a new *phase* text means that a new step began.

    *done* and *total* are bytes. *total* is 0 when the size is not known beforehand.
    """

    def __call__(self, phase: str, done: int, total: int, /) -> None: ...


def silent(phase: str, done: int, total: int, /) -> None:
    """The progress callback that shows nothing."""
