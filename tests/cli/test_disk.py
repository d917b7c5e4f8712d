"""``vmonty disk``: images made, shown, checked, copied; what is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from vmm.block.conftest import contents, qemu
from vmonty.vmm.block.image import open_image

from .conftest import Result

Run = Callable[..., Result]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(1).randbytes(100_000) + bytes(1 << 20) + b"end of it" * 1000 + bytes(512))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 512 * 512])
    return path


def test_create_and_info(vmonty: Run, tmp_path: Path, raw: Path) -> None:
    path = tmp_path / "new.qcow2"
    assert vmonty("disk", "create", path, "10M", "--cluster-size", "4K") == Result(0, "", "")
    facts = json.loads(vmonty("disk", "info", path, "--json").out)
    assert (facts["format"], facts["size"], facts["cluster_size"], facts["snapshots"]) == ("qcow2", 10 << 20, 4096, [])
    assert "exists; give --force" in vmonty("disk", "create", path, "1M").refusal()
    assert json.loads(vmonty("disk", "create", path, "1M", "--force", "--json").out)["size"] == 1 << 20
    made = vmonty("disk", "create", "--format", "raw", tmp_path / "new.raw", "64K")
    assert made.status == 0
    assert json.loads(vmonty("disk", "info", tmp_path / "new.raw", "--json").out)["format"] == "raw"
    over = tmp_path / "over.qcow2"
    assert vmonty("disk", "create", "--backing", raw.name, "--backing-format", "raw", over).status == 0
    assert contents(over) == raw.read_bytes()
    assert f"backing file    {raw.name}" in vmonty("disk", "info", over).out


@pytest.mark.parametrize("options", [[], ["--compress"], ["-c", "--compression", "zstd"], ["--to", "raw"]])
def test_convert(vmonty: Run, tmp_path: Path, raw: Path, options: list[str]) -> None:
    target = tmp_path / "target"
    assert vmonty("disk", "convert", "-f", "raw", raw, target, *options).status == 0
    assert contents(target, "raw" if "raw" in options else "qcow2") == raw.read_bytes()
    assert target.stat().st_blocks * 512 < 600_000
    assert "exists" in vmonty("disk", "convert", raw, target).refusal()
    assert vmonty("disk", "convert", "-f", "raw", raw, target, "--force", *options).status == 0


def test_snapshots_and_check(vmonty: Run, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    vmonty("disk", "create", path, "4M")
    assert vmonty("disk", "snapshot", "create", path, "clean").status == 0
    qemu("qemu-io", "-c", "write -P 3 0 1M", path)
    assert [item["name"] for item in json.loads(vmonty("disk", "snapshot", "list", path, "--json").out)] == ["clean"]
    assert "clean" in vmonty("disk", "snapshot", "list", path).out
    assert vmonty("disk", "snapshot", "apply", path, "clean").status == 0
    with open_image(path, read_only=True) as disk:
        assert disk.read(0, 512) == bytes(512)
    assert vmonty("disk", "snapshot", "delete", path, "clean").status == 0
    assert "no snapshot 'clean'" in vmonty("disk", "snapshot", "apply", path, "clean").refusal()
    assert vmonty("disk", "check", path).out == "0 damages, 0 lost clusters\n"
    image = bytearray(path.read_bytes())
    table = int.from_bytes(image[48:56], "big")
    block = int.from_bytes(image[table : table + 8], "big")
    image[block + 901] = 1
    path.write_bytes(image)
    assert vmonty("disk", "check", path) == Result(1, "0 damages, 1 lost clusters\n", "")
    assert json.loads(vmonty("disk", "check", path, "--repair", "--json").out)["leaks_fixed"] == 1
    assert vmonty("disk", "check", path).status == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["create", "{}/a"], "needs a size"),
        (["create", "{}/a", "1000"], "multiple of 512"),
        (["create", "{}/a", "1M", "--cluster-size", "100"], "512 to 2M"),
        (["create", "{}/a", "1M", "-f", "raw", "-b", "x"], "raw image has no backing file"),
        (["create", "{}/none/a", "1M"], "cannot be made"),
        (["info", "{}/none"], "No such file"),
        (["check", "{}/raw", "-f", "raw"], "raw image"),
        (["convert", "-c", "--to", "raw", "{}/raw", "{}/b"], "only qcow2"),
    ],
)
def test_what_is_refused(vmonty: Run, tmp_path: Path, arguments: list[str], complaint: str) -> None:
    (tmp_path / "raw").write_bytes(bytes(1024))
    assert complaint in vmonty("disk", *(item.format(tmp_path) for item in arguments)).refusal()


def test_an_image_over_its_own_backing_file(vmonty: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    vmonty("disk", "create", path, "1M")
    before = path.read_bytes()
    refusal = vmonty("disk", "create", "--force", "--backing", path, path).refusal()
    assert "is a backing file of itself" in refusal
    assert path.read_bytes() == before


def test_what_fails_is_not_in_the_way_of_the_next_try(vmonty: Run, tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert "512 to 2M" in vmonty("disk", "create", path, "1M", "--cluster-size", "100").refusal()
    assert vmonty("disk", "create", path, "1M").status == 0
    over = tmp_path / "over"
    vmonty("disk", "create", over, "--backing", path)
    # An L2 entry that cannot be: the copy ends in the middle.
    vmonty("disk", "snapshot", "create", path, "x")
    with open_image(path) as disk:
        disk.write(0, b"data" * 1000)
    image = bytearray(path.read_bytes())
    l1 = int.from_bytes(image[40:48], "big")
    l2 = int.from_bytes(image[l1 : l1 + 8], "big") & 0x00FF_FFFF_FFFF_FE00
    image[l2 : l2 + 8] = (1 << 55).to_bytes(8, "big")
    path.write_bytes(image)
    target = tmp_path / "target"
    assert vmonty("disk", "convert", path, target).status != 0
    assert not target.exists()
    target.symlink_to(tmp_path / "elsewhere")  # where nothing is
    assert "exists" in vmonty("disk", "convert", path, target).refusal()
    assert vmonty("disk", "convert", "--force", path, target).status != 0
    assert target.is_symlink()
    target.unlink()
    target.write_bytes(b"there before")
    assert "only qcow2" in vmonty("disk", "convert", "--force", "-c", "--to", "raw", over, target).refusal()
    assert target.read_bytes() == b"there before"


def test_a_repair_that_fails_leaves_the_image_marked(vmonty: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    vmonty("disk", "create", path, "1M")
    image = bytearray(path.read_bytes())
    image[79] |= 1
    image[60:72] = (1).to_bytes(4, "big") + len(image).to_bytes(8, "big")
    path.write_bytes(bytes(image) + b"\xff" * 65536)
    for _ in range(2):
        assert "damaged" in vmonty("disk", "check", "--repair", path).refusal()
        assert path.read_bytes()[79] & 1
