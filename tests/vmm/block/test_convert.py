"""Images that are made: over what is there already, onto devices, and what is left when it fails."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vmonty.base.errors import DiskImageError
from vmonty.vmm.block import file as block_file
from vmonty.vmm.block.convert import copy, create_image
from vmonty.vmm.block.image import open_image

Make = Callable[..., Path]
SIZE = 1 << 20


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("way", ["itself", "symbolic link", "hard link"])
def test_an_image_is_not_made_over_one_that_it_stands_on(tmp_path: Path, make: Make, depth: int, way: str) -> None:
    bottom = top = make(SIZE, "0.qcow2")
    with open_image(bottom) as disk:
        disk.write(0, b"kept" * 1000)
    for number in range(1, depth + 1):
        above = tmp_path / f"{number}.qcow2"
        create_image(above, None, backing=top.name)
        top = above
    target = bottom
    if way != "itself":
        target = tmp_path / "other.qcow2"
        (target.symlink_to if way == "symbolic link" else target.hardlink_to)(bottom)
    before = bottom.read_bytes()
    with pytest.raises(DiskImageError, match="is a backing file of itself"):
        create_image(target, None, backing=str(top))
    assert bottom.read_bytes() == before


def test_what_an_image_stands_on_is_locked_while_it_is_made(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make(SIZE, "base.qcow2")
    tried: list[str] = []
    from vmonty.vmm.block.qcow2 import create

    lay_out = create.lay_out

    def late(*arguments: object) -> None:
        with pytest.raises(DiskImageError) as caught:
            open_image(base)
        tried.append(str(caught.value))
        lay_out(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(create, "lay_out", late)
    create_image(base.with_name("over.qcow2"), None, backing=base.name)
    assert [text for text in tried if "in use" in text] == tried != []


@pytest.mark.parametrize(
    "options",
    [
        {"cluster_size": 100}, {"refcount_bits": 3}, {"version": 4}, {"size": 1 << 62}, {"size": 100},
        {"size": 1 << 63, "format": "raw"}, {"backing": "long"},
    ],
)  # fmt: skip
def test_nothing_is_left_of_an_image_that_cannot_be_made(tmp_path: Path, options: dict[str, object]) -> None:
    path = tmp_path / "new"
    if "backing" in options:
        (base := tmp_path / ("b" * 200)).write_bytes(bytes(SIZE))
        options = {"backing": "./" * 100 + base.name, "backing_format": "raw", "cluster_size": 512}
    arguments = {"size": SIZE} | options
    with pytest.raises(DiskImageError):
        create_image(path, **arguments)  # type: ignore[arg-type]
    assert not path.exists()
    path.write_bytes(b"there before")
    with pytest.raises(DiskImageError):
        create_image(path, **arguments)  # type: ignore[arg-type]
    assert path.exists()
    if options.get("format") != "raw":
        assert path.read_bytes() == b"there before"


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is taken for a block device, with old data."""
    path = tmp_path / "device"
    path.write_bytes(b"old!" * (SIZE // 2))
    node = path.stat().st_ino
    real = os.fstat

    class Status:
        def __init__(self, status: os.stat_result) -> None:
            self.st_mode = 0o060600 if status.st_ino == node else status.st_mode
            self.st_size = status.st_size

    monkeypatch.setattr(block_file.os, "fstat", lambda fd: Status(real(fd)))
    return path


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_device_keeps_no_old_data(tmp_path: Path, device: Path, kind: str) -> None:
    (raw := tmp_path / "source").write_bytes(bytes(300_032) + b"new!" * 25_000 + bytes(SIZE - 400_032))
    with open_image(raw, format="raw", read_only=True) as source:
        create_image(device, source.size, format=kind)
        with open_image(device, format=kind) as target:
            copy(source, target)
            assert target.read(0, SIZE) == raw.read_bytes()
    assert device.stat().st_size == 2 * SIZE
    assert device.read_bytes()[-SIZE // 2 :] == b"old!" * (SIZE // 8), "behind the disk"


def test_a_device_that_is_too_small(device: Path) -> None:
    before = device.read_bytes()
    with pytest.raises(DiskImageError, match="too few for a disk of"):
        create_image(device, 2 * SIZE + 512, format="raw")
    assert device.read_bytes() == before
    (path := device.with_name("large")).write_bytes(bytes(3 * SIZE))
    with (
        open_image(device, format="raw") as small,
        open_image(path, format="raw", read_only=True) as large,
        pytest.raises(DiskImageError, match="cannot hold one of"),
    ):
        copy(large, small)
