"""The two ways of a host bridge to configuration space: a pair of ports, and memory."""

from __future__ import annotations

from collections.abc import Callable

from vmonty.kvm.api import PortCell
from vmonty.vmm.bus import PlainCell
from vmonty.vmm.hw.pci import config as cfg
from vmonty.vmm.hw.pci.bus import PciBus

ADDRESS_ENABLE = 1 << 31
ADDRESS = 0x80FF_FFFC
# ICH9 data sheet, "Reset Control Register": SYS_RST, RST_CPU, FULL_RST.
RESET_CPU = 1 << 2


class ConfigPorts:
    """Configuration mechanism #1: address at offset 0, data at offset 4 (ports 0xCF8 and 0xCFC).

    Source: PCI Local Bus Specification 3.0, "Software Generation of Configuration Transactions". Byte accesses to the
    address port reach the chipset's own register there: 0xCF9, reset control, which calls *reset*. *address* holds the
    address where KVM takes plain writes of it.
    """

    def __init__(self, bus: PciBus, reset: Callable[[], None], address: PortCell | None = None) -> None:
        self._bus = bus
        self._address = address or PlainCell()
        self._reset = reset
        self._reset_control = 0

    def read(self, offset: int, size: int) -> int:
        """The address when read as a whole; the data through it."""
        if offset >= 4:
            if not self._address.value & ADDRESS_ENABLE:
                return (1 << 8 * size) - 1
            return self._bus.config_read(*self._target(offset), size)
        if offset == 0 and size == 4:
            return self._address.value
        return self._reset_control if offset == 1 and size == 1 else (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Select a register, write it, or reset the machine by 0xCF9 (bit 2 rising)."""
        if offset >= 4:
            if self._address.value & ADDRESS_ENABLE:
                self._bus.config_write(*self._target(offset), size, value)
        elif offset == 0 and size == 4:
            self._address.value = value & ADDRESS
        elif offset == 1 and size == 1:
            rising = value & ~self._reset_control & RESET_CPU
            self._reset_control = value & 0x0E
            if rising:
                self._reset()

    def _target(self, offset: int) -> tuple[int, int, int, int]:
        address = self._address.value
        return address >> 16 & 0xFF, address >> 11 & 0x1F, address >> 8 & 7, (address & 0xFC) + offset - 4


class Ecam:
    """PCI Express's memory-mapped configuration space: 1 MiB a bus.

    Source: PCI Express Base Specification, "PCI Express Enhanced Configuration Access Mechanism".
    """

    def __init__(self, bus: PciBus) -> None:
        self._bus = bus

    def read(self, offset: int, size: int) -> int:
        """A register of the function that the offset names."""
        return self._bus.config_read(*self._target(offset), size)

    def write(self, offset: int, size: int, value: int) -> None:
        """As read."""
        self._bus.config_write(*self._target(offset), size, value)

    @staticmethod
    def _target(offset: int) -> tuple[int, int, int, int]:
        return offset >> 20, offset >> 15 & 0x1F, offset >> 12 & 7, offset & (cfg.EXTENDED_SIZE - 1)
