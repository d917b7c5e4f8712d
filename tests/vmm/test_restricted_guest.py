"""SeaBIOS, and a boot sector behind it, where real mode is virtual-8086 mode (kvm_intel unrestricted_guest=0)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from vmonty import kvm
from vmonty.base.errors import BootImageError
from vmonty.vmm import boards, firmware
from vmonty.vmm.block.image import open_image
from vmonty.vmm.machine import Config

from . import bootable
from .conftest import Screen

LIMIT_S = 100.0


@pytest.mark.parametrize("provider", ["soft-vmx-restricted", "soft-vmx-shadow"])
def test_seabios_starts_a_disk(screen: Screen, tmp_path: Path, provider: str) -> None:
    if shutil.which("nasm") is None:
        pytest.skip("nasm is not on this host: apt-get install nasm")
    try:
        bios = firmware.read("bios")
    except BootImageError as error:
        pytest.skip(str(error))
    (tmp_path / "disk").write_bytes(bootable.disk("disk"))
    config = Config(machine="pc", memory=32 << 20, firmware=bios)
    with (
        open_image(tmp_path / "disk", format="raw") as image,
        kvm.open(provider) as system,
        boards.create(system, config, screen.write, [], [image], []) as machine,
    ):
        machine.start()
        screen.wait_for(b"this is disk\r\n", LIMIT_S)
