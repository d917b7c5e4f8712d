"""Linux's bzImage by its 64-bit entry.

Source: Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header", "64-bit Boot Protocol"; zero-page.rst.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vmonty.base.errors import BootImageError
from vmonty.kvm.api import Vcpu
from vmonty.vmm.boot import acpi, longmode
from vmonty.vmm.memory import GuestMemory

# Where things go in low memory.
TABLES = 0x1000
ZERO_PAGE = 0x1_0000
COMMAND_LINE = 0x2_0000
COMMAND_LINE_ROOM = 0x1_0000
LOW_RAM_END = 0x9_FC00  # the extended BIOS data area of a PC starts here
ACPI_TABLES = 0xE_0000
HIGH_MEMORY = 0x10_0000
PAGE = 4096

HEADER = 0x1F1
XLOADFLAGS_64, LOADED_HIGH = 1, 1
ENTRY_64 = 0x200
E820_RAM, E820_RESERVED = 1, 2


@dataclass(frozen=True)
class SetupHeader:
    """The fields of the setup header that a loader needs; addresses and sizes in bytes."""

    raw: bytes
    setup_size: int
    version: int
    pref_address: int
    alignment: int
    init_size: int
    cmdline_size: int
    initrd_addr_max: int
    relocatable: bool


def parse(image: bytes) -> SetupHeader:
    """Read the header of a bzImage. Raises BootImageError for anything that cannot be entered in 64-bit mode."""
    if len(image) < 0x270 or image[0x202:0x206] != b"HdrS":
        raise BootImageError("the kernel is no Linux bzImage (no HdrS signature); give a distribution's vmlinuz file")
    version, xloadflags = struct.unpack_from("<H", image, 0x206)[0], struct.unpack_from("<H", image, 0x236)[0]
    if version < 0x20C or not xloadflags & XLOADFLAGS_64:
        raise BootImageError(
            f"the kernel has no 64-bit entry (boot protocol {version >> 8}.{version & 0xFF:02});"
            " use a 64-bit kernel, 3.8 or newer"
        )
    if not image[0x211] & LOADED_HIGH:
        raise BootImageError("the kernel is a zImage, which loads low; use a bzImage")
    setup_size = ((image[0x1F1] or 4) + 1) * 512
    if len(image) < setup_size + ENTRY_64 + 1:
        raise BootImageError(f"the kernel is truncated: {len(image)} bytes, its setup alone takes {setup_size}")
    syssize = struct.unpack_from("<I", image, 0x1F4)[0] * 16
    if len(image) < setup_size + syssize - 15:
        raise BootImageError(f"the kernel is truncated: {len(image)} of {setup_size + syssize} bytes")
    alignment = struct.unpack_from("<I", image, 0x230)[0]
    if alignment == 0 or alignment & (alignment - 1):
        raise BootImageError(f"the kernel's header asks for an alignment of {alignment:#x}, which is no power of two")
    return SetupHeader(
        raw=image[HEADER : min(0x202 + image[0x201], 0x290)],
        setup_size=setup_size,
        version=version,
        pref_address=struct.unpack_from("<Q", image, 0x258)[0],
        alignment=alignment,
        init_size=struct.unpack_from("<I", image, 0x260)[0],
        cmdline_size=struct.unpack_from("<I", image, 0x238)[0],
        initrd_addr_max=struct.unpack_from("<I", image, 0x22C)[0],
        relocatable=bool(image[0x234]),
    )


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


@dataclass(frozen=True)
class Placement:
    """Where a kernel and its initrd go, in bytes; *initrd* is 0 when there is none."""

    header: SetupHeader
    kernel: int
    initrd: int
    command_line: bytes


def place(kernel: bytes, initrd: bytes | None, command_line: str, low_end: int) -> Placement:
    """Find room in the RAM that ends at *low_end*, below 4 GiB.

    Raises BootImageError when the kernel is none, or when something does not fit.
    """
    header = parse(kernel)
    # What came from a command line may hold bytes that are no UTF-8: they go through as they are.
    text = command_line.encode(errors="surrogateescape")
    if len(text) >= min(header.cmdline_size + 1, COMMAND_LINE_ROOM):
        raise BootImageError(f"the kernel command line is {len(text)} bytes; this kernel takes {header.cmdline_size}")
    if low_end <= HIGH_MEMORY:
        raise BootImageError(f"memory of {low_end >> 20} MiB is too small for Linux; give at least 64M")
    start = -(-max(header.pref_address, HIGH_MEMORY) // header.alignment) * header.alignment
    end = start + max(header.init_size, len(kernel) - header.setup_size)
    if end > low_end:
        raise BootImageError(
            f"the kernel needs {end >> 20} MiB and the guest has {low_end >> 20} MiB; give it more memory"
        )
    return Placement(header, start, _room_for(len(initrd), header, end, low_end) if initrd else 0, text)


def _room_for(initrd_size: int, header: SetupHeader, kernel_end: int, low_end: int) -> int:
    start = (min(low_end, header.initrd_addr_max + 1) - initrd_size) & -PAGE
    if start < kernel_end:
        raise BootImageError(
            f"the initrd of {initrd_size >> 20} MiB does not fit beside the kernel"
            f" into {low_end >> 20} MiB; give the guest more memory"
        )
    return start


def load(memory: GuestMemory, kernel: bytes, initrd: bytes | None, command_line: str, platform: acpi.Platform) -> int:
    """Put kernel, initrd, command line, zero page, tables and ACPI into *memory*; return the entry's address.

    Raises BootImageError as place() does.
    """
    placed = place(kernel, initrd, command_line, memory.low_end)
    memory.write(placed.kernel, memoryview(kernel)[placed.header.setup_size :])
    if initrd:
        memory.write(placed.initrd, initrd)
    memory.write(COMMAND_LINE, placed.command_line + b"\0")
    tables, rsdp = acpi.build(platform, ACPI_TABLES)
    memory.write(ACPI_TABLES, tables)
    longmode.write_tables(memory, TABLES)
    _write_zero_page(memory, placed.header, placed.initrd, len(initrd or b""), rsdp)
    return placed.kernel + ENTRY_64


def _write_zero_page(memory: GuestMemory, header: SetupHeader, initrd: int, initrd_size: int, rsdp: int) -> None:
    page = bytearray(PAGE)
    page[HEADER : HEADER + len(header.raw)] = header.raw
    page[0x210] = 0xFF  # type_of_loader: none of the assigned ones
    struct.pack_into("<II", page, 0x218, initrd, initrd_size)
    struct.pack_into("<I", page, 0x228, COMMAND_LINE)
    struct.pack_into("<Q", page, 0x070, rsdp)
    entries = e820(memory)
    page[0x1E8] = len(entries)
    for index, entry in enumerate(entries):
        struct.pack_into("<QQI", page, 0x2D0 + 20 * index, *entry)
    memory.write(ZERO_PAGE, page)


def enter(vcpu: Vcpu, entry: int) -> None:
    """Point *vcpu* at the kernel: 64-bit mode, interrupts off, rsi = the zero page."""
    longmode.enter(vcpu, TABLES)
    regs = vcpu.get_regs()
    regs.rip, regs.rsi, regs.rflags = entry, ZERO_PAGE, 2
    vcpu.set_regs(regs)
