"""ACPI tables: RSDP, XSDT, FADT, FACS, MADT, HPET, MCFG, and the DSDT around a board's AML.

Source: ACPI Specification 6.5, "ACPI Software Programming Model", "ACPI System Description Tables"; IA-PC HPET
Specification, "HPET Description Table"; PCI Firmware Specification, "MCFG Table Description".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vmonty.vmm.boot import aml
from vmonty.vmm.hw import acpi_ged, acpi_pm

OEM_ID, OEM_TABLE_ID, CREATOR_ID = b"VMONTY", b"VMONTYPC", b"VMTY"

FADT_WBINVD = 1 << 0
FADT_PROC_C1 = 1 << 2
FADT_POWER_BUTTON_IS_DEVICE = 1 << 4
FADT_SLEEP_BUTTON_ABSENT = 1 << 5
FADT_TIMER_32_BITS = 1 << 8
FADT_RESET_REGISTER = 1 << 10
FADT_HARDWARE_REDUCED = 1 << 20
BOOT_LEGACY_DEVICES, BOOT_8042, BOOT_NO_VGA, BOOT_NO_RTC = 1, 2, 4, 1 << 5
SYSTEM_MEMORY, IO_SPACE = 0, 1

MADT_PCAT_COMPAT = 1
LOCAL_APIC_ADDRESS = 0xFEE0_0000
IO_APIC_ADDRESS = 0xFEC0_0000
ACTIVE_HIGH_LEVEL = 0b1101

HPET_PERIODIC_MINIMUM = 100  # ticks
RSDP_ROOM = 64


def soft_off() -> bytes:
    r"""Name (\_S5, …): the sleep type that powers off."""
    return aml.name("\\_S5", aml.package(acpi_pm.SLEEP_TYPE_S5, acpi_pm.SLEEP_TYPE_S5, 0, 0))


@dataclass(frozen=True)
class Platform:
    """What the tables tell of a board.

    *pm_base* is the port where the PM registers stand, None on a hardware-reduced board, which has a generic event
    device at *ged*. *dsdt* is AML. *hpet* and *ecam* are addresses, None when there is none.
    """

    cpus: int
    pm_base: int | None = None
    sci: int = 9
    reset_port: int = 0x64
    reset_value: int = 0xFE
    dsdt: bytes = b""
    ged: int | None = None
    hpet: int | None = None
    hpet_id: int = 0
    ecam: int | None = None
    keyboard_controller: bool = True
    rtc: bool = True
    vga: bool = False


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A table with its header and checksum."""
    header = struct.pack(
        "<4sIBB6s8sI4sI", signature, 36 + len(body), revision, 0, OEM_ID, OEM_TABLE_ID, 1, CREATOR_ID, 1
    )
    return _summed(header + body, 9)


def _summed(data: bytes, at: int) -> bytes:
    """Set the byte *at* so that all bytes add up to zero."""
    return data[:at] + bytes((-(sum(data) - data[at]) & 0xFF,)) + data[at + 1 :]


def _generic_address(address: int, bits: int, access: int, space: int = IO_SPACE) -> bytes:
    return struct.pack("<BBBBQ", space, bits, 0, access, address)


def _fadt(platform: Platform, dsdt: int, facs: int) -> bytes:
    body = bytearray(276 - 36)

    def put(offset: int, form: str, *values: int) -> None:
        struct.pack_into("<" + form, body, offset - 36, *values)

    def put_address(offset: int, address: bytes) -> None:
        body[offset - 36 : offset - 24] = address

    put(36, "II", facs, dsdt)
    put(140, "Q", dsdt)
    put(96, "HH", 0xFFF, 0xFFF)  # C2 and C3 latency: not supported
    flags = FADT_WBINVD | FADT_PROC_C1 | FADT_SLEEP_BUTTON_ABSENT | FADT_RESET_REGISTER
    boot = BOOT_LEGACY_DEVICES
    boot |= BOOT_8042 if platform.keyboard_controller else 0
    boot |= 0 if platform.vga else BOOT_NO_VGA
    boot |= 0 if platform.rtc else BOOT_NO_RTC
    if platform.ged is not None:
        flags |= FADT_HARDWARE_REDUCED | FADT_POWER_BUTTON_IS_DEVICE
        put_address(116, _generic_address(platform.ged + acpi_ged.RESET, 8, 1, SYSTEM_MEMORY))
        put(128, "B", acpi_ged.RESET_VALUE)
        put_address(244, _generic_address(platform.ged + acpi_ged.SLEEP_CONTROL, 8, 1, SYSTEM_MEMORY))
        put_address(256, _generic_address(platform.ged + acpi_ged.SLEEP_STATUS, 8, 1, SYSTEM_MEMORY))
    else:
        base = platform.pm_base or 0
        flags |= FADT_TIMER_32_BITS
        put(46, "H", platform.sci)
        put(56, "I", base + acpi_pm.PM1_STATUS)
        put(64, "I", base + acpi_pm.PM1_CONTROL)
        put(76, "I", base + acpi_pm.PM_TIMER)
        put(88, "BBBB", 4, 2, 0, 4)  # lengths of PM1 event, PM1 control, PM2 control, PM timer
        put(108, "B", 0x32)  # the century's place in the CMOS memory
        put_address(116, _generic_address(platform.reset_port, 8, 1))
        put(128, "B", platform.reset_value)
        put_address(148, _generic_address(base + acpi_pm.PM1_STATUS, 32, 2))
        put_address(172, _generic_address(base + acpi_pm.PM1_CONTROL, 16, 2))
        put_address(208, _generic_address(base + acpi_pm.PM_TIMER, 32, 3))
    put(109, "H", boot)
    put(112, "I", flags)
    return table(b"FACP", 6, bytes(body))


def _facs() -> bytes:
    return struct.pack("<4sIIIIIQB31x", b"FACS", 64, 0, 0, 0, 0, 0, 2)


def _madt(platform: Platform) -> bytes:
    legacy = platform.ged is None
    body = struct.pack("<II", LOCAL_APIC_ADDRESS, MADT_PCAT_COMPAT if legacy else 0)
    for cpu in range(platform.cpus):
        body += struct.pack("<BBBBI", 0, 8, cpu, cpu, 1)
    body += struct.pack("<BBBBII", 1, 12, 0, 0, IO_APIC_ADDRESS, 0)
    if legacy:
        body += struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0)  # the PIT's IRQ 0 is on pin 2
        body += struct.pack("<BBBBIH", 2, 10, 0, platform.sci, platform.sci, ACTIVE_HIGH_LEVEL)
    body += struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1)  # LINT1 of all processors is NMI
    return table(b"APIC", 5, body)


def _hpet(address: int, identity: int) -> bytes:
    location = _generic_address(address, 64, 0, SYSTEM_MEMORY)
    return table(b"HPET", 1, struct.pack("<I12sBHB", identity, location, 0, HPET_PERIODIC_MINIMUM, 0))


def _mcfg(address: int) -> bytes:
    return table(b"MCFG", 1, bytes(8) + struct.pack("<QHBB4x", address, 0, 0, 255))


def build(platform: Platform, base: int) -> tuple[bytes, int]:
    """The tables as one block to put at guest-physical *base*, and the address of the RSDP in it."""
    image = bytearray(RSDP_ROOM)  # the RSDP comes first

    def add(made: bytes, alignment: int = 16) -> int:
        image.extend(bytes(-(base + len(image)) % alignment))
        address = base + len(image)
        image.extend(made)
        return address

    facs = 0 if platform.ged is not None else add(_facs(), 64)
    dsdt = add(table(b"DSDT", 2, platform.dsdt or soft_off()))
    tables = [add(_fadt(platform, dsdt, facs)), add(_madt(platform))]
    if platform.hpet is not None:
        tables.append(add(_hpet(platform.hpet, platform.hpet_id)))
    if platform.ecam is not None:
        tables.append(add(_mcfg(platform.ecam)))
    xsdt = add(table(b"XSDT", 1, struct.pack(f"<{len(tables)}Q", *tables)))
    rsdp = struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, OEM_ID, 2, 0, 36, xsdt, 0)
    # Two checksums: over the first 20 bytes, and over all.
    rsdp = _summed(rsdp[:20], 8) + rsdp[20:]
    image[:36] = _summed(rsdp, 32)
    return bytes(image), base
