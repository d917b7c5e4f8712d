"""``vmonty doctor`` on hosts of every kind, made by faking what it looks at."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vmm.fake_kvm import FakeKvm
from vmm.steps import Guest, Leave, Spin
from vmonty import host, kvm
from vmonty.host import Report, Row, Verdict
from vmonty.kvm import linux
from vmonty.kvm.uapi import Cap, Exit
from vmonty.vmm import accel

from .conftest import Result

Run = Callable[..., Result]
Host = Callable[[object], None]
_provider: list[Any] = []


def chosen() -> Any:
    return _provider[0]


@pytest.fixture
def host_with(monkeypatch: pytest.MonkeyPatch) -> Host:
    """Let the host's KVM be this provider, and the only one."""
    monkeypatch.setattr(accel, "ACCELERATORS", {"kvm": "linux"})

    def choose(provider: object) -> None:
        _provider[:] = [provider]
        monkeypatch.setitem(kvm.PROVIDERS, "linux", (__name__, "chosen"))

    return choose


def running_at(mips: float) -> FakeKvm:
    def guest(cpu: int) -> Guest:
        yield Spin(mips)

    return FakeKvm(guest)


def examined(vmonty: Run) -> tuple[int, dict[str, Any], dict[str, dict[str, Any]]]:
    result = vmonty("doctor", "--json")
    assert result.err == ""
    report = json.loads(result.out)
    return result.status, report, {row["name"]: row for row in report["rows"]}


def test_schema(vmonty: Run) -> None:
    status, report, rows = examined(vmonty)
    assert set(report) == {"usable", "accelerator", "rows"}
    assert status == (0 if report["usable"] else 1)
    assert report["usable"] is (report["accelerator"] is not None)
    assert len(rows) == len(report["rows"]), "names are unique"
    for row in report["rows"]:
        assert set(row) == {"name", "verdict", "text", "remedy", "data"}
        assert row["verdict"] in ("ok", "warning", "missing")
        assert row["text"]
        assert "\n" not in row["text"] + row["remedy"]
        assert isinstance(row["data"], dict)
        if row["verdict"] == "missing":
            assert row["remedy"], row
    assert {"processor", "virtualization", "nested paging", "/dev/kvm", "/dev/net/tun", "/dev/vhost-net", "huge pages",
            "memory", "disk"} <= set(rows)  # fmt: skip


def test_table_and_json_agree(vmonty: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    report = host.examine()
    odd = Row("odd [name]", Verdict.MISSING, "text with [brackets] and [/]", "a remedy with [red]markup[/red]")
    report = Report([*report.rows, odd], report.accelerator)
    monkeypatch.setattr(host, "examine", lambda: report)
    monkeypatch.setenv("COLUMNS", "400")
    table = vmonty("doctor")
    status, parsed, _ = examined(vmonty)
    assert table.status == status
    expected = []
    for row in parsed["rows"]:
        expected.append(f"{row['verdict']} {row['name']} {row['text']}")
        if row["remedy"]:
            expected.append(f"→ {row['remedy']}")
    shown = [re.sub(r"  +", " ", line.strip()) for line in table.out.splitlines()]
    assert shown[:-1] == [re.sub(r"  +", " ", line) for line in expected]
    assert ("No VM can run here" in shown[-1]) is not parsed["usable"]


def test_a_fast_kvm(vmonty: Run, host_with: Host) -> None:
    fake = running_at(3000)
    host_with(fake)
    status, report, rows = examined(vmonty)
    assert (status, report["accelerator"]) == (0, "kvm")
    assert rows["/dev/kvm"]["text"] == "API version 12"
    assert rows["kernel code"]["verdict"] == "ok"
    assert rows["kernel code"]["data"]["cpl0_mips"] > 500
    assert rows["limits"]["data"] == {"recommended_vcpus": 1, "max_vcpus": 1024, "memory_slots": 1}
    assert rows["capabilities"]["verdict"] == "ok"
    assert not fake.files
    assert vmonty("doctor").out.endswith("A VM can run here: --accel auto takes kvm.\n")


def test_a_slow_kvm(vmonty: Run, host_with: Host) -> None:
    host_with(running_at(1))
    status, report, rows = examined(vmonty)
    assert (status, report["usable"]) == (1, False)
    assert rows["kernel code"]["verdict"] == "warning"
    assert "emulated, too slow to boot" in rows["kernel code"]["text"]
    assert "auto will not choose this KVM" in rows["kernel code"]["remedy"]


def test_the_software_cpu_steps_in(vmonty: Run, host_with: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host_with(running_at(1))
    monkeypatch.setitem(accel.ACCELERATORS, "soft", "soft")
    monkeypatch.setitem(kvm.PROVIDERS, "soft", (__name__, "software"))
    status, report, rows = examined(vmonty)
    assert (status, report["accelerator"]) == (0, "soft")
    assert rows["kernel code"]["verdict"] == "warning"
    assert rows["software CPU"]["verdict"] == "ok"
    host_with(running_at(3000))
    assert examined(vmonty)[1]["accelerator"] == "kvm", "hardware comes first"


def software() -> FakeKvm:
    return running_at(700)


def test_a_software_cpu_that_cannot_run(vmonty: Run, host_with: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host_with(FakeKvm(refuses={"KVM_CREATE_VM": errno.ENOMEM}))
    monkeypatch.setitem(accel.ACCELERATORS, "soft", "linux")
    status, report, rows = examined(vmonty)
    assert (status, report["usable"]) == (1, False)
    assert rows["software CPU"]["verdict"] == "missing"


def test_no_device(vmonty: Run, host_with: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host_with(linux.LinuxKvm(str(tmp_path / "kvm")))
    for flags, remedy in (
        ({"vmx"}, "sudo modprobe kvm_intel"), ({"svm"}, "sudo modprobe kvm_amd"), (set(), "no virtualization"),
    ):  # fmt: skip
        monkeypatch.setattr(linux, "cpu_flags", lambda flags=flags: frozenset(flags))
        status, report, rows = examined(vmonty)
        assert (status, report["usable"]) == (1, False)
        assert rows["/dev/kvm"]["verdict"] == "missing"
        assert "No such file or directory" in rows["/dev/kvm"]["text"]
        assert remedy in rows["/dev/kvm"]["remedy"]
        assert "kernel code" not in rows


def test_no_permission(vmonty: Run, host_with: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    really_open = os.open

    def refuse(path: Any, *rest: Any, **more: Any) -> int:
        if path == "/dev/forbidden":
            raise PermissionError(errno.EACCES, "Permission denied")
        return really_open(path, *rest, **more)

    host_with(linux.LinuxKvm("/dev/forbidden"))
    monkeypatch.setattr(os, "open", refuse)
    status, _, rows = examined(vmonty)
    assert status == 1
    assert "Permission denied" in rows["/dev/kvm"]["text"]
    assert "usermod -aG kvm" in rows["/dev/kvm"]["remedy"]


def test_a_kvm_that_makes_no_vm(vmonty: Run, host_with: Host) -> None:
    host_with(FakeKvm(refuses={"KVM_CREATE_VM": errno.EBUSY}))
    status, _, rows = examined(vmonty)
    assert status == 1
    assert rows["kernel code"]["verdict"] == "missing"
    assert rows["kernel code"]["remedy"] == "a remedy"


def test_a_kvm_whose_guest_fails(vmonty: Run, host_with: Host) -> None:
    def guest(cpu: int) -> Guest:
        yield Leave(Exit.FAIL_ENTRY)

    host_with(FakeKvm(guest))
    status, _, rows = examined(vmonty)
    assert status == 1
    assert "FAIL_ENTRY" in rows["kernel code"]["text"]


@pytest.mark.parametrize(("lacking", "verdict", "status"), [(Cap.IRQCHIP, "missing", 1), (Cap.IRQFD, "warning", 0)])
def test_a_kvm_without_a_capability(vmonty: Run, host_with: Host, lacking: Cap, verdict: str, status: int) -> None:
    fake = running_at(3000)
    fake.extensions[lacking] = 0
    host_with(fake)
    got, report, rows = examined(vmonty)
    assert rows["capabilities"]["verdict"] == verdict
    assert lacking.name in rows["capabilities"]["text"]
    assert (got, report["usable"]) == (status, status == 0)


@pytest.mark.parametrize(
    ("flags", "virtualization", "paging"),
    [
        ({"vmx", "ept", "avx2"}, ("ok", "vmx"), ("ok", "ept")),
        ({"svm", "npt"}, ("ok", "svm"), ("ok", "npt")),
        ({"vmx"}, ("ok", "vmx"), ("warning", "no ept or npt flag")),
        (set(), ("warning", "no vmx or svm flag"), ("warning", "no ept or npt flag")),
    ],
)
def test_processors(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], virtualization: tuple[str, str], paging: tuple[str, str]
) -> None:
    monkeypatch.setattr(host, "cpu_flags", lambda: frozenset(flags))
    assert host.processor().data == {"flags": sorted(flags)}
    for row, expected in ((host.virtualization(), virtualization), (host.nested_paging(), paging)):
        assert (row.verdict.value, row.text) == expected


def test_another_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    row = host.processor()
    assert row.verdict is Verdict.MISSING
    assert "x86-64" in row.remedy


@pytest.mark.parametrize(
    ("module", "verdict"), [("kvm_intel", "ok"), ("kvm_amd", "ok"), ("kvm_xyz", "warning"), (None, "warning")]
)
def test_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str | None, verdict: str) -> None:
    if module:
        tmp_path.joinpath(module).mkdir()
    monkeypatch.setattr(host, "vendor_module", lambda: linux.vendor_module(tmp_path))
    assert host.kvm_module().verdict.value == verdict


def test_little_memory_and_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "LEAST_MEMORY", 1 << 60)
    monkeypatch.setattr(host, "LEAST_DISK", 1 << 60)
    for row in (host.memory(), host.disk()):
        assert row.verdict is Verdict.WARNING
        assert row.remedy


def test_a_cache_that_is_not_there_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a" / "b"))
    assert f"at {tmp_path}" in host.disk().text
    assert not tmp_path.joinpath("a").exists()
