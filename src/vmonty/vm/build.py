"""Machines from settings: what is booted, and the devices with what is behind them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vmonty.base.errors import BootImageError
from vmonty.guests import busybox
from vmonty.guests.progress import Progress, silent
from vmonty.kvm.api import System
from vmonty.vm.settings import Network, Settings, UserNetwork
from vmonty.vmm import boards
from vmonty.vmm.block.device import BlockDevice
from vmonty.vmm.block.image import open_image
from vmonty.vmm.firmware import BootOptions, Firmware
from vmonty.vmm.firmware import read as read_firmware
from vmonty.vmm.machine import Config, Machine
from vmonty.vmm.net.backend import NetBackend
from vmonty.vmm.net.pcap import PcapBackend, PcapFile
from vmonty.vmm.net.tap import TapBackend, open_tap
from vmonty.vmm.net.user.backend import UserBackend
from vmonty.vmm.peripherals import add_disk, add_ide, add_network_card, open_cdrom

DEFAULT_APPEND = "console=ttyS0"
GUEST_APPEND = "console=ttyS0 quiet cryptomgr.notests=1"


def read_image(path: Path, what: str) -> bytes:
    """The file's bytes. Raises BootImageError, naming *what* it was to be, when it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BootImageError(f"the {what} {path} cannot be read: {error.strerror}") from error
    if not data:
        raise BootImageError(f"the {what} {path} is empty")
    return data


class Build:
    """One machine after another from the same *settings*: a reset makes a new one, on the same disks.

    Raises UsageError and its kin for what cannot be read.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.user_networks: list[UserBackend] = []
        self._config: Config | None = None
        self._disks: list[BlockDevice] = []
        self._cdroms: list[BlockDevice] = []
        if settings.firmware is not None:
            self._config = self._boot(None, None, "", read_firmware(settings.firmware))
        elif settings.kernel is not None:
            initrd = read_image(settings.initrd, "initrd") if settings.initrd is not None else None
            self._config = self._boot(read_image(settings.kernel, "kernel"), initrd, DEFAULT_APPEND)
        try:
            for disk in settings.disks:
                self._disks.append(
                    open_image(disk.file, format=disk.format, read_only=disk.readonly, snapshot=disk.snapshot)
                )
            for path in settings.cdroms:
                self._cdroms.append(open_cdrom(path))
        except BaseException:
            self.close()
            raise

    def _boot(
        self, kernel: bytes | None, initrd: bytes | None, append: str, firmware: Firmware | None = None
    ) -> Config:
        wanted = self.settings
        line = wanted.append if wanted.append is not None else append
        return Config(
            kernel, initrd, line, wanted.memory, wanted.cpus, wanted.machine, wanted.cpu, wanted.devices,
            firmware=firmware, boot=BootOptions.parse(wanted.boot),
        )  # fmt: skip

    def fetch(self, progress: Progress = silent) -> None:
        """Get the guest that vmonty builds, if it is that. Raises GuestError."""
        if self._config is None:
            guest = busybox.build(progress=progress)
            self._config = self._boot(
                read_image(guest.kernel, "kernel"), read_image(guest.initrd, "initrd"), GUEST_APPEND
            )

    def machine(self, system: System, console: Callable[[bytes], None]) -> Machine:
        """The machine, ready to start. Raises UsageError and its kin, KvmError."""
        self.fetch()
        assert self._config is not None
        machine = boards.create(system, self._config, console)
        try:
            disks: dict[str, list[BlockDevice]] = {"virtio": [], "ide": []}
            for described, disk in zip(self.settings.disks, self._disks, strict=True):
                disks[described.bus].append(disk)
            for number, disk in enumerate(disks["virtio"]):
                add_disk(machine, disk, number)
            add_ide(machine, disks["ide"], self._cdroms)
            self.user_networks.clear()
            for number, network in enumerate(self.settings.net):
                mac = bytes.fromhex(network.mac.replace(":", "")) if network.mac else None
                add_network_card(machine, self._backend(machine, network, number), number, mac)
        except BaseException:
            machine.close()
            raise
        return machine

    def _backend(self, machine: Machine, network: Network, number: int) -> NetBackend:
        capture = PcapFile(network.pcap) if network.pcap is not None else None
        backend: NetBackend
        if isinstance(network, UserNetwork):
            backend = UserBackend(network.config(), machine.loop)
            self.user_networks.append(backend)
        else:
            fd, _ = open_tap(network.ifname)
            backend = TapBackend(fd, machine.loop)
        return PcapBackend(backend, capture) if capture is not None else backend

    def close(self) -> None:
        """Close the disks."""
        while self._disks:
            self._disks.pop().close()
        while self._cdroms:
            self._cdroms.pop().close()
