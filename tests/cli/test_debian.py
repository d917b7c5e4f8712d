"""``vmonty run debian`` and ``vmonty guest build debian``, with a guest that is built at once."""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

import vmonty as package
from vmm.fake_kvm import FakeKvm
from vmm.steps import Guest, Out
from vmonty import kvm
from vmonty.guests import rootdisk
from vmonty.vm import debian
from vmonty.vmm.block.convert import create_image
from vmonty.vmm.block.image import open_image

from .conftest import LIMIT_S, Result

Run = Callable[..., Result]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, kernel: Path, tmp_path: Path) -> list[dict[str, object]]:
    """A builder that is done at once; each call adds its arguments to the list."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    initrd, disk = tmp_path / "initrd", tmp_path / "disk.qcow2"
    initrd.write_bytes(b"an initrd")
    create_image(disk, 1 << 20)
    with open_image(disk) as opened:
        opened.write(0, b"the base")
    made = rootdisk.Disk(disk, kernel, initrd, "9.9", "bookworm", tmp_path / "key", 1 << 20, "abc" * 20)
    calls: list[dict[str, object]] = []

    def build(pack: object, **options: object) -> rootdisk.Disk:
        calls.append({name: value for name, value in options.items() if name != "progress"})
        return made

    monkeypatch.setattr(rootdisk, "build", build)
    monkeypatch.setattr(rootdisk, "cached", lambda: made if calls else None)
    return calls


def test_build(vmonty: Run, built: list[dict[str, object]]) -> None:
    result = vmonty("guest", "build", "debian", "--size", "2G", "--gcc", "--json")
    assert set(json.loads(result.out)) == {field.name for field in dataclasses.fields(rootdisk.Disk)}
    assert "bookworm" in vmonty("guest", "build", "debian", "--force").out
    assert built == [
        {"size": 2 << 30, "compiler": True, "force": False},
        {"size": 8 << 30, "compiler": False, "force": True},
    ]


def off(cpu: int) -> Guest:
    yield Out(0x604, 5 << 10 | 1 << 13, 2)


def fake() -> FakeKvm:
    return FakeKvm(off)


def test_the_overlay_is_the_users(built: list[dict[str, object]], tmp_path: Path) -> None:
    first = debian.prepare()
    assert built
    with open_image(first.disk) as disk:
        assert disk.read(0, 8) == b"the base"
        disk.write(0, b"mine")
    # The base that it needs stays, whatever becomes of the cache.
    (tmp_path / "disk.qcow2").unlink()
    assert debian.prepare() == first
    with open_image(first.disk) as disk:
        assert disk.read(0, 8) == b"minebase"


def test_run_says_how_to_reach_it(vmonty: Run, monkeypatch: pytest.MonkeyPatch, built: list[dict[str, object]]) -> None:
    monkeypatch.setitem(kvm.PROVIDERS, "linux", (__name__, "fake"))
    result = vmonty("run", "debian", "--accel", "kvm", "--memory", "16M")
    assert (result.status, result.out) == (0, ""), result
    assert "ssh -i " in result.err
    assert built


def test_a_file_and_the_api_name_it_too(
    vmonty: Run, monkeypatch: pytest.MonkeyPatch, built: list[dict[str, object]], tmp_path: Path
) -> None:
    monkeypatch.setitem(kvm.PROVIDERS, "linux", (__name__, "fake"))
    with package.VM(guest="debian", accel="kvm", memory="16M", append="mine") as vm:
        assert vm.ssh[:2] == ["ssh", "-i"]
        assert vm.ssh[-1] == "root@127.0.0.1"
        assert vm.forwarded_ports == (int(vm.ssh[-2]),)
        vm.start()
        outcome = vm.wait(LIMIT_S)
    assert outcome is not None
    assert outcome.ending.value == "power-off"
    with package.VM(guest="debian", accel="kvm", memory="16M", net="user") as vm:
        assert vm.ssh == [], "a network of the user's own"
    (tmp_path / "vm.toml").write_text('guest = "debian"\naccel = "kvm"\nmemory = "16M"\n')
    result = vmonty("run", "--config", tmp_path / "vm.toml")
    assert (result.status, result.out) == (0, ""), result
    assert "ssh -i " in result.err


def test_a_port_that_is_taken_is_passed_over() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port < debian.free_port(port) < port + 100
