"""``vmonty run`` with disks, networks and a configuration file."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from vmm.fake_kvm import FakeKvm
from vmm.steps import Guest, Out
from vmonty import kvm
from vmonty.vm.build import Build
from vmonty.vm.plan import Plan

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


def test_options_and_a_file_lead_to_the_same_machine(
    vmonty: Run, kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = []

    class Seen(Build):
        def __init__(self, plan: Plan) -> None:
            plans.append(plan)
            super().__init__(plan)

    monkeypatch.setattr("vmonty.cli.run.Build", Seen)
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 16))
    net = "user,net=10.1.0.0/24,mac=52:54:00:00:00:01"
    options = {
        "--kernel": kernel, "--append": "quiet", "--memory": "32M", "--cpus": 1, "--accel": "kvm",
        "--machine": "q35,root-ports=1", "--cpu": "Haswell,-pcid", "--device": "virtio-rng",
        "--disk": f"{disk},snapshot,format=raw", "--net": net, "--timeout": 60,
    }  # fmt: skip
    assert vmonty("run", "--no-reboot", *(word for pair in options.items() for word in pair)).status == 0
    config = tmp_path / "vm.toml"
    config.write_text(
        f'kernel = "{kernel}"\nappend = "quiet"\nmemory = "32M"\ncpus = 1\naccel = "kvm"\n'
        'machine = "q35,root-ports=1"\ncpu = "Haswell,-pcid"\ndevices = "virtio-rng"\n'
        f'disks = "{disk},snapshot,format=raw"\nnet = "{net}"\ntimeout = 60\nreboot = false\n'
    )
    assert vmonty("run", "--config", config).status == 0
    assert plans[0] == plans[1]
    assert plans[0].disks[0].snapshot
    assert plans[0].networks[0].mac == bytes.fromhex("525400000001")
