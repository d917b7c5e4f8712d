"""The same boot sector draws on our display adapter and on QEMU's, by the same video BIOS: both pictures are equal."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vmonty import kvm
from vmonty.base.errors import BootImageError
from vmonty.vmm import boards, firmware
from vmonty.vmm.block.image import open_image
from vmonty.vmm.machine import Config

LIMIT_S = 120.0
SOURCE = Path(__file__).with_name("picture.asm")
DRAWN = b"!"

pytestmark = [
    pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is not installed")
    for tool in ("nasm", "qemu-system-x86_64")
]


def wait(log: Path) -> None:
    end = time.monotonic() + LIMIT_S
    while not (log.exists() and log.read_bytes().endswith(DRAWN)):
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)


def ours(disk: Path, log: Path) -> Any:
    from PIL import Image

    try:
        bios = firmware.read("bios")
    except BootImageError as error:
        pytest.skip(str(error))
    config = Config(memory=64 << 20, firmware=bios, devices=("VGA", f"isa-debugcon,file={log}"))
    with (
        kvm.open("soft") as system,
        open_image(disk, format="raw", snapshot=True) as image,
        boards.create(system, config, bytes, disks=[image]) as machine,
    ):
        machine.start()
        wait(log)
        assert machine.screen is not None
        frame = machine.screen.frame()
    return Image.frombytes("RGB", (frame.width, frame.height), bytes(frame.pixels), "raw", "BGRX")


def theirs(disk: Path, log: Path) -> Any:
    from PIL import Image

    dump = log.with_suffix(".ppm")
    qemu = subprocess.Popen(
        ["qemu-system-x86_64", "-accel", "tcg", "-m", "64", "-display", "none", "-vga", "std", "-net", "none",
         "-monitor", "stdio", "-drive", f"file={disk},format=raw,if=virtio,snapshot=on", "-debugcon", f"file:{log}",
         "-global", "isa-debugcon.iobase=0x402"],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait(log)
        qemu.communicate(f"screendump {dump}\nquit\n".encode(), timeout=LIMIT_S)
    finally:
        qemu.kill()
        qemu.wait()
    with Image.open(dump) as image:
        return image.convert("RGB")


@pytest.mark.parametrize(
    ("mode", "size", "colours"),
    [
        (0x03, (720, 400), 16), (0x04, (640, 400), 4), (0x06, (640, 400), 2), (0x0D, (640, 400), 16),
        (0x12, (640, 480), 16), (0x13, (640, 400), 200), (0x101, (640, 480), 200), (0x111, (640, 480), 256),
    ],
)  # fmt: skip
def test_picture_is_qemus(mode: int, size: tuple[int, int], colours: int, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    subprocess.run(
        ["nasm", "-f", "bin", f"-DMODE={mode}", "-DBANKS=1", "-DDOTS=8192", "-o", disk, SOURCE], check=True, timeout=60
    )
    with disk.open("ab") as file:
        file.truncate(1 << 20)
    our, their = ours(disk, tmp_path / "ours"), theirs(disk, tmp_path / "theirs")
    assert our.size == their.size == size
    # From six bits of a colour to eight ways differ: we repeat the highest ones, so that white is white.
    six: Callable[[int], int] = lambda value: value >> 2  # noqa: E731
    ours_six, theirs_six = our.point(six).tobytes(), their.point(six).tobytes()
    assert ours_six == theirs_six
    seen = {ours_six[at : at + 3] for at in range(0, len(ours_six), 3)}
    assert len(seen) >= colours * 9 // 10
