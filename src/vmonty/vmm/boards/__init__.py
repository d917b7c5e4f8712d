"""The boards: ``pc``, ``q35`` and ``microvm``. Each module is one readable build order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING

from vmonty.kvm.api import System
from vmonty.vmm.block.tray import Tray
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
    cdroms: Sequence[BlockDevice | Tray] = (),
    networks: Sequence[Network] = (),
    sata_disks: Sequence[BlockDevice] = (),
    boot_index: Mapping[BlockDevice | Tray, int] = MappingProxyType({}),
) -> Machine:
    """The machine that *config* describes, on *system*, with its devices, and a card for each of *networks*.

    *disks* (virtio), *ide_disks*, *sata_disks* and *cdroms* stay open when it is closed; *boot_index* says which of
    them firmware tries first.

    Raises what Machine raises, and UsageError for an unknown board, property or device.
    """
    # These know the boards of this package.
    from vmonty.vmm.catalogue import TYPES
    from vmonty.vmm.peripherals import AtaDrives, add_ata, add_disk, add_networks

    board = TYPES.create(config.machine, "machine")
    devices = [TYPES.create(text, "device") for text in config.devices]
    machine: Machine = board.realize(system, config, console)
    try:
        for number, disk in enumerate(disks):
            with machine.plugging():
                add_disk(machine, disk, number, boot_index.get(disk))
        trays = [medium if isinstance(medium, Tray) else Tray(medium) for medium in cdroms]
        indexes: dict[BlockDevice | Tray, int] = {
            tray: boot_index[disc] for disc, tray in zip(cdroms, trays, strict=True) if disc in boot_index
        }
        add_ata(machine, AtaDrives(ide_disks, trays, {**boot_index, **indexes}), AtaDrives(sata_disks))
        add_networks(machine, networks)
        for device in devices:
            with machine.plugging():
                device.realize(machine)
    except BaseException:
        machine.close()
        raise
    return machine
