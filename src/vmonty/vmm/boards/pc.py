"""``pc``: i440FX, PIIX3 and PIIX4, as QEMU lays a pc out.

slot 0     82441FX host bridge
slot 1.0   PIIX3: ISA bridge, PIRQA to PIRQD
slot 1.3   PIIX4: power management at port 0x600, SCI on IRQ 9
"""

from __future__ import annotations

from functools import cache

from vmonty.vmm.boards.legacy import add_legacy_devices, describe_legacy_devices, prepare_legacy_devices
from vmonty.vmm.boards.pci_host import PM_BASE, SCI_IRQ, PciMachine, describe_fw_cfg
from vmonty.vmm.boot import acpi, dsdt
from vmonty.vmm.hotplug import GPE_PORT, SLOTS_PORT
from vmonty.vmm.hw import hpet, i440fx, piix4_pm
from vmonty.vmm.hw.i440fx import I440fx
from vmonty.vmm.hw.pci import PciDevice
from vmonty.vmm.hw.piix3 import PIRQ_ROUTES, PIRQS, Piix3
from vmonty.vmm.hw.piix4_pm import Piix4Pm

SOUTH_BRIDGE_SLOT = 1
# PIRQA to PIRQD, as SeaBIOS sets them.
PIRQ_IRQS = (10, 10, 11, 11)
LINKS = ("LNKA", "LNKB", "LNKC", "LNKD")
ROUTE_FIELDS = ("PRQ0", "PRQ1", "PRQ2", "PRQ3")


@cache
def _routing() -> bytes:
    """The _PRT; tables are made more than once in a start, and half of it would be this."""
    return dsdt.routing_by_links(lambda slot, pin: f"\\_SB.{LINKS[(slot - 1 + pin) % PIRQS]}")


class Pc(PciMachine):
    """The machine for everything that a PC of 1996 and its successors boot."""

    name = "pc"

    def build(self) -> None:
        """The build order."""
        bus = self._add_root_bus()
        self.host_bridge = I440fx(self._add_shadow_ram())
        self.piix3 = Piix3([self.lines.source(irq) for irq in range(16)])
        self.piix4_pm = Piix4Pm(self._pm_registers())
        bus.add(self.host_bridge, slot=0)
        bus.add(self.piix3, slot=SOUTH_BRIDGE_SLOT)
        bus.add(self.piix4_pm, slot=SOUTH_BRIDGE_SLOT, function=3)
        self.legacy = add_legacy_devices(self)
        self.serial = self.legacy.serial
        self._add_hpet(self.legacy.cmos)
        self._add_fw_cfg()

    def _place_ide(self, function: PciDevice) -> None:
        self.pci.add(function, SOUTH_BRIDGE_SLOT, 1)

    def _intx(self, slot: int, pin: int, level: int) -> None:
        self.piix3.intx(slot, pin, level)

    def _interrupt_line(self, slot: int, pin: int) -> int:
        return SCI_IRQ if slot == SOUTH_BRIDGE_SLOT else PIRQ_IRQS[(slot - 1 + pin) % PIRQS]

    def prepare(self) -> None:
        """Route interrupts, switch the power management registers on, give addresses."""
        for pirq, irq in enumerate(PIRQ_IRQS):
            self.piix3.config_write(PIRQ_ROUTES + pirq, 1, irq)
        self.piix4_pm.config_write(piix4_pm.PM_BASE, 4, PM_BASE | 1)
        self.piix4_pm.config_write(piix4_pm.PM_MISC, 1, piix4_pm.PM_IO_ENABLE)
        prepare_legacy_devices(self.legacy)
        self._assign_addresses()
        self.prepare_screen()
        self._prepare_memory(self.host_bridge, i440fx.PAM)
        self.publish()

    def platform(self) -> acpi.Platform:
        """The ACPI tables' contents."""
        links = [
            dsdt.interrupt_link(label, number, f"\\_SB.PCI0.ISA.{field}")
            for number, (label, field) in enumerate(zip(LINKS, ROUTE_FIELDS, strict=True))
        ]
        routing = _routing()
        bridge = dsdt.isa_bridge(
            SOUTH_BRIDGE_SLOT,
            dsdt.pirq_registers(PIRQ_ROUTES, ROUTE_FIELDS),
            describe_legacy_devices(self.serial_ports),
            describe_fw_cfg(),
        )  # fmt: skip
        return acpi.Platform(
            cpus=self.config.cpus, pm_base=self.piix4_pm.base or PM_BASE, sci=SCI_IRQ,
            vga=self.screen is not None, hpet=self.hpet, hpet_id=hpet.IDENTITY, gpe=GPE_PORT,
            dsdt=acpi.soft_off()
            + dsdt.system_bus(
                dsdt.processors(self.config.cpus),
                dsdt.pci_root(self.windows, routing, bridge, self._describe_slots()), *links, self._describe_hpet(),
            )
            + dsdt.hot_plug_event(SLOTS_PORT, GPE_PORT),
        )  # fmt: skip
