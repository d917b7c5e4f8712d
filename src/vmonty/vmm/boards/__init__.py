"""The boards: ``pc``, ``q35`` and ``microvm``. Each module is one readable build order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from vmonty.kvm.api import System
from vmonty.vmm.machine import Config, Machine

if TYPE_CHECKING:
    from vmonty.vmm.block.device import BlockDevice
    from vmonty.vmm.peripherals import Network

# Name → its class. Each has chips of its own, whose modules the others need not wait for.
BOARDS = {"pc": "Pc", "q35": "Q35", "microvm": "Microvm"}


def board_class(name: str) -> type[Machine]:
    """The class of the board *name*, one of BOARDS."""
    found: type[Machine] = getattr(import_module(f"vmonty.vmm.boards.{name}"), BOARDS[name])
    return found


def create(
    system: System,
    config: Config,
    console: Callable[[bytes], None],
    disks: Sequence[BlockDevice] = (),
    ide_disks: Sequence[BlockDevice] = (),
    cdroms: Sequence[BlockDevice] = (),
    networks: Sequence[Network] = (),
) -> Machine:
    """The machine that *config* describes, on *system*, with its devices, and a card for each of *networks*.

    *disks* (virtio), *ide_disks* and *cdroms* stay open when it is closed.

    Raises what Machine raises, and UsageError for an unknown board, property or device.
    """
    # These know the boards of this package.
    from vmonty.vmm.catalogue import TYPES
    from vmonty.vmm.peripherals import add_disk, add_ide, add_networks

    board = TYPES.create(config.machine, "machine")
    devices = [TYPES.create(text, "device") for text in config.devices]
    machine: Machine = board.realize(system, config, console)
    try:
        for number, disk in enumerate(disks):
            with machine.plugging():
                add_disk(machine, disk, number)
        add_ide(machine, ide_disks, cdroms)
        add_networks(machine, networks)
        for device in devices:
            with machine.plugging():
                device.realize(machine)
    except BaseException:
        machine.close()
        raise
    return machine
