"""``vmonty doctor``: what this host offers, and what to do where it does not."""

from __future__ import annotations

import json

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vmonty import host

COLOURS = {host.Verdict.OK: "green", host.Verdict.WARNING: "yellow", host.Verdict.MISSING: "red"}


@click.command(epilog="Example:  vmonty doctor --json | jq .usable")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def doctor(as_json: bool) -> int:
    """Say what this host offers to virtual machines: a verdict per row, with the remedy.

    The status is 0 only if a VM can run.
    """
    report = host.examine()
    if as_json:
        click.echo(json.dumps(_object(report), indent=1))
    else:
        _show(report)
    return 0 if report.usable else 1


def _object(report: host.Report) -> dict[str, object]:
    rows = [
        {"name": row.name, "verdict": row.verdict.value, "text": row.text, "remedy": row.remedy, "data": row.data}
        for row in report.rows
    ]
    return {"usable": report.usable, "accelerator": report.accelerator, "rows": rows}


def _show(report: host.Report) -> None:
    console = Console()
    table = Table(box=None, pad_edge=False, show_header=False)
    for column in ("verdict", "name", "text"):
        table.add_column(column, overflow="fold")
    for row in report.rows:
        colour = COLOURS[row.verdict]
        table.add_row(f"[{colour}]{row.verdict.value}[/]", escape(row.name), escape(row.text))
        if row.remedy:
            table.add_row("", "", f"[dim]→ {escape(row.remedy)}[/]")
    console.print(table)
    if report.usable:
        console.print(f"A VM can run here: --accel auto takes {report.accelerator}.")
    else:
        console.print("No VM can run here at a useful speed: --accel auto finds nothing to take.")
