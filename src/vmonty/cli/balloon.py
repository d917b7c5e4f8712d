"""``vmonty balloon``: the memory that a running guest gets along with."""

from __future__ import annotations

import json
from typing import Any

import click

from vmonty.cli.attach import Attached
from vmonty.cli.sizes import Size

MIB = 1 << 20


def table(found: dict[str, Any]) -> str:
    """What the command ``balloon`` answered, for people; the guest's statistics as it tells them."""
    sizes = {name: f"{found[name] // MIB} MiB" for name in ("memory", "target", "actual")}
    return "\n".join(f"{name:<20}{value}" for name, value in (sizes | found["statistics"]).items())


@click.command(epilog="Example:  vmonty balloon work 256M")
@click.argument("machine", metavar="NAME|PATH")
@click.argument("size", required=False, type=Size())
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text: bytes.")
def balloon(machine: str, size: int | None, as_json: bool) -> None:
    """Ask the guest of a machine that listens at a control socket to get along with SIZE of its memory.

    It needs --device virtio-balloon and the guest's driver, which takes its time: without SIZE show where it is, and
    what the guest tells of its memory.
    """
    with Attached(machine) as attached:
        found = attached.request("balloon", **({} if size is None else {"size": size}))
    click.echo(json.dumps(found) if as_json else table(found))
