"""``vmonty device``: devices of a running machine that come and go."""

from __future__ import annotations

import json

import click

from vmonty.base.errors import UsageError
from vmonty.cli.attach import Attached
from vmonty.vmm.hotplug import UNPLUG_SECONDS

MACHINE = click.argument("machine", metavar="NAME|PATH")


@click.group(epilog="Example:  vmonty device add work --disk data.qcow2")
def device() -> None:
    """Add virtio devices to a machine that listens at a control socket, and remove them."""


@device.command("list", epilog="Example:  vmonty device list work --json")
@MACHINE
@click.option("--json", "as_json", is_flag=True, help="Print an object: slot → name.")
def list_(machine: str, as_json: bool) -> None:
    """List what may be removed, by slot of the PCI root bus."""
    with Attached(machine) as attached:
        found = attached.request("devices")
    if as_json:
        click.echo(json.dumps(found))
        return
    for slot, name in found.items():
        click.echo(f"{slot:>4}  {name}")


@device.command(epilog="Example:  vmonty device add work --net user,hostfwd=tcp::8080-:80")
@MACHINE
@click.option("--disk", metavar="FILE[,OPTIONS]", help="A virtio disk, as `vmonty run --disk` has it.")
@click.option("--net", metavar="KIND[,OPTIONS]", help="A network card, as `vmonty run --net` has it.")
@click.option("--device", "other", metavar="NAME[,OPTIONS]", help="Another virtio device, such as virtio-rng.")
def add(machine: str, disk: str | None, net: str | None, other: str | None) -> None:
    """Add one device; prints its slot. Paths are the machine's process's."""
    given = [(kind, text) for kind, text in (("disk", disk), ("net", net), ("device", other)) if text is not None]
    if len(given) != 1:
        raise UsageError("give one of --disk, --net and --device")
    with Attached(machine) as attached:
        click.echo(attached.request("plug", kind=given[0][0], options=given[0][1])["slot"])


@device.command(epilog="Example:  vmonty device remove work 4")
@MACHINE
@click.argument("slot", type=int)
@click.option("--seconds", type=click.IntRange(1), default=UNPLUG_SECONDS, show_default=True, help="How long to wait.")
def remove(machine: str, slot: int, seconds: int) -> None:
    """Ask the guest for the device in SLOT, and wait until it has let go of it."""
    with Attached(machine) as attached:
        attached.request("unplug", slot=slot, seconds=seconds)
