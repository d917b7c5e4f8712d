"""An IDE channel: the task file of two drives, data by ports, and the hand-over of data to bus-master DMA.

Source: ATA/ATAPI-7, volume 2, "Register delivered data transfer command sequences"; volume 1, "PACKET".
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from vmonty.vmm.hw.ata.cdrom import CdRom
from vmonty.vmm.hw.ata.drive import (
    DEVICE_1,
    DEVICE_RESET,
    ERROR_ABORT,
    EXECUTE_DIAGNOSTIC,
    STATUS_BUSY,
    STATUS_DATA,
    STATUS_ERROR,
    Aborted,
    Drive,
    TaskFile,
    Transfer,
)

DATA, FEATURE, COUNT, LBA_LOW, LBA_MID, LBA_HIGH, DEVICE, COMMAND = range(8)
FIELDS = {FEATURE: "feature", COUNT: "count", LBA_LOW: "lba_low", LBA_MID: "lba_mid", LBA_HIGH: "lba_high"}
CONTROL_NO_INTERRUPT, CONTROL_RESET, CONTROL_OLDER = 0x02, 0x04, 0x80
NO_DRIVE = 0x00


class Channel:
    """Drives 0 and 1, either of which may be missing. *interrupt* is called with the level of INTRQ.

    ``start_dma`` is the bus master's: it is called when a command waits for DMA. Locked: any thread may call.
    """

    def __init__(self, drives: Sequence[Drive | None], interrupt: Callable[[int], None]) -> None:
        self.drives = list(drives)
        self.lock = threading.RLock()
        self.start_dma: Callable[[], None] = lambda: None
        self._interrupt = interrupt
        self._nobody = TaskFile(status=NO_DRIVE)
        self._selected = 0
        self._control = 0
        self._pending = False
        self.transfer: Transfer | None = None
        self._is_packet = False
        self._buffer = bytearray()
        self._at = 0  # of the buffer
        self._moved = 0  # of the transfer, before the buffer
        for number, drive in enumerate(self.drives):
            if drive is not None:
                drive.registers.device = DEVICE_1 * number

    @property
    def _drive(self) -> Drive | None:
        return self.drives[self._selected]

    @property
    def _registers(self) -> TaskFile:
        return self._nobody if (drive := self._drive) is None else drive.registers

    @property
    def _anybody(self) -> bool:
        return any(drive is not None for drive in self.drives)

    def exclusively(self, drive: Drive) -> Callable[[Callable[[], None]], None]:
        """A way to call functions while *drive* carries no command out: one that moves data ends with an error."""

        def call(function: Callable[[], None]) -> None:
            with self.lock:
                busy = self.transfer is not None and self._drive is drive and not self._is_packet_command
                function()
                if busy:
                    self.fail(ERROR_ABORT)

        return call

    @property
    def _is_packet_command(self) -> bool:
        """Is it the packet that moves, and no data yet?"""
        return self._is_packet and self.transfer is not None and not self.transfer.to_host

    # ---- the command block -----------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """A register; the data register in the width of the access."""
        with self.lock:
            if offset == DATA:
                return int.from_bytes(self._take(size), "little")
            value = self._register(offset)
            if offset == COMMAND:
                self._raise(False)
            return value

    def _register(self, offset: int) -> int:
        if not self._anybody:
            return 0xFF if offset != COMMAND else 0x7F  # nobody drives the bus: DD7 is pulled down
        registers = self._registers
        if offset == FEATURE:
            return registers.error
        if offset == COMMAND:
            return registers.status
        if offset == DEVICE:
            return registers.device | 0xA0
        value: int = getattr(registers, FIELDS[offset])
        return value >> 8 & 0xFF if self._control & CONTROL_OLDER else value & 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        """Parameters go to both drives, commands to the one that is selected."""
        with self.lock:
            if offset == DATA:
                self._put((value & (1 << 8 * size) - 1).to_bytes(size, "little"))
                return
            value &= 0xFF
            self._control &= ~CONTROL_OLDER
            if offset == COMMAND:
                self._command(value)
            elif self.transfer is None or self._registers.status & (STATUS_BUSY | STATUS_DATA) == 0:
                self._parameter(offset, value)

    def _parameter(self, offset: int, value: int) -> None:
        for drive in filter(None, self.drives):
            if offset == DEVICE:
                drive.registers.device = value & 0x5F
            else:
                name = FIELDS[offset]
                setattr(drive.registers, name, (getattr(drive.registers, name) & 0xFF) << 8 | value)
        if offset == DEVICE:
            self._selected = int(bool(value & DEVICE_1))

    # ---- the control block -----------------------------------------------------------------------------------------

    def read_control(self) -> int:
        """The alternate status, which leaves the interrupt as it is."""
        with self.lock:
            return self._register(COMMAND)

    def write_control(self, value: int) -> None:
        """nIEN, soft reset, and which byte of the parameters is read."""
        with self.lock:
            before, self._control = self._control, value & 0xFF
            if value & ~before & CONTROL_RESET:
                self._drop()
                for drive in filter(None, self.drives):
                    drive.registers.status = STATUS_BUSY
            elif before & ~value & CONTROL_RESET:
                self._reset()
            self._show()

    def _reset(self) -> None:
        self._selected = 0
        for number, drive in enumerate(self.drives):
            if drive is not None:
                drive.reset()
                drive.registers.device = 0 if number == 0 else drive.registers.device & ~DEVICE_1

    def _raise(self, pending: bool) -> None:
        self._pending = pending
        self._show()

    def _show(self) -> None:
        self._interrupt(int(self._pending and not self._control & CONTROL_NO_INTERRUPT))

    # ---- commands --------------------------------------------------------------------------------------------------

    def _drop(self) -> None:
        self.transfer, self._is_packet = None, False
        self._buffer.clear()
        self._at = self._moved = 0
        self._pending = False

    def _command(self, command: int) -> None:
        if command == EXECUTE_DIAGNOSTIC:  # both drives, whichever is selected
            self._drop()
            self._reset()
            self._raise(self._anybody)
            return
        drive = self._drive
        if drive is None:
            return
        packet_reset = command == DEVICE_RESET and isinstance(drive, CdRom)
        if drive.registers.status & (STATUS_BUSY | STATUS_DATA) and not packet_reset:
            return  # only DEVICE RESET may interrupt a command
        self._drop()
        self._show()
        try:
            transfer = drive.execute(command)
        except Aborted as reason:
            drive.failed(reason.error)
            transfer = None
        if transfer is None:
            if not packet_reset:
                self._raise(True)
            return
        self._is_packet = transfer.packet
        self._begin(drive, transfer, quiet=not transfer.to_host)

    def _begin(self, drive: Drive, transfer: Transfer, *, quiet: bool = False) -> None:
        """A transfer starts; a *quiet* one tells that it is ready for the first block by the status alone."""
        self.transfer, self._moved = transfer, 0
        if transfer.dma:
            drive.registers.status = drive.ready_status | STATUS_DATA
            self.start_dma()
        else:
            self._next_block(quiet=quiet)

    def _next_block(self, *, quiet: bool = False) -> None:
        transfer, drive = self.transfer, self._drive
        assert transfer is not None
        assert drive is not None
        size = min(transfer.block, transfer.size - self._moved)
        self._buffer, self._at = bytearray(size), 0
        if transfer.to_host:
            try:
                transfer.move(self._moved, [memoryview(self._buffer)])
            except Aborted as reason:
                self.fail(reason.error)
                return
            if transfer.packet:
                drive.registers.lba_mid, drive.registers.lba_high = size & 0xFF, size >> 8
        drive.registers.status = drive.ready_status | STATUS_DATA
        if not quiet:
            self._raise(True)

    def fail(self, error: int) -> None:
        """The transfer that is under way ends with *error*."""
        drive = self._drive
        self._drop()
        if drive is not None:
            drive.failed(error)
            self._raise(True)

    def finish(self) -> None:
        """All of the transfer that is under way was moved."""
        transfer, drive = self.transfer, self._drive
        if transfer is None or drive is None:
            return
        to_host, packet = transfer.to_host, transfer.packet
        self._drop()
        try:
            transfer.end()
        except Aborted as reason:
            drive.failed(reason.error)
        # A read by ports told of its last block; only packet commands and DMA tell of the end as well.
        if transfer.dma or packet or not to_host or drive.registers.status & STATUS_ERROR:
            self._raise(True)

    # ---- data by ports ---------------------------------------------------------------------------------------------

    def _take(self, size: int) -> bytes:
        transfer = self.transfer
        if transfer is None or not transfer.to_host or transfer.dma:
            return b"\xff" * size
        data = bytes(self._buffer[self._at : self._at + size])
        self._advance(size)
        return data.ljust(size, b"\0")

    def _put(self, data: bytes) -> None:
        transfer = self.transfer
        if transfer is None or transfer.to_host or transfer.dma:
            return
        end = min(self._at + len(data), len(self._buffer))
        self._buffer[self._at : end] = data[: end - self._at]
        self._advance(len(data))

    def _advance(self, size: int) -> None:
        self._at += size
        if self._at < len(self._buffer):
            return
        transfer, drive = self.transfer, self._drive
        assert transfer is not None
        if self._is_packet and not transfer.to_host and isinstance(drive, CdRom):
            self._packet(drive, bytes(self._buffer))
            return
        if not transfer.to_host:
            try:
                transfer.move(self._moved, [memoryview(self._buffer)])
            except Aborted as reason:
                self.fail(reason.error)
                return
        self._moved += len(self._buffer)
        if self._moved < transfer.size:
            self._next_block()
        else:
            self.finish()

    def _packet(self, drive: CdRom, data: bytes) -> None:
        self._drop()
        answer = drive.packet(data)
        if answer is None:
            self._raise(True)
        else:
            self._begin(drive, answer)

    # ---- many at once ----------------------------------------------------------------------------------------------

    def read_string(self, offset: int, size: int, data: memoryview) -> None:
        """REP INS: as many reads as fill *data*."""
        with self.lock:
            at = 0
            while at < len(data):
                left = len(self._buffer) - self._at
                transfer = self.transfer
                if offset != DATA or transfer is None or not transfer.to_host or transfer.dma or left < size:
                    data[at : at + size] = self.read(offset, size).to_bytes(size, "little")
                    at += size
                    continue
                part = min(left - left % size, len(data) - at)
                data[at : at + part] = self._buffer[self._at : self._at + part]
                at += part
                self._advance(part)

    def write_string(self, offset: int, size: int, data: memoryview) -> None:
        """REP OUTS: the writes that *data* holds."""
        with self.lock:
            at = 0
            while at < len(data):
                left = len(self._buffer) - self._at
                transfer = self.transfer
                if offset != DATA or transfer is None or transfer.to_host or transfer.dma or left < size:
                    self.write(offset, size, int.from_bytes(data[at : at + size], "little"))
                    at += size
                    continue
                part = min(left - left % size, len(data) - at)
                self._put(bytes(data[at : at + part]))
                at += part


class ControlPort:
    """The control block register of *channel*: one port."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def read(self, offset: int, size: int) -> int:
        """The alternate status."""
        return self._channel.read_control()

    def write(self, offset: int, size: int, value: int) -> None:
        """Device control."""
        self._channel.write_control(value)
