"""PCI-to-PCI bridges, and PCI Express root ports.

Source: PCI-to-PCI Bridge Architecture Specification 1.2, "Configuration Space"; PCI Express Base Specification 3.0,
"PCI Express Capability Structure".
"""

from __future__ import annotations

from vmonty.base.record import Record
from vmonty.vmm.hw.pci import config as cfg
from vmonty.vmm.hw.pci.bus import PciBus
from vmonty.vmm.hw.pci.decode import Space, Window
from vmonty.vmm.hw.pci.device import PciDevice, Slot

PCI_BRIDGE = 0x06_0400
PRIMARY_BUS, SECONDARY_BUS, SUBORDINATE_BUS = 0x18, 0x19, 0x1A
IO_BASE, IO_LIMIT, SECONDARY_STATUS = 0x1C, 0x1D, 0x1E
MEMORY_BASE, MEMORY_LIMIT = 0x20, 0x22
PREFETCH_BASE, PREFETCH_LIMIT, PREFETCH_BASE_UPPER, PREFETCH_LIMIT_UPPER = 0x24, 0x26, 0x28, 0x2C
IO_BASE_UPPER, BRIDGE_CONTROL = 0x30, 0x3E
BRIDGE_ROM = 0x38

EXPRESS_CAPABILITY = 0x10
PORT_ENDPOINT, PORT_ROOT = 0, 4
EXPRESS_VERSION, EXPRESS_SLOT = 2, 1 << 8
LINK_2_5GT_X1 = 0x11
LINK_ACTIVE_CAPABLE, LINK_ACTIVE = 1 << 20, 1 << 13
SLOT_PRESENT = 1 << 6


class _Gate(Record):
    """A decoder for what stands behind a bridge: windows decode only where the bridge passes accesses on."""

    bridge: PciBridge

    def __post_init__(self) -> None:
        self._wanted: dict[Window, int] = {}

    def move(self, window: Window, base: int | None) -> None:
        if base is None:
            self._wanted.pop(window, None)
        else:
            self._wanted[window] = base
        self._pass(window, base)

    def update(self) -> None:
        for window, base in self._wanted.items():
            self._pass(window, base)

    def _pass(self, window: Window, base: int | None) -> None:
        passes = base is not None and self.bridge.forwards(window.space, base, window.size)
        self.bridge.upstream(window, base if passes else None)


class PciBridge(PciDevice):
    """One bridge; what is behind it is added to its ``secondary`` bus."""

    def __init__(self, name: str, *, vendor_id: int, device_id: int, express: bool = False) -> None:
        super().__init__(
            name, vendor_id=vendor_id, device_id=device_id, class_code=PCI_BRIDGE, interrupt_pin=1, express=express
        )
        self._gate = _Gate(self)
        self.secondary = PciBus(f"{name}.bus", self._gate, self._intx, self._forward_msi)
        register = self.config.set
        register(cfg.HEADER_TYPE, 1, cfg.HEADER_BRIDGE)
        register(PRIMARY_BUS, 4, 0, writable=0xFF_FFFF)
        register(IO_BASE, 2, 0, writable=0xF0F0)
        register(SECONDARY_STATUS, 2, 0)
        register(MEMORY_BASE, 4, 0, writable=0xFFF0_FFF0)
        register(PREFETCH_BASE, 4, 0x0001_0001, writable=0xFFF0_FFF0)
        register(PREFETCH_BASE_UPPER, 8, 0, writable=(1 << 64) - 1)
        register(IO_BASE_UPPER, 4, 0)
        register(BRIDGE_ROM, 4, 0)
        register(BRIDGE_CONTROL, 2, 0, writable=0x0043)

    def forwards(self, space: Space, base: int, size: int) -> bool:
        """Does the bridge pass all of these addresses on to its secondary bus?"""
        config, last = self.config, base + size - 1
        command = config.data[cfg.COMMAND]
        if space is Space.IO:
            first = (config.data[IO_BASE] & 0xF0) << 8
            limit = (config.data[IO_LIMIT] & 0xF0) << 8 | 0xFFF
            return bool(command & cfg.COMMAND_IO) and first <= base and last <= limit
        if not command & cfg.COMMAND_MEMORY:
            return False
        first = (config.get(MEMORY_BASE, 2) & 0xFFF0) << 16
        limit = (config.get(MEMORY_LIMIT, 2) & 0xFFF0) << 16 | 0xF_FFFF
        if first <= base and last <= limit:
            return True
        first = config.get(PREFETCH_BASE_UPPER, 4) << 32 | (config.get(PREFETCH_BASE, 2) & 0xFFF0) << 16
        limit = config.get(PREFETCH_LIMIT_UPPER, 4) << 32 | (config.get(PREFETCH_LIMIT, 2) & 0xFFF0) << 16 | 0xF_FFFF
        return first <= base and last <= limit

    def upstream(self, window: Window, base: int | None) -> None:
        """Let *window* decode on the primary side."""
        if self._slot is not None:
            self._slot.decoder.move(window, base)

    def attach(self, slot: Slot) -> None:
        """Called by the bus, once."""
        super().attach(slot)
        self._gate.update()

    def update_decoding(self) -> None:
        """The bridge's own BARs, and what it passes on."""
        super().update_decoding()
        self._gate.update()

    def behind(self, bus: int, slot: int, function: int) -> PciDevice | None:
        """The function at a configuration address on one of the buses behind this bridge."""
        secondary, subordinate = self.config.data[SECONDARY_BUS], self.config.data[SUBORDINATE_BUS]
        if not 0 < secondary <= bus <= subordinate:
            return None
        if bus == secondary:
            return self.secondary.devices().get((slot, function))
        return self.secondary.find(bus, slot, function)

    def _intx(self, slot: int, pin: int, level: int) -> None:
        # Architecture Specification, "Interrupt Routing": pins rotate with the slot behind the bridge.
        if self._slot is not None:
            self._slot.forward_intx((slot + pin) % 4, slot << 2 | pin, level)

    def _forward_msi(self, address: int, data: int) -> None:
        self._send_msi(address, data)


class PcieRootPort(PciBridge):
    """A root port whose slot holds what is added to ``secondary`` before the machine starts (no hot-plug)."""

    def __init__(self, name: str, port: int = 0) -> None:
        super().__init__(name, vendor_id=0x1B36, device_id=0x000C, express=True)
        add_express(self, PORT_ROOT, port)


def add_express(device: PciDevice, kind: int, port: int = 0) -> int:
    """Give *device* the PCI Express capability of port type *kind*; returns its offset."""
    body = bytearray(0x3A)

    def put(offset: int, size: int, value: int) -> None:
        body[offset - 2 : offset - 2 + size] = value.to_bytes(size, "little")

    root = kind == PORT_ROOT
    put(0x02, 2, EXPRESS_VERSION | kind << 4 | (EXPRESS_SLOT if root else 0))
    put(0x04, 4, 1 << 15)  # role-based error reporting; payloads of 128 bytes
    put(0x0C, 4, LINK_2_5GT_X1 | port << 24 | (LINK_ACTIVE_CAPABLE if root else 0))
    put(0x12, 2, LINK_2_5GT_X1 | (LINK_ACTIVE if root else 0))
    writable = bytearray(0x3A)
    writable[0x08 - 2 : 0x0A - 2] = (0x7FFF).to_bytes(2, "little")  # device control
    writable[0x10 - 2 : 0x12 - 2] = (0x01FB).to_bytes(2, "little")  # link control
    if root:
        put(0x14, 4, port << 19)  # slot capabilities: its number
        put(0x1A, 2, SLOT_PRESENT)
        writable[0x1C - 2 : 0x1E - 2] = (0x001F).to_bytes(2, "little")  # root control
    put(0x2C, 4, 2)  # supported link speeds: 2.5 GT/s
    return device.add_capability(EXPRESS_CAPABILITY, bytes(body), bytes(writable))
