"""The boards: ``pc``, ``q35`` and ``microvm``. Each module is one readable build order."""

from __future__ import annotations

from collections.abc import Callable

from vmonty.kvm.api import System
from vmonty.vmm.boards.microvm import Microvm
from vmonty.vmm.boards.pc import Pc
from vmonty.vmm.boards.q35 import Q35
from vmonty.vmm.machine import Config, Machine

BOARDS: dict[str, type[Machine]] = {board.name: board for board in (Pc, Q35, Microvm)}


def create(system: System, config: Config, console: Callable[[bytes], None]) -> Machine:
    """The machine that *config* describes, on *system*, with its devices.

    Raises what Machine raises, and UsageError for an unknown board, property or device.
    """
    from vmonty.vmm.catalogue import TYPES  # which names the boards of this package

    board = TYPES.create(config.machine, "machine")
    devices = [TYPES.create(text, "device") for text in config.devices]
    machine: Machine = board.realize(system, config, console)
    try:
        for device in devices:
            device.realize(machine)
    except BaseException:
        machine.close()
        raise
    return machine
