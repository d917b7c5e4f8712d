"""AML, the byte code of ACPI's definition blocks, from small functions that each give bytes.

Source: ACPI Specification 6.5, "ACPI Machine Language (AML) Specification", and "Resource Data Types for ACPI".
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

_ZERO, _ONE, _ONES = 0x00, 0x01, 0xFF
_BYTE, _WORD, _DWORD, _STRING, _QWORD = 0x0A, 0x0B, 0x0C, 0x0D, 0x0E
_EXTENDED = 0x5B

ARG0, ARG1, ARG2, ARG3 = (bytes((0x68 + n,)) for n in range(4))
LOCAL0, LOCAL1 = b"\x60", b"\x61"
NOTHING = b"\x00"  # a null target

SYSTEM_MEMORY, SYSTEM_IO, PCI_CONFIG = 0, 1, 2
BYTE_ACCESS, WORD_ACCESS, DWORD_ACCESS = 1, 2, 3


@functools.cache
def path(name: str) -> bytes:
    r"""A NameString such as ``_HID``, ``\_SB.PCI0`` or ``^LNKA``; segments are padded to four characters."""
    prefix = ""
    while name[:1] in ("\\", "^"):
        prefix, name = prefix + name[0], name[1:]
    segments = [segment.ljust(4, "_") for segment in name.split(".") if segment]
    for segment in segments:
        if len(segment) != 4 or segment[0].isdigit() or not segment.replace("_", "A").isalnum() or segment.islower():
            raise ValueError(f"{segment!r} is no ACPI name segment")
    body = "".join(segments).encode()
    match len(segments):
        case 0:
            return prefix.encode() + b"\0"
        case 1:
            return prefix.encode() + body
        case 2:
            return prefix.encode() + b"\x2e" + body
        case count:
            return prefix.encode() + bytes((0x2F, count)) + body


def integer(value: int) -> bytes:
    """The shortest encoding of an unsigned integer of up to 64 bits."""
    if value in (0, 1):
        return bytes((value,))
    for size, opcode in ((1, _BYTE), (2, _WORD), (4, _DWORD), (8, _QWORD)):
        if value < 1 << 8 * size:
            return bytes((opcode,)) + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} has more than 64 bits")


def string(text: str) -> bytes:
    """An ASCII string."""
    return bytes((_STRING,)) + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """EISAID("PNP0A03"): three letters and four hexadecimal digits in 32 bits."""
    letters = [ord(letter) - 0x40 & 31 for letter in text[:3]]
    packed = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(text[3:], 16)
    return bytes((_DWORD,)) + packed.to_bytes(4, "big")


def value(item: int | str | bytes) -> bytes:
    """AML of a Python value: an integer, a string, or AML as it is."""
    if isinstance(item, bytes):
        return item
    return string(item) if isinstance(item, str) else integer(item)


def _package_length(size: int) -> bytes:
    """PkgLength of a body of *size* bytes; it counts itself."""
    for extra in range(4):
        total = size + 1 + extra
        if total < (1 << 6 if extra == 0 else 1 << 4 + 8 * extra):
            if extra == 0:
                return bytes((total,))
            return bytes((extra << 6 | total & 15,)) + (total >> 4).to_bytes(extra, "little")
    raise ValueError(f"{size} bytes are too many for one AML object")


def _sized(opcode: bytes, body: bytes) -> bytes:
    return opcode + _package_length(len(body)) + body


# ---- named objects and blocks ---------------------------------------------------------------------------------


def name(where: str, item: int | str | bytes) -> bytes:
    """Name (where, item)."""
    return b"\x08" + path(where) + value(item)


def scope(where: str, *terms: bytes) -> bytes:
    """Scope (where) { terms }."""
    return _sized(b"\x10", path(where) + b"".join(terms))


def device(where: str, *terms: bytes) -> bytes:
    """Device (where) { terms }."""
    return _sized(b"\x5b\x82", path(where) + b"".join(terms))


def method(where: str, arguments: int, *terms: bytes, serialized: bool = False) -> bytes:
    """Method (where, arguments) { terms }."""
    flags = arguments | (8 if serialized else 0)
    return _sized(b"\x14", path(where) + bytes((flags,)) + b"".join(terms))


def package(*items: int | str | bytes) -> bytes:
    """Package () { items }, up to 255."""
    return _sized(b"\x12", bytes((len(items),)) + b"".join(value(item) for item in items))


def buffer(data: bytes) -> bytes:
    """Buffer () { data }."""
    return _sized(b"\x11", integer(len(data)) + data)


def operation_region(where: str, space: int, offset: int, size: int) -> bytes:
    """OperationRegion (where, space, offset, size)."""
    return b"\x5b\x80" + path(where) + bytes((space,)) + integer(offset) + integer(size)


def field(region: str, access: int, *fields: tuple[str, int]) -> bytes:
    """Field (region, access, NoLock, Preserve) { name, bits }; a name of "" skips bits."""
    body = path(region) + bytes((access,))
    for label, bits in fields:
        body += (path(label) if label else b"\0") + _field_length(bits)
    return _sized(b"\x5b\x81", body)


def _field_length(bits: int) -> bytes:
    # The same encoding as PkgLength, but it does not count itself.
    for extra in range(4):
        if bits < (1 << 6 if extra == 0 else 1 << 4 + 8 * extra):
            if extra == 0:
                return bytes((bits,))
            return bytes((extra << 6 | bits & 15,)) + (bits >> 4).to_bytes(extra, "little")
    raise ValueError(f"a field of {bits} bits is too long")


# ---- statements and expressions -------------------------------------------------------------------------------


def returns(item: int | str | bytes) -> bytes:
    """Return (item)."""
    return b"\xa4" + value(item)


def store(item: int | str | bytes, target: bytes) -> bytes:
    """Store (item, target)."""
    return b"\x70" + value(item) + target


def bit_and(left: int | bytes, right: int | bytes, target: bytes = NOTHING) -> bytes:
    """And (left, right, target)."""
    return b"\x7b" + value(left) + value(right) + target


def bit_or(left: int | bytes, right: int | bytes, target: bytes = NOTHING) -> bytes:
    """Or (left, right, target)."""
    return b"\x7d" + value(left) + value(right) + target


def if_(condition: bytes, *terms: bytes) -> bytes:
    """If (condition) { terms }."""
    return _sized(b"\xa0", condition + b"".join(terms))


def notify(target: str, code: int | bytes) -> bytes:
    """Notify (target, code)."""
    return b"\x86" + path(target) + value(code)


def call(target: str, *arguments: int | bytes) -> bytes:
    """A call of a method."""
    return path(target) + b"".join(value(argument) for argument in arguments)


def create_dword_field(source: bytes, offset: int, label: str) -> bytes:
    """CreateDWordField (source, offset in bytes, label)."""
    return b"\x8a" + source + integer(offset) + path(label)


# ---- resources ---------------------------------------------------------------------------------------------------


def resources(*descriptors: bytes) -> bytes:
    """ResourceTemplate () { descriptors }; the checksum 0 says that there is none."""
    return buffer(b"".join(descriptors) + b"\x79\x00")


def io(base: int, size: int) -> bytes:
    """IO (Decode16, base, base, 1, size)."""
    return struct.pack("<BBHHBB", 0x47, 1, base, base, 1, size)


def irq(number: int) -> bytes:
    """IRQNoFlags () { number }: an ISA interrupt, edge-triggered, active high."""
    return struct.pack("<BH", 0x22, 1 << number)


def fixed_memory(base: int, size: int, writable: bool = True) -> bytes:
    """Memory32Fixed (base, size)."""
    return struct.pack("<BHBII", 0x86, 9, int(writable), base, size)


def interrupt(numbers: Sequence[int], *, level: bool = True, low: bool = False, shared: bool = False) -> bytes:
    """Interrupt (ResourceConsumer, …) { numbers }: GSIs."""
    flags = 1 | (0 if level else 2) | (4 if low else 0) | (8 if shared else 0)
    return struct.pack(f"<BHBB{len(numbers)}I", 0x89, 2 + 4 * len(numbers), flags, len(numbers), *numbers)


def _address_space(form: str, tag: int, kind: int, specific: int, minimum: int, maximum: int) -> bytes:
    # Fixed minimum and maximum, positive decode, produced for the devices behind.
    fields = struct.pack(f"<5{form}", 0, minimum, maximum, 0, maximum - minimum + 1)
    return struct.pack("<BHBBB", tag, 3 + len(fields), kind, 0x0C, specific) + fields


def bus_numbers(first: int, last: int) -> bytes:
    """WordBusNumber: the buses behind a host bridge."""
    return _address_space("H", 0x88, 2, 0, first, last)


def io_window(first: int, last: int) -> bytes:
    """WordIO: ports that a host bridge passes on. The size of all 64 Ki ports does not fit: give less."""
    return _address_space("H", 0x88, 1, 3, first, last)


def memory_window(first: int, last: int, *, cacheable: bool = False, writable: bool = True) -> bytes:
    """DWordMemory or QWordMemory: memory addresses that a host bridge passes on."""
    specific = int(writable) | (2 if cacheable else 0)
    if last < 1 << 32:
        return _address_space("I", 0x87, 0, specific, first, last)
    return _address_space("Q", 0x8A, 0, specific, first, last)
