"""``microvm``: no PCI and no legacy but one serial port; virtio devices behind memory-mapped registers.

0xFEA00000   generic event device: power button, sleep, reset (hardware-reduced ACPI)
0xFEB00000   16 virtio-mmio slots of 512 bytes
"""

from __future__ import annotations

from collections.abc import Callable

from vmonty.base.errors import UsageError
from vmonty.vmm.boards.ports import COM_PORTS
from vmonty.vmm.boot import acpi, dsdt
from vmonty.vmm.bus import BusDevice
from vmonty.vmm.hw import acpi_ged
from vmonty.vmm.hw.acpi_ged import AcpiGed
from vmonty.vmm.machine import Machine, MmioSlot

GED, GED_GSI = 0xFEA0_0000, 9
VIRTIO_MMIO, VIRTIO_MMIO_SIZE = 0xFEB0_0000, 512
# Pins of the I/O APIC that nothing else uses; those that no PIC shares come first.
VIRTIO_GSIS = (16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 10, 11, 12, 14, 15)


class Microvm(Machine):
    """The machine for guests that know that they are virtual."""

    name = "microvm"
    pit = False

    def build(self) -> None:
        """The build order."""
        base, irq = COM_PORTS[0]
        self.serial = self.add_console(base, irq)
        self.ged = AcpiGed(self.power_off, self.reset, self.lines.source(GED_GSI))
        self.mmio.place(GED, acpi_ged.SIZE, self.ged, "acpi-ged")
        self.slots: list[MmioSlot] = []

    def add_mmio_device(self, make: Callable[[MmioSlot], BusDevice]) -> BusDevice:
        """Fill the next virtio-mmio slot; see Machine.add_mmio_device."""
        number = len(self.slots)
        if number == len(VIRTIO_GSIS):
            raise UsageError(f"a microvm has {number} virtio-mmio slots, and all are taken")
        gsi = VIRTIO_GSIS[number]
        base = VIRTIO_MMIO + number * VIRTIO_MMIO_SIZE
        slot = MmioSlot(base, VIRTIO_MMIO_SIZE, gsi, self.lines.source(gsi))
        device = make(slot)
        self.mmio.place(base, VIRTIO_MMIO_SIZE, device, f"virtio-mmio.{number}")
        self.slots.append(slot)
        return device

    def press_power_button(self) -> None:
        """The event device's power button."""
        self.ged.press_power_button()

    def prepare(self) -> None:
        """There is nothing that firmware would have done."""

    def platform(self) -> acpi.Platform:
        """The ACPI tables' contents."""
        base, irq = COM_PORTS[0]
        virtio = [dsdt.virtio_mmio(number, slot.base, slot.size, slot.gsi) for number, slot in enumerate(self.slots)]
        return acpi.Platform(
            cpus=self.config.cpus, ged=GED, keyboard_controller=False, rtc=False,
            dsdt=acpi.soft_off()
            + dsdt.system_bus(dsdt.serial_port(1, base, irq), dsdt.generic_event_device(GED, GED_GSI), *virtio),
        )  # fmt: skip
