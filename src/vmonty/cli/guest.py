"""``vmonty guest``: guests made from the host's own packages."""

from __future__ import annotations

import dataclasses
import json

import click

from vmonty.cli.progress import terminal_progress
from vmonty.cli.sizes import Size
from vmonty.guests import busybox, rootdisk


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


@build.command("debian")
@click.option("--size", type=Size(), default="8G", show_default=True, help="Size of the disk.")
@click.option("--gcc", "compiler", is_flag=True, help="Add gcc, make and the headers of libc.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option("--force", is_flag=True, help="Build again, for instance for newer packages.")
def build_debian(size: int, compiler: bool, as_json: bool, force: bool) -> None:
    """A Debian root disk with systemd, DHCP and sshd, made by mmdebstrap from the host's apt sources.

    root logs in on the serial console without a password, and over ssh with the key that is shown: yours from
    ~/.ssh, or one made for you. The image is a base: `vmonty run debian` writes to an overlay.

    Example: vmonty guest build debian --gcc
    """
    from vmonty.vm.debian import pack

    with terminal_progress() as progress:
        built = rootdisk.build(pack, size=size, compiler=compiler, force=force, progress=progress)
    if as_json:
        click.echo(json.dumps({name: str(value) for name, value in dataclasses.asdict(built).items()}, indent=1))
    else:
        click.echo(f"disk    {built.disk}  ({built.size >> 20} MiB, Debian {built.suite})")
        click.echo(f"kernel  {built.kernel}  ({built.kernel_release})")
        click.echo(f"initrd  {built.initrd}")
        click.echo(f"key     {built.key}")
