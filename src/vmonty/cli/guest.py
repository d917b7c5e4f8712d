"""``vmonty guest``: guests made from the host's own packages."""

from __future__ import annotations

import dataclasses
import json

import click

from vmonty.cli.progress import terminal_progress
from vmonty.guests import busybox


@click.group()
def guest() -> None:
    """Guests to boot, made from Debian packages.

    Example: vmonty guest build busybox
    """


@guest.group()
def build() -> None:
    """Fetch and build a guest, or show the one in the cache.

    Example: vmonty guest build busybox
    """


@build.command("busybox")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option("--force", is_flag=True, help="Ask apt again and build again, for instance for a newer kernel.")
def build_busybox(as_json: bool, force: bool) -> None:
    """The default guest: a cloud kernel and an initrd with busybox.

    Both come from the host's own apt, are kept under the XDG cache directory, and need no network once they
    are there. Nothing is installed.

    Example: vmonty guest build busybox --json
    """
    with terminal_progress() as progress:
        built = busybox.build(force=force, progress=progress)
    if as_json:
        fields = {name: str(value) for name, value in dataclasses.asdict(built).items()}
        click.echo(json.dumps(fields, indent=1))
    else:
        click.echo(f"kernel  {built.kernel}  ({built.kernel_release}, {built.kernel_version})")
        click.echo(f"initrd  {built.initrd}  (busybox {built.busybox_version})")
