"""Port registers that a KVM answers for itself, where it can: no exit for each byte of a console."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class PortWindow(Protocol):
    """Eight ports of one byte each. All methods on any thread. At first every access is an exit."""

    def show(self, values: Mapping[int, int], idle: int, collects: bool) -> None:
        """From now on reads of the registers in *values* give that value.

        Registers with a bit in *idle* also take writes of just that value, which change nothing. With *collects* bytes
        written to register 0 are kept for take(), as long as there is room. Everything else is an exit.
        """
        ...

    def take(self) -> bytes:
        """What was collected since the last time."""
        ...

    def wait(self) -> None:
        """Sleep until something was collected, or wake(); now and then it returns for nothing."""
        ...

    def wake(self) -> None:
        """End a wait()."""
        ...


class PortCell(Protocol):
    """One port that holds ``value``, which the guest and user space read and write. All on any thread."""

    value: int

    def hide(self) -> None:
        """From now on every access is an exit."""
        ...
