"""82371SB (PIIX3), function 0: the PCI-to-ISA bridge and its interrupt router.

Source: Intel 82371FB/82371SB data sheet, "PCI Configuration Registers (Function 0)".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vmonty.vmm.hw.pci import PciDevice
from vmonty.vmm.hw.pci.pirq import ROUTE_DISABLED, PirqRouter

DEVICE_82371SB_ISA = 0x7000
ISA_BRIDGE = 0x06_0100
PIRQ_ROUTES, PIRQS = 0x60, 4


class Piix3(PciDevice):
    """*isa* are the ends of ISA interrupts 0 to 15. The board gives ``intx`` to the bus it stands on."""

    def __init__(self, isa: Sequence[Callable[[int], None]]) -> None:
        super().__init__(
            "piix3", vendor_id=0x8086, device_id=DEVICE_82371SB_ISA, class_code=ISA_BRIDGE,
            subsystem_vendor_id=0x1AF4, subsystem_id=0x1100, multifunction=True,
        )  # fmt: skip
        self.router = PirqRouter(PIRQS, isa)
        self.config.put(0x04, 2, 7)  # always bus master, always decoding
        for offset, size, value, writable in (
            (0x4C, 1, 0x4D, 0x7F),  # ISA I/O recovery timer
            (0x4E, 2, 0x0003, 0x1FFF),  # X-bus chip select
            (0x69, 1, 0x02, 0xFE),  # top of memory
            (0x6A, 2, 0x0000, 0xFFFF),
            (0x76, 2, 0x0C0C, 0x8F8F),  # motherboard DMA
            (0xA0, 4, 0x0000_0008, 0xFFFF_FFFF),  # SMI control and enable
        ):
            self.config.set(offset, size, value, writable=writable)
        for pirq in range(PIRQS):
            self.config.set(PIRQ_ROUTES + pirq, 1, ROUTE_DISABLED, writable=0x8F)

    def intx(self, slot: int, pin: int, level: int) -> None:
        """A pin of a slot: the board's traces rotate them, so that four neighbours use four lines."""
        self.router.set((slot - 1 + pin) % PIRQS, (slot, pin), level)

    def config_written(self, offset: int, size: int) -> None:
        """The routes take effect at once."""
        for pirq in range(PIRQS):
            if offset <= PIRQ_ROUTES + pirq < offset + size:
                self.router.route(pirq, self.config.data[PIRQ_ROUTES + pirq])
