"""`vmonty stat`: what machines of this user's other processes count, as a live table."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table

from vmonty.base.errors import UsageError
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


def table(pid: int, now: Snapshot, before: Snapshot, seconds: float) -> Table:
    """What is not zero, what happens most often first."""
    made = Table(title=f"vmonty, process {pid}")
    for column, justify in (("counter", "left"), ("total", "right"), ("per second", "right")):
        made.add_column(column, justify=justify)  # type: ignore[arg-type]
    rates = {name: (value - before.get(name, value)) / seconds for name, value in now.items()}
    for name in sorted((name for name in now if now[name]), key=lambda name: (-rates[name], name)):
        made.add_row(name, f"{now[name]:,}", f"{rates[name]:,.0f}" if rates[name] else "")
    return made


@click.command(epilog="Example:  vmonty stat 4711 --interval 2")
@click.argument("pid", type=int, required=False)
@click.option("--interval", default=1.0, show_default=True, help="Seconds between two looks.")
@click.option("--once", is_flag=True, help="Print the totals once, and end.")
@click.option("--json", "as_json", is_flag=True, help="With --once: as JSON.")
def stat(pid: int | None, interval: float, once: bool, as_json: bool) -> int:
    """Show what a running machine's KVM counts: exits, injections, page faults, halts.

    PID is the process of a `vmonty run --accel soft`; without it the only one there is.
    """
    if interval <= 0:
        raise UsageError("--interval needs a number of seconds above 0")
    if pid is None:
        running = processes()
        if len(running) != 1:
            raise UsageError(f"give a PID; machines run in: {', '.join(map(str, running)) or 'no process'}")
        (pid,) = running
    opened = counters(pid)
    if not opened:
        raise UsageError(f"process {pid} shows no counters: it must be a running `vmonty run --accel soft` of yours")
    if once or as_json:
        now = totals(opened)
        if as_json:
            click.echo(json.dumps(now, sort_keys=True))
        else:
            Console().print(table(pid, now, now, 1.0))
        return 0
    before, since = totals(opened), time.monotonic()
    with Live(table(pid, before, before, interval)) as live:
        while (PROC / str(pid)).exists():
            time.sleep(interval)
            now, at = totals(opened), time.monotonic()
            live.update(table(pid, now, before, at - since))
            before, since = now, at
    return 0
