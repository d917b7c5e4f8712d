"""ACPI tables: RSDP, XSDT, FADT, FACS, MADT, HPET, MCFG, and the DSDT around a board's AML.

Source: ACPI Specification 6.5, "ACPI Software Programming Model", "ACPI System Description Tables"; IA-PC HPET
Specification, "HPET Description Table"; PCI Firmware Specification, "MCFG Table Description".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from vmonty.base.record import Record, made
from vmonty.vmm.boot import aml
from vmonty.vmm.hw import acpi_ged, acpi_hotplug, acpi_pm

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
RSDP_ROOM, RSDP_SIZE = 64, 36
RSDP_SUM, RSDP_XSDT, RSDP_EXTENDED_SUM, TABLE_SUM = 8, 24, 32, 9


def soft_off() -> bytes:
    r"""Name (\_S5, …): the sleep type that powers off."""
    return aml.name("\\_S5", aml.package(acpi_pm.SLEEP_TYPE_S5, acpi_pm.SLEEP_TYPE_S5, 0, 0))


class Platform(NamedTuple):
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
    gpe: int | None = None
    keyboard_controller: bool = True
    rtc: bool = True
    vga: bool = False


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A table with its header and checksum."""
    header = struct.pack(
        "<4sIBB6s8sI4sI", signature, 36 + len(body), revision, 0, OEM_ID, OEM_TABLE_ID, 1, CREATOR_ID, 1
    )
    return _summed(header + body, TABLE_SUM)


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
        if platform.gpe is not None:
            put(80, "I", platform.gpe)
            put(92, "B", acpi_hotplug.GPE_SIZE)
            put_address(220, _generic_address(platform.gpe, 8 * acpi_hotplug.GPE_SIZE, 1))
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


class _Image(Record):
    """Tables one behind the other from address *base*, with what would have to change if they moved."""

    base: int
    data: bytearray = made(factory=bytearray)
    pointers: list[tuple[int, int]] = made(factory=list)  # (offset, size in bytes)
    sums: list[tuple[int, int]] = made(factory=list)  # (offset, size) of each table with a checksum

    def add(
        self, made: bytes, alignment: int = 16, pointers: Sequence[tuple[int, int]] = (), summed: bool = True
    ) -> int:
        """Append a table whose *pointers* are (offset, size) inside it; returns its address."""
        self.data.extend(bytes(-(self.base + len(self.data)) % alignment))
        start = len(self.data)
        self.data.extend(made)
        self.pointers += [(start + offset, size) for offset, size in pointers]
        if summed:
            self.sums.append((start, len(made)))
        return self.base + start


def _tables(platform: Platform, base: int, room: int) -> tuple[_Image, int]:
    """All tables, behind *room* bytes, and the address of the XSDT."""
    image = _Image(base, bytearray(room))
    facs = None if platform.ged is not None else image.add(_facs(), 64, summed=False)
    dsdt = image.add(table(b"DSDT", 2, platform.dsdt or soft_off()))
    fadt_pointers = [(40, 4), (140, 8)] + ([] if facs is None else [(36, 4)])
    tables = [image.add(_fadt(platform, dsdt, facs or 0), pointers=fadt_pointers), image.add(_madt(platform))]
    if platform.hpet is not None:
        tables.append(image.add(_hpet(platform.hpet, platform.hpet_id)))
    if platform.ecam is not None:
        tables.append(image.add(_mcfg(platform.ecam)))
    places = [(36 + 8 * number, 8) for number in range(len(tables))]
    return image, image.add(table(b"XSDT", 1, struct.pack(f"<{len(tables)}Q", *tables)), pointers=places)


def _rsdp(xsdt: int) -> bytes:
    rsdp = struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, OEM_ID, 2, 0, RSDP_SIZE, xsdt, 0)
    # Two checksums: over the first 20 bytes, and over all.
    return _summed(_summed(rsdp[:20], RSDP_SUM) + rsdp[20:], RSDP_EXTENDED_SUM)


def build(platform: Platform, base: int) -> tuple[bytes, int]:
    """The tables as one block to put at guest-physical *base*, and the address of the RSDP in it."""
    image, xsdt = _tables(platform, base, RSDP_ROOM)
    image.data[:RSDP_SIZE] = _rsdp(xsdt)
    return bytes(image.data), base


# ---- for firmware, which puts the tables where it likes ---------------------------------------------------------

TABLES_FILE, RSDP_FILE, LOADER_FILE = "etc/acpi/tables", "etc/acpi/rsdp", "etc/table-loader"
_ALLOCATE, _ADD_POINTER, _ADD_CHECKSUM = 1, 2, 3
_ZONE_HIGH, _ZONE_FSEG = 1, 2
_COMMAND_SIZE = 128


def _command(kind: int, form: str, *fields: bytes | int) -> bytes:
    return struct.pack("<I" + form, kind, *fields).ljust(_COMMAND_SIZE, b"\0")


def firmware_files(platform: Platform) -> dict[str, bytes]:
    """The tables as files of fw_cfg, with the script by which firmware places them.

    The script's commands are QEMU's linker-loader, as SeaBIOS and OVMF implement it: allocate a file, add a file's
    address to a pointer, make a checksum right (whose byte is zero before).
    """
    image, xsdt = _tables(platform, 0, 0)
    tables, rsdp = TABLES_FILE.encode(), RSDP_FILE.encode()
    script = [
        _command(_ALLOCATE, "56sIB", rsdp, 16, _ZONE_FSEG),
        _command(_ALLOCATE, "56sIB", tables, 64, _ZONE_HIGH),
        *(_command(_ADD_POINTER, "56s56sIB", tables, tables, offset, size) for offset, size in image.pointers),
        _command(_ADD_POINTER, "56s56sIB", rsdp, tables, RSDP_XSDT, 8),
    ]
    for start, size in image.sums:
        image.data[start + TABLE_SUM] = 0
        script.append(_command(_ADD_CHECKSUM, "56sIII", tables, start + TABLE_SUM, start, size))
    pointer = bytearray(_rsdp(xsdt))
    pointer[RSDP_SUM] = pointer[RSDP_EXTENDED_SUM] = 0
    script.append(_command(_ADD_CHECKSUM, "56sIII", rsdp, RSDP_SUM, 0, 20))
    script.append(_command(_ADD_CHECKSUM, "56sIII", rsdp, RSDP_EXTENDED_SUM, 0, RSDP_SIZE))
    return {TABLES_FILE: bytes(image.data), RSDP_FILE: bytes(pointer), LOADER_FILE: b"".join(script)}
