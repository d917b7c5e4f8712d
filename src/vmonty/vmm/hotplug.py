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
        self.then = contextlib.ExitStack()  # what else is closed behind it, whether it closes well or not

    def close(self) -> None:
        try:
            with self.then:
                self.resources.close()
        except (VmontyError, OSError) as error:
            self.complaint = str(error)
        except BaseException as error:
            self.complaint = f"internal error: {type(error).__name__}: {error}"
            raise
        finally:
            self.gone.set()


class Addition:
    """A device of *kind* that is added while a machine runs, and the same again in the next machine after a reset.

    *make* adds it with its number; *close* closes what it keeps over resets.
    """

    def __init__(
        self, make: Callable[[Machine, int], object], kind: str, close: Callable[[], None] = lambda: None
    ) -> None:
        self.make, self.kind, self.close = make, kind, close
        # Once it is there: a card keeps its address, and a guest that names it by its slot its name.
        self.number: int | None = None
        self.slot: int | None = None


class HotPlug:
    """The slots of *machine*'s root bus, and the registers by which its guest hears of them. *sci* as for AcpiPm."""

    def __init__(self, machine: PciMachine) -> None:
        self._machine = machine
        self._events = GeneralEvents(machine.sci())
        self._slots = SlotEvents(self._eject)
        # Held from a device's number until it can be removed. A guest's eject waits for it on a vCPU's thread: whoever
        # holds it waits for no vCPU.
        self._lock = threading.RLock()
        self._ended = False
        self._plugged: dict[int, _Plugged] = {}
        self._counts: Counter[str] = Counter()  # the next number of each name
        self._additions: list[Addition] = []
        self._removed: set[int] = set()  # slots of devices that were there from the start
        # Last of all, when the devices are closed.
        machine.resources.callback(self._close_additions, self._additions)
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

    def add(self, addition: Addition) -> int:
        """Add it, and tell the guest; gives the device's slot.

        Raises StateError after end(), and what its ``make`` raises, with nothing there.
        """
        slot = self._add(addition)
        self._slots.came(slot)
        self._events.happen(EVENT_PCI)
        return slot

    def end(self) -> None:
        """Nothing is added from now on, and nobody waits for a removal; waits for an addition that is under way.

        Before the machine is closed.
        """
        with self._lock:
            self._ended = True
            for plugged in self._plugged.values():
                plugged.gone.set()

    def restore(self, additions: list[Addition], removed: set[int]) -> None:
        """Make it what the machine before this one had become, before this one starts: without the devices in the slots
        *removed*, with *additions*. Both are kept up to date from now on, and their owner closes the additions.

        Raises what one of them raises.
        """
        self._removed = removed
        # Before there are additions, one of which may have such a slot by now.
        for slot in sorted(removed):
            self._eject(slot)
        self._additions = additions
        for addition in list(additions):
            self._add(addition)

    def _add(self, addition: Addition) -> int:
        kind, machine = addition.kind, self._machine
        with self._lock:
            if self._ended:
                from vmonty.vmm.inspection import StateError  # with all of a machine, which a client need not import

                raise StateError("the machine has ended, or was reset, before the device was there; try again")
            number = addition.number if addition.number is not None else self._counts[kind]
            machine.next_slot = addition.slot
            try:
                with self.plugging() as slots:
                    addition.make(machine, number)
            finally:
                machine.next_slot = None
            self._counts[kind] = max(self._counts[kind], number + 1)
            addition.number, addition.slot = number, slots[0]
            if addition not in self._additions:
                self._additions.append(addition)
            return slots[0]

    @staticmethod
    def _close_additions(additions: list[Addition]) -> None:
        with contextlib.ExitStack() as closing:  # each, though one before it fails
            for addition in reversed(additions):
                closing.callback(addition.close)

    def devices(self) -> dict[int, str]:
        """Slot → the name of what may be removed."""
        with self._lock:
            return {slot: plugged.name for slot, plugged in sorted(self._plugged.items())}

    def chips(self) -> set[int]:
        """The slots of what stays."""
        with self._lock:
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
        if self._plugged.get(slot) is plugged:
            raise VmontyError(f"the machine has ended, or was reset, before it let go of {plugged.name} in slot {slot}")
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
            gone = [addition for addition in self._additions if addition.slot == slot]
            for addition in gone:
                self._additions.remove(addition)
                plugged.then.callback(addition.close)
            if not gone:
                self._removed.add(slot)
        plugged.close()


def slots_of(machine: Machine) -> HotPlug:
    """Where devices of *machine* come and go. Raises UsageError for a board where they cannot."""
    from vmonty.vmm.boards.pci_host import PciMachine

    if not isinstance(machine, PciMachine):
        raise UsageError(f"a {machine.name} has no PCI: its devices stay; take pc or q35")
    return machine.hotplug


def plug(machine: Machine, kind: str, options: str) -> int:
    """Add a device to a machine that runs; *kind* and *options* as of the command line's: disk, net or device.

    Gives its slot. Raises UsageError and its kin for what cannot be added, StateError when the machine ends meanwhile.
    """
    hotplug = slots_of(machine)
    if (made := {"disk": _disk, "net": _network, "device": _device}.get(kind)) is None:
        raise UsageError(f"{kind}: there are disk, net and device")
    addition = made(options)
    try:
        return hotplug.add(addition)
    except BaseException:
        addition.close()
        raise


def _disk(options: str) -> Addition:
    from vmonty.vmm.peripherals import Disk, add_disk

    disk = Disk.parse(options)
    if disk.interface != "virtio":
        raise UsageError(f"--disk {options}: a disk that is added to a machine that runs is a virtio disk")

    backend = disk.open()
    return Addition(lambda machine, number: add_disk(machine, backend, number), "virtio-blk", backend.close)


def _network(options: str) -> Addition:
    from vmonty.vmm.peripherals import NO_ROM, Network, add_network

    # Firmware has run: no ROM is executed, and the boot order has been told.
    network = Network.parse(options)._replace(boot_index=None, rom=NO_ROM).connected()
    if network.kind == "none":
        raise UsageError("--net none: there is nothing to add")
    return Addition(lambda machine, number: add_network(machine, network, number), "virtio-net", network.close)


def _device(options: str) -> Addition:
    from vmonty.vmm.catalogue import TYPES

    device = TYPES.create(options, "device")
    name = device.info.name
    if device.info.parent != "virtio-device" or name == "virtio-console":
        raise UsageError(f"--device {name}: it cannot be added to a machine that runs; virtio-rng and its kin can")
    return Addition(lambda machine, _: TYPES.create(options, "device").realize(machine), name)
