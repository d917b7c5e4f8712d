"""Devices that a user adds to a machine: virtio devices on whichever bus the board has, with their backends."""

from __future__ import annotations

from vmonty.base.errors import UsageError
from vmonty.vmm.block.device import BlockDevice
from vmonty.vmm.boards.pci_host import PciMachine
from vmonty.vmm.bus import BusDevice
from vmonty.vmm.machine import Machine, MmioSlot
from vmonty.vmm.net.backend import NetBackend
from vmonty.vmm.virtio.blk import Blk
from vmonty.vmm.virtio.device import VirtioDevice
from vmonty.vmm.virtio.mmio import MmioTransport
from vmonty.vmm.virtio.net import Net
from vmonty.vmm.virtio.pci import VirtioPci

# Locally administered, QEMU's prefix; the last byte is the card's number.
MAC_PREFIX = bytes.fromhex("5254001234")
FIRST_MAC = 0x56


def add_virtio(machine: Machine, device: VirtioDevice) -> None:
    """Plug *device* into the next PCI slot, or virtio-mmio slot where there is no PCI; it ends with the machine.

    Before the machine starts. Raises UsageError when no slot is free.
    """
    machine.resources.callback(machine.loop.run, device.close)
    if isinstance(machine, PciMachine):
        function = VirtioPci(device, machine.vm)
        machine.resources.callback(function.close)
        machine.add_device(function)
        return

    def make(slot: MmioSlot) -> BusDevice:
        transport = MmioTransport(device, slot.line)
        transport.connect(machine.vm, slot.base)
        machine.resources.callback(transport.close)
        return transport

    machine.add_mmio_device(make)


def add_disk(machine: Machine, backend: BlockDevice, number: int = 0) -> Blk:
    """A virtio disk on *backend*, which stays its owner's to close."""
    device = Blk(machine.memory, machine.loop, backend, serial=f"vmonty-{number}")
    add_virtio(machine, device)
    return device


def add_network_card(machine: Machine, backend: NetBackend, number: int = 0, mac: bytes | None = None) -> Net:
    """A virtio network card on *backend*, which it closes at its end; card *number* has its own address."""
    if mac is None:
        if not 0 <= number < 0x100 - FIRST_MAC:
            raise UsageError(f"network card {number} needs an address of its own: give mac=")
        mac = MAC_PREFIX + bytes((FIRST_MAC + number,))
    device = Net(machine.memory, machine.loop, backend, mac)
    add_virtio(machine, device)
    return device
