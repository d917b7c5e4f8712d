"""``vmonty guest build`` and the guest that ``vmonty run`` takes by itself; tests/guests has the building."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vmm.fake_kvm import FakeKvm
from vmm.steps import Guest, Out
from vmonty import kvm
from vmonty.base.errors import GuestError
from vmonty.guests import busybox

from .conftest import Result

Run = Callable[..., Result]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, kernel: Path, tmp_path: Path) -> list[bool]:
    """A builder that is done at once; each call adds its *force* to the list."""
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"an initrd")
    made = busybox.Guest(kernel, initrd, "9.9", "linux-image-9.9", "9.9-1", "aa", "bb", "1:1.36")
    calls: list[bool] = []

    def build(*, force: bool = False, progress: Callable[[str, int, int], None]) -> busybox.Guest:
        calls.append(force)
        for done in (0, 50, 100):
            progress("downloading it", done, 100)
        progress("building it", 0, 0)
        return made

    monkeypatch.setattr(busybox, "build", build)
    return calls


def test_text(vmonty: Run, built: list[bool], kernel: Path) -> None:
    result = vmonty("guest", "build", "busybox")
    first, second = result.out.splitlines()
    assert first.split() == ["kernel", str(kernel), "(9.9,", "9.9-1)"]
    assert second.endswith("(busybox 1:1.36)")
    assert result.err == "downloading it …\nbuilding it …\n", "a line for each phase where there is no terminal"
    assert built == [False]


def test_json(vmonty: Run, built: list[bool]) -> None:
    result = vmonty("guest", "build", "busybox", "--json", "--force")
    assert set(json.loads(result.out)) == {field.name for field in dataclasses.fields(busybox.Guest)}
    assert json.loads(result.out)["kernel_release"] == "9.9"
    assert built == [True]


def test_a_guest_that_cannot_be_built(vmonty: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(**_: object) -> busybox.Guest:
        raise GuestError("apt-get is not on this host; do this")

    monkeypatch.setattr(busybox, "build", build)
    result = vmonty("guest", "build", "busybox")
    assert (result.status, result.out, result.err) == (1, "", "vmonty: apt-get is not on this host; do this\n")


def off(cpu: int) -> Guest:
    yield Out(0x604, 5 << 10 | 1 << 13, 2)


def fake() -> FakeKvm:
    return FakeKvm(off)


@pytest.mark.parametrize("name", [[], ["busybox"]])
@pytest.mark.usefixtures("built")
def test_run_takes_it(vmonty: Run, monkeypatch: pytest.MonkeyPatch, name: list[str]) -> None:
    monkeypatch.setitem(kvm.PROVIDERS, "linux", (__name__, "fake"))
    result = vmonty("run", *name, "--accel", "kvm", "--memory", "16M", "--cpus", "2")
    assert (result.status, result.out) == (0, "")
    assert result.err.endswith("vmonty: using kvm, as asked\n")


def test_interrupted(vmonty: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(**_: object) -> busybox.Guest:
        raise KeyboardInterrupt

    monkeypatch.setattr(busybox, "build", build)
    result = vmonty("guest", "build", "busybox")
    assert (result.status, result.err.strip()) == (130, "vmonty: interrupted")
