"""MSI-X: the table, the pending bit array, and masking. Source: PCI Local Bus Specification 3.0, "MSI-X"."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable

CAPABILITY_ID = 0x11
CAPABILITY_SIZE = 12
MOST_VECTORS = 2048
ENTRY_SIZE = 16
CONTROL_ENABLE, CONTROL_FUNCTION_MASK = 1 << 15, 1 << 14
VECTOR_MASKED = 1
# Of each entry's four words, the bits that can be written: messages are aligned to 4 bytes.
WORD_MASKS = (0xFFFF_FFFC, 0xFFFF_FFFF, 0xFFFF_FFFF, VECTOR_MASKED)


class Msix:
    """*vectors* messages that a function can send. ``notify`` is for the device, from any thread.

    ``table`` and ``pending`` (the pending bits) are two bus devices, which stand in one of the function's BARs.
    *send* is called with address and data of each message.
    """

    def __init__(self, vectors: int, send: Callable[[int, int], None]) -> None:
        if not 1 <= vectors <= MOST_VECTORS:
            raise ValueError(f"{vectors} MSI-X vectors: there are 1 to {MOST_VECTORS}")
        self.vectors = vectors
        self._send = send
        self._lock = threading.Lock()
        self._table = [[0, 0, 0, VECTOR_MASKED] for _ in range(vectors)]
        self._pending = 0
        self._control = 0
        self.table = _Table(self)
        self.pending = _Pending(self)

    @property
    def enabled(self) -> bool:
        """Has the driver switched it on? Then INTx is not used."""
        return bool(self._control & CONTROL_ENABLE)

    @property
    def table_size(self) -> int:
        """Of the table, in bytes."""
        return self.vectors * ENTRY_SIZE

    @property
    def pending_size(self) -> int:
        """Of the pending bit array, in bytes."""
        return -(-self.vectors // 64) * 8

    def notify(self, vector: int) -> None:
        """Send the message of *vector*, or remember it while it is masked. Nothing while MSI-X is off."""
        with self._lock:
            if not self.enabled or not 0 <= vector < self.vectors:
                return
            self._pending |= 1 << vector
            ready = self._take([vector])
        self._deliver(ready)

    def message(self, vector: int) -> tuple[int, int] | None:
        """Address and data of *vector*; None while it is masked or MSI-X is off."""
        with self._lock:
            low, high, data, _ = self._table[vector]
            return None if self._masked(vector) else (high << 32 | low, data)

    def set_control(self, control: int) -> None:
        """The message control register was written."""
        with self._lock:
            self._control = control
            ready = self._take(range(self.vectors))
        self._deliver(ready)

    def _masked(self, vector: int) -> bool:
        off = not self.enabled or bool(self._control & CONTROL_FUNCTION_MASK)
        return off or bool(self._table[vector][3] & VECTOR_MASKED)

    def _take(self, vectors: range | list[int]) -> list[tuple[int, int]]:
        """The messages among *vectors* that are pending and not masked; they are pending no more."""
        ready = []
        if self._pending:
            for vector in vectors:
                if self._pending >> vector & 1 and not self._masked(vector):
                    self._pending &= ~(1 << vector)
                    low, high, data, _ = self._table[vector]
                    ready.append((high << 32 | low, data))
        return ready

    def _deliver(self, messages: list[tuple[int, int]]) -> None:
        for address, data in messages:
            self._send(address, data)

    def read_table(self, offset: int, size: int) -> int:
        """A guest's read of the table: aligned 4 or 8 bytes; anything else is undefined, and 0 here."""
        vector, word = divmod(offset, ENTRY_SIZE)
        if size not in (4, 8) or offset % size or vector >= self.vectors:
            return 0
        with self._lock:
            words = struct.pack("<4I", *self._table[vector])
        return int.from_bytes(words[word : word + size], "little")

    def write_table(self, offset: int, size: int, value: int) -> None:
        """A guest's write to the table; unmasking a vector sends what is pending."""
        vector, word = divmod(offset, ENTRY_SIZE)
        if size not in (4, 8) or offset % size or vector >= self.vectors:
            return
        with self._lock:
            for at in range(size // 4):
                index = word // 4 + at
                self._table[vector][index] = value >> 32 * at & WORD_MASKS[index]
            ready = self._take([vector])
        self._deliver(ready)

    def read_pending(self, offset: int, size: int) -> int:
        """A guest's read of the pending bits."""
        with self._lock:
            return self._pending >> 8 * offset


class _Table:
    def __init__(self, msix: Msix) -> None:
        self.read = msix.read_table
        self.write = msix.write_table


class _Pending:
    def __init__(self, msix: Msix) -> None:
        self.read = msix.read_pending

    def write(self, offset: int, size: int, value: int) -> None:
        """Read-only."""
