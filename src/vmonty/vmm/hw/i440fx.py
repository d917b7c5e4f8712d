"""82441FX host bridge (PMC) of the 440FX. Source: Intel 82441FX data sheet, "PCI Configuration Registers"."""

from __future__ import annotations

from vmonty.vmm.hw.pci import PciDevice
from vmonty.vmm.hw.pci.pam import Attributes, Pam

VENDOR_INTEL, DEVICE_82441 = 0x8086, 0x1237
QEMU_SUBSYSTEM_VENDOR, QEMU_SUBSYSTEM = 0x1AF4, 0x1100
HOST_BRIDGE = 0x06_0000
PAM, SMRAM_CONTROL = 0x59, 0x72


class I440fx(PciDevice):
    """*memory* is what the PAM and SMRAM registers switch.

    The guest identifies a QEMU machine by the subsystem, as its firmware does.
    """

    def __init__(self, memory: Attributes) -> None:
        super().__init__(
            "i440fx", vendor_id=VENDOR_INTEL, device_id=DEVICE_82441, class_code=HOST_BRIDGE, revision=2,
            subsystem_vendor_id=QEMU_SUBSYSTEM_VENDOR, subsystem_id=QEMU_SUBSYSTEM,
        )  # fmt: skip
        self._pam = Pam(self.config, PAM, SMRAM_CONTROL, memory)

    def config_written(self, offset: int, size: int) -> None:
        """The memory's attributes take effect at once."""
        self._pam.written(offset, size)
