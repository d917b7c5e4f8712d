"""Images, and QEMU's tools as the oracle."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vmonty.vmm.block.file import HostFile
from vmonty.vmm.block.qcow2 import create
from vmonty.vmm.block.qcow2.header import DIRTY

LIMIT_S = 120
# What `qemu-img check` ends with when it finds leaks, and no damage.
LEAKS = 3


def qemu(tool: str, *arguments: object, status: int = 0) -> str:
    """What qemu-img or qemu-io prints; it must end with *status*."""
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not on this host: apt-get install qemu-utils")
    command = [tool, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == status, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def assert_clean(path: Path) -> None:
    """qemu-img finds neither damage nor a leak."""
    assert "No errors were found" in qemu("qemu-img", "check", path)


def assert_sound(path: Path, *, leaks: bool = False) -> None:
    """No damage; leaks with *leaks*, or where the dirty bit has them collected when the image is opened."""
    dirty = leaks or path.read_bytes()[79] & DIRTY
    done = subprocess.run(["qemu-img", "check", path], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode in ((0, LEAKS) if dirty else (0,)), done.stdout


def contents(path: Path, format: str = "qcow2") -> bytes:  # noqa: A002
    """What QEMU reads from an image."""
    copy = path.with_name(path.name + ".raw-copy")
    qemu("qemu-img", "convert", "-f", format, "-O", "raw", path, copy)
    data = copy.read_bytes()
    copy.unlink()
    return data


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Make an empty qcow2 image, by ourselves."""

    def image(size: int, name: str = "disk.qcow2", **options: object) -> Path:
        path = tmp_path / name
        with create.making(path) as file:
            create.create(file, size, **options)  # type: ignore[arg-type]
        return path

    return image


def host_file(path: Path) -> HostFile:
    """The file, unlocked."""
    return HostFile(path, writable=True, lock=False)
