"""Boot order: what firmware is told, and what SeaBIOS starts from."""

from __future__ import annotations

import contextlib
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from vmonty import kvm
from vmonty.base.errors import BootImageError, UsageError
from vmonty.kvm.api import System
from vmonty.testing.nasm import assemble
from vmonty.vm.build import Build
from vmonty.vm.plan import Plan
from vmonty.vmm import boards, firmware
from vmonty.vmm.block.image import open_image
from vmonty.vmm.bootorder import BootOrder, check_index, cmos_registers
from vmonty.vmm.firmware import BootOptions, Firmware
from vmonty.vmm.hw import fw_cfg
from vmonty.vmm.machine import Config, Machine
from vmonty.vmm.optionrom import IPXE_VIRTIO, OptionRom
from vmonty.vmm.peripherals import Cdrom, Disk, Network, open_cdrom

from . import bootable
from .conftest import Screen
from .fake_kvm import FakeKvm

LIMIT_S = 100.0
ROM = Firmware("a test's", bytes(0x1_0000))


def test_options() -> None:
    parsed = BootOptions.parse("order=dc,once=n,menu=on,strict=on,wait=5")
    assert parsed == BootOptions(menu=True, wait_ms=5, order="dc", once="n", strict=True)
    assert parsed.first().order == "n"
    assert BootOptions.parse("order=d").first().order == "d"


@pytest.mark.parametrize("text", ["order=", "order=x", "order=cc", "order=acdn", "once=cdx"])
def test_orders_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--boot: the order"):
        BootOptions.parse(text)


@pytest.mark.parametrize("text", ["", "-1", "first", "1.5", str(1 << 31)])
def test_indexes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--disk: bootindex="):
        check_index("--disk", text)


def test_cmos_has_three_nibbles() -> None:
    assert cmos_registers("") == {0x3D: 0x12, 0x38: 0x31}
    assert cmos_registers("dcn") == {0x3D: 0x23, 0x38: 0x41}
    assert cmos_registers("n") == {0x3D: 0x04, 0x38: 0x01}


def test_the_file() -> None:
    order = BootOrder()
    assert order.file() == b""
    assert order.file(strict=True) == b"HALT\0"
    order.add("c", "/disk")
    order.add("n", "/card", 2)
    order.add("d", "/disc")
    order.add("c", "/second", 1)
    assert order.file() == b"/second\n/card\0"
    assert order.file("dcn", strict=True) == b"/second\n/card\n/disc\n/disk\nHALT\0"
    with pytest.raises(UsageError, match="bootindex=2 is given twice"):
        order.add("c", "/third", 2)


def published(machine: Machine, name: str) -> bytes:
    """A file of fw_cfg, as a guest finds it."""
    items: Any = machine.fw_cfg._items  # type: ignore[attr-defined]
    directory = items[fw_cfg.FILE_DIRECTORY]
    for at in range(4, len(directory), 64):
        size, key, _, label = struct.unpack_from(">IHH56s", directory, at)
        if label.rstrip(b"\0").decode() == name:
            assert len(items[key]) == size
            return bytes(items[key])
    return b""


def test_devices_have_open_firmware_paths(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    for board, ide, disc in (
        ("pc", "/pci@i0cf8/ide@1,1/drive@0/disk@0", "/pci@i0cf8/ide@1,1/drive@1/disk@0"),
        ("q35", "/pci@i0cf8/pci8086,2922@1f,2/drive@0/disk@0", "/pci@i0cf8/pci8086,2922@1f,2/drive@2/disk@0"),
    ):
        with (
            open_image(path, format="raw", read_only=True) as first,
            open_image(path, format="raw", read_only=True) as second,
            open_cdrom(path) as medium,
            System(FakeKvm()) as system,
            boards.create(
                system, Config(firmware=ROM, machine=board, memory=64 << 20, boot=BootOptions(order="dc")), bytes,
                disks=[first], ide_disks=[second], cdroms=[medium], networks=[Network.parse("user,bootindex=7")],
                boot_index={first: 9},
            ) as machine,
        ):  # fmt: skip
            machine.publish()
            lines = published(machine, "bootorder").rstrip(b"\0").decode().split("\n")
            assert lines[0].startswith("/pci@i0cf8/ethernet@")
            assert lines[0].endswith("/ethernet-phy@0")
            assert lines[1].startswith("/pci@i0cf8/scsi@")
            assert lines[1].endswith("/disk@0,0")
            assert lines[2:] == [disc, ide]


def test_options_of_media() -> None:
    assert Disk.parse("d.img,bootindex=3,if=sata") == Disk(Path("d.img"), interface="sata", boot_index=3)
    assert Cdrom.parse("a,,b.iso,bootindex=0") == Cdrom(Path("a,b.iso"), 0)
    assert Network.parse("user,bootindex=1,romfile=").rom == Path()
    for text in ("x.iso,colour=red", "x.iso,bootindex=x", ""):
        with pytest.raises(UsageError, match="--cdrom"):
            Cdrom.parse(text)


def test_option_roms_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "rom"
    with pytest.raises(UsageError, match="cannot be read"):
        OptionRom.parse(str(path))
    path.write_bytes(b"\x55\xaa")
    with pytest.raises(UsageError, match="is no option ROM"):
        OptionRom.parse(str(path))
    path.write_bytes(b"\x55\xaa" + bytes(510))
    assert OptionRom.parse(f"{path},bootindex=4").boot_path == "/rom@genroms/rom"
    with pytest.raises(UsageError, match="there is: bootindex"):
        OptionRom.parse(f"{path},fast")
    longer = path.rename(tmp_path / ("x" * 60))
    with pytest.raises(UsageError, match="name is too long"):
        OptionRom.parse(str(longer))


# ---- SeaBIOS ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bios() -> Firmware:
    if shutil.which("nasm") is None:
        pytest.skip("nasm is not on this host: apt-get install nasm")
    try:
        return firmware.read("bios")
    except BootImageError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("board", "options", "indexes", "first"),
    [
        ("pc", "", {}, "ide"),
        ("pc", "order=d", {}, "disc"),
        ("q35", "order=dc", {}, "disc"),
        ("q35", "order=cd", {}, "virtio"),
        ("pc", "", {"ide": 0}, "ide"),
        ("q35", "", {"sata": 5, "disc": 6}, "sata"),
        ("q35", "order=c", {"disc": 1}, "disc"),
        ("pc", "", {"sata": 0}, "sata"),
    ],
)
def test_what_seabios_starts_from(
    bios: Firmware, screen: Screen, tmp_path: Path, board: str, options: str, indexes: dict[str, int], first: str
) -> None:
    for name in ("virtio", "ide", "sata"):
        (tmp_path / name).write_bytes(bootable.disk(name))
    (tmp_path / "disc").write_bytes(bootable.disc("disc"))
    config = Config(machine=board, memory=32 << 20, firmware=bios, boot=BootOptions.parse(options))
    with (
        open_image(tmp_path / "virtio", format="raw") as virtio,
        open_image(tmp_path / "ide", format="raw") as ide,
        open_image(tmp_path / "sata", format="raw") as sata,
        open_cdrom(tmp_path / "disc") as disc,
        kvm.open("soft") as system,
    ):
        images = {"virtio": virtio, "ide": ide, "sata": sata, "disc": disc}
        with boards.create(
            system, config, screen.write, [virtio], [ide], [disc], sata_disks=[sata],
            boot_index={images[name]: index for name, index in indexes.items()},
        ) as machine:  # fmt: skip
            machine.start()
            screen.wait_for(b"this is ", LIMIT_S)
            screen.wait_for(f"this is {first}\r\n".encode())


def test_strict_tries_nothing_else(bios: Firmware, screen: Screen, tmp_path: Path) -> None:
    for name in ("empty", "disk"):
        (tmp_path / name).write_bytes(bootable.disk(name) if name == "disk" else bytes(1 << 20))
    config = Config(memory=32 << 20, firmware=bios, boot=BootOptions.parse("strict=on"))
    with (
        open_image(tmp_path / "empty", format="raw") as empty,
        open_image(tmp_path / "disk", format="raw") as disk,
        kvm.open("soft") as system,
        boards.create(system, config, screen.write, [empty, disk], boot_index={empty: 0}) as machine,
    ):
        machine.start()
        screen.wait_for(b"not a bootable disk", LIMIT_S)
        screen.wait_for(b"No bootable device.", LIMIT_S)
    assert b"this is" not in screen.text


def test_a_card_before_a_disk(bios: Firmware, screen: Screen, tmp_path: Path) -> None:
    """iPXE's ROM comes from the card's ROM BAR; without a server it gives up, and the disk is next."""
    if not IPXE_VIRTIO.exists():
        pytest.skip("iPXE's ROMs are not on this host: apt-get install ipxe-qemu")
    (tmp_path / "disk").write_bytes(bootable.disk("disk"))
    config = Config(memory=64 << 20, firmware=bios, boot=BootOptions.parse("order=nc"))
    with (
        open_image(tmp_path / "disk", format="raw") as disk,
        kvm.open("soft") as system,
        boards.create(
            system, config, screen.write, [disk], networks=[Network.parse("user")]
        ) as machine,
    ):  # fmt: skip
        machine.start()
        screen.wait_for(b"iPXE", LIMIT_S)
        screen.wait_for(b"Booting from ROM", LIMIT_S)
        screen.wait_for(b"this is disk", LIMIT_S)
    assert b"Open Source Network Boot Firmware" in screen.text


OPTION_ROM = """
    dw 0xaa55
    db 2                        ; blocks
    jmp init
    times 6 - ($ - $$) db 0
    db 0                        ; balances the sum
init:
    pushad
    push ds
    push cs
    pop ds
    mov si, text
.next:
    lodsb
    test al, al
    jz .done
    mov ah, 0x0e
    mov bx, 7
    int 0x10
    jmp .next
.done:
    pop ds
    popad
    retf
text: db 'a ROM by path', 13, 10, 0
    times 1024 - ($ - $$) db 0
"""


def test_an_option_rom_by_path(bios: Firmware, screen: Screen, tmp_path: Path) -> None:
    rom = bytearray(assemble(OPTION_ROM, org=0))
    rom[6] = -sum(rom) & 0xFF
    path = tmp_path / "mine.rom"
    path.write_bytes(rom)
    config = Config(memory=32 << 20, firmware=bios, option_roms=(OptionRom.parse(str(path)),))
    with kvm.open("soft") as system, boards.create(system, config, screen.write) as machine:
        machine.start()
        screen.wait_for(b"a ROM by path\r\n", LIMIT_S)


def test_once_is_for_the_first_machine(tmp_path: Path) -> None:
    path = tmp_path / "rom"
    path.write_bytes(ROM.code)
    plan = Plan(firmware=str(path), boot="order=c,once=d", memory=32 << 20)
    with contextlib.closing(Build(plan)) as build, System(FakeKvm()) as system:
        for order, nibbles in (("d", 3), ("c", 2)):
            with build.machine(system, bytes) as machine:
                assert machine.config.boot.order == order
                assert machine.legacy.cmos.load(0x3D, 1)[0] == nibbles  # type: ignore[attr-defined]
