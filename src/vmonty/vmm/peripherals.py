"""Devices that a user adds to a machine: virtio devices on whichever bus the board has, with their backends.

Backends are imported where they are opened: a machine without them should not wait for their code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from vmonty.base.errors import UsageError
from vmonty.base.sizes import parse_size
from vmonty.vmm import bootorder
from vmonty.vmm.block.tray import Tray
from vmonty.vmm.bus import BusDevice
from vmonty.vmm.eventloop import EventLoop
from vmonty.vmm.machine import Machine, MmioSlot
from vmonty.vmm.removable import Removable

if TYPE_CHECKING:
    from vmonty.vmm.block.device import BlockDevice
    from vmonty.vmm.block.throttle import Limits
    from vmonty.vmm.boards.pci_host import PciMachine
    from vmonty.vmm.net.backend import Cable, NetBackend
    from vmonty.vmm.net.user.config import UserConfig
    from vmonty.vmm.virtio.blk import Blk
    from vmonty.vmm.virtio.device import VirtioDevice
    from vmonty.vmm.virtio.net import Net

SECTOR = 512  # what disks count in
# Locally administered, QEMU's prefix; the last byte is the card's number.
MAC_PREFIX = bytes.fromhex("5254001234")
FIRST_MAC = 0x56
# As vmm.block.image has them, which is imported when a disk is opened.
FORMATS = ("auto", "raw", "qcow2", "vmdk", "vdi", "vhdx", "vpc", "dmg")
LIMITS = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")  # bytes and operations a second
IDE_DRIVES, FIRST_CD_PLACE = 4, 2
NO_ROM = Path()  # what an empty path is
NO_INDEXES: Mapping[Any, int] = MappingProxyType({})


class Disk(NamedTuple):
    """A disk from ``FILE,format=…,ro,snapshot,if=virtio|ide|sata,size=…,bootindex=N,bps=…,iops=…``.

    With *size* it is made if there is none; *limits* slow it down, which a virtio disk can do.
    """

    path: Path
    format: str = "auto"
    read_only: bool = False
    snapshot: bool = False
    interface: str = "virtio"
    size: int | None = None
    boot_index: int | None = None
    limits: Limits | None = None

    @classmethod
    def parse(cls, text: str) -> Disk:
        """Raises UsageError that names the option. Two commas are one in the file's name."""
        name, options = _image_options("--disk", text)
        disk = cls(Path(name))
        limits: dict[str, int] = {}
        for option, key, value in options:
            match key, value:
                case "format", _ if value in FORMATS:
                    disk = disk._replace(format=value)
                case "ro", ("" | "on"):
                    disk = disk._replace(read_only=True)
                case "snapshot", ("" | "on"):
                    disk = disk._replace(snapshot=True)
                case "if", ("virtio" | "ide" | "sata"):
                    disk = disk._replace(interface=value)
                case "bootindex", _:
                    disk = disk._replace(boot_index=bootorder.check_index(f"--disk {name}", value))
                case "size", _:
                    disk = disk._replace(size=_disk_size(name, value))
                case (("ro" | "snapshot"), "off"):
                    continue
                case _ if key in LIMITS:
                    limits[key] = _limit(name, key, value)
                case _:
                    raise UsageError(
                        f"--disk {name}: {option!r} is no option; "
                        f"there are: format={'|'.join(FORMATS)}, ro, snapshot, if=virtio|ide|sata, size=BYTES, "
                        f"bootindex=N, {'=, '.join(LIMITS)}="
                    )
        if not limits:
            return disk
        from vmonty.vmm.block.throttle import Limits

        return disk._replace(limits=Limits(**limits)).checked()

    def checked(self) -> Disk:
        """Itself. Raises UsageError for what does not go together."""
        if self.limits is not None and self.interface != "virtio":
            # There a vCPU or a controller would stand still meanwhile.
            raise UsageError(f"--disk {self.path}: limits need if=virtio")
        return self

    def open(self) -> BlockDevice:
        """The image. Raises DiskImageError."""
        from vmonty.vmm.block.image import open_image

        if self.size is not None and not self.path.exists():
            from vmonty.vmm.block.convert import create_image

            if self.format not in ("auto", "raw", "qcow2"):
                raise UsageError(f"--disk {self.path}: only raw and qcow2 images can be made, not {self.format}")
            create_image(self.path, self.size, format="raw" if self.format == "raw" else "qcow2")
        return open_image(
            self.path, format=self.format, read_only=self.read_only, snapshot=self.snapshot, probe_raw=False,
            limits=self.limits,
        )  # fmt: skip


class Cdrom(NamedTuple):
    """A disc in a drive of its own, from ``FILE,bootindex=N``."""

    path: Path
    boot_index: int | None = None

    @classmethod
    def parse(cls, text: str) -> Cdrom:
        """Raises UsageError that names the option. Two commas are one in the file's name."""
        name, options = _image_options("--cdrom", text)
        made = cls(Path(name))
        for option, key, value in options:
            if key != "bootindex":
                raise UsageError(f"--cdrom {name}: {option!r} is no option; there is: bootindex=N")
            made = made._replace(boot_index=bootorder.check_index(f"--cdrom {name}", value))
        return made


def _image_options(command: str, text: str) -> tuple[str, list[tuple[str, str, str]]]:
    """The image's file name, and of each option all of it, its key, its value. Raises UsageError."""
    name, *options = split_options(text)
    if not name:
        raise UsageError(f"{command} {text}: it begins with the image's file name")
    return name, [(option, *option.partition("=")[::2]) for option in options]


def split_options(text: str) -> list[str]:
    """What stands between commas; two of them are one that is meant."""
    return [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]


def _limit(name: str, key: str, text: str) -> int:
    if key.startswith("bps"):
        return parse_size(text)
    if not text.isdecimal():
        raise UsageError(f"--disk {name}: {key}={text}: write a number of operations a second")
    return int(text)


def _disk_size(name: str, text: str) -> int:
    size = parse_size(text)
    if not size or size % SECTOR:
        raise UsageError(f"--disk {name}: a size of {size} bytes; it must be a multiple of {SECTOR}")
    return size


class Network(NamedTuple):
    """A network card from ``user|tap|none[,mac=…][,pcap=FILE][,bootindex=N][,romfile=FILE][,options of the kind]``.

    *rom* None is iPXE's, if the host has it; an empty path is none. *cable* is what it is connected to already.
    """

    kind: str
    user: UserConfig | None = None
    interface: str = "tap%d"
    mac: bytes | None = None
    capture: Path | None = None
    boot_index: int | None = None
    rom: Path | None = None
    cable: Cable | None = None

    @classmethod
    def parse(cls, text: str) -> Network:
        """Raises UsageError that names the option."""
        kind, *options = text.split(",")
        made, rest = cls(kind), []
        for option in options:
            key, _, value = option.partition("=")
            if key == "mac":
                made = made._replace(mac=_mac(value))
            elif key == "pcap" and value:
                made = made._replace(capture=Path(value))
            elif key == "bootindex":
                made = made._replace(boot_index=bootorder.check_index(f"--net {kind}", value))
            elif key == "romfile":
                made = made._replace(rom=Path(value))
            elif key == "ifname" and value and kind == "tap":
                made = made._replace(interface=value)
            else:
                rest.append(option)
        if kind == "user":
            from vmonty.vmm.net.user.config import UserConfig

            return made._replace(user=UserConfig.parse(",".join(rest)))
        if kind not in ("tap", "none"):
            raise UsageError(f"--net {kind}: unknown; there are: user, tap, none")
        if rest or (kind == "none" and options):
            raise UsageError(f"--net {kind}: {(rest or options)[0]!r} is no option of it")
        return made

    def connected(self) -> Network:
        """Itself with what it is connected to, for one machine after another; close() ends that. Raises UsageError."""
        return self if self.kind == "none" else self._replace(cable=self.connect())

    def close(self) -> None:
        """Give back what connected() took."""
        if self.cable is not None:
            self.cable.close()

    def connect(self) -> Cable:
        """What the card is to be connected to. Raises UsageError."""
        cable: Cable
        if self.kind == "user":
            from vmonty.vmm.net.user.backend import UserCable

            cable = UserCable(self.user)
        else:
            from vmonty.vmm.net.tap import TapCable

            cable = TapCable(self.interface)
        if self.capture is None:
            return cable
        from vmonty.vmm.net.pcap import PcapCable

        try:
            return PcapCable(cable, self.capture)
        except BaseException:
            cable.close()
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
    """Card *number*, on the network's cable if it has one, which stays over resets. Raises UsageError."""
    cable = network.cable if network.cable is not None else network.connect()

    def pulled() -> None:
        # Who removes the card from a machine that runs may want its ports for another.
        if network.cable is None or machine.wait(0) is None:
            cable.close()

    machine.resources.callback(pulled)
    backend = cable.plug(machine.loop)
    try:
        add_network_card(machine, backend, number, network.mac, network.boot_index, network.rom)
    except BaseException:
        backend.close()
        raise
    machine.networks.append(backend)
    machine.resources.callback(machine.networks.remove, backend)


class Boot(NamedTuple):
    """How firmware finds a device that it may start from: see PciMachine.add_boot_device."""

    kind: str
    node: str
    unit: str
    place: int | None = None


def add_virtio(machine: Machine, device: VirtioDevice, boot: Boot | None = None, rom: bytes = b"") -> None:
    """Plug *device* into the next PCI slot, or virtio-mmio slot where there is no PCI; it ends with the machine.

    Firmware may start from it if *boot* says how; *rom* is its option ROM. Before the machine starts. Raises UsageError
    when no slot is free.
    """
    machine.resources.callback(device.loop.run, device.close)
    if machine.has_pci:
        from vmonty.vmm.boards.pci_host import PciMachine
        from vmonty.vmm.virtio.pci import VirtioPci

        assert isinstance(machine, PciMachine)
        function = VirtioPci(device, machine.vm)
        machine.resources.callback(function.close)
        if rom:
            machine.add_option_rom(function, rom)
        machine.add_device(function)
        if boot is not None:
            machine.add_boot_device(boot.kind, function, boot.node, boot.unit, boot.place)
        return

    from vmonty.vmm.virtio.mmio import MmioTransport

    def make(slot: MmioSlot) -> BusDevice:
        transport = MmioTransport(device, slot.line)
        transport.connect(machine.vm, slot.base)
        machine.resources.callback(transport.close)
        return transport

    machine.add_mmio_device(make)


def add_disk(machine: Machine, backend: BlockDevice, number: int = 0, boot_index: int | None = None) -> Blk:
    """A virtio disk on *backend*, which stays its owner's to close. It has an event loop of its own."""
    from vmonty.vmm.virtio.blk import Blk

    loop = EventLoop(f"disk {number}")
    loop.start()
    machine.resources.callback(loop.stop)
    device = Blk(machine.memory, loop, backend, serial=f"vmonty-{number}")
    add_virtio(machine, device, Boot(bootorder.DISK, "scsi", "disk@0,0", boot_index))
    return device


def open_cdrom(path: Path) -> BlockDevice:
    """The image of a CD or DVD, as it is. Raises DiskImageError."""
    from vmonty.vmm.block.image import open_image

    return open_image(path, format="raw", read_only=True)


class AtaDrives(NamedTuple):
    """Drives with ATA commands, in the order in which firmware numbers them."""

    disks: Sequence[BlockDevice] = ()
    trays: Sequence[Tray] = ()
    boot: Mapping[BlockDevice | Tray, int] = NO_INDEXES


def add_ata(machine: Machine, ide: AtaDrives, sata: AtaDrives) -> None:
    """The drives of *ide* and *sata* with their controllers; images and trays stay their owner's to close.

    What is on the board decides: a q35 has SATA alone, so that *ide* means this there; a pc gets an AHCI controller for
    *sata*. Disks come first, CD-ROMs on the third place and behind. Raises UsageError for more than there are places,
    or on a board without PCI.
    """
    from vmonty.vmm.boards.pci_host import PciMachine

    if not (ide.disks or ide.trays or sata.disks or sata.trays):
        return
    if not isinstance(machine, PciMachine):
        raise UsageError(f"a {machine.name} has no IDE or SATA: take if=virtio, or pc or q35")
    boot = {**ide.boot, **sata.boot}
    if not machine.has_ide:
        ide, sata = AtaDrives(), AtaDrives((*ide.disks, *sata.disks), (*ide.trays, *sata.trays))
    if ide.disks or ide.trays:
        _add_ide(machine, ide._replace(boot=boot))
    if sata.disks or sata.trays:
        _add_sata(machine, sata._replace(boot=boot))


def _places(wanted: AtaDrives, places: int, kind: str) -> list[tuple[int, BlockDevice | Tray]]:
    """(place, disk or tray) of each."""
    count = len(wanted.disks) + len(wanted.trays)
    if count > places:
        raise UsageError(f"{count} drives on {kind}: there are {places} places; take if=virtio")
    free = list(range(places))
    made: list[tuple[int, BlockDevice | Tray]] = [(free.pop(0), disk) for disk in wanted.disks]
    for tray in wanted.trays:
        place = next((at for at in free if at >= FIRST_CD_PLACE), free[0])
        free.remove(place)
        made.append((place, tray))
    return made


def _add_ide(machine: PciMachine, wanted: AtaDrives) -> None:
    from vmonty.vmm.hw.ata import AtaDisk, CdRom
    from vmonty.vmm.hw.ata.drive import Drive

    drives: list[Drive | None] = [None] * IDE_DRIVES
    places = _places(wanted, IDE_DRIVES, "IDE")
    for number, (place, what) in enumerate(places):
        drives[place] = (
            CdRom(what, serial=f"vmonty-cd-{number - len(wanted.disks)}")
            if isinstance(what, Tray)
            else AtaDisk(what, serial=f"vmonty-ide-{number}")
        )
    function = machine.add_ide(drives)
    for place, what in places:
        unit = f"drive@{place >> 1}/disk@{place & 1}"
        kind = bootorder.CDROM if isinstance(what, Tray) else bootorder.DISK
        machine.add_boot_device(kind, function, "ide", unit, wanted.boot.get(what))
        if isinstance(drive := drives[place], CdRom):
            machine.add_removable(Removable(drive, function.channels[place >> 1].exclusively(drive)))


def _add_sata(machine: PciMachine, wanted: AtaDrives) -> None:
    from vmonty.vmm.hw.ata import AtaDisk, CdRom
    from vmonty.vmm.hw.ata.ahci import PORTS
    from vmonty.vmm.hw.ata.drive import Drive

    drives: list[Drive | None] = [None] * PORTS
    places = _places(wanted, PORTS, "SATA")
    for number, (place, what) in enumerate(places):
        drives[place] = (
            CdRom(what, serial=f"vmonty-cd-{number - len(wanted.disks)}")
            if isinstance(what, Tray)
            else AtaDisk(what, serial=f"vmonty-sata-{number}", sata=True)
        )
    loops = []
    for place in range(PORTS):
        loop = machine.loop
        if drives[place] is not None:
            # Of its own: while one drive waits for the host's disk, the others go on.
            loop = EventLoop(f"sata {place}")
            loop.start()
            machine.resources.callback(loop.stop)
        loops.append(loop)
    function = machine.add_ahci(drives, loops)
    for place, what in places:
        kind = bootorder.CDROM if isinstance(what, Tray) else bootorder.DISK
        machine.add_boot_device(kind, function, "pci8086,2922", f"drive@{place}/disk@0", wanted.boot.get(what))
        if isinstance(drive := drives[place], CdRom):
            machine.add_removable(Removable(drive, function.exclusively(place)))


def add_network_card(
    machine: Machine, backend: NetBackend, number: int = 0, mac: bytes | None = None, boot_index: int | None = None,
    rom: Path | None = None,
) -> Net:  # fmt: skip
    """A virtio network card on *backend*, which it closes at its end; card *number* has its own address.

    A machine that starts firmware gives it *rom*: None is iPXE's if the host has it, an empty path none.
    """
    from vmonty.vmm.virtio.net import Net

    if mac is None:
        if not 0 <= number < 0x100 - FIRST_MAC:
            raise UsageError(f"network card {number} needs an address of its own: give mac=")
        mac = MAC_PREFIX + bytes((FIRST_MAC + number,))
    device = Net(machine.memory, machine.loop, backend, mac)
    boot = Boot(bootorder.NETWORK, "ethernet", "ethernet-phy@0", boot_index)
    add_virtio(machine, device, boot, _network_rom(rom) if machine.config.firmware is not None else b"")
    return device


def _network_rom(path: Path | None) -> bytes:
    from vmonty.vmm.optionrom import IPXE_VIRTIO, read_rom

    if path is None:
        return read_rom(IPXE_VIRTIO) if IPXE_VIRTIO.is_file() else b""
    return read_rom(path) if path != NO_ROM else b""
