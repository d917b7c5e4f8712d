"""What a benchmark gives: rows with the peers' figures beside ours, as JSON and as a table."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from math import exp, log
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One measurement; None where a peer cannot do it. *target* says what we want, in words."""

    name: str
    unit: str
    better: Literal["less", "more"]
    vmonty: float | None
    native: float | None = None
    qemu_tcg: float | None = None
    target: str = ""

    @property
    def over_native(self) -> float | None:
        """How many times the processor's own figure ours is."""
        return self.vmonty / self.native if self.vmonty and self.native else None

    @property
    def tcg_over_vmonty(self) -> float | None:
        """How many times better than QEMU's TCG we are."""
        if not self.vmonty or not self.qemu_tcg:
            return None
        ratio = self.qemu_tcg / self.vmonty
        return ratio if self.better == "less" else 1 / ratio


def host() -> dict[str, str | int]:
    """The machine and the programs that measured."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "cpu": model, "cpus": os.cpu_count() or 1, "kernel": platform.release(), "python": platform.python_version(),
        "vmonty": version("vmonty"), "qemu": qemu_version() or "not installed",
    }  # fmt: skip


def qemu_version() -> str | None:
    """QEMU's own words; None when it is not installed."""
    if shutil.which("qemu-system-x86_64") is None:
        return None
    shown = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True, timeout=20)
    return shown.stdout.splitlines()[0].removeprefix("QEMU emulator version ")


def geometric_mean(values: Iterable[float]) -> float:
    """The mean that ratios have."""
    logs = [log(value) for value in values]
    return exp(statistics.fmean(logs))


@dataclass
class Report:
    """The rows of one run."""

    title: str
    rows: list[Row] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write the JSON that docs and scripts read: host, rows. Raises OSError."""
        rows = [asdict(row) for row in self.rows]
        path.write_text(json.dumps({"host": host(), "rows": rows}, indent=1) + "\n")

    def show(self, console: Console) -> None:
        """Print the table."""
        table = Table(title=self.title, title_justify="left", box=None, pad_edge=False)
        table.add_column("", no_wrap=True)
        for column in ("vmonty", "native", "QEMU TCG", "÷ native", "× TCG"):
            table.add_column(column, justify="right")
        table.add_column("target")
        for row in self.rows:
            cells = [figure(value, row.unit) for value in (row.vmonty, row.native, row.qemu_tcg)]
            ratios = [f"{value:.2f}" if value else "" for value in (row.over_native, row.tcg_over_vmonty)]
            table.add_row(row.name, *cells, *ratios, row.target)
        console.print(table)
        facts = host()
        console.print(
            f"{facts['cpu']}, {facts['cpus']} CPUs; Linux {facts['kernel']}; QEMU {facts['qemu']}", style="dim"
        )


def figure(value: float | None, unit: str) -> str:
    """A value as the table shows it: seconds with the prefix that suits them, a dash for None."""
    if value is None:
        return "–"
    if unit == "s":
        for scale, name in ((1, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")):
            if value >= scale:
                return f"{value / scale:.3g} {name}"
    return f"{value:.4g} {unit}"
