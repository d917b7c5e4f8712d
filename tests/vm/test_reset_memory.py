"""A reset makes a new machine: nothing keeps the one before, whose RAM would stay beside the new one's."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest

from vmonty.base.errors import UsageError
from vmonty.vm.build import Build
from vmonty.vm.plan import Plan
from vmonty.vmm import accel
from vmonty.vmm.peripherals import Cdrom


@pytest.fixture
def firmware(tmp_path: Path) -> str:
    file = tmp_path / "firmware"
    file.write_bytes(b"\xf4" * 0x10000)
    return str(file)


@pytest.mark.parametrize("watched", [False, True], ids=["alone", "with viewers"])
def test_nothing_keeps_the_machine_before(firmware: str, tmp_path: Path, watched: bool) -> None:
    build = Build(Plan(firmware=firmware, memory=16 << 20, vnc=f"unix:{tmp_path}/vnc" if watched else None))
    choice = accel.choose("soft")
    try:
        with choice.system:
            machine = build.machine(choice.system, lambda data: None)
            for _ in range(2):
                before = weakref.ref(machine)
                build.end(machine)
                del machine
                gc.collect()
                assert before() is None
                machine = build.machine(choice.system, lambda data: None)
            build.end(machine)
    finally:
        build.close()


def test_drives_between_two_machines(firmware: str, tmp_path: Path) -> None:
    """What is in them is known; who changes it waits for the next machine, or for the end."""
    disc = tmp_path / "disc"
    disc.write_bytes(bytes(4096))
    build = Build(Plan(firmware=firmware, memory=16 << 20, cdroms=(Cdrom(disc),)))
    choice = accel.choose("soft")
    with choice.system:
        machine = build.machine(choice.system, lambda data: None)
        build.end(machine)
        assert build.media() == {"cd0": str(disc)}
        machine = build.machine(choice.system, lambda data: None)
        build.change_medium("cd0", None)
        assert build.media() == {"cd0": None}
        build.end(machine)
        build.over()
        with pytest.raises(UsageError):  # at once: no machine follows
            build.change_medium("cd0", disc)
    build.close()
    with pytest.raises(UsageError):
        build.change_medium("cd0", disc)
