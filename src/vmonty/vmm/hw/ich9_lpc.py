"""ICH9's LPC bridge: interrupt router, ACPI base, root complex base. Source: Intel ICH9 data sheet, "LPC Interface
Bridge Registers (D31:F0)", "Chipset Configuration Registers"."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vmonty.vmm.bus import BusDevice
from vmonty.vmm.hw.pci import PciDevice, Space, Window
from vmonty.vmm.hw.pci.pirq import ROUTE_DISABLED, PirqRouter

DEVICE_ICH9_LPC = 0x2918
ISA_BRIDGE = 0x06_0100
PM_BASE, PM_SIZE = 0x40, 128
ACPI_CONTROL, ACPI_ENABLE = 0x44, 0x80
PIRQ_ROUTES = (0x60, 0x61, 0x62, 0x63, 0x68, 0x69, 0x6A, 0x6B)
# Says to firmware that system management mode was set up already: there is none here.
SMI_ENABLE, SMI_BY_APM = 0x30, 0x20
ROOT_COMPLEX_BASE, ROOT_COMPLEX_SIZE = 0xF0, 1 << 14
# Of the slots, 25 to 31 are inside the chip and use PIRQA to PIRQD; the others are on the board's PIRQE to PIRQH.
FIRST_INTERNAL_SLOT = 25


class _RootComplex:
    """The root complex register block: kept, and without effect, but for the interrupt pins that read as at reset."""

    def __init__(self) -> None:
        self._bytes = bytearray(ROOT_COMPLEX_SIZE)

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self._bytes[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self._bytes[offset : offset + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")


class _PowerManagement:
    """ACPI's registers, and SMI_EN behind them."""

    def __init__(self, registers: BusDevice) -> None:
        self._registers = registers

    def read(self, offset: int, size: int) -> int:
        if SMI_ENABLE <= offset < SMI_ENABLE + 4:
            return SMI_BY_APM >> 8 * (offset - SMI_ENABLE)
        return self._registers.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        if offset < SMI_ENABLE:
            self._registers.write(offset, size, value)


class Ich9Lpc(PciDevice):
    """*registers* are ACPI's, at PMBASE; *isa* the ends of ISA interrupts 0 to 15, *gsi* those of GSI 16 to 23."""

    def __init__(
        self, registers: BusDevice, isa: Sequence[Callable[[int], None]], gsi: Sequence[Callable[[int], None]]
    ) -> None:
        super().__init__(
            "ich9-lpc", vendor_id=0x8086, device_id=DEVICE_ICH9_LPC, class_code=ISA_BRIDGE, revision=2,
            subsystem_vendor_id=0x1AF4, subsystem_id=0x1100, multifunction=True,
        )  # fmt: skip
        self.router = PirqRouter(len(PIRQ_ROUTES), isa, gsi)
        self._pm = Window("acpi-pm", Space.IO, PM_SIZE, _PowerManagement(registers))
        self._root_complex = Window("rcba", Space.MEMORY, ROOT_COMPLEX_SIZE, _RootComplex())
        self.config.put(0x04, 2, 7)
        self.config.set(PM_BASE, 4, 1, writable=0xFF80)
        self.config.set(ACPI_CONTROL, 1, 0, writable=0x87)
        for offset in PIRQ_ROUTES:
            self.config.set(offset, 1, ROUTE_DISABLED, writable=0x8F)
        self.config.set(0x80, 4, 0, writable=0x3F0F_1377)  # which legacy devices the LPC bus decodes
        self.config.set(0xA0, 2, 0, writable=0x16FF)  # general PM configuration
        self.config.set(0xDC, 1, 0, writable=0x03)  # BIOS control
        self.config.set(ROOT_COMPLEX_BASE, 4, 0, writable=0xFFFF_C001)

    def intx(self, slot: int, pin: int, level: int) -> None:
        """A pin of a slot on the root bus."""
        pirq = pin % 4 if slot >= FIRST_INTERNAL_SLOT else 4 + (slot + pin) % 4
        self.router.set(pirq, (slot, pin), level)

    @property
    def pm_base(self) -> int | None:
        """The port where ACPI's registers stand, None while they do not answer."""
        base = self.config.get(PM_BASE, 2) & 0xFF80
        return base if self.config.data[ACPI_CONTROL] & ACPI_ENABLE and base else None

    def update_decoding(self) -> None:
        """PMBASE and RCBA move their registers."""
        super().update_decoding()
        if self._slot is None:
            return
        self._slot.decoder.move(self._pm, self.pm_base)
        root = self.config.get(ROOT_COMPLEX_BASE, 4)
        self._slot.decoder.move(self._root_complex, root & 0xFFFF_C000 if root & 1 else None)

    def config_written(self, offset: int, size: int) -> None:
        """The routes take effect at once."""
        for pirq, register in enumerate(PIRQ_ROUTES):
            if offset <= register < offset + size:
                self.router.route(pirq, self.config.data[register])
