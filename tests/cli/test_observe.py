"""`vmonty run --trace` and `vmonty stat`: on the software KVM, with a guest that is no Linux."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvm_soft.plain import plain_guest
from vmonty.base.errors import UsageError
from vmonty.cli.stat import stat
from vmonty.cli.tracefile import TraceFile
from vmonty.testing.guests import Mode, TinyGuest


@pytest.fixture(params=["kvm_intel", "kvm_amd", "kvm_intel ept=0", "kvm_amd npt=0"])
def guest(request: pytest.FixtureRequest) -> Iterator[TinyGuest]:
    with plain_guest(request.param) as made:
        yield made.load(Mode.LONG, "again: cpuid\n out 0x10, al\n jmp again")


def traced(guest: TinyGuest, path: Path, *names: str) -> str:
    trace = TraceFile(path, frozenset(names), io.StringIO())
    guest.vm.trace(trace)
    for _ in range(3):
        guest.out()
    guest.vm.trace(None)
    trace.close()
    return path.read_text()


def test_json_lines(guest: TinyGuest, tmp_path: Path) -> None:
    records = [json.loads(line) for line in traced(guest, tmp_path / "t.jsonl").splitlines()]
    names = [record["exit"] for record in records]
    port = "IOIO" if "IOIO" in names else "IO_INSTRUCTION"
    # Beside those that fill our tables.
    assert [name for name in names if name in ("CPUID", port)] == ["CPUID", port] * 3
    assert all(record["vcpu"] == 0 and record["guest_ns"] >= 0 for record in records)


def test_only_some(guest: TinyGuest, tmp_path: Path) -> None:
    text = traced(guest, tmp_path / "t.jsonl", "CPUID")
    assert {json.loads(line)["exit"] for line in text.splitlines()} == {"CPUID"}


def test_a_chrome_trace(guest: TinyGuest, tmp_path: Path) -> None:
    events = json.loads(traced(guest, tmp_path / "t.json"))
    assert {event["name"] for event in events} == {"guest", "host"}
    assert all(event["ph"] == "X" and event["dur"] >= 0 for event in events)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        TraceFile(tmp_path / "no" / "t.json", frozenset(), io.StringIO())


def test_counters_of_a_process(guest: TinyGuest) -> None:
    with guest.vm.stats(), guest.vcpu.stats():
        guest.out()
        shown = CliRunner().invoke(stat, [str(os.getpid()), "--json"])
        assert json.loads(shown.output)["io_exits"] >= 1
        table = CliRunner().invoke(stat, [str(os.getpid()), "--once"])
        assert "io_exits" in table.output


def test_a_process_without_counters() -> None:
    shown = CliRunner().invoke(stat, ["1"])
    assert isinstance(shown.exception, UsageError)
    assert "shows no counters" in str(shown.exception)


@pytest.mark.parametrize("interval", ["0", "-1"])
def test_bad_interval(interval: str) -> None:
    assert isinstance(CliRunner().invoke(stat, ["1", "--interval", interval]).exception, UsageError)


def test_to_the_terminal(guest: TinyGuest) -> None:
    terminal = io.StringIO()
    trace = TraceFile(Path("-"), frozenset(["CPUID"]), terminal)
    guest.vm.trace(trace)
    guest.out()
    guest.vm.trace(None)
    trace.close()
    assert [json.loads(line)["exit"] for line in terminal.getvalue().splitlines()] == ["CPUID"]
