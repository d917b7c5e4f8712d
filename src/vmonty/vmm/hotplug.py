"""Devices that come and go while the machine runs: by ACPI, in the slots of the PCI root bus."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from vmonty.base.errors import UsageError, VmontyError
from vmonty.vmm.hw.acpi_hotplug import EVENT_PCI, GPE_SIZE, SLOTS_SIZE, GeneralEvents, SlotEvents

if TYPE_CHECKING:
    from vmonty.vmm.boards.pci_host import PciMachine
    from vmonty.vmm.machine import Machine

# Where QEMU's pc has them.
SLOTS_PORT, GPE_PORT = 0xAE00, 0xAFE0
# How long a guest may take to let go of a device. Linux ignores the request in the first seconds after it came.
UNPLUG_SECONDS = 30


class _Plugged:
    """A device with what it holds, from its slot to its removal."""

    def __init__(self, name: str, resources: contextlib.ExitStack) -> None:
        self.name, self.resources = name, resources
        self.gone = threading.Event()
        self.complaint = ""

    def close(self) -> None:
        try:
            self.resources.close()
        except (VmontyError, OSError) as error:
            self.complaint = str(error)
        self.gone.set()


class HotPlug:
    """The slots of *machine*'s root bus, and the registers by which its guest hears of them. *sci* as for AcpiPm."""

    def __init__(self, machine: PciMachine) -> None:
        self._machine = machine
        self._events = GeneralEvents(machine.sci())
        self._slots = SlotEvents(self._eject)
        self._lock = threading.Lock()
        self._plugged: dict[int, _Plugged] = {}
        self._counts: Counter[str] = Counter()  # how many there were of each name
        machine.ports.place(GPE_PORT, GPE_SIZE, self._events, "acpi-gpe0")
        machine.ports.place(SLOTS_PORT, SLOTS_SIZE, self._slots, "acpi-pci-hotplug")

    @contextlib.contextmanager
    def plugging(self) -> Iterator[list[int]]:
        """The removable devices that are added to the machine in this block may be removed; gives their slots then."""
        machine, slots = self._machine, list[int]()
        with self._lock:
            before = set(machine.pci.devices())
            outer, machine.resources = machine.resources, contextlib.ExitStack()
            try:
                yield slots
            except BaseException:
                machine.resources.close()
                raise
            finally:
                own, machine.resources = machine.resources, outer
                outer.callback(own.close)
            for place, device in machine.pci.devices().items():
                if place not in before and device.removable:
                    self._plugged[place[0]] = _Plugged(device.name, own)
                    self._counts[device.name] += 1
                    slots.append(place[0])

    def add(self, make: Callable[[Machine, int], object], kind: str) -> int:
        """Let *make* add a device of *kind*, the next of this number, and tell the guest; gives the device's slot.

        Raises what *make* raises; then nothing is there.
        """
        with self.plugging() as slots:
            make(self._machine, self._counts[kind])
        for slot in slots:
            self._slots.came(slot)
        self._events.happen(EVENT_PCI)
        return slots[0]

    def devices(self) -> dict[int, str]:
        """Slot → the name of what may be removed."""
        with self._lock:
            return {slot: plugged.name for slot, plugged in sorted(self._plugged.items())}

    def chips(self) -> set[int]:
        """The slots of what stays."""
        return {slot for slot, _ in self._machine.pci.devices()} - self._plugged.keys()

    def remove(self, slot: int, timeout: float) -> None:
        """Ask the guest for the device in *slot*, and wait up to *timeout* seconds until it has let go.

        Raises UsageError when there is nothing to remove, VmontyError when the guest keeps it or it does not close.
        """
        if (plugged := self._plugged.get(slot)) is None:
            there = ", ".join(f"{number} ({name})" for number, name in self.devices().items())
            raise UsageError(f"slot {slot}: there is nothing to remove; there is: {there or 'nothing'}")
        self._slots.shall_go(slot)
        self._events.happen(EVENT_PCI)
        if not plugged.gone.wait(timeout):
            raise VmontyError(f"the guest has not let go of {plugged.name} in slot {slot} after {timeout:g} s")
        if plugged.complaint:
            raise VmontyError(f"{plugged.name} is removed, but: {plugged.complaint}")

    def _eject(self, slot: int) -> None:
        # On a vCPU's thread: the guest finds the slot empty when its write is done. A hostile one may write anything.
        with self._lock:
            plugged = self._plugged.pop(slot, None)
            if plugged is None:
                return
            for (at, _), device in self._machine.pci.devices().items():
                if at == slot:
                    self._machine.pci.remove(device)
        plugged.close()


def slots_of(machine: Machine) -> HotPlug:
    """Where devices of *machine* come and go. Raises UsageError for a board where they cannot."""
    from vmonty.vmm.boards.pci_host import PciMachine

    if not isinstance(machine, PciMachine):
        raise UsageError(f"a {machine.name} has no PCI: its devices stay; take pc or q35")
    return machine.hotplug


def plug(machine: Machine, kind: str, options: str) -> int:
    """Add a device to a machine that runs; *kind* and *options* as of the command line's: disk, net or device.

    Gives its slot. A reset makes a machine without it. Raises UsageError and its kin for what cannot be added.
    """
    hotplug = slots_of(machine)
    match kind:
        case "disk":
            return hotplug.add(*_disk(options))
        case "net":
            return hotplug.add(*_network(options))
        case "device":
            return hotplug.add(*_device(options))
    raise UsageError(f"{kind}: there are disk, net and device")


_Maker = tuple[Callable[["Machine", int], object], str]


def _disk(options: str) -> _Maker:
    from vmonty.vmm.peripherals import Disk, add_disk

    disk = Disk.parse(options)
    if disk.interface != "virtio":
        raise UsageError(f"--disk {options}: a disk that is added to a machine that runs is a virtio disk")

    def make(machine: Machine, number: int) -> None:
        backend = disk.open()
        machine.resources.callback(backend.close)
        add_disk(machine, backend, number)

    return make, "virtio-blk"


def _network(options: str) -> _Maker:
    from vmonty.vmm.peripherals import NO_ROM, Network, add_network

    # Firmware has run: no ROM is executed, and the boot order has been told.
    network = Network.parse(options)._replace(boot_index=None, rom=NO_ROM)
    if network.kind == "none":
        raise UsageError("--net none: there is nothing to add")
    return lambda machine, number: add_network(machine, network, number), "virtio-net"


def _device(options: str) -> _Maker:
    from vmonty.vmm.catalogue import TYPES

    device = TYPES.create(options, "device")
    name = device.info.name
    if device.info.parent != "virtio-device" or name == "virtio-console":
        raise UsageError(f"--device {name}: it cannot be added to a machine that runs; virtio-rng and its kin can")
    return lambda machine, _: device.realize(machine), name
