"""SMBIOS tables: what DMI tells of the machine.

Source: DMTF DSP0134, System Management BIOS Reference Specification 2.8.0, "Entry Point", "Structure Definitions".
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from uuid import UUID

ANCHOR_SIZE = 0x1F
VERSION = (2, 8)
UNKNOWN_HANDLE, NO_CACHE, NO_WIDTH = 0xFFFE, 0xFFFF, 0xFFFF
BIOS, SYSTEM, CHASSIS, PROCESSOR, MEMORY_ARRAY, MEMORY_DEVICE = 0x000, 0x100, 0x300, 0x400, 0x1000, 0x1100
MAPPED_ADDRESS, BOOT, END = 0x1300, 0x2000, 0x7F00
LARGEST_SMALL_DEVICE_MIB = 0x7FFF
LARGEST_SMALL_ARRAY = 0x8000_0000
NOT_SET = bytes(16)


class Identity(NamedTuple):
    """What the owner of a machine may choose; an empty string is left out, and no *uuid* is all zeros."""

    manufacturer: str = "vmonty"
    product: str = "pc"
    version: str = ""
    serial: str = ""
    uuid: UUID | None = None


def _structure(kind: int, handle: int, body: bytes, *strings: str) -> bytes:
    texts = b"".join(text.encode("latin-1", "replace").replace(b"\0", b"?") + b"\0" for text in strings) or b"\0"
    return struct.pack("<BBH", kind, 4 + len(body), handle) + body + texts + b"\0"


class _Strings:
    """The strings of one structure, numbered from 1; an empty one is number 0."""

    def __init__(self) -> None:
        self.all: list[str] = []

    def add(self, text: str) -> int:
        if not text:
            return 0
        self.all.append(text)
        return len(self.all)


def _system(identity: Identity) -> bytes:
    strings = _Strings()
    numbers = [strings.add(text) for text in (identity.manufacturer, identity.product, identity.version)]
    serial = strings.add(identity.serial)
    uuid = identity.uuid.bytes_le if identity.uuid else NOT_SET
    body = struct.pack("<4B16sBBB", *numbers, serial, uuid, 6, 0, 0)
    return _structure(1, SYSTEM, body, *strings.all)


def _processor(number: int, signature: int, features: int, maker: str) -> bytes:
    body = struct.pack(
        "<BBBBIIBBHHHBBHHHBBBBBBHH",
        1, 3, 1, 2, signature, features, 3, 0, 0, 2000, 2000, 0x41, 1, NO_CACHE, NO_CACHE, NO_CACHE, 0, 0, 0, 1, 1, 1,
        2, 1,
    )  # fmt: skip
    return _structure(4, PROCESSOR + number, body, f"CPU {number}", maker, "virtual processor")


def _memory(blocks: list[tuple[int, int]]) -> bytes:
    total = sum(size for _, size in blocks)
    kib, mib = total >> 10, total >> 20
    small_array = min(LARGEST_SMALL_ARRAY, kib)
    array = struct.pack("<BBBIHHQ", 1, 3, 6, small_array, UNKNOWN_HANDLE, 1, 0 if kib < LARGEST_SMALL_ARRAY else total)
    small = min(LARGEST_SMALL_DEVICE_MIB, mib)
    device = struct.pack(
        "<HHHHHBBBBBHHBBBBBIHHHH",
        MEMORY_ARRAY, UNKNOWN_HANDLE, NO_WIDTH, NO_WIDTH, small, 9, 0, 1, 0, 7, 2, 0, 2, 0, 0, 0, 0,
        mib if small == LARGEST_SMALL_DEVICE_MIB else 0, 0, 0, 0, 0,
    )  # fmt: skip
    made = _structure(16, MEMORY_ARRAY, array) + _structure(17, MEMORY_DEVICE, device, "DIMM 0", "vmonty")
    for number, (base, size) in enumerate(blocks):
        first, last = base >> 10, (base + size - 1) >> 10
        fits = last < 0xFFFF_FFFF
        mapped = struct.pack(
            "<IIHBQQ", first if fits else 0xFFFF_FFFF, last if fits else 0xFFFF_FFFF, MEMORY_ARRAY, 1,
            0 if fits else base, 0 if fits else base + size - 1,
        )  # fmt: skip
        made += _structure(19, MAPPED_ADDRESS + number, mapped)
    return made


def tables(
    identity: Identity, cpus: int, blocks: list[tuple[int, int]], signature: int = 0, features: int = 0
) -> tuple[bytes, int]:
    """All structures, and how many. *blocks* are (base, size) of RAM; the last two are CPUID leaf 1's EAX and EDX."""
    characteristics = 1 << 3  # none are reported
    bios = struct.pack("<BBHBBQBBBBBB", 1, 2, 0xE800, 3, 0, characteristics, 0, 0x14, 0, 0, 0xFF, 0xFF)
    chassis = struct.pack("<BBBBBBBBBIBBBBB", 1, 1, 0, 0, 0, 3, 3, 3, 2, 0, 0, 0, 0, 0, 0)
    made = [
        _structure(0, BIOS, bios, "vmonty", "1", "01/01/2026"),
        _system(identity),
        _structure(3, CHASSIS, chassis, identity.manufacturer or "vmonty"),
        *(_processor(number, signature, features, identity.manufacturer or "vmonty") for number in range(cpus)),
        _memory(blocks),
        _structure(32, BOOT, bytes(7)),
        _structure(127, END, b""),
    ]
    return b"".join(made), 3 + cpus + 2 + len(blocks) + 2


def anchor(structures: bytes, count: int, address: int) -> bytes:
    """The entry point for *structures* at *address*, below 4 GiB."""
    largest, at = 0, 0
    while at < len(structures):
        end = structures.index(b"\0\0", at + structures[at + 1]) + 2
        largest, at = max(largest, end - at), end
    inner = struct.pack("<5sBHIHB", b"_DMI_", 0, len(structures), address, count, VERSION[0] << 4 | VERSION[1])
    inner = inner[:5] + bytes((-sum(inner) & 0xFF,)) + inner[6:]
    outer = struct.pack("<4sBBBBHB5s", b"_SM_", 0, ANCHOR_SIZE, *VERSION, largest, 0, bytes(5)) + inner
    return outer[:4] + bytes((-sum(outer) & 0xFF,)) + outer[5:]
