"""`vmonty stat`: what machines of this user's other processes count, as a live table."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from pathlib import Path

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table

from vmonty.base.errors import UsageError, VmontyError
from vmonty.cli.attach import Attached
from vmonty.kvm.api.stats import Stats

PROC = Path("/proc")
_FILE = re.compile(r"/memfd:(kvm-\d+(?:/vcpu-\d+)?) \(deleted\)")
Snapshot = dict[str, int]


def counters(pid: int) -> dict[str, Stats]:
    """The open statistics of process *pid*, by id: kvm-PID and kvm-PID/vcpu-N. The caller closes them."""
    found: dict[str, Stats] = {}
    try:
        entries = sorted((PROC / str(pid) / "fd").iterdir())
    except OSError:
        return found  # it has ended, or is someone else's
    for entry in entries:
        try:
            named = _FILE.fullmatch(os.readlink(entry))
            if named and named[1] not in found and f"kvm-{pid}" == named[1].split("/")[0]:
                found[named[1]] = Stats(os.open(entry, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            continue  # closed meanwhile
    return found


def processes() -> list[int]:
    """All processes that show counters."""
    numbers = sorted(int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit())
    shown = []
    for pid in numbers:
        opened = counters(pid)
        if opened:
            shown.append(pid)
        for stats in opened.values():
            stats.close()
    return shown


def totals(opened: dict[str, Stats]) -> Snapshot:
    """The sums over a process's VMs and vCPUs; histograms are left out."""
    sums: Snapshot = {}
    for stats in opened.values():
        for name, value in stats.read().items():
            if isinstance(value, int):
                sums[name] = sums.get(name, 0) + value
    return sums


def table(title: str, now: Snapshot, before: Snapshot, seconds: float) -> Table:
    """What is not zero, what happens most often first."""
    made = Table(title=title)
    for column, justify in (("counter", "left"), ("total", "right"), ("per second", "right")):
        made.add_column(column, justify=justify)  # type: ignore[arg-type]
    rates = {name: (value - before.get(name, value)) / seconds for name, value in now.items()}
    for name in sorted((name for name in now if now[name]), key=lambda name: (-rates[name], name)):
        made.add_row(name, f"{now[name]:,}", f"{rates[name]:,.0f}" if rates[name] else "")
    return made


class Source:
    """Where a machine's counters come from: the files of a process, or a control socket."""

    def __init__(self, name: str | None) -> None:
        if name is not None and not name.isdecimal():
            self._attached: Attached | None = Attached(name)
            self._opened: dict[str, Stats] = {}
            self.title = f"vmonty, {name}"
            return
        self._attached = None
        pid = int(name) if name is not None else self._only_one()
        self._pid, self.title = pid, f"vmonty, process {pid}"
        self._opened = counters(pid)
        if not self._opened:
            raise UsageError(
                f"process {pid} shows no counters: it must be a running `vmonty run --accel soft` of yours"
            )

    @staticmethod
    def _only_one() -> int:
        running = processes()
        if len(running) != 1:
            raise UsageError(f"give a PID; machines run in: {', '.join(map(str, running)) or 'no process'}")
        return running[0]

    def totals(self) -> Snapshot | None:
        """The sums over VM and vCPUs; None when the machine has ended."""
        if self._attached is None:
            return totals(self._opened) if (PROC / str(self._pid)).exists() else None
        sums: Snapshot = {}
        try:
            parts = self._attached.request("stat")
        except (VmontyError, OSError):
            return None
        for part in parts.values():
            for name, value in part.items():
                sums[name] = sums.get(name, 0) + value
        return sums

    def close(self) -> None:
        """Close what was opened."""
        if self._attached is not None:
            self._attached.close()
        for stats in self._opened.values():
            stats.close()


@click.command(epilog="Example:  vmonty stat mine --interval 2")
@click.argument("name", metavar="[PID|NAME|PATH]", required=False)
@click.option("--interval", default=1.0, show_default=True, help="Seconds between two looks.")
@click.option("--once", is_flag=True, help="Print the totals once, and end.")
@click.option("--json", "as_json", is_flag=True, help="With --once: as JSON.")
def stat(name: str | None, interval: float, once: bool, as_json: bool) -> int:
    """Show what a running machine's KVM counts: exits, injections, page faults, halts.

    It is a process that runs `vmonty run --accel soft`, without an argument the only one there is; or the control
    socket that `vmonty run --control` was given.
    """
    if interval <= 0:
        raise UsageError("--interval needs a number of seconds above 0")
    with contextlib.closing(Source(name)) as source:
        return show(source, interval, once or as_json, as_json)


def show(source: Source, interval: float, once: bool, as_json: bool) -> int:
    """Print the totals, or a table until the machine ends."""
    before, since = source.totals(), time.monotonic()
    if before is None:
        raise UsageError("the machine has ended")
    if once:
        if as_json:
            click.echo(json.dumps(before, sort_keys=True))
        else:
            Console().print(table(source.title, before, before, 1.0))
        return 0
    with Live(table(source.title, before, before, interval)) as live:
        while True:
            time.sleep(interval)
            now, at = source.totals(), time.monotonic()
            if now is None:
                return 0
            live.update(table(source.title, now, before, at - since))
            before, since = now, at
