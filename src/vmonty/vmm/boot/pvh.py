"""An ELF kernel by its PVH entry: 32-bit, with a structure that tells what the machine has.

Source: xen.git, xen/include/public/arch-x86/hvm/start_info.h; docs/misc/pvh.pandoc.
"""

from __future__ import annotations

import struct

from vmonty.base.errors import BootImageError, GuestMemoryError
from vmonty.vmm.boot import acpi, elf
from vmonty.vmm.boot.entry import Entry, Mode
from vmonty.vmm.boot.lowmem import (
    ACPI_TABLES,
    COMMAND_LINE,
    COMMAND_LINE_ROOM,
    HIGH_MEMORY,
    INFORMATION,
    INFORMATION_END,
    PAGE,
    e820,
)
from vmonty.vmm.memory import GuestMemory

PHYS32_ENTRY = 18  # XEN_ELFNOTE_PHYS32_ENTRY
MAGIC = 0x336E_C578

_START_INFO = struct.Struct("<IIIIQQQQII")
_MODULE = struct.Struct("<QQQQ")
_MEMORY = struct.Struct("<QQII")


def entry_of(kernel: elf.Elf) -> int | None:
    """The address in the kernel's PVH note, None when it has none."""
    for owner, kind, contents in kernel.notes:
        if owner == b"Xen\0" and kind == PHYS32_ENTRY and len(contents) in (4, 8):
            return int.from_bytes(contents, "little")
    return None


def place(kernel: elf.Elf, initrd: bytes | None, command_line: str, low_end: int) -> int:
    """The address for the initrd, 0 when there is none. Raises BootImageError when something does not fit."""
    entry = entry_of(kernel)
    if entry is None or entry > 0xFFFF_FFFF or not kernel.holds(entry):
        raise BootImageError("the kernel's PVH entry is not inside of it")
    if kernel.start < INFORMATION_END or kernel.end > low_end:
        raise BootImageError(
            f"the kernel takes {kernel.start:#x} to {kernel.end:#x}; it may load from {INFORMATION_END:#x} on, and"
            f" the guest has {low_end >> 20} MiB: give it more memory"
        )
    if len(command_line.encode(errors="surrogateescape")) >= COMMAND_LINE_ROOM:
        raise BootImageError(f"the kernel command line is longer than {COMMAND_LINE_ROOM - 1} bytes")
    start = (low_end - len(initrd or b"")) & -PAGE
    if initrd and start < max(kernel.end, HIGH_MEMORY):
        raise BootImageError(
            f"the initrd of {len(initrd) >> 20} MiB does not fit beside the kernel; give the guest more memory"
        )
    return start if initrd else 0


def load(memory: GuestMemory, image: bytes, initrd: bytes | None, command_line: str, platform: acpi.Platform) -> Entry:
    """Put everything into *memory*. Raises BootImageError as place() does."""
    kernel = elf.parse(image)
    initrd_at = place(kernel, initrd, command_line, memory.low_end)
    try:
        kernel.load(memory, image)
    except GuestMemoryError as error:
        raise BootImageError(f"the kernel does not fit into the guest's memory: {error}") from error
    if initrd:
        memory.write(initrd_at, initrd)
    memory.write(COMMAND_LINE, command_line.encode(errors="surrogateescape") + b"\0")
    tables, rsdp = acpi.build(platform, ACPI_TABLES)
    memory.write(ACPI_TABLES, tables)
    ranges = e820(memory)
    modules_at = INFORMATION + _START_INFO.size
    ranges_at = modules_at + _MODULE.size
    data = _START_INFO.pack(
        MAGIC, 1, 0, int(bool(initrd)), modules_at if initrd else 0, COMMAND_LINE, rsdp, ranges_at, len(ranges), 0
    )
    data += _MODULE.pack(initrd_at, len(initrd or b""), 0, 0)
    data += b"".join(_MEMORY.pack(base, size, kind, 0) for base, size, kind in ranges)
    memory.write(INFORMATION, data)
    entry = entry_of(kernel)
    assert entry is not None
    made = Entry(Mode.PROTECTED, entry, {"rbx": INFORMATION})
    made.write_tables(memory)
    return made
