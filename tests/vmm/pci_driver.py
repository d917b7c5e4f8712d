"""The driver's side of PCI: what a guest does to find a function and to make it answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from vmonty.vmm.bus import Bus
from vmonty.vmm.hw.pci import ConfigPorts, Decoder, PciBus, PciDevice


class Latch:
    """A bus device of *size* bytes that keeps what was written and shows *value* until then."""

    def __init__(self, value: int = 0) -> None:
        self.value = value
        self.writes: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        return self.value

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))
        self.value = value


@dataclass
class PciHost:
    """A bus with nothing but its host's side; ``lines`` and ``messages`` record what devices send."""

    lines: list[tuple[int, int, int]] = field(default_factory=list)
    messages: list[tuple[int, int]] = field(default_factory=list)
    resets: int = 0

    def __post_init__(self) -> None:
        self.ports = Bus("the port space", 0x1_0000)
        self.mmio = Bus("the memory space", 1 << 52)
        self.bus = PciBus(
            "pci.0", Decoder(self.ports, self.mmio),
            lambda slot, pin, level: self.lines.append((slot, pin, level)),
            lambda address, data: self.messages.append((address, data)),
        )  # fmt: skip
        self.ports.place(0xCF8, 8, ConfigPorts(self.bus, self._reset), "pci-config")

    def _reset(self) -> None:
        self.resets += 1

    def config(self, slot: int, offset: int, size: int, value: int | None = None, bus: int = 0) -> int:
        """Read a configuration register through the ports, or write *value* there."""
        self.ports.write(0xCF8, 4, 1 << 31 | bus << 16 | slot << 11 | offset & 0xFC)
        if value is None:
            return self.ports.read(0xCFC + (offset & 3), size)
        self.ports.write(0xCFC + (offset & 3), size, value)
        return value

    def size_bar(self, slot: int, index: int) -> int:
        """Ask for a BAR's size, as drivers do, and put its old value back."""
        offset = 0x10 + 4 * index
        before = self.config(slot, offset, 4)
        self.config(slot, offset, 4, 0xFFFF_FFFF)
        mask = self.config(slot, offset, 4) & ~(3 if before & 1 else 15)
        self.config(slot, offset, 4, before)
        return -mask & 0xFFFF_FFFF


def plain(**changes: int) -> PciDevice:
    """A function of no known kind."""
    fields = {"vendor_id": 0x1234, "device_id": 0x5678, "class_code": 0x0880_00, "interrupt_pin": 1} | changes
    return PciDevice("plain", **fields)  # type: ignore[arg-type]
