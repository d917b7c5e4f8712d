"""A port of an AHCI controller: its registers, and the commands that it fetches from guest memory.

Source: AHCI 1.3.1, "Port Registers (one set per port)", "System Memory Structures", "Data Transfer Operation",
"Error Reporting and Recovery".

A command is carried out on the port's event loop, not on the thread of the vCPU that issued it. ``lock`` protects the
registers and is not held meanwhile; nobody else touches the drive then: what must wait for its end is ``when_idle``.
"""

from __future__ import annotations

import errno
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from vmonty.base.errors import BlockError, GuestMemoryError
from vmonty.vmm.eventloop import Call
from vmonty.vmm.hw.ata import fis
from vmonty.vmm.hw.ata.cdrom import PACKET, PACKET_SIZE, CdRom
from vmonty.vmm.hw.ata.disk import QUEUED, AtaDisk
from vmonty.vmm.hw.ata.drive import (
    ERROR_ABORT,
    EXECUTE_DIAGNOSTIC,
    STATUS_BUSY,
    STATUS_DATA,
    STATUS_ERROR,
    Aborted,
    Drive,
    Transfer,
)
from vmonty.vmm.hw.ata.piix_ide import Memory

SLOTS = 32
MOST_WAIT_S = 60.0

# Registers.
CLB, CLBU, FB, FBU, IS, IE, CMD, TFD, SIG = 0x00, 0x04, 0x08, 0x0C, 0x10, 0x14, 0x18, 0x20, 0x24
SSTS, SCTL, SERR, SACT, CI = 0x28, 0x2C, 0x30, 0x34, 0x38

START, SPIN_UP, POWER_ON, CLEAR_BUSY, FIS_RECEIVE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4
FIS_RUNNING, LIST_RUNNING, ATAPI = 1 << 14, 1 << 15, 1 << 24
CMD_WRITABLE = START | FIS_RECEIVE | ATAPI
IS_REGISTER, IS_PIO, IS_DEVICE_BITS, IS_DESCRIPTOR, IS_CONNECTED = 1 << 0, 1 << 1, 1 << 3, 1 << 5, 1 << 6
IS_OVERFLOW, IS_INTERFACE, IS_HOST_BUS, IS_TASK_FILE = 1 << 24, 1 << 27, 1 << 29, 1 << 30
IE_WRITABLE = 0xFDC0_00FF
SERR_EXCHANGED = 1 << 26
LINK_UP, DETECT_MASK, DETECT_RESET, DETECT_OFF = 0x113, 0xF, 1, 4
NO_DRIVE_STATUS, NO_SIGNATURE = 0x7F, 0xFFFF_FFFF

# Where a FIS lands in the area for received ones.
AREA_DMA_SETUP, AREA_PIO, AREA_REGISTER, AREA_DEVICE_BITS = 0x00, 0x20, 0x40, 0x58
# The command header, and the command table.
HEADER = struct.Struct("<IIQ")
HEADER_SIZE, BYTES_MOVED = 32, 4
HEADER_LENGTH, HEADER_WRITE = 0x1F, 1 << 6
PACKET_AT, REGIONS_AT, REGION = 0x40, 0x80, struct.Struct("<QII")
REGION_COUNT, REGION_INTERRUPT = 0x3F_FFFF, 1 << 31
REGIONS_AT_ONCE = 256
# Between pieces of this size a command notices that it was taken back; only packets ask for more.
BYTES_AT_ONCE = 32 << 20


class Loop(Protocol):
    """Where commands are carried out."""

    def call_soon(self, callback: Callable[[], None], /) -> None:
        """Call it later, after those that were given before."""
        ...


class _BrokenError(Exception):
    """The command cannot be fetched: the bit of the interrupt status that says why."""

    def __init__(self, cause: int) -> None:
        super().__init__(f"{cause:#x}")
        self.cause = cause


class _Command(NamedTuple):
    slot: int
    flags: int
    table: int

    @property
    def regions(self) -> int:
        return self.flags >> 16


class _Data(NamedTuple):
    """Guest memory that a command names, and whether it wants an interrupt for a part of it."""

    regions: list[tuple[int, int]]
    interrupt: bool

    @property
    def size(self) -> int:
        return sum(size for _, size in self.regions)


class Port:
    """One port with *drive*, or nothing. *changed* is called, with the lock held, when ``pending`` may have changed."""

    def __init__(
        self, drive: Drive | None, memory: Memory, loop: Loop, lock: threading.RLock, allowed: Callable[[], bool],
        changed: Callable[[], None],
    ) -> None:  # fmt: skip
        self.drive = drive
        self._memory, self._loop, self._allowed, self._changed = memory, loop, allowed, changed
        self.lock = lock
        self._waiting: deque[int] = deque()  # slots, in the order in which they were issued
        self._working = False  # a command is carried out, or about to be
        self._after: list[Callable[[], None]] = []
        # A command that is under way when its list is stopped ends without telling anybody.
        self._stops = self._stops_before = 0
        self._list = self._area = 0
        self._unseen = b""
        self._enabled = self._control = 0
        self._reset_registers()

    def _reset_registers(self) -> None:
        self._causes = self._enabled = self._command = self._control = self._errors = 0
        self._issued = self._active = 0
        self._current = 0
        self._halted = self._in_reset = False
        self._waiting.clear()
        self._arrive()

    def _arrive(self) -> None:
        """The link came up: the drive tells what it is."""
        if self.drive is None:
            self._status, self._error, self._signature = NO_DRIVE_STATUS, 0, NO_SIGNATURE
            return
        self.drive.reset()
        registers = self.drive.registers
        self._status, self._error, self._signature = registers.status, registers.error, fis.signature(registers)
        self._unseen = fis.register_to_host(registers, interrupt=False)
        self._show_signature()

    def _show_signature(self) -> None:
        """The first FIS waits for an area that takes it."""
        if self._unseen and self._command & FIS_RECEIVE:
            data, self._unseen = self._unseen, b""
            self._receive(AREA_REGISTER, data)

    # ---- the driver's side ------------------------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """Does it want an interrupt?"""
        return bool(self._interrupts & self._enabled)

    @property
    def _interrupts(self) -> int:
        return self._causes | (IS_CONNECTED if self._errors & SERR_EXCHANGED else 0)

    def read(self, register: int) -> int:
        """A register, 32 bits; with the lock held."""
        match register:
            case 0x00 | 0x04:
                return self._list >> 8 * register & 0xFFFF_FFFF
            case 0x08 | 0x0C:
                return self._area >> 8 * (register - FB) & 0xFFFF_FFFF
            case 0x10:
                return self._interrupts
            case 0x14:
                return self._enabled
            case 0x18:
                return self._command_register()
            case 0x20:
                return self._error << 8 | self._status
            case 0x24:
                return self._signature
            case 0x28:
                return LINK_UP if self.drive is not None and not self._link_down else 0
            case 0x2C:
                return self._control
            case 0x30:
                return self._errors
            case 0x34:
                return self._active
            case 0x38:
                return self._issued
        return 0

    @property
    def _link_down(self) -> bool:
        return self._control & DETECT_MASK in (DETECT_RESET, DETECT_OFF) or self._in_reset

    def _command_register(self) -> int:
        command = self._command | SPIN_UP | POWER_ON
        busy = LIST_RUNNING if self._command & START or self._working else 0
        receives = FIS_RUNNING if self._command & FIS_RECEIVE or self._working else 0
        return command | busy | receives | self._current << 8

    def write(self, register: int, value: int) -> None:
        """A register, 32 bits; with the lock held."""
        match register:
            case 0x00 | 0x04:
                self._list = _half(self._list, register, value) & ~0x3FF
            case 0x08 | 0x0C:
                self._area = _half(self._area, register - FB, value) & ~0xFF
            case 0x10:
                self._causes &= ~value
            case 0x14:
                self._enabled = value & IE_WRITABLE
            case 0x18:
                self._write_command(value)
            case 0x2C:
                self._write_control(value)
            case 0x30:
                self._errors &= ~value
            case 0x34:
                if self._command & START:
                    self._active |= value
            case 0x38:
                self._issue(value)
        self._changed()

    def _write_command(self, value: int) -> None:
        before, self._command = self._command, value & CMD_WRITABLE
        if value & CLEAR_BUSY and not before & START:
            self._status &= ~(STATUS_BUSY | STATUS_DATA)
        if before & ~value & START:
            self._stop()
        self._show_signature()

    def _stop(self) -> None:
        self._stops += 1
        self._issued = self._active = self._current = 0
        self._halted = False
        self._waiting.clear()

    def _write_control(self, value: int) -> None:
        before, self._control = self._control, value & 0xFFF
        detect, old = value & DETECT_MASK, before & DETECT_MASK
        if detect == old or self.drive is None:
            return
        if detect in (DETECT_RESET, DETECT_OFF):
            self._stop()
            self._status = STATUS_BUSY if detect == DETECT_RESET else NO_DRIVE_STATUS
        elif old in (DETECT_RESET, DETECT_OFF):
            self._in_reset = True
            self.when_idle(self._link_up)

    def _link_up(self) -> None:
        self._in_reset = False
        self._stop()
        self._errors |= SERR_EXCHANGED
        self._arrive()
        self._changed()

    def reset(self) -> None:
        """The controller is reset; when a command is under way, after it."""
        self._stop()
        self._in_reset = True
        self.when_idle(self._reset_registers)

    def when_idle(self, function: Callable[[], None]) -> None:
        """Call *function*, with the lock held, when no command is being carried out: now, or when that one ends.

        It comes before what else was issued: a driver that always keeps the list filled cannot put it off.
        """
        with self.lock:
            if self._working:
                self._after.append(function)
            else:
                function()

    def run_idle(self, function: Callable[[], None]) -> None:
        """As ``when_idle``, and wait for it; what *function* raises is raised here.

        BlockError after a minute: then *function* was not called, and will not be.
        """
        call = Call(function)
        self.when_idle(call)
        if not call.wait(MOST_WAIT_S):
            with self.lock:
                # It is called under the lock: either it is there, or it was called meanwhile.
                if call in self._after:
                    self._after.remove(call)
                    raise BlockError(errno.EBUSY, "the drive does not end its command")
        call.result()

    def _issue(self, value: int) -> None:
        if not self._command & START or self.drive is None or self._link_down:
            return
        fresh = value & ~self._issued
        self._issued |= fresh
        self._waiting.extend(slot for slot in range(SLOTS) if fresh >> slot & 1)
        if self._waiting and not self._working and not self._halted:
            self._working = True
            self._loop.call_soon(self._work)

    # ---- carrying commands out --------------------------------------------------------------------------------------

    def _work(self) -> None:
        """On the loop's thread: all that was issued."""
        while True:
            with self.lock:
                while self._after:
                    self._call(self._after.pop(0))
                if not self._waiting or self._halted:
                    self._working = False
                    return
                slot = self._waiting.popleft()
                self._current, self._stops_before = slot, self._stops
                command_list = self._list
            try:
                self._execute(slot, command_list)
            except _BrokenError as reason:
                self._halt(reason.cause)
            except GuestMemoryError:
                self._halt(IS_HOST_BUS)
            except Exception:  # a fault of ours: the guest must notice, and the port live on
                self._halt(IS_HOST_BUS)
                _report()

    @staticmethod
    def _call(function: Callable[[], None]) -> None:
        try:
            function()
        except Exception:
            _report()

    def _stale(self) -> bool:
        """Was the command that is carried out taken back? With the lock held."""
        return self._stops != self._stops_before

    def _halt(self, cause: int) -> None:
        with self.lock:
            if self._stale():
                return
            self._halted = True
            self._causes |= cause
            self._changed()

    def _execute(self, slot: int, command_list: int) -> None:
        if not self._allowed():
            raise _BrokenError(IS_HOST_BUS)
        flags, _, table = HEADER.unpack(self._memory.read(command_list + HEADER_SIZE * slot, HEADER.size))
        command = _Command(slot, flags, table & ~0x7F)
        request = self._memory.read(command.table, fis.COMMAND_SIZE)
        if request[0] != fis.REGISTER_TO_DEVICE or 4 * (flags & HEADER_LENGTH) < fis.COMMAND_SIZE:
            raise _BrokenError(IS_INTERFACE)
        drive = self.drive
        assert drive is not None
        if not request[1] & fis.COMMAND:
            self._device_control(command, drive, request)
            return
        fis.load(request, drive.registers)
        if request[2] in QUEUED and isinstance(drive, AtaDisk):
            self._queued(command, drive, to_host=QUEUED[request[2]])
            return
        transfer, data = None, _Data([], interrupt=False)
        moved = 0
        try:
            if request[2] == EXECUTE_DIAGNOSTIC:
                drive.reset()
            else:
                transfer = drive.execute(request[2])
            if transfer is not None and request[2] == PACKET and isinstance(drive, CdRom):
                transfer = drive.packet(self._memory.read(command.table + PACKET_AT, PACKET_SIZE))
            if transfer is not None:
                data = self._data(command, transfer.size)
                moved = self._move(transfer, data)
                transfer.end()
        except Aborted as reason:
            drive.failed(reason.error)
        self._finish(command, drive, transfer, data, command_list, moved)

    def _device_control(self, command: _Command, drive: Drive, request: bytes) -> None:
        """A soft reset begins when its bit is set, and is over when it is cleared."""
        if request[15] & fis.CONTROL_RESET:
            with self.lock:
                if self._stale():
                    return
                self._status |= STATUS_BUSY
                self._issued &= ~(1 << command.slot)
            return
        drive.reset()
        registers = drive.registers
        with self.lock:
            if self._stale():
                return
            self._receive(AREA_REGISTER, fis.register_to_host(registers, interrupt=False))
            self._status, self._error, self._signature = registers.status, registers.error, fis.signature(registers)
            self._issued &= ~(1 << command.slot)

    def _data(self, command: _Command, wanted: int) -> _Data:
        """The guest memory of *command*'s descriptors, up to *wanted* bytes. Raises GuestMemoryError."""
        found: list[tuple[int, int]] = []
        interrupt = False
        for first in range(0, command.regions, REGIONS_AT_ONCE):
            count = min(REGIONS_AT_ONCE, command.regions - first)
            at = command.table + REGIONS_AT + REGION.size * first
            for base, _, control in REGION.iter_unpack(self._memory.read(at, REGION.size * count)):
                size = min((control & REGION_COUNT) + 1, wanted)
                found.append((base & ~1, size))
                interrupt = interrupt or bool(control & REGION_INTERRUPT)
                wanted -= size
                if not wanted:
                    return _Data(found, interrupt)
        return _Data(found, interrupt)

    def _move(self, transfer: Transfer, data: _Data) -> int:
        """Move what has room; the number of bytes. Raises Aborted, GuestMemoryError."""
        size = data.size
        if size < transfer.size and not transfer.to_host:
            raise Aborted  # the driver does not give what it said it would
        moved = 0
        for regions in _pieces(data.regions):
            if moved and self._taken_back():
                break
            views = [self._memory.view(base, length) for base, length in regions]
            try:
                transfer.move(moved, views)
            finally:
                if transfer.to_host:
                    for base, length in regions:
                        self._memory.written(base, length)
            moved += sum(length for _, length in regions)
        return moved

    def _taken_back(self) -> bool:
        with self.lock:
            return self._stale()

    def _finish(
        self, command: _Command, drive: Drive, transfer: Transfer | None, data: _Data, command_list: int, moved: int
    ) -> None:  # fmt: skip
        registers = drive.registers
        count = struct.pack("<I", moved & 0xFFFF_FFFF)
        self._memory.write(command_list + HEADER_SIZE * command.slot + BYTES_MOVED, count)
        failed = registers.status & STATUS_ERROR
        by_pio = transfer is not None and transfer.to_host and not transfer.dma and not transfer.packet and not failed
        with self.lock:
            if self._stale():
                return
            if by_pio:
                report = fis.pio_setup(registers, moved, registers.status, to_host=True)
                self._receive(AREA_PIO, report)
            else:
                self._receive(AREA_REGISTER, fis.register_to_host(registers, interrupt=True))
            causes = IS_PIO if by_pio else IS_REGISTER
            causes |= IS_DESCRIPTOR if data.interrupt else 0
            causes |= IS_OVERFLOW if transfer is not None and not failed and moved < transfer.size else 0
            self._end(command, registers.status, registers.error, causes)

    def _end(self, command: _Command, status: int, error: int, causes: int) -> None:
        """With the lock held: the command is done; after an error it stays issued, and nothing goes on."""
        self._status, self._error = status, error
        if status & STATUS_ERROR:
            self._halted = True
            causes |= IS_TASK_FILE
        else:
            self._issued &= ~(1 << command.slot)
        self._causes |= causes
        self._changed()

    # ---- native command queuing -------------------------------------------------------------------------------------

    def _queued(self, command: _Command, disk: AtaDisk, *, to_host: bool) -> None:
        """READ and WRITE FPDMA QUEUED: taken from the list at once, and ended by its bit in SACT."""
        tag = disk.registers.count >> 3 & 31
        with self.lock:
            if self._stale():
                return
            self._status, self._error = disk.ready_status, 0
            self._issued &= ~(1 << command.slot)
        error, interrupt = 0, False
        try:
            transfer = disk.queued(to_host=to_host)
            data = self._data(command, transfer.size)
            interrupt = data.interrupt
            if data.size < transfer.size:
                raise Aborted
            self._receive_unlocked(AREA_DMA_SETUP, fis.dma_setup(tag, transfer.size, to_host=to_host))
            self._move(transfer, data)
            transfer.end()
        except Aborted as reason:
            error = reason.error or ERROR_ABORT
            disk.queue_failed(tag, error)
        status = disk.registers.status
        with self.lock:
            if self._stale():
                return
            finished = 0 if error else 1 << tag
            self._receive(AREA_DEVICE_BITS, fis.set_device_bits(status, error, finished))
            self._active &= ~finished
            self._causes |= IS_DEVICE_BITS | (IS_DESCRIPTOR if interrupt else 0)
            self._status, self._error = status, error
            if error:
                self._halted = True
                self._causes |= IS_TASK_FILE
            self._changed()

    # ---- results ----------------------------------------------------------------------------------------------------

    def _receive_unlocked(self, place: int, data: bytes) -> None:
        with self.lock:
            if not self._stale():
                self._receive(place, data)

    def _receive(self, place: int, data: bytes) -> None:
        """A FIS came, with the lock held: it goes where the driver wants it, or nowhere."""
        if not self._command & FIS_RECEIVE:
            return
        try:
            self._memory.write(self._area + place, data)
        except GuestMemoryError:
            self._halted = True
            self._causes |= IS_HOST_BUS


def _pieces(regions: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """*regions* in parts of about BYTES_AT_ONCE."""
    piece: list[tuple[int, int]] = []
    size = 0
    for region in regions:
        piece.append(region)
        size += region[1]
        if size >= BYTES_AT_ONCE:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _report() -> None:
    """Tell the host's log of the exception that is being handled."""
    threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))


def _half(value: int, register: int, half: int) -> int:
    """*value* with its low half replaced (*register* 0), or its high half (4)."""
    shift = 8 * register
    return value & ~(0xFFFF_FFFF << shift) | half << shift


def idle(ports: Sequence[Port]) -> bool:
    """Is none of *ports* in a reset that waits for a command's end? With the lock held."""
    return not any(port._in_reset for port in ports)
