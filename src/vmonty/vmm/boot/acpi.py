"""ACPI tables of a minimal PC: RSDP, XSDT, FADT, MADT, DSDT.

Source: ACPI Specification 6.5, "ACPI Software Programming Model", "ACPI System Description Tables".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vmonty.vmm.hw import acpi_pm

OEM_ID, OEM_TABLE_ID, CREATOR_ID = b"VMONTY", b"VMONTYPC", b"VMTY"

FADT_WBINVD = 1 << 0
FADT_PROC_C1 = 1 << 2
FADT_SLEEP_BUTTON_ABSENT = 1 << 5
FADT_TIMER_32_BITS = 1 << 8
FADT_RESET_REGISTER = 1 << 10
BOOT_LEGACY_DEVICES = 1
IO_SPACE = 1

MADT_PCAT_COMPAT = 1
LOCAL_APIC_ADDRESS = 0xFEE0_0000
IO_APIC_ADDRESS = 0xFEC0_0000
ACTIVE_HIGH_LEVEL = 0b1101


@dataclass(frozen=True)
class Platform:
    """What the tables tell: processors, where the PM registers stand, and how to reset."""

    cpus: int
    pm_base: int
    sci: int = 9
    reset_port: int = 0x64
    reset_value: int = 0xFE


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    header = struct.pack(
        "<4sIBB6s8sI4sI", signature, 36 + len(body), revision, 0, OEM_ID, OEM_TABLE_ID, 1, CREATOR_ID, 1
    )
    return _summed(header + body, 9)


def _summed(table: bytes, at: int) -> bytes:
    """Set the byte *at* so that all bytes add up to zero."""
    return table[:at] + bytes((-(sum(table) - table[at]) & 0xFF,)) + table[at + 1 :]


def _generic_address(port: int, bits: int, access: int) -> bytes:
    return struct.pack("<BBBBQ", IO_SPACE, bits, 0, access, port)


def _dsdt() -> bytes:
    # Name (\_S5, Package () {SLP_TYPa, SLP_TYPb, 0, 0})
    package = bytes((4, 0x0A, acpi_pm.SLEEP_TYPE_S5, 0x0A, acpi_pm.SLEEP_TYPE_S5, 0, 0))
    return _table(b"DSDT", 2, b"\x08\\_S5_" + b"\x12" + bytes((len(package) + 1,)) + package)


def _fadt(platform: Platform, dsdt: int) -> bytes:
    base = platform.pm_base
    body = bytearray(276 - 36)

    def put(offset: int, form: str, *values: int) -> None:
        struct.pack_into("<" + form, body, offset - 36, *values)

    put(40, "I", dsdt)
    put(46, "H", platform.sci)
    put(56, "I", base + acpi_pm.PM1_STATUS)
    put(64, "I", base + acpi_pm.PM1_CONTROL)
    put(76, "I", base + acpi_pm.PM_TIMER)
    put(88, "BBBB", 4, 2, 0, 4)  # lengths of PM1 event, PM1 control, PM2 control, PM timer
    put(96, "HH", 0xFFF, 0xFFF)  # C2 and C3 latency: not supported
    put(109, "H", BOOT_LEGACY_DEVICES)
    put(
        112,
        "I",
        FADT_WBINVD | FADT_PROC_C1 | FADT_SLEEP_BUTTON_ABSENT | FADT_TIMER_32_BITS | FADT_RESET_REGISTER,
    )
    body[116 - 36 : 128 - 36] = _generic_address(platform.reset_port, 8, 1)
    put(128, "B", platform.reset_value)
    put(140, "Q", dsdt)
    body[148 - 36 : 160 - 36] = _generic_address(base + acpi_pm.PM1_STATUS, 32, 2)
    body[172 - 36 : 184 - 36] = _generic_address(base + acpi_pm.PM1_CONTROL, 16, 2)
    body[208 - 36 : 220 - 36] = _generic_address(base + acpi_pm.PM_TIMER, 32, 3)
    return _table(b"FACP", 6, bytes(body))


def _madt(platform: Platform) -> bytes:
    body = struct.pack("<II", LOCAL_APIC_ADDRESS, MADT_PCAT_COMPAT)
    for cpu in range(platform.cpus):
        body += struct.pack("<BBBBI", 0, 8, cpu, cpu, 1)
    body += struct.pack("<BBBBII", 1, 12, 0, 0, IO_APIC_ADDRESS, 0)
    body += struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0)  # the PIT's IRQ 0 is on pin 2
    body += struct.pack("<BBBBIH", 2, 10, 0, platform.sci, platform.sci, ACTIVE_HIGH_LEVEL)
    body += struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1)  # LINT1 of all processors is NMI
    return _table(b"APIC", 5, body)


def build(platform: Platform, base: int) -> tuple[bytes, int]:
    """The tables as one block to put at guest-physical *base*, and the address of the RSDP in it."""
    image = bytearray(64)  # the RSDP comes first

    def add(table: bytes) -> int:
        image.extend(bytes(-len(image) % 16))
        address = base + len(image)
        image.extend(table)
        return address

    dsdt = add(_dsdt())
    tables = [add(_fadt(platform, dsdt)), add(_madt(platform))]
    xsdt = add(_table(b"XSDT", 1, struct.pack(f"<{len(tables)}Q", *tables)))
    rsdp = struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, OEM_ID, 2, 0, 36, xsdt, 0)
    # Two checksums: over the first 20 bytes, and over all.
    rsdp = _summed(rsdp[:20], 8) + rsdp[20:]
    image[:36] = _summed(rsdp, 32)
    return bytes(image), base
