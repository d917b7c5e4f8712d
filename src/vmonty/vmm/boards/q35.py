"""``q35``: the Q35 memory controller hub and ICH9, as QEMU lays a q35 out.

slot 0      MCH; memory-mapped configuration space at 0xB0000000
slot 31.0   ICH9 LPC bridge: power management at port 0x600, PIRQA to PIRQH on GSI 16 to 23
slot 31.2   ICH9 SATA (AHCI), when there are drives
"""

from __future__ import annotations

from vmonty.vmm.boards.legacy import add_legacy_devices, describe_legacy_devices, prepare_legacy_devices
from vmonty.vmm.boards.pci_host import LOW_WINDOW, PM_BASE, SCI_IRQ, PciMachine, describe_fw_cfg
from vmonty.vmm.boot import acpi, aml, dsdt
from vmonty.vmm.boot.dsdt import Window
from vmonty.vmm.hotplug import GPE_PORT, SLOTS_PORT
from vmonty.vmm.hw import hpet, ich9_lpc, q35_mch
from vmonty.vmm.hw.ich9_lpc import FIRST_INTERNAL_SLOT, Ich9Lpc
from vmonty.vmm.hw.pci import Ecam, PciDevice, PcieRootPort
from vmonty.vmm.hw.q35_mch import Q35Mch

ECAM, ECAM_SIZE = 0xB000_0000, 256 << 20
LPC_SLOT = 31
SATA_PLACE = (LPC_SLOT, 2)
FIRST_PIRQ_GSI = 16


def pirq_of(slot: int, pin: int) -> int:
    """0 is PIRQA."""
    return pin % 4 if slot >= FIRST_INTERNAL_SLOT else 4 + (slot + pin) % 4


class Q35(PciMachine):
    """The machine with PCI Express."""

    name = "q35"
    has_ide = False
    low_ram_limit = 0x8000_0000

    def build(self) -> None:
        """The build order."""
        bus = self._add_root_bus()
        self.mch = Q35Mch(Ecam(bus), self._add_shadow_ram())
        self.lpc = Ich9Lpc(
            self._pm_registers(),
            [self.lines.source(irq) for irq in range(16)],
            [self.lines.source(FIRST_PIRQ_GSI + pirq) for pirq in range(len(ich9_lpc.PIRQ_ROUTES))],
        )
        bus.add(self.mch, slot=0)
        bus.add(self.lpc, slot=LPC_SLOT)
        self.legacy = add_legacy_devices(self)
        self.serial = self.legacy.serial
        self._add_hpet(self.legacy.cmos)
        self._add_fw_cfg()
        for number in range(self.properties.get("root_ports", 0)):
            bus.add(PcieRootPort(f"root-port.{number}", number + 1))

    def _place_ahci(self, function: PciDevice) -> None:
        self.pci.add(function, *SATA_PLACE)

    def _intx(self, slot: int, pin: int, level: int) -> None:
        self.lpc.intx(slot, pin, level)

    def _interrupt_line(self, slot: int, pin: int) -> int:
        return FIRST_PIRQ_GSI + pirq_of(slot, pin)

    def prepare(self) -> None:
        """Open configuration space, switch the power management registers on, give addresses."""
        for at, word in ((4, 0), (0, ECAM | q35_mch.PCIEXBAR_ENABLE)):
            self.mch.config_write(q35_mch.PCIEXBAR + at, 4, word)
        self.lpc.config_write(ich9_lpc.PM_BASE, 4, PM_BASE | 1)
        self.lpc.config_write(ich9_lpc.ACPI_CONTROL, 1, ich9_lpc.ACPI_ENABLE)
        prepare_legacy_devices(self.legacy)
        self._assign_addresses()
        self.prepare_screen()
        self._prepare_memory(self.mch, q35_mch.PAM)
        self.publish()

    @property
    def ecam_window(self) -> Window:
        """Where firmware put it; before, where it usually does."""
        first = self.mch.ecam_base or ECAM
        if first > LOW_WINDOW.last:
            first = ECAM  # where no firmware puts it
        return Window(first, first + ECAM_SIZE - 1)

    def platform(self) -> acpi.Platform:
        """The ACPI tables' contents."""
        routing = dsdt.routing_by_gsi(lambda slot, pin: FIRST_PIRQ_GSI + pirq_of(slot, pin))
        bridge = dsdt.isa_bridge(LPC_SLOT, describe_legacy_devices(self.serial_ports), describe_fw_cfg())
        # Linux believes in the window only when a motherboard device reserves it.
        reserved = dsdt.plain_device("MEMC", "PNP0C02", aml.fixed_memory(self.ecam_window.first, ECAM_SIZE), uid=1)
        return acpi.Platform(
            cpus=self.config.cpus, pm_base=self.lpc.pm_base or PM_BASE, sci=SCI_IRQ,
            vga=self.screen is not None, hpet=self.hpet, hpet_id=hpet.IDENTITY, gpe=GPE_PORT,
            ecam=self.ecam_window.first,
            dsdt=acpi.soft_off()
            + dsdt.system_bus(
                dsdt.processors(self.config.cpus),
                dsdt.pci_root(self.windows, routing, bridge, self._describe_slots(), express=True), reserved,
                self._describe_hpet(),
            )
            + dsdt.hot_plug_event(SLOTS_PORT, GPE_PORT),
        )  # fmt: skip
