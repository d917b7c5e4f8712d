"""``vmonty bench``: measurements, with the peers in the same run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from vmonty import kvm as providers
from vmonty.base.errors import UsageError
from vmonty.cli.progress import terminal_progress

if TYPE_CHECKING:
    from vmonty.bench.report import Report

# The measurements are imported by their commands: no other command should wait for the processor's code.


@click.group(epilog="Example:  vmonty bench cpu --quick")
def bench() -> None:
    """Measure this build, its peers beside it: medians of paired runs, in CPU time."""


def finish(report: Report, json_file: Path | None) -> None:
    """Show the table, and write the JSON where it was asked for."""
    console = Console()
    # In a pipe or a file nothing says how wide: as wide as the table is.
    report.show(console if console.is_terminal else Console(width=160))
    if json_file is not None:
        try:
            report.write(json_file)
        except OSError as error:
            raise UsageError(f"{json_file} cannot be written: {error.strerror}") from error


def check_names(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Raises UsageError when one of *given* is not known."""
    for name in given:
        if name not in known:
            raise UsageError(f"there is no {what} {name}; there are {', '.join(known)}")


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
    from vmonty.bench.cpu import measure
    from vmonty.bench.payload import NAMES

    check_names("payload", payloads, NAMES)
    with terminal_progress() as progress:
        report = measure(payloads or NAMES, quick, progress)
    finish(report, json_file)


@bench.command(epilog="Example:  vmonty bench kvm --provider soft --json kvm.json")
@click.argument("operations", nargs=-1)
@click.option(
    "--provider", type=click.Choice(sorted(providers.PROVIDERS)), default="soft", show_default=True,
    help="Whose KVM is measured.",
)  # fmt: skip
@json_option
@quick_option
def kvm(operations: tuple[str, ...], provider: str, json_file: Path | None, quick: bool) -> None:
    """Measure OPERATIONS (default: all) of a KVM: exits, page fills, interrupts between vCPUs, creation."""
    from vmonty.bench.kvm import NAMES, measure

    check_names("operation", operations, NAMES)
    with terminal_progress() as progress:
        report = measure(provider, operations or NAMES, quick, progress)
    finish(report, json_file)


@bench.command(epilog="Example:  vmonty bench boot microvm seabios --quick")
@click.argument("names", nargs=-1)
@json_option
@quick_option
def boot(names: tuple[str, ...], json_file: Path | None, quick: bool) -> None:
    """Boot NAMES (default: all), on soft and under QEMU's TCG.

    pc, q35 and microvm are the busybox guest to userspace, debian is the Debian guest to its login; seabios, memtest,
    ovmf and grub go by firmware to their first screen. With --quick the default is pc, microvm and seabios. What this
    host lacks is left out; without qemu-system-x86_64 its column stays empty.
    """
    from vmonty.bench.boot import NAMES, measure

    check_names("boot", names, NAMES)
    with terminal_progress() as progress:
        report = measure(names, quick, progress)
    finish(report, json_file)


@bench.command(epilog="Example:  vmonty bench block --quick --json block.json")
@json_option
@quick_option
def block(json_file: Path | None, quick: bool) -> None:
    """Read and write virtio disks, raw and qcow2, in a Linux guest on soft and under QEMU's TCG.

    Needs gcc for the guest's program. Without qemu-system-x86_64 its column stays empty.
    """
    from vmonty.bench.block import measure

    with terminal_progress() as progress:
        report = measure(quick, progress)
    finish(report, json_file)


@bench.command(epilog="Example:  vmonty bench net --quick")
@json_option
@quick_option
def net(json_file: Path | None, quick: bool) -> None:
    """Send and receive by TCP through the user network, in a Linux guest on soft and under QEMU's TCG.

    Needs gcc for the guest's program. Without qemu-system-x86_64 its column stays empty.
    """
    from vmonty.bench.net import measure

    with terminal_progress() as progress:
        report = measure(quick, progress)
    finish(report, json_file)


@bench.command(epilog="Example:  vmonty bench vnc --quick")
@json_option
@quick_option
def vnc(json_file: Path | None, quick: bool) -> None:
    """Show a scrolling text console of 1024x768 to a VNC viewer, from soft and from QEMU's TCG.

    Needs gcc for the guest. Without qemu-system-x86_64 its column stays empty.
    """
    from vmonty.bench.vnc import measure

    with terminal_progress() as progress:
        report = measure(quick, progress)
    finish(report, json_file)
