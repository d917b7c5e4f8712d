"""``vmonty bench``: measurements, with the peers in the same run."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from vmonty.base.errors import UsageError
from vmonty.bench.cpu import measure
from vmonty.bench.payload import NAMES
from vmonty.bench.report import Report
from vmonty.cli.progress import terminal_progress


@click.group(epilog="Example:  vmonty bench cpu --quick")
def bench() -> None:
    """Measure this build, its peers beside it: medians of paired runs, in CPU time."""


def finish(report: Report, json_file: Path | None) -> None:
    """Show the table, and write the JSON where it was asked for."""
    report.show(Console())
    if json_file is not None:
        try:
            report.write(json_file)
        except OSError as error:
            raise UsageError(f"{json_file} cannot be written: {error.strerror}") from error


json_option = click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the rows to this file as JSON."
)
quick_option = click.option("--quick", is_flag=True, help="One short round: ends within a minute, less exact.")


@bench.command(epilog="Example:  vmonty bench cpu --json cpu.json")
@click.argument("payloads", nargs=-1)
@json_option
@quick_option
def cpu(payloads: tuple[str, ...], json_file: Path | None, quick: bool) -> None:
    """Run PAYLOADS (default: all) natively, on vmonty's processor and under QEMU's TCG.

    Needs gcc for the payloads; without qemu-system-x86_64 its column stays empty.
    """
    unknown = [name for name in payloads if name not in NAMES]
    if unknown:
        raise UsageError(f"there is no payload {unknown[0]}; there are {', '.join(NAMES)}")
    with terminal_progress() as progress:
        report = measure(payloads or NAMES, quick, progress)
    finish(report, json_file)
