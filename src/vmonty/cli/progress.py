"""Progress of long steps on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from vmonty.guests.progress import Progress


@contextmanager
def terminal_progress() -> Iterator[Progress]:
    """A bar on a terminal; a line per phase elsewhere, so that a log stays readable."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    shown = ""
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task: TaskID | None = None

        def show(phase: str, done: int, total: int, /) -> None:
            nonlocal shown, task
            if phase != shown and not console.is_terminal:
                click.echo(f"{phase} …", err=True)
            if phase != shown or task is None:
                # A new bar, or it would keep the last phase's total.
                if task is not None:
                    bars.remove_task(task)
                task = bars.add_task(phase, total=total or None)
            shown = phase
            bars.update(task, completed=done)

        yield show
