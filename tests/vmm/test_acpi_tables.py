"""The ACPI tables, read as an operating system reads them."""

from __future__ import annotations

import itertools
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmonty.kvm.api import System
from vmonty.vmm import boards
from vmonty.vmm.boot import acpi
from vmonty.vmm.hw import acpi_ged, acpi_pm
from vmonty.vmm.machine import Config

from . import kernels
from .fake_kvm import FakeKvm
from .pci_driver import Latch

BASE = 0xE_0000
PLATFORM = acpi.Platform(cpus=3, pm_base=0x600, sci=9, hpet=0xFED0_0000, hpet_id=0x8086_A201, ecam=0xB000_0000)
REDUCED = acpi.Platform(cpus=2, ged=0xFEA0_0000, keyboard_controller=False, rtc=False)


class Tables:
    """All tables by signature, found from the RSDP on; every checksum and length is verified on the way."""

    def __init__(self, platform: acpi.Platform, base: int = BASE) -> None:
        self.base = base
        self.image, self.rsdp = acpi.build(platform, base)
        pointer = self.bytes(self.rsdp, 36)
        assert pointer[:8] == b"RSD PTR "
        assert sum(pointer[:20]) & 0xFF == 0, "the checksum of ACPI 1.0"
        assert sum(pointer) & 0xFF == 0
        self.revision, rsdt, length, xsdt = struct.unpack_from("<BIIQ", pointer, 15)
        assert (self.revision, rsdt, length) == (2, 0, 36)
        self.found: dict[str, bytes] = {}
        for (address,) in struct.iter_unpack("<Q", self.add(xsdt)[36:]):
            self.add(address)
        self.add(struct.unpack_from("<Q", self.found["FACP"], 140)[0])
        self.facs = struct.unpack_from("<I", self.found["FACP"], 36)[0]

    def bytes(self, address: int, size: int) -> bytes:
        at = address - self.base
        assert 0 <= at <= len(self.image) - size
        return self.image[at : at + size]

    def add(self, address: int) -> bytes:
        assert address % 16 == 0
        signature, length = struct.unpack("<4sI", self.bytes(address, 8))
        table = self.bytes(address, length)
        assert sum(table) & 0xFF == 0, signature
        oem, oem_table, _, creator = struct.unpack_from("<6s8sI4s", table, 10)
        assert (oem, oem_table, creator) == (acpi.OEM_ID, acpi.OEM_TABLE_ID, acpi.CREATOR_ID)
        self.found[signature.decode()] = table
        return table


@pytest.fixture(scope="module")
def tables() -> Tables:
    return Tables(PLATFORM)


def test_every_pointer_resolves(tables: Tables) -> None:
    assert set(tables.found) == {"XSDT", "FACP", "APIC", "DSDT", "HPET", "MCFG"}
    assert tables.bytes(tables.facs, 8) == b"FACS" + struct.pack("<I", 64)
    assert tables.facs % 64 == 0
    assert tables.rsdp == BASE
    assert len(tables.image) < 0x2_0000, "they end below 1 MiB"


def test_tables_do_not_overlap(tables: Tables) -> None:
    spans = sorted((tables.image.index(table), len(table)) for table in tables.found.values())
    assert spans[0][0] >= 36
    assert all(start + size <= following for (start, size), (following, _) in itertools.pairwise(spans))


def test_fadt(tables: Tables) -> None:
    table = tables.found["FACP"]
    assert (len(table), table[8]) == (276, 6)
    dsdt = struct.unpack_from("<I", table, 40)[0]
    assert struct.unpack_from("<Q", table, 140)[0] == dsdt
    assert tables.bytes(dsdt, 4) == b"DSDT"
    sci, smi_command = struct.unpack_from("<HI", table, 46)
    assert (sci, smi_command) == (9, 0), "no SMI: ACPI mode is on for good"
    blocks = struct.unpack_from("<8I", table, 56)
    assert blocks == (0x600, 0, 0x604, 0, 0, 0x608, 0, 0)
    assert tuple(table[88:92]) == (4, 2, 0, 4)
    assert struct.unpack_from("<HH", table, 96) == (0xFFF, 0xFFF)
    flags = struct.unpack_from("<I", table, 112)[0]
    for flag in (acpi.FADT_WBINVD, acpi.FADT_TIMER_32_BITS, acpi.FADT_RESET_REGISTER):
        assert flags & flag
    assert struct.unpack_from("<H", table, 109)[0] == acpi.BOOT_LEGACY_DEVICES | acpi.BOOT_8042 | acpi.BOOT_NO_VGA


def test_fadt_addresses(tables: Tables) -> None:
    table = tables.found["FACP"]
    addresses = {offset: struct.unpack_from("<BBBBQ", table, offset) for offset in (116, 148, 172, 208)}
    assert addresses[116] == (acpi.IO_SPACE, 8, 0, 1, 0x64)
    assert table[128] == 0xFE
    assert addresses[148] == (acpi.IO_SPACE, 32, 0, 2, 0x600 + acpi_pm.PM1_STATUS)
    assert addresses[172] == (acpi.IO_SPACE, 16, 0, 2, 0x600 + acpi_pm.PM1_CONTROL)
    assert addresses[208] == (acpi.IO_SPACE, 32, 0, 3, 0x600 + acpi_pm.PM_TIMER)
    unused = [offset for offset in range(160, 268, 12) if offset not in addresses]
    assert all(table[offset : offset + 12] == bytes(12) for offset in unused)


def entries(madt: bytes) -> list[tuple[int, bytes]]:
    """(type, body) of each interrupt controller structure."""
    found, at = [], 44
    while at < len(madt):
        kind, length = madt[at : at + 2]
        assert length >= 2
        found.append((kind, madt[at + 2 : at + length]))
        at += length
    assert at == len(madt)
    return found


def test_madt(tables: Tables) -> None:
    table = tables.found["APIC"]
    assert struct.unpack_from("<II", table, 36) == (acpi.LOCAL_APIC_ADDRESS, acpi.MADT_PCAT_COMPAT)
    found = entries(table)
    assert [struct.unpack("<BBI", body) for kind, body in found if kind == 0] == [(n, n, 1) for n in range(3)]
    ((_, io_apic),) = [entry for entry in found if entry[0] == 1]
    assert struct.unpack("<BBII", io_apic)[2:] == (acpi.IO_APIC_ADDRESS, 0)
    overrides = [struct.unpack("<BBIH", body) for kind, body in found if kind == 2]
    assert overrides == [(0, 0, 2, 0), (0, 9, 9, acpi.ACTIVE_HIGH_LEVEL)]
    ((_, nmi),) = [entry for entry in found if entry[0] == 4]
    assert struct.unpack("<BHB", nmi) == (0xFF, 0, 1)


def test_dsdt_names_the_soft_off_type(tables: Tables) -> None:
    body = tables.found["DSDT"][36:]
    assert body.startswith(b"\x08\\_S5_\x12")
    length, count = body[7], body[8]
    assert 7 + length == len(body), "a package's length counts itself"
    assert count == 4
    assert tuple(body[9:]) == (0x0A, acpi_pm.SLEEP_TYPE_S5, 0x0A, acpi_pm.SLEEP_TYPE_S5, 0, 0)


@given(
    cpus=st.integers(1, 255), pm_base=st.integers(0, 0xFFF0), sci=st.integers(3, 15), page=st.integers(0, 0x1F),
)  # fmt: skip
def test_any_platform(cpus: int, pm_base: int, sci: int, page: int) -> None:
    tables = Tables(acpi.Platform(cpus=cpus, pm_base=pm_base, sci=sci), 0xE_0000 + page * 4096)
    processors = [body for kind, body in entries(tables.found["APIC"]) if kind == 0]
    assert len(processors) == len(set(processors)) == cpus
    assert struct.unpack_from("<I", tables.found["FACP"], 64)[0] == pm_base + acpi_pm.PM1_CONTROL


def test_hardware_reduced() -> None:
    tables = Tables(REDUCED)
    fadt = tables.found["FACP"]
    assert tables.facs == 0
    assert struct.unpack_from("<I", fadt, 112)[0] & acpi.FADT_HARDWARE_REDUCED
    assert struct.unpack_from("<H", fadt, 109)[0] & acpi.BOOT_NO_RTC
    assert fadt[56:96] == bytes(40), "no PM blocks"
    addresses = [struct.unpack_from("<BBBBQ", fadt, offset) for offset in (116, 244, 256)]
    assert [(space, address) for space, *_, address in addresses] == [
        (acpi.SYSTEM_MEMORY, 0xFEA0_0000 + offset)
        for offset in (acpi_ged.RESET, acpi_ged.SLEEP_CONTROL, acpi_ged.SLEEP_STATUS)
    ]
    madt = tables.found["APIC"]
    assert struct.unpack_from("<I", madt, 40)[0] == 0, "no PIC"
    assert not [entry for entry in entries(madt) if entry[0] == 2]


def test_hpet_and_mcfg(tables: Tables) -> None:
    identity, space, *_, address = struct.unpack_from("<IBBBBQ", tables.found["HPET"], 36)
    assert (identity, space, address) == (0x8086_A201, acpi.SYSTEM_MEMORY, 0xFED0_0000)
    assert struct.unpack_from("<QHBB", tables.found["MCFG"], 44) == (0xB000_0000, 0, 0, 255)


def disassemble(table: bytes, folder: Path) -> str:
    """The reference disassembler's text; it must have nothing to complain of."""
    if shutil.which("iasl") is None:
        pytest.skip("iasl is not on this host: apt-get install acpica-tools")
    folder.joinpath("table.aml").write_bytes(table)
    command = ["iasl", "-d", "table.aml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    text = folder.joinpath("table.dsl").read_text()
    for complaint in ("Error", "Invalid", "Incorrect", "Unknown", "**** "):
        assert complaint not in done.stdout + done.stderr + text, text
    return text


EXPECTED = {
    "FACP": "00000604", "APIC": "Local Apic Address : FEE00000", "DSDT": r"Name (\_S5, Package (0x04)",
    "HPET": "00000000FED00000", "MCFG": "00000000B0000000",
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_the_reference_disassembler_takes_them(tables: Tables, name: str, tmp_path: Path) -> None:
    assert EXPECTED[name] in disassemble(tables.found[name], tmp_path)


def test_the_reference_disassembler_takes_a_hardware_reduced_fadt(tmp_path: Path) -> None:
    assert "Hardware Reduced (V5) : 1" in disassemble(Tables(REDUCED).found["FACP"], tmp_path)


# ---- the boards' own -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("board", boards.BOARDS)
def test_a_boards_dsdt_compiles_again_without_a_warning(board: str, image: bytes, tmp_path: Path) -> None:
    with System(FakeKvm()) as system:
        machine = boards.create(system, Config(image, memory=kernels.MEMORY, cpus=2, machine=board), bytes)
        with machine:
            if board == "microvm":
                for _ in range(2):
                    machine.add_mmio_device(lambda slot: Latch())
            platform = machine.platform()
    disassemble(Tables(platform).found["DSDT"], tmp_path)
    command = ["iasl", "table.dsl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stdout
    assert "0 Errors, 0 Warnings" in done.stdout, done.stdout


def place(files: dict[str, bytes], bases: dict[str, int]) -> dict[str, bytes]:
    """What firmware makes of the files by the loader script, when it puts them at *bases*."""
    placed = {name: bytearray(files[name]) for name in bases}
    allocated = set()
    script = files[acpi.LOADER_FILE]
    assert len(script) % 128 == 0
    for at in range(0, len(script), 128):
        kind, first = struct.unpack_from("<I56s", script, at)
        name = first.rstrip(b"\0").decode()
        if kind == 1:
            assert struct.unpack_from("<I", script, at + 60)[0] <= 64
            allocated.add(name)
        elif kind == 2:
            source, offset, size = struct.unpack_from("<56sIB", script, at + 60)
            value = int.from_bytes(placed[name][offset : offset + size], "little")
            value += bases[source.rstrip(b"\0").decode()]
            placed[name][offset : offset + size] = value.to_bytes(size, "little")
        else:
            assert kind == 3
            offset, start, length = struct.unpack_from("<III", script, at + 60)
            assert placed[name][offset] == 0
            placed[name][offset] = -sum(placed[name][start : start + length]) & 0xFF
    assert allocated == set(bases)
    return {name: bytes(data) for name, data in placed.items()}


@pytest.mark.parametrize("platform", [PLATFORM, REDUCED], ids=["full", "reduced"])
def test_firmware_places_the_same_tables(platform: acpi.Platform) -> None:
    base = 0x7FFE_0000
    files = acpi.firmware_files(platform)
    placed = place(files, {acpi.TABLES_FILE: base, acpi.RSDP_FILE: 0xF_0000})
    direct, _ = acpi.build(platform, base - acpi.RSDP_ROOM)
    assert placed[acpi.TABLES_FILE] == direct[acpi.RSDP_ROOM :]
    assert placed[acpi.RSDP_FILE] == direct[: acpi.RSDP_SIZE]
