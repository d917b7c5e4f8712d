"""``vmonty run`` with disks, networks and a configuration file."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from vmm.fake_kvm import FakeKvm
from vmm.steps import Guest, Out
from vmonty import kvm

from .conftest import Result

Run = Callable[..., Result]


def short(cpu: int) -> Guest:
    """Say ok and power off."""
    for byte in b"ok\n":
        yield Out(0x3F8, byte)
    yield Out(0x604, 5 << 10 | 1 << 13, 2)


@pytest.fixture(autouse=True)
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kvm.PROVIDERS, "linux", (__name__, "fake"))


def fake() -> FakeKvm:
    return FakeKvm(short)


def test_a_file_says_what_runs_and_options_go_before_it(vmonty: Run, kernel: Path, tmp_path: Path) -> None:
    config = tmp_path / "vm.toml"
    config.write_text(f'kernel = "{kernel}"\nmemory = "32M"\naccel = "soft:nothing"\n')
    result = vmonty("run", "--config", config, "--accel", "kvm")
    assert (result.status, result.out) == (0, "ok\n")
    config.write_text("memroy = 1\n")
    assert "memroy: there is no such setting" in vmonty("run", "--config", config).refusal()


def test_disks_and_networks_of_a_file_are_checked(vmonty: Run, kernel: Path, tmp_path: Path) -> None:
    config = tmp_path / "vm.yaml"
    base = f"kernel: {kernel}\naccel: kvm\nmemory: 32M\n"
    config.write_text(base + "disks: none.img\n")
    assert str(tmp_path / "none.img") in vmonty("run", "--config", config).err
    config.write_text(base + "disks: [x.img]\n")
    assert "disks.0.colour" in vmonty("run", "--config", config, "--disk", "x.img,colour=red").refusal()
    config.write_text(base + "net: wifi\n")
    assert "no kind of network" in vmonty("run", "--config", config).refusal()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config.write_text(base + f"net: user,hostfwd=tcp:127.0.0.1:{taken.getsockname()[1]}-:22\n")
        assert "cannot be had" in vmonty("run", "--config", config).refusal()
