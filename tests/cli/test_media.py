"""``vmonty media``, and the options of what firmware starts from."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vmonty as package
from vmonty.base.errors import DiskImageError, UsageError

from .conftest import LIMIT_S, Result

Run = Callable[..., Result]


@pytest.fixture
def discs(tmp_path: Path) -> list[Path]:
    made = [tmp_path / "first.iso", tmp_path / "second.iso"]
    for number, path in enumerate(made):
        path.write_bytes(bytes((number,)) * 4096)
    return made


@pytest.fixture(params=["pc", "q35"])
def machine(request: pytest.FixtureRequest, kernel: Path, discs: list[Path]) -> Iterator[package.VM]:
    """It is ready, and does not run: nobody uses the drive."""
    with package.VM(kernel=kernel, accel="soft", machine=request.param, memory="16M", cdroms=discs[0]) as made:
        yield made


def outside(*arguments: object) -> Result:
    """vmonty in a process of its own: the machine's side of a connection is a thread of this one."""
    words = [sys.executable, "-m", "vmonty", *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    return Result(done.returncode, done.stdout, done.stderr)


def test_discs_are_changed(machine: package.VM, discs: list[Path], tmp_path: Path) -> None:
    path, vmonty = machine.listen(tmp_path / "control"), outside
    assert vmonty("media", path).out == f"cd0  {discs[0]}\n"
    assert vmonty("media", path, "cd0", discs[1]) == Result(0, "", "")
    assert vmonty("media", path).out == f"cd0  {discs[1]}\n"
    assert vmonty("media", path, "cd0", "--eject", "--force") == Result(0, "", "")
    assert vmonty("media", path).out == "cd0  empty\n"
    missing = vmonty("media", path, "cd0", tmp_path / "none.iso")
    assert missing.status == 1
    assert "none.iso cannot be opened" in missing.err
    assert "there is no drive 'cd1' for media; there are: cd0" in vmonty("media", path, "cd1", "--eject").err
    assert machine.media == {"cd0": None}


def test_discs_are_changed_from_python(machine: package.VM, discs: list[Path], tmp_path: Path) -> None:
    machine.change_medium("cd0", discs[1])
    assert machine.media == {"cd0": str(discs[1])}
    with pytest.raises(DiskImageError):
        machine.change_medium("cd0", tmp_path)
    assert machine.media == {"cd0": str(discs[1])}, "it keeps what it had"
    machine.change_medium("cd0", None)
    assert machine.media == {"cd0": None}
    with pytest.raises(UsageError, match="there is no drive 'fd0'"):
        machine.change_medium("fd0", None)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["cd0"], "give a FILE for the drive, or --eject"),
        (["cd0", "x.iso", "--eject"], "give a FILE for the drive, or --eject"),
        (["--force"], "which DRIVE"),
    ],
)
def test_what_is_refused(vmonty: Run, tmp_path: Path, words: list[str], complaint: str) -> None:
    assert complaint in vmonty("media", tmp_path / "control", *words).refusal()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--boot", "order=zz"], "--boot: the order 'zz' is none"),
        (["--boot", "once=ddd"], "--boot: the order 'ddd' is none"),
        (["--cdrom", "x.iso,bootindex=one"], "bootindex='one'"),
        (["--disk", "x.img,bootindex=-1"], "bootindex='-1'"),
        (["--net", "user,bootindex=x"], "bootindex='x'"),
        (["--option-rom", "/nowhere/rom"], "the option ROM /nowhere/rom cannot be read"),
    ],
)
def test_what_firmware_cannot_start_from(vmonty: Run, words: list[str], complaint: str) -> None:
    assert complaint in vmonty("run", "--firmware", "bios", *words).refusal()
