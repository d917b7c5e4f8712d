"""82371SB (PIIX3), function 1: two IDE channels at the ports of a PC, and their bus masters.

Source: Intel 82371SB data sheet, "PCI Configuration Registers (Function 1)"; Programming Interface for Bus Master IDE
Controllers 1.0.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Protocol

from vmonty.base.errors import GuestMemoryError
from vmonty.vmm.hw.ata.channel import Channel
from vmonty.vmm.hw.ata.drive import ERROR_ABORT, Aborted, Drive
from vmonty.vmm.hw.pci import PciDevice

DEVICE_82371SB_IDE = 0x7010
IDE_COMPATIBLE_BUS_MASTER = 0x01_0180
TIMING, DECODE_ENABLE = 0x40, 0x8000
BUS_MASTER_BAR, BUS_MASTER_SIZE = 4, 16

COMMAND, STATUS, TABLE = 0, 2, 4
COMMAND_START, COMMAND_TO_MEMORY = 0x01, 0x08
STATUS_ACTIVE, STATUS_ERROR, STATUS_INTERRUPT, STATUS_KEPT = 0x01, 0x02, 0x04, 0x60
END_OF_TABLE = 0x8000_0000
MOST_REGIONS = 8192  # a table may not cross 64 KiB


class Memory(Protocol):
    """Guest RAM."""

    def read(self, address: int, size: int) -> bytes:
        """Raises GuestMemoryError outside of RAM."""
        ...

    def view(self, address: int, size: int) -> memoryview:
        """Raises GuestMemoryError outside of RAM."""
        ...

    def write(self, address: int, data: bytes) -> None:
        """Raises GuestMemoryError outside of RAM."""
        ...

    def written(self, address: int, size: int) -> None:
        """RAM was written through a view."""
        ...


class BusMaster:
    """The eight registers of one channel. *allowed* says whether the function may reach memory."""

    def __init__(self, channel: Channel, memory: Memory, allowed: Callable[[], bool]) -> None:
        self._channel = channel
        self._memory = memory
        self._allowed = allowed
        self._command = self._status = self._table = 0
        channel.start_dma = self._try

    def interrupted(self, level: int) -> None:
        """INTRQ rose: the status keeps it until it is cleared."""
        if level:
            self._status |= STATUS_INTERRUPT

    def read(self, offset: int, size: int) -> int:
        """Registers may be read in any width."""
        with self._channel.lock:
            block = struct.pack("<BBBBI", self._command, 0, self._status, 0, self._table)
            return int.from_bytes(block[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """A write byte by byte: the status clears where ones are written."""
        with self._channel.lock:
            for at in range(offset, offset + size):
                byte = value >> 8 * (at - offset) & 0xFF
                if at == COMMAND:
                    self._start(byte)
                elif at == STATUS:
                    self._status = self._status & ~(byte & (STATUS_ERROR | STATUS_INTERRUPT)) & ~STATUS_KEPT
                    self._status |= byte & STATUS_KEPT
                elif at >= TABLE:
                    shift = 8 * (at - TABLE)
                    self._table = (self._table & ~(0xFF << shift) | byte << shift) & ~3

    def _start(self, value: int) -> None:
        before, self._command = self._command, value & (COMMAND_START | COMMAND_TO_MEMORY)
        if value & ~before & COMMAND_START:
            self._status |= STATUS_ACTIVE
            self._try()
        elif before & ~value & COMMAND_START:
            self._status &= ~STATUS_ACTIVE

    def _try(self) -> None:
        """Move the data when both the drive and the driver are ready."""
        transfer = self._channel.transfer
        if transfer is None or not transfer.dma or not self._status & STATUS_ACTIVE or not self._allowed():
            return
        if transfer.to_host != bool(self._command & COMMAND_TO_MEMORY):
            return  # the driver is wrong: nothing moves, until it resets the drive
        try:
            regions, more = self._regions(transfer.size)
            views = [self._memory.view(base, size) for base, size in regions]
        except GuestMemoryError:
            self._status = self._status & ~STATUS_ACTIVE | STATUS_ERROR
            self._channel.fail(ERROR_ABORT)
            return
        moved = sum(size for _, size in regions)
        try:
            transfer.move(0, views)
        except Aborted as reason:
            self._status &= ~STATUS_ACTIVE
            self._channel.fail(reason.error)
            return
        finally:
            if transfer.to_host:
                for base, size in regions:
                    self._memory.written(base, size)
        if not more:
            self._status &= ~STATUS_ACTIVE
        if moved == transfer.size:
            self._channel.finish()

    def _regions(self, wanted: int) -> tuple[list[tuple[int, int]], bool]:
        """(base, size) of the table, up to *wanted* bytes, and whether the table goes on. Raises GuestMemoryError."""
        regions: list[tuple[int, int]] = []
        for number in range(MOST_REGIONS):
            base, control = struct.unpack("<II", self._memory.read(self._table + 8 * number, 8))
            size = control & 0xFFFE or 0x1_0000
            base &= ~1
            taken = min(size, wanted)
            if taken:
                regions.append((base, taken))
            wanted -= taken
            if control & END_OF_TABLE:
                return regions, taken < size
            if not wanted:
                return regions, True
        return regions, False


class _BothMasters:
    """Sixteen ports: the primary channel's master, then the secondary's."""

    def __init__(self, masters: Sequence[BusMaster]) -> None:
        self._masters = masters

    def read(self, offset: int, size: int) -> int:
        return self._masters[offset >> 3].read(offset & 7, size)

    def write(self, offset: int, size: int, value: int) -> None:
        if (offset & 7) + size <= 8:
            self._masters[offset >> 3].write(offset & 7, size, value)


class PiixIde(PciDevice):
    """*drives* are primary 0 and 1, secondary 0 and 1; *irqs* the ends of ISA interrupts 14 and 15.

    The board places ``channels`` at the ports of a PC: the function always decodes them.
    """

    def __init__(self, memory: Memory, drives: Sequence[Drive | None], irqs: Sequence[Callable[[int], None]]) -> None:
        super().__init__(
            "piix3-ide", vendor_id=0x8086, device_id=DEVICE_82371SB_IDE, class_code=IDE_COMPATIBLE_BUS_MASTER,
            subsystem_vendor_id=0x1AF4, subsystem_id=0x1100,
        )  # fmt: skip
        self.config.set(TIMING, 4, DECODE_ENABLE | DECODE_ENABLE << 16, writable=0xFFFF_FFFF)
        self.channels = []
        masters: list[BusMaster] = []

        def interrupt(number: int) -> Callable[[int], None]:
            def drive(level: int) -> None:
                masters[number].interrupted(level)
                irqs[number](level)

            return drive

        for number in range(2):
            channel = Channel(drives[2 * number : 2 * number + 2], interrupt(number))
            self.channels.append(channel)
            masters.append(BusMaster(channel, memory, lambda: self.bus_master))
        self.add_bar(BUS_MASTER_BAR, _BothMasters(masters), BUS_MASTER_SIZE, io=True)
