"""Frame information structures: task files and their results as they travel on Serial ATA.

Source: Serial ATA 3.x, "FIS types"; AHCI 1.3.1, "Received FIS Structure", "Command Table".
"""

from __future__ import annotations

import struct

from vmonty.vmm.hw.ata.drive import DEVICE_1, TaskFile

REGISTER_TO_DEVICE, REGISTER_TO_HOST, DMA_SETUP, PIO_SETUP, SET_DEVICE_BITS = 0x27, 0x34, 0x41, 0x5F, 0xA1
# Byte 1: what came is a command; the direction; an interrupt is wanted.
COMMAND, TO_HOST, INTERRUPT = 0x80, 0x20, 0x40
COMMAND_SIZE = 20
CONTROL_RESET = 0x04
# Bits of the status that Set Device Bits leaves alone: BSY and DRQ.
STATUS_LEFT = 0x88


def load(fis: bytes, registers: TaskFile) -> None:
    """Put a Register FIS, 20 bytes, into *registers*."""
    registers.feature = fis[11] << 8 | fis[3]
    registers.lba_low = fis[8] << 8 | fis[4]
    registers.lba_mid = fis[9] << 8 | fis[5]
    registers.lba_high = fis[10] << 8 | fis[6]
    registers.count = fis[13] << 8 | fis[12]
    registers.device = fis[7] & ~DEVICE_1


def signature(registers: TaskFile) -> int:
    """What a port's signature register shows of a drive that was reset."""
    values = registers.count, registers.lba_low, registers.lba_mid, registers.lba_high
    return int.from_bytes(bytes(value & 0xFF for value in values), "little")


def _result(kind: int, flags: int, registers: TaskFile, tail: bytes) -> bytes:
    low, mid, high, count = registers.lba_low, registers.lba_mid, registers.lba_high, registers.count
    return (
        bytes((kind, flags, registers.status, registers.error))
        + bytes((low & 0xFF, mid & 0xFF, high & 0xFF, registers.device))
        + bytes((low >> 8 & 0xFF, mid >> 8 & 0xFF, high >> 8 & 0xFF, 0))
        + bytes((count & 0xFF, count >> 8 & 0xFF))
        + tail
    )


def register_to_host(registers: TaskFile, *, interrupt: bool) -> bytes:
    """The end of a command, and the signature after a reset."""
    return _result(REGISTER_TO_HOST, INTERRUPT if interrupt else 0, registers, bytes(6))


def pio_setup(registers: TaskFile, size: int, end_status: int, *, to_host: bool) -> bytes:
    """*size* bytes follow by PIO, and behind them *end_status*."""
    flags = INTERRUPT | (TO_HOST if to_host else 0)
    return _result(PIO_SETUP, flags, registers, bytes((0, end_status)) + struct.pack("<HH", size & 0xFFFF, 0))


def dma_setup(tag: int, size: int, *, to_host: bool) -> bytes:
    """*size* bytes of the queued command *tag* follow."""
    return struct.pack("<BBHQIIII", DMA_SETUP, TO_HOST if to_host else 0, 0, tag, 0, 0, size, 0)


def set_device_bits(status: int, error: int, finished: int) -> bytes:
    """Queued commands ended: those whose bits are set in *finished*."""
    return struct.pack("<BBBBI", SET_DEVICE_BITS, INTERRUPT, status & ~STATUS_LEFT, error, finished)
