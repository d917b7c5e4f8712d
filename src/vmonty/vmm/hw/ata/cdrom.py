"""A CD-ROM drive: SCSI multimedia commands in ATA packets.

Source: ATA/ATAPI-7, volume 1, "PACKET"; MMC-5 and SPC-3 for the commands and their sense data.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from vmonty.base.errors import BlockError
from vmonty.vmm.block.device import BlockDevice
from vmonty.vmm.block.tray import Tray
from vmonty.vmm.hw.ata.drive import (
    DEVICE_RESET,
    ERROR_ABORT,
    REASON_COMMAND,
    REASON_TO_HOST,
    STATUS_ERROR,
    STATUS_READY,
    STATUS_SEEK,
    Aborted,
    Drive,
    Transfer,
    text,
)

BLOCK = 2048
PACKET_SIZE = 12
PACKET, IDENTIFY_PACKET, IDENTIFY, SET_FEATURES = 0xA0, 0xA1, 0xEC, 0xEF
NOTHING_TO_DO = frozenset((0xE0, 0xE1, 0xE2, 0xE3, 0xE5, 0xE6, 0xE7))
FEATURE_DMA = 1

NOT_READY, MEDIUM_ERROR, ILLEGAL_REQUEST, UNIT_ATTENTION = 2, 3, 5, 6
NO_MEDIUM, NO_MEDIUM_OPEN, INVALID_COMMAND, OUT_OF_RANGE = (0x3A, 0), (0x3A, 2), (0x20, 0), (0x21, 0)
INVALID_FIELD, MEDIUM_CHANGED, READ_FAILED, REMOVAL_PREVENTED = (0x24, 0), (0x28, 0), (0x11, 0), (0x53, 2)
SAVING_NOT_SUPPORTED = (0x39, 0)
PROFILE_CD_ROM, PROFILE_DVD_ROM = 0x0008, 0x0010
MOST_CD_BLOCKS = 450_000  # 100 minutes: anything larger is a DVD
LEAD_OUT = 0xAA
# GET EVENT STATUS NOTIFICATION.
MEDIA_CLASS, EVENT_NONE, EVENT_EJECT_REQUEST, EVENT_NEW, EVENT_REMOVED = 4, 0, 1, 2, 3


class CheckCondition(Exception):
    """The command ends with sense data."""

    def __init__(self, key: int, code: tuple[int, int] = (0, 0)) -> None:
        super().__init__(f"sense {key:#x} {code[0]:#04x} {code[1]:#04x}")
        self.key, self.code = key, code


class CdRom(Drive):
    """The drive with *tray*. ``change`` puts another medium in. *ejected* is told when the guest opens the tray."""

    signature = (0x14, 0xEB)

    def __init__(self, tray: Tray | None = None, serial: str = "", ejected: Callable[[], None] | None = None) -> None:
        self.tray = tray if tray is not None else Tray()
        self._serial = serial
        self._ejected = ejected
        self.locked = False
        self._attention = self.tray.readable is not None
        self._event = EVENT_NONE
        self._sense: tuple[int, tuple[int, int]] = (0, (0, 0))
        super().__init__()

    @property
    def ready_status(self) -> int:
        """As a disk's, once a command was given; see reset()."""
        return STATUS_READY | STATUS_SEEK

    def reset(self) -> None:
        """The signature; the status of a packet device is zero until a command comes."""
        super().reset()
        self.registers.status = 0
        self._limit = 0

    def change(self, medium: BlockDevice | None) -> None:
        """Another medium, or none; while the controller carries no command out for this drive."""
        self.tray.medium, self.tray.open = medium, False
        self._tell_of_medium()

    def request_eject(self) -> None:
        """Press the drive's button: a guest that has locked the tray is told, and may open it."""
        self._event = EVENT_EJECT_REQUEST

    def _tell_of_medium(self) -> None:
        there = self.tray.readable is not None
        self._attention, self._event = there, EVENT_NEW if there else EVENT_REMOVED
        self.locked = self.locked and there

    # ---- ATA ------------------------------------------------------------------------------------------------------

    def execute(self, command: int) -> Transfer | None:
        """See Drive. PACKET returns the transfer of the packet; ``packet`` then takes it."""
        registers = self.registers
        if command == PACKET:
            limit = registers.lba_mid & 0xFF | (registers.lba_high & 0xFF) << 8
            self._limit = limit & ~1 or 0xFFFE
            registers.count = REASON_COMMAND
            return Transfer(PACKET_SIZE, False, PACKET_SIZE, lambda offset, views: None, lambda: None, packet=True)
        if command == IDENTIFY_PACKET:
            return self.answer(self.identify())
        if command == DEVICE_RESET:
            self.reset()
            return None
        if command == IDENTIFY:
            self._sign()
            raise Aborted
        if command not in NOTHING_TO_DO and not (command == SET_FEATURES and registers.feature & 0xFF == 3):
            raise Aborted
        self.done()
        return None

    def packet(self, data: bytes) -> Transfer | None:
        """The command in a packet of 12 bytes: its transfer, None when it is done, well or with sense data."""
        dma = bool(self.registers.feature & FEATURE_DMA)
        try:
            reply = self._command(data)
        except CheckCondition as condition:
            self.fail(condition)
            return None
        if isinstance(reply, bytes):
            return self._reply(len(reply), dma, self.answer(reply).move)
        first, count = reply
        medium = self.tray.readable
        assert medium is not None

        def move(offset: int, views: Sequence[memoryview]) -> None:
            try:
                medium.preadv(first * BLOCK + offset, views)
            except BlockError as error:
                self._sense = MEDIUM_ERROR, READ_FAILED
                raise Aborted(MEDIUM_ERROR << 4) from error

        return self._reply(count * BLOCK, dma, move)

    def _reply(self, size: int, dma: bool, move: Callable[[int, Sequence[memoryview]], None]) -> Transfer | None:
        if not size:
            self._finish()
            return None
        self.registers.count = REASON_TO_HOST
        return Transfer(size, True, self._limit, move, self._finish, dma, packet=True)

    def _finish(self) -> None:
        self.registers.count = REASON_COMMAND | REASON_TO_HOST
        self.done()

    def fail(self, condition: CheckCondition) -> None:
        """End a packet command with sense data."""
        self._sense = condition.key, condition.code
        self.failed(condition.key << 4 | (ERROR_ABORT if condition.key == ILLEGAL_REQUEST else 0))

    def failed(self, error: int) -> None:
        """An error of a packet command leaves the interrupt reason as at its end."""
        self.registers.count = REASON_COMMAND | REASON_TO_HOST
        self.registers.status, self.registers.error = STATUS_READY | STATUS_SEEK | STATUS_ERROR, error

    # ---- SCSI -----------------------------------------------------------------------------------------------------

    @property
    def _blocks(self) -> int:
        medium = self.tray.readable
        return medium.size // BLOCK if medium is not None else 0

    def _command(self, cdb: bytes) -> bytes | tuple[int, int]:
        """The reply, or (first block, count) of a read. Raises CheckCondition."""
        operation = cdb[0]
        if operation == 0x03:  # REQUEST SENSE
            (key, (code, qualifier)), self._sense = self._sense, (0, (0, 0))
            return (bytes((0x70, 0, key, 0, 0, 0, 0, 10, 0, 0, 0, 0, code, qualifier)) + bytes(4))[: cdb[4]]
        if operation == 0x12:  # INQUIRY
            return self._inquiry(cdb)
        if operation == 0x4A:  # GET EVENT STATUS NOTIFICATION
            return self._events(cdb)
        if self._attention:
            self._attention = False
            raise CheckCondition(UNIT_ATTENTION, MEDIUM_CHANGED)
        self._sense = 0, (0, 0)
        if (simple := _WITHOUT_MEDIUM.get(operation)) is not None:
            return simple(self, cdb)
        if (handler := _WITH_MEDIUM.get(operation)) is None:
            raise CheckCondition(ILLEGAL_REQUEST, INVALID_COMMAND)
        if not self._blocks:
            raise CheckCondition(NOT_READY, NO_MEDIUM_OPEN if self.tray.open else NO_MEDIUM)
        return handler(self, cdb)

    def _inquiry(self, cdb: bytes) -> bytes:
        if cdb[1] & 1 or cdb[2]:
            raise CheckCondition(ILLEGAL_REQUEST, INVALID_FIELD)
        reply = bytes((5, 0x80, 5, 0x32, 31, 0, 0, 0)) + b"vmonty  " + b"CD-ROM          " + b"1.0 "
        return reply[: int.from_bytes(cdb[3:5], "big")]

    def _events(self, cdb: bytes) -> bytes:
        if not cdb[1] & 1:  # only polling
            raise CheckCondition(ILLEGAL_REQUEST, INVALID_FIELD)
        size = int.from_bytes(cdb[7:9], "big")
        if not cdb[4] & 1 << MEDIA_CLASS:
            return struct.pack(">HBB", 2, 0x80, 1 << MEDIA_CLASS)[:size]
        event, self._event = self._event, EVENT_NONE
        status = (2 if self._blocks else 0) | int(self.tray.open)
        return struct.pack(">HBBBBBB", 6, MEDIA_CLASS, 1 << MEDIA_CLASS, event, status, 0, 0)[:size]

    def _nothing(self, cdb: bytes) -> bytes:
        return b""

    def _prevent(self, cdb: bytes) -> bytes:
        self.locked = bool(cdb[4] & 1)
        return b""

    def _start_stop(self, cdb: bytes) -> bytes:
        if cdb[4] & 2:
            opens = not cdb[4] & 1
            if opens and self.locked:
                raise CheckCondition(ILLEGAL_REQUEST if self._blocks else NOT_READY, REMOVAL_PREVENTED)
            if opens != self.tray.open:
                self.tray.open = opens
                self._tell_of_medium()
                if opens and self._ejected is not None:
                    self._ejected()
        return b""

    def _mode_sense(self, cdb: bytes) -> bytes:
        """MODE SENSE(10): the error recovery page, and the capabilities page of MMC-2 that Linux asks for."""
        page, control = cdb[2] & 0x3F, cdb[2] >> 6
        if control == 3:
            raise CheckCondition(ILLEGAL_REQUEST, SAVING_NOT_SUPPORTED)
        recovery = bytes((1, 6, 0, 5, 0, 0, 0, 0))
        capabilities = struct.pack(
            ">BBBBBBBBHHHHBBHH", 0x2A, 18, 0x3B, 0, 0x71 if control != 1 else 0, 0x60, 0x29 | int(self.locked) << 1, 0,
            5632, 2, 512, 5632, 0, 0, 0, 0,
        )  # fmt: skip
        pages = {1: recovery, 0x2A: capabilities, 0x3F: recovery + capabilities}
        if page not in pages:
            raise CheckCondition(ILLEGAL_REQUEST, INVALID_FIELD)
        body = struct.pack(">B5x", 1 if self._blocks else 0x70) + pages[page]
        return (struct.pack(">H", len(body)) + body)[: int.from_bytes(cdb[7:9], "big")]

    def _configuration(self, cdb: bytes) -> bytes:
        """GET CONFIGURATION: the profiles, core, and removable medium features."""
        profile = 0 if not self._blocks else PROFILE_DVD_ROM if self._blocks > MOST_CD_BLOCKS else PROFILE_CD_ROM
        features = [
            (0, struct.pack(">HBB", 0, 3, 8) + b"".join(
                struct.pack(">HBB", one, int(one == profile), 0) for one in (PROFILE_DVD_ROM, PROFILE_CD_ROM)
            )),
            (1, struct.pack(">HBBII", 1, 0x0B, 8, 2, 1)),  # core, ATAPI
            (3, struct.pack(">HBBB3x", 3, 3, 4, 0x39)),  # removable medium: a tray that can be locked
        ]  # fmt: skip
        kind, start = cdb[1] & 3, int.from_bytes(cdb[2:4], "big")
        if kind == 3:
            raise CheckCondition(ILLEGAL_REQUEST, INVALID_FIELD)
        wanted = [body for number, body in features if (number == start if kind == 2 else number >= start)]
        body = struct.pack(">HH", 0, profile) + b"".join(wanted)
        return (struct.pack(">I", len(body)) + body)[: int.from_bytes(cdb[7:9], "big")]

    def _capacity(self, cdb: bytes) -> bytes:
        return struct.pack(">II", min(self._blocks - 1, 0xFFFF_FFFF), BLOCK)

    def _read_10(self, cdb: bytes) -> tuple[int, int]:
        return self._read(int.from_bytes(cdb[2:6], "big"), int.from_bytes(cdb[7:9], "big"))

    def _read_12(self, cdb: bytes) -> tuple[int, int]:
        return self._read(int.from_bytes(cdb[2:6], "big"), int.from_bytes(cdb[6:10], "big"))

    def _read(self, first: int, count: int) -> tuple[int, int]:
        if first + count > self._blocks:
            raise CheckCondition(ILLEGAL_REQUEST, OUT_OF_RANGE)
        return first, count

    def _read_cd(self, cdb: bytes) -> bytes | tuple[int, int]:
        """READ CD, of user data only."""
        count = int.from_bytes(cdb[6:9], "big")
        if not count or not cdb[9] & 0xF8:
            return b""
        if cdb[9] & 0xF8 != 0x10 or cdb[10] & 7:
            raise CheckCondition(ILLEGAL_REQUEST, INVALID_FIELD)
        return self._read(int.from_bytes(cdb[2:6], "big"), count)

    def _seek(self, cdb: bytes) -> bytes:
        self._read(int.from_bytes(cdb[2:6], "big"), 1)
        return b""

    def _contents(self, cdb: bytes) -> bytes:
        """READ TOC: one data track and the lead-out."""
        size, kind = int.from_bytes(cdb[7:9], "big"), cdb[2] & 15 or cdb[9] >> 6
        in_minutes = bool(cdb[1] & 2)

        def place(block: int) -> bytes:
            if not in_minutes:
                return struct.pack(">I", block)
            frames = min(block + 150, 255 * 60 * 75 - 1)
            return bytes((0, frames // (60 * 75), frames // 75 % 60, frames % 75))

        if kind == 0:
            if cdb[6] > 1 and cdb[6] != LEAD_OUT:
                raise CheckCondition(ILLEGAL_REQUEST, INVALID_FIELD)
            body = b"\1\1" + (bytes((0, 0x14, 1, 0)) + place(0) if cdb[6] <= 1 else b"")
            body += bytes((0, 0x14, LEAD_OUT, 0)) + place(self._blocks)
        elif kind == 1:
            body = b"\1\1" + bytes((0, 0x14, 1, 0)) + place(0)
        else:
            raise CheckCondition(ILLEGAL_REQUEST, INVALID_FIELD)
        return (struct.pack(">H", len(body)) + body)[:size]

    def identify(self) -> bytes:
        """The 512 bytes of IDENTIFY PACKET DEVICE."""
        words = bytearray(512)

        def put(word: int, data: bytes) -> None:
            words[2 * word : 2 * word + len(data)] = data

        def put_words(word: int, *values: int) -> None:
            put(word, struct.pack(f"<{len(values)}H", *values))

        put_words(0, 0x8580)  # a removable CD-ROM that takes packets of 12 bytes, DRQ within 50 microseconds
        put(10, text(self._serial, 20))
        put(23, text("1.0", 8))
        put(27, text("vmonty CD-ROM", 40))
        put_words(49, 0x0B00)  # DMA, LBA, IORDY
        put_words(53, 6)
        put_words(63, 7, 3, 120, 120, 120, 120)
        put_words(80, 0xF0, 0x16, 0x0210, 0x4000, 0x4000, 0x0210, 0x0000, 0x4000, 0x203F)
        return bytes(words)


_Plain = Callable[[CdRom, bytes], bytes]
_WITHOUT_MEDIUM: dict[int, _Plain] = {
    0x1B: CdRom._start_stop, 0x1E: CdRom._prevent, 0x46: CdRom._configuration, 0x5A: CdRom._mode_sense,
    0xBB: CdRom._nothing,  # SET CD SPEED
}  # fmt: skip
_WITH_MEDIUM: dict[int, Callable[[CdRom, bytes], bytes | tuple[int, int]]] = {
    0x00: CdRom._nothing, 0x25: CdRom._capacity, 0x28: CdRom._read_10, 0x2B: CdRom._seek, 0x43: CdRom._contents,
    0xA8: CdRom._read_12, 0xBE: CdRom._read_cd,
}  # fmt: skip
