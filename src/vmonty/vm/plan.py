"""What one virtual machine is made of, checked: the command line and the settings both end here.

It needs no pydantic: the command line checks its options itself, and starts sooner.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vmonty.vmm import cpu

if TYPE_CHECKING:
    from vmonty.vmm.optionrom import OptionRom
    from vmonty.vmm.peripherals import Cdrom, Disk, Network


def usual_firmware(named: bool, cdroms: Sequence[object]) -> str | None:
    """Who has a CD in the drive, and no guest or kernel *named*, wants to boot it."""
    return "bios" if cdroms and not named else None


class Plan(NamedTuple):
    """A virtual machine. *memory* in bytes, *timeout* in seconds; *machine*, *cpu* and *devices* as in ``Config``.

    Without *kernel* and *firmware* it is *guest*, by default busybox. *append* None is the guest's or the kernel's
    usual command line.
    """

    kernel: Path | None = None
    initrd: Path | None = None
    append: str | None = None
    memory: int = 512 << 20
    cpus: int = 1
    machine: str = "pc"
    cpu: str = cpu.DEFAULT
    devices: tuple[str, ...] = ()
    accel: str = "auto"
    disks: tuple[Disk, ...] = ()
    networks: tuple[Network, ...] = ()
    reboot: bool = True
    timeout: float | None = None
    firmware: str | None = None
    boot: str = ""
    cdroms: tuple[Cdrom, ...] = ()
    nvram: Path | None = None
    vnc: str | None = None
    option_roms: tuple[OptionRom, ...] = ()
    guest: str | None = None
