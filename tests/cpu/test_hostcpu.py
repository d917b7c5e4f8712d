"""A host that cannot run translated code is refused in one line, before any code is made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmonty import host, kvm
from vmonty.base.errors import KvmUnavailable
from vmonty.cpu import hostcpu
from vmonty.cpu.core import Cpu
from vmonty.kvm.soft import modules, pcpu

ALL = hostcpu.host_flags()


@pytest.fixture
def no_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: no module is loaded, and no processor has been made."""
    monkeypatch.setattr(modules, "_loaded", None)
    monkeypatch.setattr(pcpu, "POOL", pcpu.PhysicalCpus(4))


def has(monkeypatch: pytest.MonkeyPatch, flags: frozenset[str]) -> None:
    monkeypatch.setattr(hostcpu, "host_flags", lambda: flags)


def test_this_host_will_do() -> None:
    assert hostcpu.REQUIRED.keys() <= ALL
    Cpu()


@pytest.mark.parametrize("name", hostcpu.REQUIRED)
def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    has(monkeypatch, ALL - {name})
    with pytest.raises(hostcpu.HostCpuError, match=f"needs {name}, which") as error:
        Cpu()
    assert "\n" not in str(error.value)


def test_all_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor of before 2011, or where the kernel runs with ``noxsave``."""
    has(monkeypatch, frozenset({"lm", "sse2", "lahf_lm"}))
    with pytest.raises(hostcpu.HostCpuError, match="needs bmi2, avx, xsave, which"):
        Cpu()


@pytest.mark.parametrize("machine", ["aarch64", "i686", ""])
def test_other_architectures(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "host", "6.1.0", "#1", machine)))
    with pytest.raises(hostcpu.HostCpuError, match=f"x86-64 processor, and this host's is {machine or 'unknown'}"):
        Cpu()


def test_no_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hostcpu, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(hostcpu, "host_flags", hostcpu.host_flags.__wrapped__)
    with pytest.raises(hostcpu.HostCpuError, match="No such file or directory; mount /proc"):
        Cpu()


@pytest.mark.parametrize("provider", ["soft", "soft-svm"])
def test_the_software_kvm_is_unavailable(monkeypatch: pytest.MonkeyPatch, no_processors: None, provider: str) -> None:
    has(monkeypatch, ALL - {"bmi2"})
    with pytest.raises(KvmUnavailable, match="needs bmi2, which this host's processor lacks") as error:
        kvm.open(provider)
    assert "bmi2" in error.value.remedy


def test_doctor_shows_it(monkeypatch: pytest.MonkeyPatch, no_processors: None) -> None:
    has(monkeypatch, ALL - {"avx"})
    row = host.software()
    assert row.verdict is host.Verdict.MISSING
    assert "needs avx, which" in row.remedy
