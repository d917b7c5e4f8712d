"""The firmware configuration device: items that the board gives to firmware and to Linux, by number or by name.

Source: QEMU's documentation, "QEMU Firmware Configuration (fw_cfg) Device".
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from typing import Protocol

from vmonty.base.errors import GuestMemoryError

# Offsets: the selector (16 bits, little-endian), the data port (a byte), the DMA address (64 bits, big-endian).
SELECTOR, DATA, DMA = 0, 1, 4
SIZE = 12

SIGNATURE, INTERFACE, UUID, RAM_SIZE, NO_GRAPHICS, CPU_COUNT = range(6)
BOOT_MENU, MAX_CPUS, FILE_DIRECTORY = 0x0E, 0x0F, 0x19
FIRST_FILE, LAST_FILE = 0x20, 0x3FFF
INTERFACE_TRADITIONAL, INTERFACE_DMA = 1, 2
NAME_SIZE = 56
INVALID = 0xFFFF

DMA_ERROR, DMA_READ, DMA_SKIP, DMA_SELECT, DMA_WRITE = 1, 2, 4, 8, 16
DMA_SIGNATURE = b"QEMU CFG"
CHUNK = 1 << 16


class Memory(Protocol):
    """Guest RAM."""

    def read(self, address: int, size: int) -> bytes:
        """Raises GuestMemoryError outside of RAM."""
        ...

    def write(self, address: int, data: bytes) -> None:
        """Raises GuestMemoryError outside of RAM."""
        ...

    def view(self, address: int, size: int) -> memoryview:
        """Raises GuestMemoryError outside of RAM."""
        ...


class FwCfg:
    """The device. Items are added while the machine is built, read-only for the guest; files show in the directory."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._items: dict[int, bytes] = {
            SIGNATURE: b"QEMU",
            INTERFACE: struct.pack("<I", INTERFACE_TRADITIONAL | INTERFACE_DMA),
        }
        self._files: dict[str, bytes] = {}
        self._late: Callable[[], dict[str, bytes]] | None = None
        self._late_names: frozenset[str] = frozenset()
        self._selected = INVALID
        self._offset = 0
        self._address = 0

    def add(self, key: int, data: bytes) -> None:
        """An item with a fixed number."""
        self._items[key] = data

    def add_file(self, name: str, data: bytes) -> None:
        """An item with a name of up to 55 characters, such as ``opt/org.example/x``; it replaces an older one."""
        if not 0 < len(name.encode()) < NAME_SIZE:
            raise ValueError(f"the fw_cfg file name {name!r} is not of 1 to {NAME_SIZE - 1} characters")
        if len(self._files) > LAST_FILE - FIRST_FILE:
            raise ValueError("fw_cfg is full")
        self._files[name] = data
        entries = [struct.pack(">I", len(self._files))]
        # By name, as firmware that searches by halves expects; numbers follow the order.
        for key, (label, contents) in enumerate(sorted(self._files.items()), FIRST_FILE):
            self._items[key] = contents
            entries.append(struct.pack(f">IHH{NAME_SIZE}s", len(contents), key, 0, label.encode()))
        self._items[FILE_DIRECTORY] = b"".join(entries)

    def add_late_files(self, make: Callable[[], dict[str, bytes]]) -> None:
        """Files that tell what firmware itself has set up: *make* is called now for their sizes, and again, on the
        vCPU's thread, whenever one of them is selected. It must return the same names and sizes.
        """
        files = make()
        for name, data in files.items():
            self.add_file(name, data)
        self._late, self._late_names = make, frozenset(files)

    def _make_late(self, key: int) -> None:
        names = sorted(self._files)
        if (
            self._late is None
            or not 0 <= key - FIRST_FILE < len(names)
            or names[key - FIRST_FILE] not in self._late_names
        ):
            return
        for name, data in self._late().items():
            if len(data) != len(self._files[name]):
                raise ValueError(f"the fw_cfg file {name} has {len(data)} bytes, and said {len(self._files[name])}")
            self._files[name] = self._items[FIRST_FILE + names.index(name)] = data

    # ---- ports --------------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """The next byte of the item, zero behind its end; the DMA register shows that it is there."""
        if offset >= DMA:
            return int.from_bytes(DMA_SIGNATURE[offset - DMA :][:size], "little")
        if offset != DATA:
            return 0
        with self._lock:
            return self._take(1)[0]

    def write(self, offset: int, size: int, value: int) -> None:
        """Select an item, or give the address of a DMA request; the low half of the address starts it."""
        data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        with self._lock:
            if offset == SELECTOR:
                self._select(value & 0xFFFF)
            elif offset == DMA and size == 8:
                self._transfer(int.from_bytes(data, "big"))
            elif offset == DMA and size == 4:
                self._address = int.from_bytes(data, "big") << 32
            elif offset == DMA + 4 and size == 4:
                address, self._address = self._address | int.from_bytes(data, "big"), 0
                self._transfer(address)

    def _select(self, key: int) -> None:
        self._selected, self._offset = key & 0xBFFF, 0  # bit 14 asked for writing in old machines
        self._make_late(self._selected)

    def _take(self, size: int) -> bytes:
        data = self._items.get(self._selected, b"")[self._offset : self._offset + size]
        self._offset += size
        return data.ljust(size, b"\0")

    def _transfer(self, address: int) -> None:
        """One request, in guest memory: control, length, address, all big-endian; control tells the result."""
        try:
            control, length, target = struct.unpack(">IIQ", self._memory.read(address, 16))
        except GuestMemoryError:
            return  # nobody could be told
        failed = False
        if control & DMA_SELECT:
            self._select(control >> 16)
        if control & DMA_READ:
            failed = not self._copy(target, length)
        elif control & DMA_SKIP:
            self._offset += length
        elif control & DMA_WRITE:
            failed = True  # no item can be written
        self._memory.write(address, struct.pack(">I", DMA_ERROR if failed else 0))

    def _copy(self, target: int, length: int) -> bool:
        try:
            self._memory.view(target, length).release()  # all of it or nothing
        except GuestMemoryError:
            return False
        for at in range(0, length, CHUNK):
            self._memory.write(target + at, self._take(min(CHUNK, length - at)))
        return True
