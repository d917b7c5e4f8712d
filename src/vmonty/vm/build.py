"""Machines from a plan: what is booted, and the devices with what is behind them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmonty.base.errors import BootImageError
from vmonty.kvm.api import System
from vmonty.vm.plan import Plan
from vmonty.vmm import boards
from vmonty.vmm.block.tray import Tray
from vmonty.vmm.firmware import BootOptions
from vmonty.vmm.firmware import read as read_firmware
from vmonty.vmm.machine import Config, Machine
from vmonty.vmm.peripherals import Network, open_cdrom
from vmonty.vmm.removable import find as find_removable

if TYPE_CHECKING:
    from vmonty.guests.progress import Progress
    from vmonty.vmm.block.device import BlockDevice
    from vmonty.vmm.display.console import DisplayConsole
    from vmonty.vmm.display.vnc.server import VncServer
    from vmonty.vmm.hotplug import Addition

DEFAULT_APPEND = "console=ttyS0"
GUEST_APPEND = "console=ttyS0 quiet cryptomgr.notests=1"
NEXT_MACHINE_S = 30.0  # a reset takes less to make one


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
    """One machine after another from the same *plan*: a reset makes a new one, on the same disks and networks.

    Raises UsageError and its kin for what cannot be read.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._config: Config | None = None
        self._disks: list[BlockDevice] = []
        self._trays: list[Tray] = []
        self._networks: list[Network] = []
        self._additions: list[Addition] = []  # devices that came while a machine ran
        self._removed: set[int] = set()  # slots of those of the plan that went
        self._machine: Machine | None = None
        self._drives: tuple[str, ...] = ()  # for media, by name
        self._changing = threading.Condition()  # what machine there is, and what is in its drives
        self._between = False  # two machines
        self._started = False
        self._display: DisplayConsole | None = None
        self._vnc: VncServer | None = None
        if plan.firmware is not None:
            self._config = self._described(
                firmware=read_firmware(plan.firmware, plan.nvram), boot=BootOptions.parse(plan.boot)
            )
        elif plan.kernel is not None:
            self._config = self._boot(plan.kernel, plan.initrd, DEFAULT_APPEND)
        try:
            for disk in plan.disks:
                self._disks.append(disk.open())
            for disc in plan.cdroms:
                self._trays.append(Tray(open_cdrom(disc.path), name=str(disc.path)))
            for network in plan.networks:
                self._networks.append(network.connected())
            if plan.vnc is not None:
                self._serve(plan.vnc)
        except BaseException:
            self.close()
            raise

    def _serve(self, options: str) -> None:
        from vmonty.vmm.display.console import DisplayConsole
        from vmonty.vmm.display.vnc.server import VncOptions, VncServer

        self._display = display = DisplayConsole()
        self._vnc = VncServer(VncOptions.parse(options), "vmonty", display, display, display)
        self._vnc.start()

    @property
    def vnc_ports(self) -> list[int]:
        """Where viewers connect: the RFB port, and a WebSocket's."""
        return self._vnc.ports if self._vnc is not None else []

    def _boot(self, kernel: Path, initrd: Path | None, append: str) -> Config:
        line = self.plan.append if self.plan.append is not None else append
        images = read_image(kernel, "kernel"), read_image(initrd, "initrd") if initrd is not None else None
        return self._described(kernel=images[0], initrd=images[1], command_line=line)

    def _described(self, **booted: Any) -> Config:
        plan = self.plan
        devices = plan.devices
        if plan.vnc is not None and not any(device.partition(",")[0] == "VGA" for device in devices):
            devices = ("VGA", *devices)
        return Config(
            memory=plan.memory, cpus=plan.cpus, machine=plan.machine, cpu=plan.cpu, devices=devices,
            option_roms=plan.option_roms, **booted,
        )  # fmt: skip

    def fetch(self, shown: Callable[[], AbstractContextManager[Progress]]) -> None:
        """Get the guest that vmonty builds, if it is that, its progress *shown*. Raises GuestError."""
        if self._config is None:
            from vmonty.guests import busybox

            with shown() as progress:
                guest = busybox.build(progress=progress)
            self._config = self._boot(guest.kernel, guest.initrd, GUEST_APPEND)

    def machine(self, system: System, console: Callable[[bytes], None]) -> Machine:
        """The machine, ready to start; after fetch(). Raises UsageError and its kin, KvmError."""
        config = self._config
        assert config is not None
        if not self._started:
            config = Config(**{**vars(config), "boot": config.boot.first()})
        on: dict[str, list[BlockDevice]] = {"virtio": [], "ide": [], "sata": []}
        indexes: dict[BlockDevice | Tray, int] = {}
        for disk, image in zip(self.plan.disks, self._disks, strict=True):
            on[disk.interface].append(image)
            if disk.boot_index is not None:
                indexes[image] = disk.boot_index
        for disc, tray in zip(self.plan.cdroms, self._trays, strict=True):
            if disc.boot_index is not None:
                indexes[tray] = disc.boot_index
        with self._changing:
            machine = boards.create(
                system, config, console, on["virtio"], on["ide"], self._trays, self._networks, on["sata"], indexes
            )
            try:
                if machine.has_pci:
                    from vmonty.vmm.hotplug import slots_of

                    slots_of(machine).restore(self._additions, self._removed)
            except BaseException:
                machine.close()
                raise
            self._machine, self._started, self._between = machine, True, False
            self._drives = tuple(sorted(machine.removable))
            self._changing.notify_all()
        if self._display is not None:
            self._display.connect(machine)
        return machine

    def end(self, machine: Machine) -> None:
        """Close *machine*, and forget it: its RAM goes before the next one's comes.

        A device that is being added is there first, for the next one; none comes after.
        """
        if machine.has_pci:
            from vmonty.vmm.hotplug import slots_of

            slots_of(machine).end()
        if self._display is not None:
            self._display.connect(None)
        with self._changing:
            self._machine, self._between = None, True
        machine.close()

    def over(self) -> None:
        """No machine follows the one that was ended: nobody shall wait for it."""
        with self._changing:
            self._between = False
            self._changing.notify_all()

    def change_medium(self, name: str, path: Path | None, *, force: bool = False) -> None:
        """Put the disc in *path*, or none, into the drive *name* of the machine that runs; the next one has it too.

        Raises UsageError for a drive that is not there, or that the guest has locked unless *force*; DiskImageError.
        """
        with self._changing:
            self._changing.wait_for(lambda: not self._between, NEXT_MACHINE_S)
            drives = self._machine.removable if self._machine is not None else {}
            drive = find_removable(drives, name)
            tray = self._trays[sorted(drives).index(name)]
            before, medium = tray.medium, open_cdrom(path) if path is not None else None
            try:
                drive.change(name, medium, force=force)
            except BaseException:
                if medium is not None:
                    medium.close()
                raise
            tray.name = str(path) if path is not None else ""
            if before is not None:
                before.close()

    def media(self) -> dict[str, str | None]:
        """What is in each drive for media, by the drive's name: the file, None while there is nothing to read."""
        return {
            name: tray.name if tray.readable is not None else None
            for name, tray in zip(self._drives, self._trays, strict=False)
        }

    def close(self) -> None:
        """Close disks and networks, and send viewers away. What does not close raises, once all others were closed."""
        with ExitStack() as closing:
            closing.callback(self._close_media)
            for disk in self._disks:
                closing.callback(disk.close)
            for addition in self._additions:
                closing.callback(addition.close)
            for network in self._networks:
                closing.callback(network.close)
            self._disks.clear()
            self._additions.clear()
            self._networks.clear()
            if self._vnc is not None:
                closing.callback(self._vnc.stop)
                self._vnc = None

    def _close_media(self) -> None:
        with self._changing, ExitStack() as closing:
            self._machine, self._between = None, False
            self._changing.notify_all()
            for tray in self._trays:
                if tray.medium is not None:
                    closing.callback(tray.medium.close)
            self._trays.clear()
