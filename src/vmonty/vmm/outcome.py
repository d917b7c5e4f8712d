"""How a machine's run ended."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple


class Ending(Enum):
    """What ended it."""

    POWER_OFF = "power-off"
    RESET = "reset"
    SHUTDOWN = "shutdown"
    PANICKED = "panicked"
    DEBUG_EXIT = "debug-exit"
    HALTED = "halted"
    ERROR = "error"
    STOPPED = "stopped"


class Outcome(NamedTuple):
    """An ending, one line about it, and the registers of the vCPU that met it, where they matter.

    *status* is the exit status that the guest itself chose, by isa-debug-exit.
    """

    ending: Ending
    detail: str
    registers: Mapping[str, int] = MappingProxyType({})
    status: int | None = None

    def register_dump(self) -> str:
        """The registers, four to a line; empty when there are none."""
        cells = [f"{name:>7} {value:016x}" for name, value in self.registers.items()]
        return "\n".join("  ".join(cells[at : at + 4]) for at in range(0, len(cells), 4))
