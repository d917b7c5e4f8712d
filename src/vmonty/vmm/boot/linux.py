"""Linux: a bzImage by its 64-bit or 32-bit entry, and a vmlinux, which a bzImage may have inside.

Source: Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header", "32-bit Boot Protocol", "64-bit Boot Protocol";
zero-page.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

from vmonty.base.errors import BootImageError, GuestMemoryError
from vmonty.vmm.boot import acpi, elf, payload
from vmonty.vmm.boot.entry import Entry, Mode
from vmonty.vmm.boot.lowmem import (
    ACPI_TABLES,
    COMMAND_LINE,
    COMMAND_LINE_ROOM,
    HIGH_MEMORY,
    INFORMATION_END,
    PAGE,
    e820,
)
from vmonty.vmm.boot.lowmem import INFORMATION as ZERO_PAGE
from vmonty.vmm.memory import GuestMemory

HEADER = 0x1F1
XLOADFLAGS_64, LOADED_HIGH = 1, 1
ENTRY_64 = 0x200

# What older boot protocols do not say, by boot.rst.
_OLD_INITRD_MAX, _OLD_COMMAND_LINE, _OLD_ALIGNMENT = 0x37FF_FFFF, 255, 0x10_0000
_NEWEST_VERSION = 0x20F

Unpack = Callable[[bytes], "bytes | memoryview | None"]


class SetupHeader(NamedTuple):
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
    long_mode: bool
    payload: tuple[int, int]
    """Where in the image the compressed kernel lies, and its length; (0, 0) when the header does not say."""


def parse(image: bytes) -> SetupHeader:
    """Read the header of a bzImage. Raises BootImageError for anything that is none."""
    if len(image) < 0x270 or image[0x202:0x206] != b"HdrS":
        raise BootImageError("the kernel is no Linux bzImage (no HdrS signature); give a distribution's vmlinuz file")
    version = struct.unpack_from("<H", image, 0x206)[0]
    if version < 0x202:
        raise BootImageError(
            f"the kernel's boot protocol {version >> 8}.{version & 0xFF:02} is too old; 2.02 is needed"
        )
    if not image[0x211] & LOADED_HIGH:
        raise BootImageError("the kernel is a zImage, which loads low; use a bzImage")
    setup_size = ((image[0x1F1] or 4) + 1) * 512
    if len(image) < setup_size + ENTRY_64 + 1:
        raise BootImageError(f"the kernel is truncated: {len(image)} bytes, its setup alone takes {setup_size}")
    syssize = struct.unpack_from("<I", image, 0x1F4)[0] * 16
    if len(image) < setup_size + syssize - 15:
        raise BootImageError(f"the kernel is truncated: {len(image)} of {setup_size + syssize} bytes")
    alignment = struct.unpack_from("<I", image, 0x230)[0] if version >= 0x205 else _OLD_ALIGNMENT
    if alignment == 0 or alignment & (alignment - 1):
        raise BootImageError(f"the kernel's header asks for an alignment of {alignment:#x}, which is no power of two")
    placed = version >= 0x20A
    inside = struct.unpack_from("<II", image, 0x248) if version >= 0x208 else (0, 0)
    if inside[1] and setup_size + sum(inside) > len(image):
        raise BootImageError("the kernel's header names a compressed part that is not in the file")
    return SetupHeader(
        raw=image[HEADER : min(0x202 + image[0x201], 0x290)],
        setup_size=setup_size,
        version=version,
        pref_address=struct.unpack_from("<Q", image, 0x258)[0] if placed else HIGH_MEMORY,
        alignment=alignment,
        init_size=struct.unpack_from("<I", image, 0x260)[0] if placed else 0,
        cmdline_size=struct.unpack_from("<I", image, 0x238)[0] if version >= 0x206 else _OLD_COMMAND_LINE,
        initrd_addr_max=struct.unpack_from("<I", image, 0x22C)[0] if version >= 0x203 else _OLD_INITRD_MAX,
        relocatable=version >= 0x205 and bool(image[0x234]),
        long_mode=version >= 0x20C and bool(struct.unpack_from("<H", image, 0x236)[0] & XLOADFLAGS_64),
        payload=(setup_size + inside[0], inside[1]) if inside[1] else (0, 0),
    )


def elf_header() -> SetupHeader:
    """What the zero page of a vmlinux says in the place of a bzImage's header."""
    raw = bytearray(0x268 - HEADER)

    def put(form: str, at: int, value: int) -> None:
        struct.pack_into(form, raw, at - HEADER, value)

    put("<H", 0x1FE, 0xAA55)
    raw[0x202 - HEADER : 0x206 - HEADER] = b"HdrS"
    put("<H", 0x206, _NEWEST_VERSION)
    put("<B", 0x211, LOADED_HIGH)
    put("<I", 0x230, PAGE)
    put("<I", 0x238, 2047)
    return SetupHeader(bytes(raw), 0, _NEWEST_VERSION, HIGH_MEMORY, PAGE, 0, 2047, 0x7FFF_FFFF, False, True, (0, 0))


class Placement(NamedTuple):
    """Where a kernel and its initrd go, in bytes; *initrd* is 0 when there is none."""

    header: SetupHeader
    kernel: int
    initrd: int
    command_line: bytes


# struct screen_info to orig_video_points: cursor, mode, columns, EGA's answer to INT 10h AH=12h, lines, VGA, font.
SCREEN_INFO = struct.Struct("<BBHHBBHHHBBH")
TEXT_SCREEN = SCREEN_INFO.pack(0, 0, 0, 0, 3, 80, 0, 3, 0, 25, 1, 16)


def place(kernel: bytes, initrd: bytes | None, command_line: str, low_end: int) -> Placement:
    """Find room for a bzImage in the RAM that ends at *low_end*, below 4 GiB.

    Raises BootImageError when the kernel is none, or when something does not fit.
    """
    header = parse(kernel)
    text = _command_line(header, command_line, low_end)
    start = -(-max(header.pref_address, HIGH_MEMORY) // header.alignment) * header.alignment
    end = start + max(header.init_size, len(kernel) - header.setup_size)
    return Placement(header, start, _room_for(len(initrd or b""), header, end, low_end), text)


def place_elf(kernel: elf.Elf, header: SetupHeader, initrd: bytes | None, command_line: str, low_end: int) -> Placement:
    """As place(), for a vmlinux, which goes where it says."""
    text = _command_line(header, command_line, low_end)
    if kernel.bits != 64 or not kernel.holds(kernel.entry):
        raise BootImageError("the kernel is an ELF file without a 64-bit entry, a PVH note or a multiboot header")
    if kernel.start < INFORMATION_END:
        raise BootImageError(
            f"the kernel loads at {kernel.start:#x}, over what it is told; {INFORMATION_END:#x} is free"
        )
    return Placement(header, kernel.entry, _room_for(len(initrd or b""), header, kernel.end, low_end), text)


def _command_line(header: SetupHeader, command_line: str, low_end: int) -> bytes:
    # What came from a command line may hold bytes that are no UTF-8: they go through as they are.
    text = command_line.encode(errors="surrogateescape")
    if len(text) >= min(header.cmdline_size + 1, COMMAND_LINE_ROOM):
        raise BootImageError(f"the kernel command line is {len(text)} bytes; this kernel takes {header.cmdline_size}")
    if low_end <= HIGH_MEMORY:
        raise BootImageError(f"memory of {low_end >> 20} MiB is too small for Linux; give at least 64M")
    return text


def _room_for(initrd_size: int, header: SetupHeader, kernel_end: int, low_end: int) -> int:
    if kernel_end > low_end:
        raise BootImageError(
            f"the kernel needs {kernel_end >> 20} MiB and the guest has {low_end >> 20} MiB; give it more memory"
        )
    if not initrd_size:
        return 0
    start = (min(low_end, header.initrd_addr_max + 1) - initrd_size) & -PAGE
    if start < kernel_end:
        raise BootImageError(
            f"the initrd of {initrd_size >> 20} MiB does not fit beside the kernel"
            f" into {low_end >> 20} MiB; give the guest more memory"
        )
    return start


def load(
    memory: GuestMemory,
    kernel: bytes,
    initrd: bytes | None,
    command_line: str,
    platform: acpi.Platform,
    unpack: Unpack = payload.decompress,
) -> Entry:
    """Put a bzImage, its initrd, command line, zero page, tables and ACPI into *memory*.

    A 64-bit kernel goes there decompressed, as *unpack* gives it, or with its own decompressor if that is None. Raises
    BootImageError as place() does.
    """
    placed = place(kernel, initrd, command_line, memory.low_end)
    at, length = placed.header.payload
    vmlinux = unpack(kernel[at : at + length]) if placed.header.long_mode and length else None
    if vmlinux is not None:
        inner = elf.parse(vmlinux)
        placed = place_elf(inner, placed.header, initrd, command_line, memory.low_end)
        return _load_elf(memory, vmlinux, inner, placed, initrd, platform)
    memory.write(placed.kernel, memoryview(kernel)[placed.header.setup_size :])
    if placed.header.long_mode:
        entry = Entry(Mode.LONG, placed.kernel + ENTRY_64, {"rsi": ZERO_PAGE})
    else:
        entry = Entry(Mode.PROTECTED, placed.kernel, {"rsi": ZERO_PAGE})
    _hand_over(memory, placed, initrd, platform, entry)
    return entry


def load_elf(
    memory: GuestMemory, kernel: bytes, initrd: bytes | None, command_line: str, platform: acpi.Platform
) -> Entry:
    """As load(), for a vmlinux."""
    inner = elf.parse(kernel)
    placed = place_elf(inner, elf_header(), initrd, command_line, memory.low_end)
    return _load_elf(memory, kernel, inner, placed, initrd, platform)


def _load_elf(
    memory: GuestMemory,
    kernel: bytes | memoryview,
    inner: elf.Elf,
    placed: Placement,
    initrd: bytes | None,
    platform: acpi.Platform,
) -> Entry:
    try:
        inner.load(memory, kernel)
    except GuestMemoryError as error:
        raise BootImageError(f"the kernel does not fit into the guest's memory: {error}") from error
    entry = Entry(Mode.LONG, placed.kernel, {"rsi": ZERO_PAGE})
    _hand_over(memory, placed, initrd, platform, entry)
    return entry


def _hand_over(
    memory: GuestMemory, placed: Placement, initrd: bytes | None, platform: acpi.Platform, entry: Entry
) -> None:
    if initrd:
        memory.write(placed.initrd, initrd)
    memory.write(COMMAND_LINE, placed.command_line + b"\0")
    tables, rsdp = acpi.build(platform, ACPI_TABLES)
    memory.write(ACPI_TABLES, tables)
    entry.write_tables(memory)
    page = bytearray(PAGE)
    header = placed.header
    page[HEADER : HEADER + len(header.raw)] = header.raw
    if platform.vga:
        page[: SCREEN_INFO.size] = TEXT_SCREEN
    page[0x210] = 0xFF  # type_of_loader: none of the assigned ones
    if entry.mode is Mode.PROTECTED:
        struct.pack_into("<I", page, 0x214, placed.kernel)  # code32_start
    struct.pack_into("<II", page, 0x218, placed.initrd, len(initrd or b""))
    struct.pack_into("<I", page, 0x228, COMMAND_LINE)
    struct.pack_into("<Q", page, 0x070, rsdp)
    entries = e820(memory)
    page[0x1E8] = len(entries)
    for index, item in enumerate(entries):
        struct.pack_into("<QQI", page, 0x2D0 + 20 * index, *item)
    memory.write(ZERO_PAGE, page)
