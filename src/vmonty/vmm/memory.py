"""Guest-physical memory: RAM below and above the hole for devices under 4 GiB, and below and above a PC's ISA hole."""

from __future__ import annotations

import os
from typing import NamedTuple

from vmonty.base.errors import GuestMemoryError, KvmError, UsageError
from vmonty.base.ram import PAGE_SIZE, Ram
from vmonty.kvm.api import Provider, Vm
from vmonty.kvm.uapi.flags import KVM_MEM_READONLY

# Where a pc's RAM below 4 GiB ends at the latest: PCI, the I/O APIC and local APICs lie above.
LOW_RAM_LIMIT = 0xC000_0000
HIGH_RAM_BASE = 0x1_0000_0000
# The screen's memory, option ROMs and the BIOS of a PC: see shadow.py.
ISA_HOLE, ISA_HOLE_END = 0xA_0000, 0x10_0000
# Memory slots of KVM: below this one the RAM's.
FIRST_FREE_SLOT = 8


def host_memory() -> int:
    """The host's memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Block(NamedTuple):
    """*size* bytes of RAM at guest-physical *base*, which are those from *offset* of the machine's Ram."""

    base: int
    size: int
    offset: int


def check_size(size: int) -> None:
    """Raise UsageError for a guest memory of *size* bytes that no machine here can have."""
    if size <= 0 or size % PAGE_SIZE:
        raise UsageError(f"memory of {size} bytes: it must be a positive multiple of 4 KiB, such as 512M")
    if size > host_memory():
        raise UsageError(
            f"memory of {size >> 20} MiB is more than this host has ({host_memory() >> 20} MiB); give less"
        )


class DeviceMemory:
    """A memory slot of *vm* for what a device has: *number* is the slot's."""

    def __init__(self, vm: Vm, number: int) -> None:
        self._vm = vm
        self._number = number
        self._shown = False

    def place(
        self, ram: Ram, address: int | None, writable: bool = True, start: int = 0, size: int | None = None
    ) -> None:
        """Let the guest find *ram* at *address*, None for nowhere; or *size* bytes of it from *start* on."""
        if self._shown:
            self._vm.set_user_memory_region(self._number, 0, None)
            self._shown = False
        if address is not None:
            flags = 0 if writable else KVM_MEM_READONLY
            try:
                self._vm.set_user_memory_region(self._number, address, ram, start, size or ram.size, flags)
            except KvmError:
                # Over RAM, where a guest may put it: the RAM stays.
                return
            self._shown = True


class GuestMemory:
    """The RAM of a machine, addressed by guest-physical address.

    At most *low_limit* bytes lie below 4 GiB, the rest above. Raises UsageError for a size of 0, one that is no
    multiple of 4 KiB, or more than the host has.
    """

    def __init__(self, size: int, low_limit: int = LOW_RAM_LIMIT) -> None:
        check_size(size)
        self.size = size
        self.ram = Ram(size)
        self._provider: Provider | None = None
        low = min(size, low_limit)
        self.blocks = [Block(0, low, 0)]
        if size > low:
            self.blocks.append(Block(HIGH_RAM_BASE, size - low, low))

    @property
    def low_end(self) -> int:
        """The first address behind the RAM below 4 GiB."""
        return self.blocks[0].size

    def attach(self, vm: Vm, *, isa_hole: bool = False) -> None:
        """Give each block its memory slot in *vm*; with *isa_hole* none from 0xA0000 to 0xFFFFF."""
        self._provider = vm.provider
        blocks = self.blocks
        if isa_hole:
            low = blocks[0]
            below = Block(0, min(low.size, ISA_HOLE), 0)
            above = Block(ISA_HOLE_END, low.size - ISA_HOLE_END, ISA_HOLE_END)
            blocks = [block for block in (below, above, *blocks[1:]) if block.size > 0]
        for slot, block in enumerate(blocks):
            vm.set_user_memory_region(slot, block.base, self.ram, block.offset, block.size)

    def _locate(self, address: int, size: int) -> int:
        for block in self.blocks:
            if block.base <= address and address + size <= block.base + block.size:
                return address - block.base + block.offset
        raise GuestMemoryError(address, size, f"the guest's {self.size >> 20} MiB of RAM")

    def read(self, address: int, size: int) -> bytes:
        """A copy of guest RAM. Raises GuestMemoryError outside of it."""
        return self.ram.read(self._locate(address, size), size)

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Copy *data* into guest RAM. Raises GuestMemoryError outside of it."""
        offset = self._locate(address, len(data))
        self.ram.write(offset, data)
        self._tell(offset, len(data))

    def written(self, address: int, size: int) -> None:
        """Say that RAM was written through a view: code may lie there. Call it before the guest is told of the data."""
        self._tell(self._locate(address, size), size)

    def discard(self, address: int, size: int) -> None:
        """Give whole pages back to the host: they read as zeroes. Raises GuestMemoryError outside of RAM."""
        offset = self._locate(address, size)
        self.ram.discard(offset, size)
        self._tell(offset, size)

    def _tell(self, offset: int, size: int) -> None:
        if self._provider is not None:
            self._provider.memory_written(self.ram.address + offset, size)

    def view(self, address: int, size: int) -> memoryview:
        """A writable zero-copy view of guest RAM; see written(). Raises GuestMemoryError outside of it."""
        return self.ram.view(self._locate(address, size), size)
