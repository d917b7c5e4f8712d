"""A guest that reads and writes anything anywhere: every device of every board, all at once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from vmonty.kvm.api import System
from vmonty.vmm import boards
from vmonty.vmm.block.image import open_image
from vmonty.vmm.boards.pci_host import PciMachine
from vmonty.vmm.bus import Bus
from vmonty.vmm.hw.pci import config as cfg
from vmonty.vmm.machine import Config, Machine

from . import kernels
from .fake_kvm import FakeKvm

ACCESSES = 12_000
SEEDS = (1, 2, 3)
# Everywhere that something stands; small numbers select and switch on, addresses lie in RAM, beside it and nowhere.
VALUES = (
    0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 0x20, 0x7F, 0x80, 0xA0, 0xEC, 0xFE, 0xFF, 0x3FF, 0x1000, 0x8000, 0xFFFF, 0xF_F000,
    0x0FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 40, (1 << 64) - 1,
)  # fmt: skip
DEVICES = ("virtio-rng", "virtio-balloon", "virtio-console", "isa-debugcon", "isa-debug-exit")


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in ("virtio.raw", "ide.raw", "cd.iso")]
    for path in paths:
        path.write_bytes(random.Random(7).randbytes(1 << 20))
    return paths


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What threads of devices raised and nobody caught."""
    found: list[object] = []
    monkeypatch.setattr("threading.excepthook", found.append)
    return found


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("board", ["pc", "q35,root-ports=1", "microvm"])
def test_nothing_that_a_guest_writes_raises(board: str, seed: int, images: list[Path], lost: list[object]) -> None:
    chance = random.Random(seed)
    microvm = board == "microvm"
    config = Config(
        kernels.bzimage(b"\xf4"), memory=kernels.MEMORY, machine=board,
        devices=DEVICES if microvm else (*DEVICES, "VGA"),
    )  # fmt: skip
    with (
        open_image(images[0], format="raw") as disk,
        open_image(images[1], format="raw") as ide,
        open_image(images[2], format="raw", read_only=True) as disc,
        System(FakeKvm()) as system,
        boards.create(system, config, bytes, [disk], [] if microvm else [ide], [] if microvm else [disc]) as machine,
    ):
        machine.loop.start()
        if isinstance(machine, PciMachine):
            machine.prepare()
            _open_windows(machine)
        for count in range(ACCESSES):
            _access(machine, chance)
            if count % 1000 == 0 and isinstance(machine, PciMachine):
                _open_windows(machine)
        # Whatever was meant to end the machine has: the loop still answers.
        answered: list[int] = []
        machine.loop.run(lambda: answered.append(1))
        assert answered == [1]
    assert not lost


def _open_windows(machine: PciMachine) -> None:
    for device in machine.pci.devices().values():
        device.config_write(cfg.COMMAND, 2, cfg.COMMAND_IO | cfg.COMMAND_MEMORY | cfg.COMMAND_MASTER)


def _access(machine: Machine, chance: random.Random) -> None:
    bus: Bus = chance.choice((machine.ports, machine.ports, machine.mmio))
    place = chance.choice(bus.ranges())
    size = chance.choice((1, 1, 2, 4, 4) if bus is machine.ports else (1, 2, 4, 4, 8))
    # The beginning of a large window has most of what there is to hit.
    at = chance.randrange(min(place.size, chance.choice((8, 64, 0x1000, 1 << 40))))
    address = place.base + at
    if chance.random() < 0.3:
        value = bus.read(address, size)
        assert 0 <= value < 1 << 8 * size, (place.name, at, size)
        return
    value = chance.choice(VALUES) if chance.random() < 0.7 else chance.randrange(1 << 64)
    bus.write(address, size, value & (1 << 8 * size) - 1)
