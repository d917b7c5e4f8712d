"""SeaBIOS boots from IDE: a boot sector, and GRUB from a CD that grub-mkrescue made."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from vmonty import kvm
from vmonty.base.errors import BootImageError
from vmonty.testing.nasm import assemble
from vmonty.vmm import boards, firmware
from vmonty.vmm.block.image import open_image
from vmonty.vmm.firmware import Firmware
from vmonty.vmm.machine import Config
from vmonty.vmm.peripherals import open_cdrom

from ..conftest import Screen

LIMIT_S = 100.0

# Tells by INT 10h what the BIOS says of the drive it came from, reads sector 1 by INT 13h, waits for a key by INT 16h.
BOOT_SECTOR = """
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0x7000
    mov [drive], dl
    mov si, hello
    call print
    mov ah, 0x41                ; are there extensions?
    mov bx, 0x55aa
    mov dl, [drive]
    int 0x13
    jc failed
    mov ah, 0x42                ; extended read of sector 1
    mov si, packet
    mov dl, [drive]
    int 0x13
    jc failed
    mov si, 0x8000
    call print
    mov ax, 0x0301              ; the same text to sector 2, by CHS
    mov bx, 0x8000
    mov cx, 3
    mov dh, 0
    mov dl, [drive]
    int 0x13
    jc failed
    mov ah, 0x88                ; memory above 1 MiB, in KiB
    int 0x15
    jc failed
    cmp ax, 0x3c00
    jb failed
    mov ah, 0
    int 0x16
    mov [typed + 6], al
    mov si, typed
    call print
stop:
    hlt
    jmp stop
failed:
    mov si, bad
    call print
    jmp stop
print:
    lodsb
    test al, al
    jz .done
    mov ah, 0x0e
    mov bx, 7
    int 0x10
    jmp print
.done:
    ret
hello: db 'boot sector', 13, 10, 0
bad: db 'failed', 13, 10, 0
typed: db 'typed ?', 13, 10, 0
drive: db 0
packet: db 16, 0
    dw 1, 0x8000, 0
    dq 1
    times 510 - ($ - $$) db 0
    dw 0xaa55
    db 'sector one', 13, 10, 0
    times 1024 - ($ - $$) db 0
"""
MENU = """
serial --unit=0 --speed=115200
terminal_input serial
terminal_output serial
set timeout=0
menuentry "test" {
  cat /file.txt
  sleep 1000
}
"""


@pytest.fixture(scope="module")
def bios() -> Firmware:
    try:
        return firmware.read("bios")
    except BootImageError as error:
        pytest.skip(str(error))


def test_a_boot_sector(bios: Firmware, screen: Screen, tmp_path: Path) -> None:
    if shutil.which("nasm") is None:
        pytest.skip("nasm is not on this host: apt-get install nasm")
    path = tmp_path / "disk"
    path.write_bytes(assemble(BOOT_SECTOR, org=0x7C00).ljust(8 << 20, b"\0"))
    config = Config(memory=32 << 20, firmware=bios)
    with (
        open_image(path, format="raw") as disk,
        kvm.open("soft") as system,
        boards.create(system, config, screen.write, ide_disks=[disk]) as machine,
    ):
        machine.start()
        screen.wait_for(b"boot sector\r\n", LIMIT_S)
        screen.wait_for(b"sector one\r\n", LIMIT_S)
        machine.terminal.receive(b"k")
        screen.wait_for(b"typed k", LIMIT_S)
    assert path.read_bytes()[1024:1034] == b"sector one"


def grub_image(tmp_path: Path) -> Path:
    """An image with GRUB: an ISO, whose first sector is a boot sector for disks also."""
    for program, package in (("grub-mkrescue", "grub-common"), ("xorriso", "xorriso"), ("mformat", "mtools")):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not on this host: apt-get install {package}")
    if not Path("/usr/lib/grub/i386-pc").is_dir():
        pytest.skip("GRUB for a BIOS is not on this host: apt-get install grub-pc-bin")
    tree = tmp_path / "tree"
    (tree / "boot" / "grub").mkdir(parents=True)
    (tree / "boot" / "grub" / "grub.cfg").write_text(MENU)
    (tree / "file.txt").write_text("a file on the CD\n")
    iso = tmp_path / "iso"
    modules = "--install-modules=normal serial terminal echo cat sleep iso9660 biosdisk test"
    subprocess.run(
        ["grub-mkrescue", "-d", "/usr/lib/grub/i386-pc", modules, "-o", iso, tree],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return iso


@pytest.mark.parametrize("board", ["pc", "q35"])
def test_a_cd(bios: Firmware, screen: Screen, tmp_path: Path, board: str) -> None:
    """El Torito: the BIOS starts GRUB, which reads its menu and a file by INT 13h."""
    config = Config(memory=64 << 20, firmware=bios, machine=board)
    with (
        open_cdrom(grub_image(tmp_path)) as medium,
        kvm.open("soft") as system,
        boards.create(system, config, screen.write, cdroms=[medium]) as machine,
    ):
        machine.start()
        screen.wait_for(b"Booting from DVD/CD...", LIMIT_S)
        screen.wait_for(b"a file on the CD", LIMIT_S)


@pytest.mark.parametrize(("board", "bus"), [("pc", "ide"), ("pc", "virtio"), ("q35", "ide")])
def test_grub_on_a_disk(bios: Firmware, screen: Screen, tmp_path: Path, board: str, bus: str) -> None:
    """By its master boot record, on each kind of disk that SeaBIOS knows."""
    config = Config(memory=64 << 20, firmware=bios, machine=board)
    with (
        open_image(grub_image(tmp_path), format="raw", read_only=True) as disk,
        kvm.open("soft") as system,
        boards.create(
            system, config, screen.write, [disk] if bus == "virtio" else [], [disk] if bus == "ide" else [],
        ) as machine,
    ):  # fmt: skip
        machine.start()
        screen.wait_for(b"Booting from Hard Disk...", LIMIT_S)
        screen.wait_for(b"a file on the CD", LIMIT_S)


def broken_volume(kind: str) -> bytes:
    """A CD that says it boots, and does not."""
    if kind == "noise":
        return random.Random(6).randbytes(64 * 2048 + 700)
    volume = bytearray(64 * 2048)
    record, catalogue = 17 * 2048, 20 * 2048
    volume[record : record + 32] = b"\0CD001\1EL TORITO SPECIFICATION".ljust(32, b"\0")
    lies_at = 0x7FFF_FFFF if kind == "no catalogue" else 20
    volume[record + 0x47 : record + 0x4B] = lies_at.to_bytes(4, "little")
    validation = bytearray(b"\1".ljust(30, b"\0") + b"\x55\xaa")
    words = sum(int.from_bytes(validation[n : n + 2], "little") for n in range(0, 32, 2))
    validation[28:30] = (-words & 0xFFFF).to_bytes(2, "little")
    # A boot image without emulation, 65535 sectors of it, beyond the end.
    entry = b"\x88\0\0\0\0\0\xff\xff" + (0x0FFF_FFFF).to_bytes(4, "little")
    volume[catalogue : catalogue + 64] = bytes(validation) + entry.ljust(32, b"\0")
    return bytes(volume[: record + 100] if kind == "cut" else volume)


@pytest.mark.parametrize("kind", ["no catalogue", "no image", "cut", "noise"])
def test_a_cd_that_is_none(bios: Firmware, screen: Screen, tmp_path: Path, kind: str) -> None:
    """The BIOS says what is wrong with it and goes on."""
    iso = tmp_path / "iso"
    iso.write_bytes(broken_volume(kind))
    config = Config(memory=32 << 20, firmware=bios)
    with (
        open_cdrom(iso) as medium,
        kvm.open("soft") as system,
        boards.create(system, config, screen.write, cdroms=[medium]) as machine,
    ):
        machine.start()
        screen.wait_for(b"Could not read from CDROM", LIMIT_S)
        screen.wait_for(b"No bootable device.", LIMIT_S)
