"""Multiboot 1: ELF kernels, and any others whose header says where they go.

Source: Multiboot Specification 0.6.96, "OS image format", "Machine state", "Boot information format".
"""

from __future__ import annotations

import struct
from typing import NamedTuple

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
    LOW_RAM_END,
    PAGE,
    e820,
)
from vmonty.vmm.memory import GuestMemory

HEADER_MAGIC, LOADER_MAGIC = 0x1BAD_B002, 0x2BAD_B002
_SEARCHED = 8192
_ALIGN_MODULES, _MEMORY_INFO, _VIDEO, _ADDRESSES = 1, 2, 4, 1 << 16
_REQUIRED = 0xFFFF  # of the flags: a loader that does not know one must refuse
_HAS_MEMORY, _HAS_COMMAND_LINE, _HAS_MODULES, _HAS_MAP, _HAS_NAME = 1, 4, 8, 64, 512
_NAME = b"vmonty\0"


class Image(NamedTuple):
    """A kernel and the segments that it loads; *entry* is in 32-bit mode without paging."""

    kernel: elf.Elf
    entry: int


def is_multiboot(image: bytes) -> bool:
    """Whether *image* has a multiboot header."""
    return _header_at(image) is not None


def _header_at(image: bytes) -> int | None:
    for at in range(0, min(len(image), _SEARCHED) - 11, 4):
        magic, flags, checksum = struct.unpack_from("<III", image, at)
        if magic == HEADER_MAGIC and magic + flags + checksum & 0xFFFF_FFFF == 0:
            return at
    return None


def parse(image: bytes) -> Image:
    """Read the header. Raises BootImageError for one that cannot be honoured."""
    at = _header_at(image)
    if at is None:
        raise BootImageError("the kernel has no multiboot header")
    flags = struct.unpack_from("<I", image, at + 4)[0]
    unknown = flags & _REQUIRED & ~(_ALIGN_MODULES | _MEMORY_INFO | _VIDEO)
    if unknown:
        raise BootImageError(f"the kernel's multiboot header asks for what is not known here (flags {unknown:#x})")
    if flags & _VIDEO and len(image) >= at + 36 and struct.unpack_from("<I", image, at + 32)[0] == 0:
        raise BootImageError("the kernel's multiboot header asks for a graphics mode, which only firmware can set")
    if not flags & _ADDRESSES:
        kernel = elf.parse(image)
        if kernel.entry > 0xFFFF_FFFF:
            raise BootImageError("the kernel's multiboot entry is above 4 GiB")
        return Image(kernel, kernel.entry)
    if len(image) < at + 32:
        raise BootImageError("the kernel's multiboot header is cut off")
    header, load, load_end, bss_end, entry = struct.unpack_from("<5I", image, at + 12)
    offset = at - (header - load)
    size = (load_end - load) if load_end else len(image) - offset
    if header < load or offset < 0 or size <= 0 or offset + size > len(image):
        raise BootImageError("the addresses in the kernel's multiboot header cannot be")
    whole = max(size, bss_end - load) if bss_end else size
    segment = elf.Segment(load, load, offset, size, whole)
    return Image(elf.Elf(32, entry, (segment,), ()), entry)


def place(image: Image, initrd: bytes | None, command_line: str, low_end: int) -> int:
    """The address of the module. Raises BootImageError when something does not fit."""
    kernel = image.kernel
    if not kernel.holds(image.entry):
        raise BootImageError(f"the kernel's multiboot entry {image.entry:#x} is not inside of it")
    for segment in kernel.segments:
        first, end = segment.physical, segment.physical + segment.memory_size
        if first < INFORMATION_END or (first < HIGH_MEMORY and end > LOW_RAM_END) or end > low_end:
            raise BootImageError(
                f"the kernel loads at {first:#x} to {end:#x}; RAM is free from {INFORMATION_END:#x} to"
                f" {LOW_RAM_END:#x} and from {HIGH_MEMORY:#x} to {low_end:#x}"
            )
    if len(command_line.encode(errors="surrogateescape")) >= COMMAND_LINE_ROOM:
        raise BootImageError(f"the kernel command line is longer than {COMMAND_LINE_ROOM - 1} bytes")
    module = -(-max(kernel.end, HIGH_MEMORY) // PAGE) * PAGE
    if initrd and module + len(initrd) > low_end:
        raise BootImageError(
            f"the module of {len(initrd) >> 20} MiB does not fit behind the kernel; give the guest more memory"
        )
    return module


def load(memory: GuestMemory, data: bytes, initrd: bytes | None, command_line: str, platform: acpi.Platform) -> Entry:
    """Put everything into *memory*; an initrd is the first module. Raises BootImageError as parse() and place() do."""
    image = parse(data)
    module = place(image, initrd, command_line, memory.low_end)
    try:
        image.kernel.load(memory, data)
    except GuestMemoryError as error:
        raise BootImageError(f"the kernel does not fit into the guest's memory: {error}") from error
    memory.write(COMMAND_LINE, command_line.encode(errors="surrogateescape") + b"\0")
    # The ACPI tables are found as on a PC: the RSDP lies in the BIOS area.
    memory.write(ACPI_TABLES, acpi.build(platform, ACPI_TABLES)[0])
    modules_at = INFORMATION + 0x100
    ranges_at = modules_at + 0x20
    flags = _HAS_MEMORY | _HAS_COMMAND_LINE | _HAS_MAP | _HAS_NAME
    if initrd:
        flags |= _HAS_MODULES
        memory.write(module, initrd)
        memory.write(modules_at, struct.pack("<IIII", module, module + len(initrd), COMMAND_LINE, 0))
    ranges = b"".join(struct.pack("<IQQI", 20, *item) for item in e820(memory))
    name_at = ranges_at + len(ranges)
    memory.write(ranges_at, ranges + _NAME)
    upper = min(memory.low_end - HIGH_MEMORY, 0xFFFF_FFFF) >> 10
    information = struct.pack(
        "<IIIIIII", flags, LOW_RAM_END >> 10, upper, 0, COMMAND_LINE, int(bool(initrd)), modules_at
    )
    information = information.ljust(44, b"\0") + struct.pack("<II", len(ranges), ranges_at)
    information = information.ljust(64, b"\0") + struct.pack("<I", name_at)
    memory.write(INFORMATION, information.ljust(0x100, b"\0"))
    entry = Entry(Mode.PROTECTED, image.entry, {"rax": LOADER_MAGIC, "rbx": INFORMATION})
    entry.write_tables(memory)
    return entry
