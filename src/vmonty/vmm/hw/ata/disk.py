"""A hard disk. Source: ATA/ATAPI-7, volume 1, "Command descriptions"."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from vmonty.base.errors import BlockError
from vmonty.vmm.block.device import BlockDevice
from vmonty.vmm.hw.ata.drive import (
    DEVICE_HEAD,
    DEVICE_LBA,
    ERROR_ABORT,
    ERROR_NOT_FOUND,
    ERROR_UNCORRECTABLE,
    SECTOR,
    Aborted,
    Drive,
    Transfer,
    text,
)

MOST_LBA28 = 1 << 28
MOST_MULTIPLE = 16
HEADS, SECTORS_PER_TRACK, MOST_CYLINDERS = 16, 63, 16383

IDENTIFY, SET_FEATURES, SET_MULTIPLE, INITIALIZE_PARAMETERS, SMART = 0xEC, 0xEF, 0xC6, 0x91, 0xB0
# Reads and writes: (command) → (48-bit addresses, in multiples, by DMA).
READS = {
    0x20: (False, False, False), 0x21: (False, False, False), 0x24: (True, False, False), 0xC4: (False, True, False),
    0x29: (True, True, False), 0xC8: (False, False, True), 0xC9: (False, False, True), 0x25: (True, False, True),
}  # fmt: skip
WRITES = {
    0x30: (False, False, False), 0x31: (False, False, False), 0x34: (True, False, False), 0xC5: (False, True, False),
    0x39: (True, True, False), 0xCA: (False, False, True), 0xCB: (False, False, True), 0x35: (True, False, True),
    0x3D: (True, False, True),
}  # fmt: skip
# READ and WRITE FPDMA QUEUED: (command) → to the host.
QUEUED = {0x60: True, 0x61: False}
QUEUE_DEPTH = 32
READ_LOG, LOG_DIRECTORY, LOG_QUEUE_ERROR = 0x2F, 0x00, 0x10
# DATA SET MANAGEMENT: a block has 64 ranges of eight bytes, 48 of whose bits are the first sector.
DATA_SET_MANAGEMENT, TRIM, MOST_TRIM_BLOCKS = 0x06, 0x01, 8
TRIM_ADDRESS = 48
VERIFIES = {0x40: False, 0x41: False, 0x42: True}
FUA = 0x80
FLUSHES = frozenset((0xE7, 0xEA))
NATIVE_MAX, NATIVE_MAX_EXT, CHECK_POWER = 0xF8, 0x27, frozenset((0xE5, 0x98))
ACTIVE = 0xFF
# RECALIBRATE, SEEK, the power commands and EXECUTE DEVICE DIAGNOSTIC have nothing to do here.
NOTHING_TO_DO = frozenset((0x10, 0x70, 0xE0, 0xE1, 0xE2, 0xE3, 0xE6, 0x94, 0x95, 0x96, 0x97, 0x99))
FEATURE_TRANSFER_MODE, FEATURES_KEPT = 0x03, frozenset((0x02, 0x82, 0x55, 0xAA, 0x66, 0xCC, 0x05, 0x85, 0x42, 0xC2))
FEATURE_CACHE_ON, FEATURE_CACHE_OFF = 0x02, 0x82
SMART_KEY = (0x4F, 0xC2)
SMART_DATA, SMART_THRESHOLDS, SMART_ENABLE, SMART_DISABLE, SMART_STATUS = 0xD0, 0xD1, 0xD8, 0xD9, 0xDA


class AtaDisk(Drive):
    """The disk *backend*, which stays its owner's, with *serial* (20 characters) and *model* (40).

    A *sata* one has a command queue.
    """

    signature = (0, 0)

    def __init__(
        self, backend: BlockDevice, serial: str = "", model: str = "vmonty disk", *, sata: bool = False
    ) -> None:
        self.backend = backend
        self._serial, self._model, self._sata = serial, model, sata
        self._queue_error = bytes(SECTOR)
        self._sectors = backend.size // SECTOR
        self._cylinders = min(max(self._sectors // (HEADS * SECTORS_PER_TRACK), 1), MOST_CYLINDERS)
        super().__init__()

    def reset(self) -> None:
        """Back to what IDENTIFY tells as the default."""
        super().reset()
        self._multiple = MOST_MULTIPLE
        self._mode = 0x45  # Ultra DMA 5
        self._heads, self._track = HEADS, SECTORS_PER_TRACK
        self._write_cache = True
        self._smart = True

    # ---- commands -----------------------------------------------------------------------------------------------

    def execute(self, command: int) -> Transfer | None:
        """See Drive."""
        if command in READS:
            return self._transfer(*READS[command], to_host=True)
        if command in WRITES:
            return self._transfer(*WRITES[command], to_host=False)
        if command == IDENTIFY:
            return self.answer(self.identify())
        if command == SMART:
            return self._smart_command()
        if command == DATA_SET_MANAGEMENT:
            return self._trim()
        if command == READ_LOG and self._sata:
            return self._read_log()
        if command in VERIFIES:
            self._range(wide=VERIFIES[command])
        elif command in FLUSHES:
            self._flush()
        elif command not in NOTHING_TO_DO:
            self._set(command)
        self.done()
        return None

    def _set(self, command: int) -> None:
        registers = self.registers
        count = registers.count & 0xFF
        if command == SET_MULTIPLE:
            if count > MOST_MULTIPLE or count & (count - 1):
                raise Aborted
            self._multiple = count
        elif command == INITIALIZE_PARAMETERS:
            if not count:
                raise Aborted
            self._heads, self._track = (registers.device & DEVICE_HEAD) + 1, count
        elif command == SET_FEATURES:
            self._set_features(registers.feature & 0xFF, count)
        elif command in (NATIVE_MAX, NATIVE_MAX_EXT):
            self._native_max(wide=command == NATIVE_MAX_EXT)
        elif command in CHECK_POWER:
            registers.count = ACTIVE
        else:
            raise Aborted

    def _set_features(self, feature: int, count: int) -> None:
        if feature == FEATURE_TRANSFER_MODE:
            if count >> 3 not in (0, 1, 4, 8) or count & 7 > (5 if count >> 3 == 8 else 4):
                raise Aborted
            self._mode = count
        elif feature not in FEATURES_KEPT:
            raise Aborted
        if feature in (FEATURE_CACHE_ON, FEATURE_CACHE_OFF):
            self._write_cache = feature == FEATURE_CACHE_ON
            self._flush()

    def _native_max(self, *, wide: bool) -> None:
        registers = self.registers
        last = self._sectors - 1 if wide else min(self._sectors, MOST_LBA28) - 1
        registers.set_lba48(last)
        if not wide:
            registers.device = registers.device & ~DEVICE_HEAD | last >> 24 & DEVICE_HEAD

    def _smart_command(self) -> Transfer | None:
        registers = self.registers
        feature, key = registers.feature & 0xFF, (registers.lba_mid & 0xFF, registers.lba_high & 0xFF)
        if key != SMART_KEY or (not self._smart and feature != SMART_ENABLE):
            raise Aborted
        if feature in (SMART_DATA, SMART_THRESHOLDS):
            data = bytearray(SECTOR)
            data[0] = 1
            data[SECTOR - 1] = -sum(data) & 0xFF
            return self.answer(bytes(data))
        if feature in (SMART_ENABLE, SMART_DISABLE):
            self._smart = feature == SMART_ENABLE
        elif feature != SMART_STATUS:  # which leaves the key in the registers: no threshold is exceeded
            raise Aborted
        self.done()
        return None

    # ---- the queue ----------------------------------------------------------------------------------------------

    def queued(self, *, to_host: bool) -> Transfer:
        """The transfer of a queued command, whose sectors are counted in the feature register. Raises Aborted."""
        registers = self.registers
        first, count = registers.lba48, registers.feature & 0xFFFF or 0x1_0000
        if first + count > self._sectors:
            raise Aborted(ERROR_NOT_FOUND)
        # The device register asks for the medium in place of the cache.
        return self._moving(first, count, SECTOR, to_host=to_host, dma=True, through=bool(registers.device & FUA))

    def queue_failed(self, tag: int, error: int) -> None:
        """The queued command *tag* ended with *error*; the driver will read which one it was."""
        self.failed(error)
        registers = self.registers
        log = bytearray(SECTOR)
        log[:14] = (
            bytes((tag, 0, registers.status, error))
            + bytes((registers.lba_low & 0xFF, registers.lba_mid & 0xFF, registers.lba_high & 0xFF, registers.device))
            + bytes((registers.lba_low >> 8, registers.lba_mid >> 8, registers.lba_high >> 8, 0))
            + bytes((registers.count & 0xFF, registers.count >> 8))
        )
        log[SECTOR - 1] = -sum(log) & 0xFF
        self._queue_error = bytes(log)

    def _read_log(self) -> Transfer:
        registers = self.registers
        page, count = registers.lba_low & 0xFF, registers.count & 0xFFFF
        if registers.lba_mid & 0xFF or count != 1 or page not in (LOG_DIRECTORY, LOG_QUEUE_ERROR):
            raise Aborted
        data = bytearray(SECTOR)
        if page == LOG_DIRECTORY:
            data[0] = 1
            data[2 * LOG_QUEUE_ERROR] = 1
        else:
            data[:] = self._queue_error
        return self.answer(bytes(data))

    # ---- data ---------------------------------------------------------------------------------------------------

    def _trim(self) -> Transfer:
        """The ranges come as data; nothing is done when one of them is outside the disk."""
        registers = self.registers
        blocks = registers.count & 0xFFFF
        if registers.feature & 0xFF != TRIM or not 1 <= blocks <= MOST_TRIM_BLOCKS or self.backend.read_only:
            raise Aborted
        data = bytearray(blocks * SECTOR)

        def move(offset: int, views: Sequence[memoryview]) -> None:
            for view in views:
                data[offset : offset + len(view)] = view
                offset += len(view)

        def end() -> None:
            ranges = [
                (entry & (1 << TRIM_ADDRESS) - 1, entry >> TRIM_ADDRESS) for (entry,) in struct.iter_unpack("<Q", data)
            ]
            if any(first + count > self._sectors for first, count in ranges if count):
                raise Aborted(ERROR_NOT_FOUND)
            try:
                for first, count in ranges:
                    if count:
                        self.backend.discard(first * SECTOR, count * SECTOR)
            except BlockError as error:
                raise Aborted from error
            self.done()

        return Transfer(len(data), False, SECTOR, move, end, True)

    def _range(self, *, wide: bool) -> tuple[int, int]:
        """The first sector and the number of sectors that the registers ask for. Raises Aborted outside the disk."""
        registers = self.registers
        if wide:
            first, count = registers.lba48, registers.count & 0xFFFF or 0x1_0000
        else:
            count = registers.count & 0xFF or 0x100
            low, cylinder = registers.lba_low & 0xFF, registers.lba_mid & 0xFF | (registers.lba_high & 0xFF) << 8
            head = registers.device & DEVICE_HEAD
            first = head << 24 | cylinder << 8 | low
            if not registers.device & DEVICE_LBA:
                if not 1 <= low <= self._track or head >= self._heads:
                    raise Aborted(ERROR_NOT_FOUND)
                first = (cylinder * self._heads + head) * self._track + low - 1
        if first + count > self._sectors:
            raise Aborted(ERROR_NOT_FOUND)
        return first, count

    def _transfer(self, wide: bool, multiple: bool, dma: bool, *, to_host: bool) -> Transfer:
        if multiple and not self._multiple:
            raise Aborted
        first, count = self._range(wide=wide)
        return self._moving(first, count, SECTOR * (self._multiple if multiple else 1), to_host=to_host, dma=dma)

    def _moving(
        self, first: int, count: int, block: int, *, to_host: bool, dma: bool, through: bool = False
    ) -> Transfer:
        if not to_host and self.backend.read_only:
            raise Aborted

        def move(offset: int, views: Sequence[memoryview]) -> None:
            try:
                if to_host:
                    self.backend.preadv(first * SECTOR + offset, views)
                else:
                    self.backend.pwritev(first * SECTOR + offset, views)
            except BlockError as error:
                raise Aborted(ERROR_UNCORRECTABLE if to_host else ERROR_ABORT) from error

        def end() -> None:
            if not to_host and (through or not self._write_cache):
                self._flush()
            self.done()

        return Transfer(count * SECTOR, to_host, block, move, end, dma)

    def _flush(self) -> None:
        try:
            self.backend.flush()
        except BlockError as error:
            raise Aborted from error

    def identify(self) -> bytes:
        """The 512 bytes of IDENTIFY DEVICE."""
        words = [0] * 256

        def put(word: int, data: bytes) -> None:
            words[word : word + len(data) // 2] = struct.unpack(f"<{len(data) // 2}H", data)

        short = min(self._sectors, MOST_LBA28 - 1)
        words[0] = 0x0040  # a fixed disk
        words[1], words[3], words[6] = self._cylinders, HEADS, SECTORS_PER_TRACK
        put(10, text(self._serial, 20))
        put(23, text("1.0", 8))
        put(27, text(self._model, 40))
        words[47] = 0x8000 | MOST_MULTIPLE
        words[48] = 1
        words[49], words[50] = 0x0F00, 0x4000  # LBA, DMA, IORDY
        words[53] = 7
        current = min(self._sectors // (self._heads * self._track), 0xFFFF)
        words[54], words[55], words[56] = current, self._heads, self._track
        put(57, struct.pack("<I", min(current * self._heads * self._track, 0xFFFF_FFFF)))
        words[59] = 0x100 | self._multiple
        put(60, struct.pack("<I", short))
        words[63] = 7 | (1 << (self._mode & 7) + 8 if self._mode >> 3 == 4 else 0)
        words[64] = 3
        words[65] = words[66] = words[67] = words[68] = 120
        words[80], words[81] = 0xF0, 0x16
        words[82], words[83], words[84] = 0x4021, 0x7400, 0x4000  # SMART, write cache, NOP; FLUSH, FLUSH EXT, LBA48
        words[85] = 0x4000 | int(self._smart) | (0x20 if self._write_cache else 0)
        words[86], words[87] = 0x3400, 0x4000
        words[88] = 0x3F | (1 << (self._mode & 7) + 8 if self._mode >> 3 == 8 else 0)
        words[93] = 0x6001
        put(100, struct.pack("<Q", self._sectors))
        if not self.backend.read_only:
            words[105], words[169] = MOST_TRIM_BLOCKS, 1
        if self._sata:
            words[75], words[76] = QUEUE_DEPTH - 1, 0x0102  # the queue; 1.5 Gbit/s
            words[84] |= 0x20  # logs
            words[87] |= 0x20
            words[93] = 0  # of the parallel cable
        return struct.pack("<256H", *words)
