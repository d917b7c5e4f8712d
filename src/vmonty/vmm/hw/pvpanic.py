"""pvpanic: the port by which a guest's kernel says that it panicked. Source: QEMU's documentation, "PVPANIC Device"."""

from __future__ import annotations

from collections.abc import Callable

PANICKED = 1


class Pvpanic:
    """One byte port; *panicked* is called when the guest's kernel has given up."""

    def __init__(self, panicked: Callable[[], None]) -> None:
        self._panicked = panicked

    def read(self, offset: int, size: int) -> int:
        """The events that are understood."""
        return PANICKED

    def write(self, offset: int, size: int, value: int) -> None:
        """Events that happened."""
        if value & PANICKED:
            self._panicked()
