"""A PCI function: header, base address registers, capabilities, INTx, MSI and MSI-X.

Source: PCI Local Bus Specification 3.0, "Configuration Space", "Base Addresses", "Capabilities List".
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from typing import NamedTuple

from vmonty.base.record import Record
from vmonty.vmm.bus import Bus, BusDevice
from vmonty.vmm.hw.pci import config as cfg
from vmonty.vmm.hw.pci import msix as msix_module
from vmonty.vmm.hw.pci.config import ConfigSpace
from vmonty.vmm.hw.pci.decode import Decoding, Space, Window
from vmonty.vmm.hw.pci.msix import Msix

BAR_IO, BAR_64_BITS, BAR_PREFETCHABLE = 1, 4, 8
ROM_ENABLE = 1
ROM = 6  # the expansion ROM's place among the BARs
FIRST_EXTENDED = 0x100
MSI_CAPABILITY, MSI_ENABLE, MSI_64_BITS = 0x05, 1 << 0, 1 << 7


class Slot(NamedTuple):
    """What a bus gives a function: its address decoder, interrupt pins (pin 0 is INTA#, level) and message bus.

    ``forward_intx`` is for bridges: (pin, source, level), where each pin is raised while any of its sources is.
    """

    decoder: Decoding
    intx: Callable[[int, int], None]
    forward_intx: Callable[[int, int, int], None]
    send_msi: Callable[[int, int], None]


class Bar(Record):
    """One base address register. *size* in bytes, a power of two."""

    index: int
    offset: int
    wide: bool
    window: Window

    @property
    def size(self) -> int:
        """In bytes."""
        return self.window.size

    @property
    def io(self) -> bool:
        """Does it decode ports?"""
        return self.window.space is Space.IO


class PciDevice:
    """One function. Devices inherit from it or hold one; what they add in ``__init__`` is what the guest finds.

    *class_code* is base class, subclass and interface as one 24-bit number; *interrupt_pin* 0 none, 1 INTA#.
    The guest's writes arrive through ``config_write``; a device that has registers of its own there overrides
    ``config_written``.
    """

    removable = False  # may it leave its slot while the machine runs?

    def __init__(
        self, name: str, *, vendor_id: int, device_id: int, class_code: int, revision: int = 0,
        subsystem_vendor_id: int = 0, subsystem_id: int = 0, interrupt_pin: int = 0, express: bool = False,
        multifunction: bool = False,
    ) -> None:  # fmt: skip
        self.name = name
        self.config = ConfigSpace(cfg.EXTENDED_SIZE if express else cfg.CONFIG_SIZE)
        self.bars: list[Bar] = []
        self.msix: Msix | None = None
        self._slot: Slot | None = None
        self._irq_lock = threading.Lock()
        self._irq_level = 0  # what the device drives
        self._irq_shown = 0  # what the bus sees of it
        self._msix_control = self._msi_control = 0
        self._last_capability = cfg.CAPABILITIES
        self._next_capability = cfg.HEADER_SIZE
        self._next_extended = FIRST_EXTENDED
        self._last_extended = 0
        put = self.config.set
        put(cfg.VENDOR_ID, 2, vendor_id)
        put(cfg.DEVICE_ID, 2, device_id)
        put(cfg.COMMAND, 2, 0, writable=cfg.COMMAND_KEPT)
        put(cfg.REVISION_ID, 1, revision)
        put(cfg.CLASS_CODE, 3, class_code)
        put(cfg.CACHE_LINE_SIZE, 1, 0, writable=0xFF)
        put(cfg.LATENCY_TIMER, 1, 0, writable=0 if express else 0xFF)
        put(cfg.HEADER_TYPE, 1, cfg.HEADER_MULTIFUNCTION if multifunction else 0)
        put(cfg.SUBSYSTEM_VENDOR_ID, 2, subsystem_vendor_id)
        put(cfg.SUBSYSTEM_ID, 2, subsystem_id)
        put(cfg.INTERRUPT_LINE, 1, 0, writable=0xFF)
        put(cfg.INTERRUPT_PIN, 1, interrupt_pin)

    # ---- what a device builds itself of ---------------------------------------------------------------

    def add_bar(
        self, index: int, device: BusDevice, size: int, *, io: bool = False, wide: bool = False,
        prefetchable: bool = False, moved: Callable[[int | None], None] | None = None,
    ) -> Bar:  # fmt: skip
        """BAR *index* (0 to 5; a *wide* one, of 64 bits, takes two): *device* answers in its *size* bytes.

        *moved* is called with the address whenever it changes, None when the BAR no longer decodes.
        """
        least = 4 if io else 16
        if size < least or size & (size - 1):
            raise ValueError(f"{self.name}: BAR {index} of {size} bytes; it must be a power of two, {least} or more")
        kind = BAR_IO if io else (BAR_64_BITS if wide else 0) | (BAR_PREFETCHABLE if prefetchable else 0)
        mask = ((1 << (64 if wide else 32)) - size) & ~(3 if io else 15)
        offset = cfg.BAR_0 + 4 * index
        self.config.set(offset, 8 if wide else 4, kind, writable=mask)
        space = Space.IO if io else Space.MEMORY
        bar = Bar(index, offset, wide, Window(f"{self.name}.bar{index}", space, size, device, moved))
        self.bars.append(bar)
        return bar

    def add_rom(self, device: BusDevice, size: int, moved: Callable[[int | None], None] | None = None) -> Bar:
        """The expansion ROM of *size* bytes, a power of two of 2 KiB or more; *moved* as for ``add_bar``."""
        if size < 2048 or size & (size - 1):
            raise ValueError(f"{self.name}: a ROM of {size} bytes; it must be a power of two, 2048 or more")
        self.config.set(cfg.ROM_ADDRESS, 4, 0, writable=(1 << 32) - size | ROM_ENABLE)
        bar = Bar(ROM, cfg.ROM_ADDRESS, False, Window(f"{self.name}.rom", Space.MEMORY, size, device, moved))
        self.bars.append(bar)
        return bar

    def add_capability(self, identity: int, body: bytes, writable: bytes = b"", at: int | None = None) -> int:
        """Append a capability: ID, link, then *body*, of which *writable* masks the bits that guests may write.

        Returns the offset of the capability (of its ID byte). *at* puts it there, for chips with fixed places.
        """
        offset = self._next_capability if at is None else at
        size = 2 + len(body)
        if offset + size > cfg.CONFIG_SIZE:
            raise ValueError(f"{self.name}: no room for capability {identity:#x}")
        self.config.set(offset, 2, identity)
        mask = int.from_bytes(writable, "little")
        if body:
            self.config.set(offset + 2, len(body), int.from_bytes(body, "little"), writable=mask)
        self.config.data[self._last_capability] = offset
        self._last_capability = offset + 1
        self._next_capability = max(self._next_capability, -(-(offset + size) // 4) * 4)
        self.config.put(cfg.STATUS, 2, self.config.get(cfg.STATUS, 2) | cfg.STATUS_CAPABILITIES)
        return offset

    def add_extended_capability(self, identity: int, version: int, body: bytes) -> int:
        """Append a PCI Express extended capability; returns its offset."""
        offset = self._next_extended
        self.config.set(offset, 4, identity | version << 16)
        if body:
            self.config.set(offset + 4, len(body), int.from_bytes(body, "little"))
        if self._last_extended:
            link = self.config.get(self._last_extended, 4) & 0xF_FFFF
            self.config.put(self._last_extended, 4, link | offset << 20)
        self._last_extended = offset
        self._next_extended = -(-(offset + 4 + len(body)) // 4) * 4
        return offset

    def add_msix(self, vectors: int, bar_index: int, table_offset: int = 0, pending_offset: int = 0x800) -> Msix:
        """MSI-X of *vectors* in BAR *bar_index*, 4 KiB of its own, unless the device adds that BAR by itself.

        A device that puts the table beside other things makes the BAR first and lets it answer with
        ``msix.table`` and ``msix.pending`` at the two offsets.
        """
        made = self.msix = Msix(vectors, self._send_msi)
        if all(bar.index != bar_index for bar in self.bars):
            area = Bus(f"{self.name}.msix", 4096)
            if pending_offset < table_offset + made.table_size:
                pending_offset = table_offset + made.table_size
            area.place(table_offset, made.table_size, made.table, "table")
            area.place(pending_offset, made.pending_size, made.pending, "pending bits")
            self.add_bar(bar_index, area, 4096)
        body = (
            (vectors - 1).to_bytes(2, "little")
            + (table_offset | bar_index).to_bytes(4, "little")
            + (pending_offset | bar_index).to_bytes(4, "little")
        )
        writable = (msix_module.CONTROL_ENABLE | msix_module.CONTROL_FUNCTION_MASK).to_bytes(2, "little")
        self._msix_control = self.add_capability(msix_module.CAPABILITY_ID, body, writable) + 2
        return made

    def add_msi(self, at: int | None = None) -> None:
        """MSI with one message. Source: PCI Local Bus Specification 3.0, "Message Signaled Interrupts"."""
        body = MSI_64_BITS.to_bytes(2, "little") + bytes(12)
        writable = struct.pack("<HIIHH", MSI_ENABLE, 0xFFFF_FFFC, 0xFFFF_FFFF, 0xFFFF, 0)
        self._msi_control = self.add_capability(MSI_CAPABILITY, body, writable, at) + 2

    # ---- what a running device uses ---------------------------------------------------------------------

    @property
    def bus_master(self) -> bool:
        """May the device reach memory? The driver says so in the command register."""
        return bool(self.config.data[cfg.COMMAND] & cfg.COMMAND_MASTER)

    @property
    def msi(self) -> tuple[int, int] | None:
        """Address and data of the message, None while MSI is off, or if there is none: then it is INTx."""
        at = self._msi_control
        if not at or not self.config.get(at, 2) & MSI_ENABLE:
            return None
        return self.config.get(at + 2, 8), self.config.get(at + 10, 2)

    def send_msi(self) -> None:
        """Send the message, if MSI is on. From any thread."""
        if (message := self.msi) is not None:
            self._send_msi(*message)

    def set_irq(self, level: int) -> None:
        """Drive INTx. From any thread."""
        with self._irq_lock:
            self._irq_level = int(bool(level))
            status = self.config.data[cfg.STATUS] & ~cfg.STATUS_INTERRUPT
            self.config.data[cfg.STATUS] = status | (cfg.STATUS_INTERRUPT if level else 0)
            self._show_irq()

    def _show_irq(self) -> None:
        disabled = self.config.get(cfg.COMMAND, 2) & cfg.COMMAND_INTX_DISABLE
        shown = 0 if disabled else self._irq_level
        pin = self.config.data[cfg.INTERRUPT_PIN]
        if shown != self._irq_shown and pin and self._slot is not None:
            self._irq_shown = shown
            self._slot.intx(pin - 1, shown)

    def _send_msi(self, address: int, data: int) -> None:
        # A message is a write to memory: without leave to be bus master it does not happen.
        if self._slot is not None and self.bus_master:
            self._slot.send_msi(address, data)

    # ---- the bus's side ---------------------------------------------------------------------------------

    def attach(self, slot: Slot) -> None:
        """Called by the bus, once."""
        if self._slot is not None:
            raise ValueError(f"{self.name} is in a slot already")
        self._slot = slot
        self.update_decoding()

    def detach(self) -> None:
        """Called by the bus: decode nothing and drive no line any more."""
        for bar in self.bars:
            self._move(bar, None)
        self.set_irq(0)
        self._slot = None

    def config_read(self, offset: int, size: int) -> int:
        """A guest's read of configuration space; all ones outside of it."""
        return self.config.guest_read(offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """A guest's write: the header and the MSI-X control act, then ``config_written`` is called."""
        with self._irq_lock:
            self.config.guest_write(offset, size, value)
            self._show_irq()
        self.update_decoding()
        if self.msix is not None and offset < self._msix_control + 2 and offset + size > self._msix_control:
            self.msix.set_control(self.config.get(self._msix_control, 2))
        self.config_written(offset, size)

    def behind(self, bus: int, slot: int, function: int) -> PciDevice | None:
        """For bridges: the function at a configuration address behind this one."""
        return None

    def config_written(self, offset: int, size: int) -> None:
        """For devices with registers of their own in configuration space."""

    def bar_base(self, bar: Bar) -> int | None:
        """The address in *bar*, None when the command register (or the ROM's enable bit) switches it off."""
        command = self.config.data[cfg.COMMAND]
        raw = self.config.get(bar.offset, 8 if bar.wide else 4)
        if not command & (cfg.COMMAND_IO if bar.io else cfg.COMMAND_MEMORY):
            return None
        if bar.index == ROM and not raw & ROM_ENABLE:
            return None
        base = raw & ~(bar.size - 1)
        # Nothing is at 0: it is what a BAR holds that nobody assigned. All ones is a size being asked for.
        return None if base == 0 or base + bar.size >= 1 << (64 if bar.wide else 32) else base

    def update_decoding(self) -> None:
        """Let each BAR decode what the registers say."""
        for bar in self.bars:
            self._move(bar, self.bar_base(bar))

    def _move(self, bar: Bar, base: int | None) -> None:
        if self._slot is not None:
            self._slot.decoder.move(bar.window, base)
