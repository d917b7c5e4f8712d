"""Firmware: what is refused, and Debian's SeaBIOS to the end of its boot attempts."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from vmonty import kvm
from vmonty.base.errors import BootImageError, UsageError
from vmonty.kvm.api import System
from vmonty.vmm import boards, firmware
from vmonty.vmm.firmware import BootOptions, Firmware
from vmonty.vmm.machine import Config

from .conftest import Screen
from .fake_kvm import FakeKvm

BIOS_LIMIT_S, UEFI_LIMIT_S = 60.0, 120.0
ROM = Firmware("a test's", bytes(0x1_0000))


@pytest.mark.parametrize("size", [0, 1, 0xFFFF, 0x1_8000, (16 << 20) + 0x1_0000])
def test_sizes_that_no_rom_has(size: int, tmp_path: Path) -> None:
    path = tmp_path / "rom"
    path.write_bytes(bytes(size))
    with pytest.raises(BootImageError, match="multiple of 64 KiB"):
        firmware.read(str(path))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BootImageError, match="cannot be read: No such file"):
        firmware.read(str(tmp_path / "rom"))
    with pytest.raises(BootImageError, match="Is a directory"):
        firmware.read(str(tmp_path))


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(firmware.NAMES, "bios", ("seabios", ("/nowhere/bios.bin",)))
    with pytest.raises(BootImageError, match="apt-get install seabios"):
        firmware.read("bios")


def test_boot_options() -> None:
    assert BootOptions.parse("") == BootOptions()
    assert BootOptions.parse("menu=on,wait=250") == BootOptions(menu=True, wait_ms=250)


@pytest.mark.parametrize("text", ["menu=maybe", "wait=-1", "wait=65536", "wait=", "fast", "wait=1.5"])
def test_bad_boot_options(text: str) -> None:
    with pytest.raises(UsageError, match="is no option"):
        BootOptions.parse(text)


def test_a_kernel_or_firmware(image: bytes) -> None:
    for fields in ({}, {"kernel": image, "firmware": ROM}):
        with pytest.raises(UsageError, match="give one of the two"):
            Config(**fields)  # type: ignore[arg-type]


def test_a_microvm_has_none() -> None:
    with (
        System(FakeKvm()) as system,
        boards.create(system, Config(firmware=ROM, machine="microvm"), bytes) as machine,
        pytest.raises(UsageError, match="has no firmware"),
    ):
        machine.start()


@pytest.fixture(scope="module")
def bios() -> Firmware:
    try:
        return firmware.read("bios")
    except BootImageError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("board", "cpus"), [("pc", 1), ("q35", 3)])
def test_seabios_looks_for_a_disk(bios: Firmware, screen: Screen, tmp_path: Path, board: str, cpus: int) -> None:
    """It tells by its debug port what it found; on the serial console its menu opens, and it ends without a disk."""
    log = tmp_path / "debug"
    config = Config(
        machine=board, cpus=cpus, memory=64 << 20, firmware=bios, boot=BootOptions(menu=True, wait_ms=3000),
        devices=(f"isa-debugcon,file={log}",),
    )  # fmt: skip
    with kvm.open("soft") as system, boards.create(system, config, screen.write) as machine:
        machine.start()
        screen.wait_for(b"Press ESC for boot menu.", BIOS_LIMIT_S)
        machine.terminal.receive(b"\x1b")
        screen.wait_for(b"Select boot device:", BIOS_LIMIT_S)
        # For its first second and a half the menu takes no ESC.
        for _ in range(20):
            if screen.wait_until(lambda text: b"Booting from" in text, 2.0):
                break
            machine.terminal.receive(b"\x1b")
        screen.wait_for(b"No bootable device.", BIOS_LIMIT_S)
    assert b"SeaBIOS (version " in screen.text
    said = log.read_text()
    chipset = {"pc": "i440fx", "q35": "q35"}[board]
    assert f"Running on QEMU ({chipset})" in said
    assert f"Found {cpus} cpu(s) max supported {cpus} cpu(s)" in said
    assert "qemu/e820: addr 0x0000000000000000 len 0x0000000004000000 [RAM]" in said
    # It put our ACPI tables into RAM and found its way through them.
    assert re.search(r"ACPI: parse DSDT at 0x[0-9a-f]+ \(len \d{4}\)", said)
    assert "Copying SMBIOS" in said
    assert "ERROR" not in said.upper()


def test_ovmf_reaches_its_shell(screen: Screen, tmp_path: Path) -> None:
    """On q35, by the serial console, where it also reads what is typed; its variables go to their file."""
    store = tmp_path / "variables"
    if not Path("/usr/share/OVMF/OVMF_CODE.fd").exists():
        pytest.skip("OVMF is not on this host: apt-get install ovmf")
    uefi = firmware.read("uefi", store)
    config = Config(machine="q35", memory=256 << 20, firmware=uefi)
    with kvm.open("soft") as system, boards.create(system, config, screen.write) as machine:
        machine.start()
        screen.wait_for(b"UEFI Interactive Shell", UEFI_LIMIT_S)
        screen.wait_for(b"to skip", UEFI_LIMIT_S)
        machine.terminal.receive(b"\x1b")
        screen.wait_for(b"Shell> ", UEFI_LIMIT_S)
        machine.terminal.receive(b"ver\r")
        screen.wait_for(b"UEFI v2", UEFI_LIMIT_S)
        assert "kept".encode("utf-16-le") not in store.read_bytes()
        machine.terminal.receive(b"set kept 4711\r")
        machine.terminal.receive(b"echo do%kept%ne\r")
        screen.wait_for(b"do4711ne", UEFI_LIMIT_S)
        with pytest.raises(BootImageError, match="in use by another machine"):
            firmware.open_store(store)
    assert "kept".encode("utf-16-le") in store.read_bytes()
    assert "4711".encode("utf-16-le") in store.read_bytes()
    firmware.open_store(store).close()


def test_ovmf_of_4_mib_reaches_its_shell(screen: Screen, tmp_path: Path) -> None:
    """Its early code maps all that the processor can address, in pages of 2 MiB and tables that must fit into RAM."""
    template = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
    if not template.exists():
        pytest.skip("OVMF is not on this host: apt-get install ovmf")
    store = tmp_path / "variables"
    shutil.copy(template, store)
    uefi = firmware.read("uefi", store)
    assert uefi.name == "/usr/share/OVMF/OVMF_CODE_4M.fd", "the store's size tells which build it belongs to"
    config = Config(machine="q35", memory=256 << 20, firmware=uefi)
    with kvm.open("soft") as system, boards.create(system, config, screen.write) as machine:
        machine.start()
        screen.wait_for(b"UEFI Interactive Shell", UEFI_LIMIT_S)


def test_halves_that_do_not_belong_together(tmp_path: Path) -> None:
    volume = b"\0" * 0x28 + b"_FVH"
    code, store = tmp_path / "code", tmp_path / "variables"
    code.write_bytes(volume.ljust(0x37_C000, b"\0"))
    store.write_bytes(bytes(0x2_0000))
    with pytest.raises(BootImageError, match="together they must be whole MiB"):
        firmware.read(str(code), store)
    store.write_bytes(bytes(0x8_4000))
    assert firmware.read(str(code), store).variables == store
    with pytest.raises(BootImageError, match=r"multiple of 64 KiB.*--nvram"):
        firmware.read(str(code))


@pytest.mark.parametrize("size", [0, 100, 16 << 20])
def test_variable_stores_that_no_flash_has(tmp_path: Path, size: int) -> None:
    rom, store = tmp_path / "rom", tmp_path / "variables"
    rom.write_bytes(bytes(0x1_0000))
    store.write_bytes(bytes(size))
    with pytest.raises(BootImageError, match="it must be a multiple of 4 KiB"):
        firmware.read(str(rom), store)
    with pytest.raises(BootImageError, match="cannot be read: No such file"):
        firmware.read(str(rom), tmp_path / "none")
