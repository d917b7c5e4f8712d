"""ELF executables: their segments, entry and notes.

Source: System V ABI, "Object Files", "Program Loading".
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from vmonty.base.errors import BootImageError
from vmonty.vmm.memory import GuestMemory

MAGIC = b"\x7fELF"
_CLASS_32, _CLASS_64, _LITTLE_ENDIAN = 1, 2, 1
_EXECUTABLE, _SHARED = 2, 3
_I386, _X86_64 = 3, 62
_LOAD, _NOTE = 1, 4
_MOST_NOTE_BYTES = 1 << 16


class Segment(NamedTuple):
    """*file_size* bytes at *offset* of the file go to *physical*; up to *memory_size* zeroes follow."""

    physical: int
    virtual: int
    offset: int
    file_size: int
    memory_size: int


class Elf(NamedTuple):
    """An executable for x86; every segment lies inside the file."""

    bits: int
    entry: int
    segments: tuple[Segment, ...]
    notes: tuple[tuple[bytes, int, bytes], ...]

    @property
    def start(self) -> int:
        """The lowest physical address that it takes."""
        return min(segment.physical for segment in self.segments)

    @property
    def end(self) -> int:
        """The first physical address behind it."""
        return max(segment.physical + segment.memory_size for segment in self.segments)

    def holds(self, address: int) -> bool:
        """Whether physical *address* has bytes of the file."""
        return any(0 <= address - segment.physical < segment.file_size for segment in self.segments)

    def load(self, memory: GuestMemory, image: bytes | memoryview) -> None:
        """Copy the segments into *memory*, which is zero where they go. Raises GuestMemoryError where none is."""
        view = memoryview(image)
        for segment in self.segments:
            memory.write(segment.physical, view[segment.offset : segment.offset + segment.file_size])


def parse(image: bytes | memoryview) -> Elf:
    """Read the headers. Raises BootImageError for what is no x86 executable, or damaged."""
    if len(image) < 52 or image[:4] != MAGIC:
        raise BootImageError("the kernel is no ELF file")
    bits = {_CLASS_32: 32, _CLASS_64: 64}.get(image[4])
    if bits is None or image[5] != _LITTLE_ENDIAN or len(image) < 64:
        raise BootImageError("the kernel is an ELF file of another kind of machine")
    kind, machine = struct.unpack_from("<HH", image, 16)
    if kind not in (_EXECUTABLE, _SHARED) or machine not in (_I386, _X86_64):
        raise BootImageError("the kernel is an ELF file, but no executable for x86")
    if bits == 64:
        entry, headers_at = struct.unpack_from("<QQ", image, 24)
        size, count = struct.unpack_from("<HH", image, 54)
        form, wanted = "<IIQQQQQQ", (0, 2, 3, 4, 5, 6)
    else:
        entry, headers_at = struct.unpack_from("<II", image, 24)
        size, count = struct.unpack_from("<HH", image, 42)
        form, wanted = "<IIIIIIII", (0, 1, 2, 3, 4, 5)
    if size < struct.calcsize(form) or headers_at + size * count > len(image):
        raise BootImageError("the kernel's ELF program headers are cut off")
    segments: list[Segment] = []
    notes: list[tuple[bytes, int, bytes]] = []
    for index in range(count):
        fields = struct.unpack_from(form, image, headers_at + size * index)
        kind, offset, virtual, physical, file_size, memory_size = (fields[at] for at in wanted)
        if kind == _LOAD and memory_size:
            if file_size > memory_size or offset + file_size > len(image) or physical + memory_size > 1 << 52:
                raise BootImageError("the kernel's ELF segments are cut off or damaged")
            segments.append(Segment(physical, virtual, offset, file_size, memory_size))
        elif kind == _NOTE:
            notes += _notes(bytes(image[offset : offset + min(file_size, _MOST_NOTE_BYTES)]))
    if not segments:
        raise BootImageError("the kernel is an ELF file with nothing to load")
    return Elf(bits, entry, tuple(segments), tuple(notes))


def _notes(data: bytes) -> list[tuple[bytes, int, bytes]]:
    """(owner, type, contents) of each note; what is cut off is left out."""
    found = []
    at = 0
    while at + 12 <= len(data):
        name_size, size, kind = struct.unpack_from("<III", data, at)
        name_at = at + 12
        contents_at = name_at + -(-name_size // 4) * 4
        at = contents_at + -(-size // 4) * 4
        if contents_at + size > len(data):
            break
        found.append((data[name_at : name_at + name_size], kind, data[contents_at : contents_at + size]))
    return found
