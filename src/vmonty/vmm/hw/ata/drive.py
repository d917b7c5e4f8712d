"""What every drive on an ATA bus is: a task file, and commands that end at once or with a transfer of data.

Source: ATA/ATAPI-7, volume 1, "Status register", "Error register"; volume 2, "Transport protocols".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SECTOR = 512

STATUS_BUSY, STATUS_READY, STATUS_SEEK, STATUS_DATA, STATUS_ERROR = 0x80, 0x40, 0x10, 0x08, 0x01
ERROR_ABORT, ERROR_NOT_FOUND, ERROR_UNCORRECTABLE = 0x04, 0x10, 0x40
DEVICE_LBA, DEVICE_1, DEVICE_HEAD = 0x40, 0x10, 0x0F
DIAGNOSTIC_PASSED = 0x01
# Interrupt reason, in the sector count register, of packet commands.
REASON_COMMAND, REASON_TO_HOST = 1, 2

EXECUTE_DIAGNOSTIC, DEVICE_RESET = 0x90, 0x08


class Aborted(Exception):
    """The command ends with an error: the bits of the error register."""

    def __init__(self, error: int = ERROR_ABORT) -> None:
        super().__init__(f"ATA error {error:#04x}")
        self.error = error


@dataclass
class TaskFile:
    """The registers. Each of the five in the middle is two bytes deep: the older byte is bits 8 to 15."""

    feature: int = 0
    count: int = 0
    lba_low: int = 0
    lba_mid: int = 0
    lba_high: int = 0
    device: int = 0
    status: int = 0
    error: int = 0

    def set_lba48(self, address: int) -> None:
        """A 48-bit address as the result of a command."""
        self.lba_low = address & 0xFF | address >> 16 & 0xFF00
        self.lba_mid = address >> 8 & 0xFF | address >> 24 & 0xFF00
        self.lba_high = address >> 16 & 0xFF | address >> 32 & 0xFF00

    @property
    def lba48(self) -> int:
        """The 48-bit address."""
        low, mid, high = self.lba_low, self.lba_mid, self.lba_high
        return low & 0xFF | (mid & 0xFF) << 8 | (high & 0xFF) << 16 | low >> 8 << 24 | mid >> 8 << 32 | high >> 8 << 40


@dataclass
class Transfer:
    """The data of one command: *size* bytes, in blocks of *block* when the host reads or writes a port.

    *move* fills views (``to_host``) or takes what is in them, at an offset; it raises Aborted. *end* is called when all
    has been moved. ``packet`` transfers tell the size of each block in the byte count register.
    """

    size: int
    to_host: bool
    block: int
    move: Callable[[int, Sequence[memoryview]], None]
    end: Callable[[], None]
    dma: bool = False
    packet: bool = False


class Drive(ABC):
    """One drive. A controller fills ``registers``, calls ``execute``, and moves the data of the transfer it returns.

    Every call comes under the controller's lock.
    """

    signature: tuple[int, int]
    """What the middle and high address registers say after a reset."""

    def __init__(self) -> None:
        self.registers = TaskFile()
        self.reset()

    @property
    def ready_status(self) -> int:
        """The status of a drive that waits for a command."""
        return STATUS_READY | STATUS_SEEK

    def reset(self) -> None:
        """Soft reset, and power on: the signature stands in the registers."""
        self._sign()
        self.registers.status = self.ready_status
        self.registers.error = DIAGNOSTIC_PASSED

    def _sign(self) -> None:
        registers = self.registers
        registers.count = registers.lba_low = 1
        registers.lba_mid, registers.lba_high = self.signature
        registers.device &= DEVICE_1

    @abstractmethod
    def execute(self, command: int) -> Transfer | None:
        """Carry *command* out; the transfer that belongs to it, None when it is done. Raises Aborted."""

    def done(self) -> None:
        """The last command ended well."""
        self.registers.status, self.registers.error = self.ready_status, 0

    def failed(self, error: int) -> None:
        """The last command ended with *error*."""
        self.registers.status, self.registers.error = self.ready_status | STATUS_ERROR, error

    def answer(self, data: bytes, *, dma: bool = False) -> Transfer:
        """A transfer of *data* to the host in one block."""

        def move(offset: int, views: Sequence[memoryview]) -> None:
            for view in views:
                view[:] = data[offset : offset + len(view)]
                offset += len(view)

        return Transfer(len(data), True, len(data), move, self.done, dma)


def text(value: str, size: int) -> bytes:
    """An ASCII field of IDENTIFY DEVICE: padded with blanks, the bytes of each word swapped."""
    raw = value.encode("ascii", "replace")[:size].ljust(size)
    return bytes(raw[at ^ 1] for at in range(size))
