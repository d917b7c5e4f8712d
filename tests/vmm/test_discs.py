"""What people boot from discs: Debian's memtest86+ and iPXE, by SeaBIOS from a CD, read off the screen."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

import vmonty
from vmonty.base.errors import UsageError

LIMIT_S = 180.0
MEMTEST = Path("/usr/lib/memtest86+/memtest86+x64.iso")
IPXE = Path("/usr/lib/ipxe/ipxe.iso")
BIOS = Path("/usr/share/seabios/bios-256k.bin")


def needs(*files: Path) -> pytest.MarkDecorator:
    missing = [file for file in files if not file.exists()]
    return pytest.mark.skipif(bool(missing), reason=f"not on this host: {', '.join(map(str, missing))}")


def text_of(machine: vmonty.VM) -> str:
    try:
        return machine.screen.text()
    except UsageError as error:
        return str(error)


def until(machine: vmonty.VM, holds: Callable[[str], bool]) -> str:
    end = time.monotonic() + LIMIT_S
    while not holds(text := text_of(machine)):
        assert time.monotonic() < end, text
        time.sleep(0.2)
    return text


@needs(MEMTEST, BIOS)
def test_memtest_tests_memory() -> None:
    with vmonty.VM(cdroms=MEMTEST, memory="128M", accel="soft", devices="VGA") as machine:
        machine.start()
        until(machine, lambda text: "start testing" in text)
        machine.type("\n")
        # It fills its fields in one after the other.
        wanted = "Memtest86+", "vmonty virtual CPU", "Moving inversions", "127MB", "Errors: 0"
        until(machine, lambda text: all(part in text for part in wanted))


@pytest.mark.parametrize("name", ["x64", "ia32"])
def test_memtest_as_a_kernel(name: str) -> None:
    """Its image, entered directly: it writes on the screen that a video BIOS would have left."""
    image = Path(f"/boot/memtest86+{name}.bin")
    if not image.exists() or not BIOS.exists():
        pytest.skip("not on this host: packages memtest86+ and seabios")
    with vmonty.VM(kernel=image, memory="64M", accel="soft", devices="VGA") as machine:
        machine.start()
        wanted = "Memtest86+", "vmonty virtual CPU", "Testing: ", "Errors: 0"
        until(machine, lambda text: all(part in text for part in wanted))


@needs(IPXE, BIOS)
def test_ipxe_starts() -> None:
    with vmonty.VM(cdroms=IPXE, memory="128M", accel="soft", devices="VGA") as machine:
        machine.start()
        until(machine, lambda text: "Open Source Network Boot Firmware" in text)
