"""Devices that a user adds to a machine: virtio devices on whichever bus the board has, with their backends.

Backends are imported where they are opened: a machine without them should not wait for their code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vmonty.base.errors import UsageError
from vmonty.base.sizes import parse_size
from vmonty.vmm.bus import BusDevice
from vmonty.vmm.eventloop import EventLoop
from vmonty.vmm.machine import Machine, MmioSlot

if TYPE_CHECKING:
    from vmonty.vmm.block.device import BlockDevice
    from vmonty.vmm.net.backend import NetBackend
    from vmonty.vmm.net.user.config import UserConfig
    from vmonty.vmm.virtio.blk import Blk
    from vmonty.vmm.virtio.device import VirtioDevice
    from vmonty.vmm.virtio.net import Net

SECTOR = 512  # what disks count in
# Locally administered, QEMU's prefix; the last byte is the card's number.
MAC_PREFIX = bytes.fromhex("5254001234")
FIRST_MAC = 0x56
IDE_DRIVES = 4


@dataclass(frozen=True)
class Disk:
    """A disk from ``FILE,format=…,ro,snapshot,if=virtio|ide,size=…``; with *size* it is made if there is none."""

    path: Path
    format: str = "auto"
    read_only: bool = False
    snapshot: bool = False
    interface: str = "virtio"
    size: int | None = None

    @classmethod
    def parse(cls, text: str) -> Disk:
        """Raises UsageError that names the option. Two commas are one in the file's name."""
        name, *options = (part.replace("\0", ",") for part in text.replace(",,", "\0").split(","))
        if not name:
            raise UsageError(f"--disk {text}: it begins with the image's file name")
        disk = cls(Path(name))
        for option in options:
            key, _, value = option.partition("=")
            match key, value:
                case "format", ("raw" | "qcow2" | "auto"):
                    disk = replace(disk, format=value)
                case "ro", ("" | "on"):
                    disk = replace(disk, read_only=True)
                case "snapshot", ("" | "on"):
                    disk = replace(disk, snapshot=True)
                case "if", ("virtio" | "ide"):
                    disk = replace(disk, interface=value)
                case "size", _:
                    disk = replace(disk, size=_disk_size(name, value))
                case (("ro" | "snapshot"), "off"):
                    continue
                case _:
                    raise UsageError(
                        f"--disk {name}: {option!r} is no option; "
                        "there are: format=raw|qcow2|auto, ro, snapshot, if=virtio|ide, size=BYTES"
                    )
        return disk

    def open(self) -> BlockDevice:
        """The image. Raises DiskImageError."""
        from vmonty.vmm.block.image import open_image

        if self.size is not None and not self.path.exists():
            from vmonty.vmm.block.convert import create_image

            create_image(self.path, self.size, format="raw" if self.format == "raw" else "qcow2")
        return open_image(self.path, format=self.format, read_only=self.read_only, snapshot=self.snapshot)


def _disk_size(name: str, text: str) -> int:
    size = parse_size(text)
    if not size or size % SECTOR:
        raise UsageError(f"--disk {name}: a size of {size} bytes; it must be a multiple of {SECTOR}")
    return size


@dataclass(frozen=True)
class Network:
    """A network card from ``user|tap|none[,mac=…][,pcap=FILE][,options of the kind]``."""

    kind: str
    user: UserConfig | None = None
    interface: str = "tap%d"
    mac: bytes | None = None
    capture: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Network:
        """Raises UsageError that names the option."""
        kind, *options = text.split(",")
        made, rest = cls(kind), []
        for option in options:
            key, _, value = option.partition("=")
            if key == "mac":
                made = replace(made, mac=_mac(value))
            elif key == "pcap" and value:
                made = replace(made, capture=Path(value))
            elif key == "ifname" and value and kind == "tap":
                made = replace(made, interface=value)
            else:
                rest.append(option)
        if kind == "user":
            from vmonty.vmm.net.user.config import UserConfig

            return replace(made, user=UserConfig.parse(",".join(rest)))
        if kind not in ("tap", "none"):
            raise UsageError(f"--net {kind}: unknown; there are: user, tap, none")
        if rest or (kind == "none" and options):
            raise UsageError(f"--net {kind}: {(rest or options)[0]!r} is no option of it")
        return made

    def open(self, machine: Machine) -> NetBackend:
        """What the card is connected to. Raises UsageError."""
        backend: NetBackend
        if self.kind == "user":
            from vmonty.vmm.net.user.backend import UserBackend

            backend = UserBackend(self.user)
        else:
            from vmonty.vmm.net.tap import TapBackend, open_tap

            backend = TapBackend(open_tap(self.interface)[0], machine.loop)
        if self.capture is None:
            return backend
        from vmonty.vmm.net.pcap import PcapBackend, PcapFile

        try:
            return PcapBackend(backend, PcapFile(self.capture))
        except BaseException:
            backend.close()
            raise


def _mac(text: str) -> bytes:
    try:
        mac = bytes.fromhex(text.replace(":", ""))
    except ValueError:
        mac = b""
    if len(mac) != 6 or mac[0] & 1:
        raise UsageError(f"mac={text}: an address of a network card is six bytes such as 52:54:00:12:34:56")
    return mac


def add_networks(machine: Machine, networks: Sequence[Network]) -> None:
    """A card for each of *networks*, in order. Raises UsageError."""
    for number, network in enumerate(network for network in networks if network.kind != "none"):
        with machine.plugging():
            add_network(machine, network, number)


def add_network(machine: Machine, network: Network, number: int) -> None:
    """Card *number*, and what it is connected to. Raises UsageError."""
    backend = network.open(machine)
    try:
        add_network_card(machine, backend, number, network.mac)
    except BaseException:
        backend.close()
        raise
    machine.networks.append(backend)
    machine.resources.callback(machine.networks.remove, backend)


def add_virtio(machine: Machine, device: VirtioDevice) -> None:
    """Plug *device* into the next PCI slot, or virtio-mmio slot where there is no PCI; it ends with the machine.

    Before the machine starts. Raises UsageError when no slot is free.
    """
    machine.resources.callback(device.loop.run, device.close)
    if machine.has_pci:
        from vmonty.vmm.virtio.pci import VirtioPci

        function = VirtioPci(device, machine.vm)
        machine.resources.callback(function.close)
        machine.add_device(function)
        return

    from vmonty.vmm.virtio.mmio import MmioTransport

    def make(slot: MmioSlot) -> BusDevice:
        transport = MmioTransport(device, slot.line)
        transport.connect(machine.vm, slot.base)
        machine.resources.callback(transport.close)
        return transport

    machine.add_mmio_device(make)


def add_disk(machine: Machine, backend: BlockDevice, number: int = 0) -> Blk:
    """A virtio disk on *backend*, which stays its owner's to close. It has an event loop of its own."""
    from vmonty.vmm.virtio.blk import Blk

    loop = EventLoop(f"disk {number}")
    loop.start()
    machine.resources.callback(loop.stop)
    device = Blk(machine.memory, loop, backend, serial=f"vmonty-{number}")
    add_virtio(machine, device)
    return device


def open_cdrom(path: Path) -> BlockDevice:
    """The image of a CD or DVD, as it is. Raises DiskImageError."""
    from vmonty.vmm.block.image import open_image

    return open_image(path, format="raw", read_only=True)


def add_ide(machine: Machine, disks: Sequence[BlockDevice], cdroms: Sequence[BlockDevice]) -> None:
    """One IDE controller with *disks* and CD-ROM drives, none when there are none; both stay their owner's to close.

    Disks come first on the primary channel, CD-ROMs first on the secondary one. Raises UsageError for more than four,
    or on a board without PCI.
    """
    if not disks and not cdroms:
        return
    if len(disks) + len(cdroms) > IDE_DRIVES:
        raise UsageError(f"{len(disks) + len(cdroms)} drives on IDE: there are {IDE_DRIVES} places; take if=virtio")
    from vmonty.vmm.boards.pci_host import PciMachine

    if not isinstance(machine, PciMachine):
        raise UsageError(f"a {machine.name} has no IDE: take if=virtio, or pc or q35")
    from vmonty.vmm.hw.ata import AtaDisk, CdRom
    from vmonty.vmm.hw.ata.drive import Drive

    drives: list[Drive | None] = [None] * IDE_DRIVES
    free = list(range(IDE_DRIVES))
    for number, disk in enumerate(disks):
        drives[free.pop(0)] = AtaDisk(disk, serial=f"vmonty-ide-{number}")
    for number, medium in enumerate(cdroms):
        place = next((at for at in free if at >= 2), free[0])
        free.remove(place)
        drives[place] = CdRom(medium, serial=f"vmonty-cd-{number}")
    machine.add_ide(drives)


def add_network_card(machine: Machine, backend: NetBackend, number: int = 0, mac: bytes | None = None) -> Net:
    """A virtio network card on *backend*, which it closes at its end; card *number* has its own address."""
    from vmonty.vmm.virtio.net import Net

    if mac is None:
        if not 0 <= number < 0x100 - FIRST_MAC:
            raise UsageError(f"network card {number} needs an address of its own: give mac=")
        mac = MAC_PREFIX + bytes((FIRST_MAC + number,))
    device = Net(machine.memory, machine.loop, backend, mac)
    add_virtio(machine, device)
    return device
