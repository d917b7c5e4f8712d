"""The boards: ``pc``, ``q35`` and ``microvm``. Each module is one readable build order."""

from __future__ import annotations

from collections.abc import Callable

from vmonty.base.errors import UsageError
from vmonty.kvm.api import System
from vmonty.vmm.boards.microvm import Microvm
from vmonty.vmm.boards.pc import Pc
from vmonty.vmm.boards.q35 import Q35
from vmonty.vmm.machine import Config, Machine

BOARDS: dict[str, type[Machine]] = {board.name: board for board in (Pc, Q35, Microvm)}


def create(system: System, config: Config, console: Callable[[bytes], None]) -> Machine:
    """The machine that *config* describes, on *system*. Raises what Machine raises, UsageError for an unknown board."""
    if config.machine not in BOARDS:
        raise UsageError(f"unknown machine {config.machine!r}; there are: {', '.join(BOARDS)}")
    return BOARDS[config.machine](system, config, console)
