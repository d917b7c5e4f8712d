"""82371AB (PIIX4), function 3: where the ACPI power management registers stand.

Source: Intel 82371AB data sheet, "Power Management PCI Configuration Registers (Function 3)".
"""

from __future__ import annotations

from vmonty.vmm.bus import BusDevice
from vmonty.vmm.hw.pci import PciDevice, Space, Window

DEVICE_82371AB_PM = 0x7113
BRIDGE_OTHER = 0x06_8000
PM_BASE, PM_SIZE = 0x40, 64
DEVICE_ACTIVITY_B = 0x58
PM_MISC, PM_IO_ENABLE = 0x80, 1
SMBUS_BASE, SMBUS_HOST_CONFIG = 0x90, 0xD2
# Says to firmware that system management mode was set up already: there is none here.
SMM_DONE = 0x02


class Piix4Pm(PciDevice):
    """*registers* (the PM1 blocks and the PM timer) answer at PMBA while PMIOSE is set."""

    def __init__(self, registers: BusDevice) -> None:
        super().__init__(
            "piix4-pm", vendor_id=0x8086, device_id=DEVICE_82371AB_PM, class_code=BRIDGE_OTHER, revision=3,
            subsystem_vendor_id=0x1AF4, subsystem_id=0x1100, interrupt_pin=1,
        )  # fmt: skip
        self._window = Window("acpi-pm", Space.IO, PM_SIZE, registers)
        self.config.put(0x3C, 1, 9)
        self.config.set(PM_BASE, 4, 1, writable=0xFFC0)
        self.config.set(DEVICE_ACTIVITY_B, 4, SMM_DONE << 24)
        self.config.set(PM_MISC, 1, 0, writable=PM_IO_ENABLE)
        self.config.set(SMBUS_BASE, 4, 1, writable=0xFFF0)
        self.config.set(SMBUS_HOST_CONFIG, 1, 0, writable=0x0F)

    @property
    def base(self) -> int | None:
        """The port where the registers stand, None while they do not answer."""
        base = self.config.get(PM_BASE, 2) & 0xFFC0
        return base if self.config.data[PM_MISC] & PM_IO_ENABLE and base else None

    def update_decoding(self) -> None:
        """PMBA moves the registers."""
        super().update_decoding()
        if self._slot is not None:
            self._slot.decoder.move(self._window, self.base)
