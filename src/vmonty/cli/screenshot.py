"""``vmonty screenshot``: the screen of a running machine, as a picture or as text."""

from __future__ import annotations

import base64
from pathlib import Path

import click

from vmonty.base.errors import UsageError
from vmonty.cli.attach import Attached
from vmonty.vmm.display.screen import save


@click.command(epilog="Example:  vmonty screenshot work screen.png")
@click.argument("machine", metavar="NAME|PATH")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--text", is_flag=True, help="Print the characters of a text mode in place of writing a picture.")
def screenshot(machine: str, file: Path | None, text: bool) -> int:
    """Write the screen of a machine that listens at a control socket to FILE, as PNG; or print it with --text."""
    if text == (file is not None):
        raise UsageError("give a FILE for the picture, or --text")
    with Attached(machine) as attached:
        answer = attached.request("screen", text=text)
    if file is None:
        click.echo(answer["text"])
    else:
        save(file, base64.b64decode(answer["png"]))
    return 0
