"""82G33 (the Q35's) memory controller hub: DRAM attributes and memory-mapped configuration space.

Source: Intel 3 Series Express Chipset Family data sheet, "Host Bridge/DRAM Controller (D0:F0)".
"""

from __future__ import annotations

from vmonty.vmm.bus import BusDevice
from vmonty.vmm.hw.pci import PciDevice, Space, Window
from vmonty.vmm.hw.pci.pam import Attributes, Pam

DEVICE_Q35_MCH = 0x29C0
HOST_BRIDGE = 0x06_0000
PCIEXBAR, PCIEXBAR_ENABLE = 0x60, 1
# Bits 2:1 of PCIEXBAR: how many buses it shows.
PCIEXBAR_SIZES = {0: 256 << 20, 1: 128 << 20, 2: 64 << 20}
PAM, SMRAM_CONTROL, ESMRAM_CONTROL = 0x90, 0x9D, 0x9E


class Q35Mch(PciDevice):
    """*ecam* answers at PCIEXBAR, up to its whole 256 MiB; *memory* is what the PAM and SMRAM registers switch."""

    def __init__(self, ecam: BusDevice, memory: Attributes) -> None:
        super().__init__(
            "mch", vendor_id=0x8086, device_id=DEVICE_Q35_MCH, class_code=HOST_BRIDGE,
            subsystem_vendor_id=0x1AF4, subsystem_id=0x1100,
        )  # fmt: skip
        self._ecam = ecam
        self._windows = {code: Window("ecam", Space.MEMORY, size, ecam) for code, size in PCIEXBAR_SIZES.items()}
        self.config.set(PCIEXBAR, 8, 0xE000_0000, writable=0xF_F000_0007)
        self._pam = Pam(self.config, PAM, SMRAM_CONTROL, memory)
        self.config.set(ESMRAM_CONTROL, 1, 0x38, writable=0xC7)

    def config_written(self, offset: int, size: int) -> None:
        """The memory's attributes take effect at once."""
        self._pam.written(offset, size)

    @property
    def ecam_base(self) -> int | None:
        """Where the configuration space's window is, None when it is closed."""
        register = self.config.get(PCIEXBAR, 8)
        window = self._windows.get(register >> 1 & 3)
        return register & ~7 & -window.size if register & PCIEXBAR_ENABLE and window else None

    def update_decoding(self) -> None:
        """PCIEXBAR moves and sizes the window; its reserved size decodes nothing."""
        super().update_decoding()
        if self._slot is None:
            return
        register = self.config.get(PCIEXBAR, 8)
        code = register >> 1 & 3
        for size, window in self._windows.items():
            if size != code:
                self._slot.decoder.move(window, None)
        if code in self._windows:
            window = self._windows[code]
            base = register & ~7 & -window.size
            self._slot.decoder.move(window, base if register & PCIEXBAR_ENABLE else None)
