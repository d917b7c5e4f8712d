"""The first MiB as loaders use it, and the memory map that they hand over."""

from __future__ import annotations

from vmonty.vmm.memory import GuestMemory

# 0x1000: the tables of entry.py
INFORMATION = 0x1_0000  # the zero page, or what another protocol has in its place
COMMAND_LINE = 0x2_0000
COMMAND_LINE_ROOM = 0x1_0000
INFORMATION_END = COMMAND_LINE + COMMAND_LINE_ROOM
LOW_RAM_END = 0x9_FC00  # the extended BIOS data area of a PC starts here
ACPI_TABLES = 0xE_0000
HIGH_MEMORY = 0x10_0000
PAGE = 4096

E820_RAM, E820_RESERVED = 1, 2


def e820(memory: GuestMemory) -> list[tuple[int, int, int]]:
    """The memory map: (base, size, type)."""
    entries = [
        (0, LOW_RAM_END, E820_RAM),
        (LOW_RAM_END, 0xA_0000 - LOW_RAM_END, E820_RESERVED),
        (ACPI_TABLES, HIGH_MEMORY - ACPI_TABLES, E820_RESERVED),
        (HIGH_MEMORY, memory.low_end - HIGH_MEMORY, E820_RAM),
    ]
    entries += [(block.base, block.size, E820_RAM) for block in memory.blocks[1:]]
    return entries
