"""A DOS-like program calls SeaBIOS: INT 10h to 1Ah, in real mode, on both vendors' processors."""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from vmonty import kvm
from vmonty.testing.nasm import assemble
from vmonty.vmm import boards, firmware
from vmonty.vmm.block.image import open_image
from vmonty.vmm.display.console import type_text
from vmonty.vmm.machine import Config

from ..conftest import Screen

BIOS = Path("/usr/share/seabios/bios-256k.bin")
SOURCE = Path(__file__).with_name("calls.asm")
LIMIT_S = 100.0
MEMORY, DISK = 32 << 20, 8 << 20
CF, ZF = 0x01, 0x40
TYPED = "aZ5\n\t\x1b"


class Call(NamedTuple):
    """Registers after a call."""

    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int

    @property
    def ax(self) -> int:
        return self.eax & 0xFFFF

    @property
    def ah(self) -> int:
        return self.eax >> 8 & 0xFF

    @property
    def failed(self) -> bool:
        return bool(self.flags & CF)


Calls = dict[str, list[Call]]


@pytest.fixture(
    scope="module",
    params=[("soft", "ide"), ("soft", "virtio"), ("soft-svm", "ide"), ("soft-vmx-restricted", "ide")],
    ids=lambda pair: "-".join(pair),
)
def calls(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Calls, bytes]:
    """What the program told, and the disk afterwards."""
    provider, interface = request.param
    if shutil.which("nasm") is None:
        pytest.skip("nasm is not on this host: apt-get install nasm")
    if not BIOS.exists():
        pytest.skip("seabios is not on this host: apt-get install seabios")
    folder = tmp_path_factory.mktemp(f"{provider}-{interface}")
    disk, log = folder / "disk", folder / "log"
    log.touch()
    disk.write_bytes(assemble(SOURCE.read_text(), org=0x7C00).ljust(DISK, b"\0"))
    config = Config(memory=MEMORY, firmware=firmware.read("bios"), devices=("VGA", f"isa-debugcon,file={log}"))
    with contextlib.ExitStack() as stack:
        image = stack.enter_context(open_image(disk, format="raw"))
        system = stack.enter_context(kvm.open(provider))

        virtio, ide = ([], [image]) if interface == "ide" else ([image], [])
        machine = stack.enter_context(boards.create(system, config, Screen().write, virtio, ide))
        machine.start()
        wait_for(log, "\ntype-now ")
        type_text(machine, TYPED)
        said = wait_for(log, "\nend ")
    told: Calls = {}
    for line in said.splitlines():
        if found := re.fullmatch(r"([a-z0-9-]+)((?: [0-9a-f]{8}){5})", line):
            told.setdefault(found[1], []).append(Call(*(int(word, 16) for word in found[2].split())))
    return told, disk.read_bytes()


def wait_for(log: Path, text: str) -> str:
    end = time.monotonic() + LIMIT_S
    while text not in (said := log.read_text(errors="replace")):
        assert time.monotonic() < end, said
        time.sleep(0.1)
    return said


@pytest.fixture
def told(calls: tuple[Calls, bytes]) -> dict[str, Call]:
    """The last call of each name."""
    return {name: made[-1] for name, made in calls[0].items()}


def test_text_modes(told: dict[str, Call]) -> None:
    for name in ("mode", "mode-again"):
        assert told[name].ax == 80 << 8 | 3
        assert told[name].ebx >> 8 & 0xFF == 0
    assert (told["cursor"].ecx & 0xFFFF, told["cursor"].edx & 0xFFFF) == (0x0607, 0x0A14)
    assert told["character"].ax == 0x1E5A
    assert told["text-memory"].eax == 0x1E5A_1E5A
    assert (told["scroll"].eax, told["scroll"].ebx) == (0x1E5A_1E5A, 0x0720_0720)
    assert told["string"].eax == 0x2F64_2F63
    assert told["cursor-after"].edx & 0xFFFF == 0x0504
    assert told["teletype"].eax == 0x2F64_2F63


def test_the_adapter(told: dict[str, Call]) -> None:
    assert (told["display"].eax & 0xFF, told["display"].ebx & 0xFF) == (0x1A, 8)  # a VGA with a colour screen
    assert told["ega"].ebx & 0xFFFF == 3
    font = told["font"]
    assert (font.ecx & 0xFFFF, font.edx & 0xFF) == (16, 24)
    assert font.eax not in (0, 0xFFFF_FFFF)


def test_graphics(told: dict[str, Call]) -> None:
    assert told["pixel-256"].eax & 0xFF == 0x2A
    assert told["frame-256"].eax == 0x2A
    assert told["pixel-16"].eax & 0xFF == 0x0D
    assert told["vbe"].ax == told["vbe-set"].ax == told["vbe-mode"].ax == told["vbe-info"].ax == 0x004F
    assert told["vbe"].ebx.to_bytes(4, "little") == b"VESA"
    assert told["vbe-mode"].ebx & 0x7FFF == 0x4118
    assert told["vbe-info"].ebx == 768 << 16 | 1024
    assert told["vbe-info"].ecx >= MEMORY


def test_the_disk(calls: tuple[Calls, bytes], told: dict[str, Call]) -> None:
    for name in (
        "load", "reset", "geometry", "type", "extensions", "parameters", "write-chs", "read-chs", "read-lba",
        "write-lba", "verify", "seek",
    ):  # fmt: skip
        assert not told[name].failed, (name, told[name])
    geometry = told["geometry"]
    cylinders = (geometry.ecx >> 8 & 0xFF | geometry.ecx << 2 & 0x300) + 1
    heads, sectors = (geometry.edx >> 8 & 0xFF) + 1, geometry.ecx & 0x3F
    assert geometry.edx & 0xFF == 1
    assert DISK // 512 - heads * sectors * 2 < cylinders * heads * sectors <= DISK // 512
    assert told["type"].ah == 3
    assert (told["extensions"].ebx & 0xFFFF, told["extensions"].ecx & 1) == (0xAA55, 1)
    assert (told["parameters"].ebx, told["parameters"].ecx) == (DISK // 512, 512)
    for name in ("same-chs", "same-lba"):
        assert told[name].flags & ZF, name
    disk = calls[1]
    written = b"".join((0x1234_5678 + 0x0103_0507 * n & 0xFFFF_FFFF).to_bytes(4, "little") for n in range(128))
    assert disk[40 * 512 : 41 * 512] == written
    assert disk[42 * 512 : 44 * 512] == written + bytes(512)


def test_what_a_disk_lacks(told: dict[str, Call]) -> None:
    for name in ("beyond", "sector-0", "no-drive"):
        assert told[name].failed, name
        assert told[name].ah != 0, name
    assert told["status"].ah == told["beyond"].ah


def test_memory(calls: tuple[Calls, bytes], told: dict[str, Call]) -> None:
    ranges = [(call.ebx, call.ecx, call.edx) for call in calls[0]["e820"]]
    assert all(call.eax == 0x534D_4150 for call in calls[0]["e820"])
    assert ranges[0] == (0, 0x9FC00, 1)
    above = [(start, size) for start, size, kind in ranges if kind == 1 and start == 1 << 20]
    assert len(above) == 1
    top = (1 << 20) + above[0][1]
    assert MEMORY - (256 << 10) <= top <= MEMORY
    assert (0x10_0000 - 0x1_0000, 0x1_0000, 2) in ranges  # the BIOS itself
    kib = top - (1 << 20) >> 10
    assert not told["extended"].failed
    assert told["extended"].ax == min(kib, 63 << 10)
    assert told["e801"].ax == told["e801"].ecx & 0xFFFF == 15 << 10
    assert told["e801"].ebx & 0xFFFF == top - (16 << 20) >> 16
    assert told["low"].ax == 639
    assert told["equipment"].ax & 0x37 == 0x26  # a mouse, a coprocessor, 80 columns
    for name in ("move-up", "move-down"):
        assert not told[name].failed
        assert told[name].ah == 0
    assert told["same-move"].flags & ZF


def test_the_system(told: dict[str, Call]) -> None:
    for name in ("a20-support", "a20-off", "a20-is-off", "a20-on", "a20-is-on", "configuration", "apm", "wait"):
        assert not told[name].failed, name
    assert (told["a20-is-off"].eax & 0xFF, told["a20-is-on"].eax & 0xFF) == (0, 1)
    assert (told["above-1m"].eax, told["above-1m"].ebx) == (0x1122_3344, 0x5566_7788)
    assert (told["configuration"].ecx >= 8, told["configuration"].edx) == (True, 0xFC)
    assert told["apm"].ebx & 0xFFFF == 0x504D
    assert told["unknown"].failed
    assert told["unknown"].ah == 0x86


def test_the_clock(told: dict[str, Call]) -> None:
    assert 3 <= told["ticks"].ecx < 2000
    assert (told["set-ticks"].ecx & 0xFFFF, told["set-ticks"].edx & 0xFF00) == (0x12, 0x3400)
    assert told["date"].ecx >> 8 & 0xFF == 0x20
    assert not told["time"].failed
    assert told["time"].ecx & 0xFFFF == 0x1234


def test_pci(told: dict[str, Call]) -> None:
    assert (told["pci"].ah, told["pci"].edx) == (0, 0x2049_4350)
    assert not told["pci"].failed
    assert (told["find-host-bridge"].ah, told["find-host-bridge"].ebx & 0xFFFF) == (0, 0)
    assert told["host-bridge"].ecx == 0x1237_8086
    assert told["find-vga"].ah == 0
    assert told["find-vga"].ebx & 0xFFFF != 0
    assert told["find-nothing"].failed
    assert told["find-nothing"].ah == 0x86


def test_the_keyboard(calls: tuple[Calls, bytes], told: dict[str, Call]) -> None:
    assert told["no-key"].flags & ZF
    assert told["put-key"].eax & 0xFF == 0
    assert not told["peek-key"].flags & ZF
    assert told["peek-key"].ax == told["got-key"].ax == 0x2C7A
    assert told["shifts"].eax & 0x0F == 0
    assert [call.ax for call in calls[0]["key"]] == [0x1E61, 0x2C5A, 0x0635, 0x1C0D, 0x0F09, 0x011B]
    assert told["no-more"].flags & ZF
