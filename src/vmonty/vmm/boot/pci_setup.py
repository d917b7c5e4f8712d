"""What firmware does to PCI before an operating system starts: bus numbers, addresses, interrupt lines, decoding.

Boards do it themselves when they enter a kernel directly. Source: PCI Firmware Specification, "PCI Services";
PCI-to-PCI Bridge Architecture Specification, "System Initialization".
"""

from __future__ import annotations

from collections.abc import Callable

from vmonty.base.record import Record
from vmonty.vmm.boot.dsdt import Window
from vmonty.vmm.hw.pci import Bar, PciBridge, PciBus, PciDevice
from vmonty.vmm.hw.pci import bridge as br
from vmonty.vmm.hw.pci import config as cfg

FIRST_PORT, LAST_PORT = 0xC000, 0xFEFF
BRIDGE_IO_UNIT, BRIDGE_MEMORY_UNIT = 0x1000, 0x10_0000


class _Pool(Record):
    """Addresses from *at* to *last*, given out upwards."""

    at: int
    last: int

    def align(self, unit: int) -> int:
        self.at = -(-self.at // unit) * unit
        return self.at

    def take(self, size: int) -> int | None:
        base = -(-self.at // size) * size
        if base + size - 1 > self.last:
            return None
        self.at = base + size
        return base


class _Setup(Record):
    ports: _Pool
    low: _Pool
    high: _Pool
    line: Callable[[int, int], int]
    buses: int = 0

    def bus(self, bus: PciBus, root_slot: int | None, high: _Pool) -> None:
        devices = [(slot if root_slot is None else root_slot, device) for (slot, _), device in bus.devices().items()]
        bars = [(bar, device) for _, device in devices for bar in device.bars]
        for bar, device in sorted(bars, key=lambda pair: -pair[0].size):
            self._assign(bar, device, high)
        for slot, device in devices:
            if isinstance(device, PciBridge):
                self._bridge(device, slot)
            if pin := device.config.data[cfg.INTERRUPT_PIN]:
                device.config_write(cfg.INTERRUPT_LINE, 1, self.line(slot, pin - 1))
            command = device.config.get(cfg.COMMAND, 2)
            device.config_write(cfg.COMMAND, 2, command | cfg.COMMAND_IO | cfg.COMMAND_MEMORY)

    def _assign(self, bar: Bar, device: PciDevice, high: _Pool) -> None:
        if bar.offset == cfg.ROM_ADDRESS:
            return  # nobody here runs it
        pool = self.ports if bar.io else high if bar.wide else self.low
        base = pool.take(bar.size)
        if base is None and pool is high:
            base = self.low.take(bar.size)
        if base is not None:
            for at in range(0, 8 if bar.wide else 4, 4):
                device.config_write(bar.offset + at, 4, base >> 8 * at & 0xFFFF_FFFF)

    def _bridge(self, bridge: PciBridge, slot: int) -> None:
        self.buses += 1
        bridge.config_write(br.SECONDARY_BUS, 1, self.buses)
        bridge.config_write(br.SUBORDINATE_BUS, 1, 0xFF)
        first_port, first_byte = self.ports.align(BRIDGE_IO_UNIT), self.low.align(BRIDGE_MEMORY_UNIT)
        # Wide BARs behind a bridge go to its 32-bit window: the prefetchable one stays closed.
        self.bus(bridge.secondary, slot, self.low)
        last_port = self.ports.align(BRIDGE_IO_UNIT) - 1
        last_byte = self.low.align(BRIDGE_MEMORY_UNIT) - 1
        bridge.config_write(br.SUBORDINATE_BUS, 1, self.buses)
        if last_port < first_port:
            first_port, last_port = 0xF000, 0x0FFF  # closed: the base above the limit
        if last_byte < first_byte:
            first_byte, last_byte = 0xFFF0_0000, 0x000F_FFFF
        bridge.config_write(br.IO_BASE, 2, first_port >> 8 & 0xF0 | (last_port >> 8 & 0xF0) << 8)
        bridge.config_write(br.MEMORY_BASE, 4, first_byte >> 16 & 0xFFF0 | (last_byte >> 16 & 0xFFF0) << 16)
        bridge.config_write(br.PREFETCH_BASE, 4, 0x0000_FFF0)


def assign(bus: PciBus, low: Window, high: Window, line: Callable[[int, int], int]) -> None:
    """Number the buses behind *bus* and give every BAR an address: below 4 GiB in *low*, 64-bit ones in *high*.

    ``line(slot, pin)`` is what the interrupt line register shall say. A BAR that does not fit stays without address.
    """
    setup = _Setup(_Pool(FIRST_PORT, LAST_PORT), _Pool(low.first, low.last), _Pool(high.first, high.last), line)
    with bus.lock:
        setup.bus(bus, None, setup.high)
