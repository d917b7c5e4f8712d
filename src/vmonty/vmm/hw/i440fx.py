"""82441FX host bridge (PMC) of the 440FX. Source: Intel 82441FX data sheet, "PCI Configuration Registers"."""

from __future__ import annotations

from vmonty.vmm.hw.pci import PciDevice

VENDOR_INTEL, DEVICE_82441 = 0x8086, 0x1237
QEMU_SUBSYSTEM_VENDOR, QEMU_SUBSYSTEM = 0x1AF4, 0x1100
HOST_BRIDGE = 0x06_0000
PAM, PAM_REGISTERS = 0x59, 7
SMRAM_CONTROL = 0x72
DRAM_READ_WRITE = 0x33


class I440fx(PciDevice):
    """The registers that firmware writes are kept; 0xC0000 to 0xFFFFF is RAM whatever the PAM registers say.

    The guest identifies a QEMU machine by the subsystem, as its firmware does.
    """

    def __init__(self) -> None:
        super().__init__(
            "i440fx", vendor_id=VENDOR_INTEL, device_id=DEVICE_82441, class_code=HOST_BRIDGE, revision=2,
            subsystem_vendor_id=QEMU_SUBSYSTEM_VENDOR, subsystem_id=QEMU_SUBSYSTEM,
        )  # fmt: skip
        self.config.set(PAM, PAM_REGISTERS, 0, writable=int.from_bytes(bytes((0x33,)) * PAM_REGISTERS, "little"))
        self.config.set(SMRAM_CONTROL, 1, 2, writable=0x7F)
