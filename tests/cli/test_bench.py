"""``vmonty bench``: the quick forms measure something, and what they write keeps its contract."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmonty.bench import block, boot, firmware, net, vnc
from vmonty.bench.compiler import PayloadError
from vmonty.bench.process import Process
from vmonty.guests import rootdisk
from vmonty.guests.progress import silent
from vmonty.kvm.soft import modules

from .conftest import Result

Run = Callable[..., Result]
gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc: apt-get install gcc")


def rows(result: Result, file: Path) -> dict[str, dict[str, Any]]:
    """The rows by name, after a look at the contract that scripts rely on."""
    assert result.status == 0, result.err
    written = json.loads(file.read_text())
    assert {"cpu", "cpus", "kernel", "qemu", "vmonty"} <= set(written["host"])
    for row in written["rows"]:
        assert set(row) == {"name", "unit", "better", "vmonty", "native", "qemu_tcg", "target"}
        assert row["better"] in ("less", "more")
        assert row["name"] in result.out
    return {row["name"]: row for row in written["rows"]}


@pytest.fixture
def no_module() -> Iterator[None]:
    """What was measured leaves its vendor module behind; others expect to find none, and get kvm_intel."""
    yield
    if (module := modules.loaded()) is not None:
        modules.unload(module.name)


@gcc
def test_cpu(vmonty: Run, tmp_path: Path) -> None:
    file = tmp_path / "cpu.json"
    row = rows(vmonty("bench", "cpu", "fib", "--quick", "--json", file), file)["fib"]
    assert row["vmonty"] > 0
    assert row["native"] > 0
    assert (row["qemu_tcg"] is None) == (shutil.which("qemu-system-x86_64") is None)


@pytest.mark.usefixtures("no_module")
@pytest.mark.parametrize("provider", ["soft", "soft-svm"])
def test_kvm(vmonty: Run, tmp_path: Path, provider: str) -> None:
    file = tmp_path / "kvm.json"
    result = vmonty("bench", "kvm", "cpuid_exit", "creation", "--provider", provider, "--quick", "--json", file)
    found = rows(result, file)
    assert set(found) == {"CPUID exit", "VM and vCPU creation"}
    assert found["CPUID exit"]["target"] == "≤ 2 µs"
    for row in found.values():
        assert 0 < row["vmonty"] < 10
        assert row["native"] is row["qemu_tcg"] is None


def test_boot(vmonty: Run, tmp_path: Path) -> None:
    file = tmp_path / "boot.json"
    found = rows(vmonty("bench", "boot", "microvm", "--quick", "--json", file), file)
    assert list(found) == [
        "microvm, CPU time", "microvm, wall time", "microvm, resident beyond RAM",
        "process start to the kernel's first instruction",
    ]  # fmt: skip
    assert all(row["vmonty"] > 0 for row in found.values())
    assert found["microvm, wall time"]["vmonty"] > found["process start to the kernel's first instruction"]["vmonty"]


def test_a_debian_guest_that_is_not_built(vmonty: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rootdisk, "cached", lambda: None)
    result = vmonty("bench", "boot", "debian", "--quick")
    assert result.status == 1
    assert "run `vmonty guest build debian`" in result.err


def test_debian_boots_from_a_disk_that_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [Path(name) for name in ("disk.qcow2", "vmlinuz", "initrd.img", "key")]
    monkeypatch.setattr(rootdisk, "cached", lambda: rootdisk.Disk(*paths[:3], "12", "bookworm", paths[3], 1, ""))
    (debian,) = boot._boots(["debian"], True, silent)
    ours, theirs = debian.command("vmonty"), debian.command("qemu_tcg")
    assert ours[ours.index("--disk") + 1] == "disk.qcow2,format=qcow2,snapshot"
    assert "file=disk.qcow2,if=none,id=disk,format=qcow2,snapshot=on" in theirs
    assert rootdisk.COMMAND_LINE in ours
    assert rootdisk.COMMAND_LINE in theirs


def test_firmware_that_is_not_there(vmonty: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(firmware, "MEMTEST", tmp_path / "missing")
    assert "missing is not there: apt-get install memtest86+" in vmonty("bench", "boot", "memtest", "--quick").err
    said: list[str] = []
    assert firmware.rows(["memtest"], False, 1, lambda text, done, total: said.append(text)) == []
    assert said[-1].startswith("left out: ")


@pytest.mark.skipif(not Path("/usr/share/seabios/bios-256k.bin").exists(), reason="no SeaBIOS: apt-get install seabios")
def test_firmware(vmonty: Run, tmp_path: Path) -> None:
    file = tmp_path / "firmware.json"
    found = rows(vmonty("bench", "boot", "seabios", "--quick", "--json", file), file)
    command = "SeaBIOS to its boot menu"
    assert list(found) == [command, f"{command}, from the guest's start"]
    assert all(row["vmonty"] > 0 for row in found.values())
    assert found[command]["target"] == "≤ 0.7 × TCG"


def test_a_guest_that_does_not_say_it(tmp_path: Path) -> None:
    with Process(["sh", "-c", "echo ready; echo it broke >&2; exit 3"]) as process:
        assert process.wait_for(b"ready", 30) == b""
        with pytest.raises(
            PayloadError, match=r"ended with 3 before .* say b'up'; last on its standard error: it broke"
        ):
            process.wait_for(b"up", 30)
    with Process(["cat"]) as process:
        process.write(b"123")
        assert process.read(2, 30) == b"12"
        with pytest.raises(PayloadError, match="in time; last on its console: 3"):
            process.wait_for(b"up", 0)


@pytest.mark.parametrize("command", ["cpu", "kvm", "boot"])
def test_an_unknown_name_is_refused(vmonty: Run, command: str) -> None:
    assert "nonsense; there are" in vmonty("bench", command, "nonsense").refusal()


def test_a_file_that_cannot_be_written(vmonty: Run, tmp_path: Path) -> None:
    result = vmonty("bench", "kvm", "creation", "--quick", "--json", tmp_path / "missing" / "kvm.json")
    assert result.status == 2
    assert "kvm.json cannot be written: No such file" in result.err


@gcc
@pytest.mark.usefixtures("no_module")
def test_block(vmonty: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "KINDS", block.KINDS[:1] + block.KINDS[-1:])
    monkeypatch.setattr(block, "QUICK", (1, 4 << 20, 100))
    file = tmp_path / "block.json"
    found = rows(vmonty("bench", "block", "--quick", "--json", file), file)
    assert len(found) == 8
    for kind in ("raw", "qcow2"):
        row = found[f"{kind}, sequential write, MB/s"]
        assert row["vmonty"] > 0
        assert (row["qemu_tcg"] is None) == (shutil.which("qemu-system-x86_64") is None)


@gcc
@pytest.mark.usefixtures("no_module")
def test_net(vmonty: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net, "QUICK", (1, 4 << 20))
    file = tmp_path / "net.json"
    found = rows(vmonty("bench", "net", "--quick", "--json", file), file)
    assert {row["vmonty"] > 0 for row in found.values()} == {True}
    assert len(found) == 4


@gcc
def test_vnc(vmonty: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The viewer's picture scrolls by CopyRect: an update is far less than a line of pixels."""
    monkeypatch.setattr(vnc, "QUICK", (1, 1.0))
    file = tmp_path / "vnc.json"
    found = rows(vmonty("bench", "vnc", "--quick", "--json", file), file)
    assert list(found) == ["updates", "CPU time", "sent"]
    assert {row["vmonty"] > 0 for row in found.values()} == {True}
    assert found["sent"]["vmonty"] < 1024 * 4 * 16 / 1e3
