"""`vmonty trace`: the exits of a machine that runs in another process."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import click

from vmonty.base.errors import UsageError
from vmonty.cli.attach import Attached
from vmonty.cli.tracefile import TraceFile
from vmonty.kvm.exit_record import ExitRecord
from vmonty.vmm.tracing import fields, record_of


def line_for_people(record: ExitRecord, since_ns: int) -> str:
    """Time since the first exit, how long the guest ran before, the vCPU, why, and where."""
    seconds, guest = (record.left_ns - since_ns) / 1e9, (record.left_ns - record.entered_ns) / 1e3
    return (
        f"{seconds:12.6f}  {guest:9.1f} us  vcpu {record.vcpu:<3} {record.name:<20} rip {record.rip:#018x}"
        f"  qualification {record.qualification:#x}"
    )


@click.command(epilog="Example:  vmonty trace mine --only HLT --only EPT_VIOLATION --count 100")
@click.argument("name")
@click.option("--only", "names", multiple=True, metavar="NAME", help="Only exits of this name, such as EPT_VIOLATION.")
@click.option("--vcpu", "vcpus", multiple=True, type=click.IntRange(min=0), metavar="N", help="Only this vCPU's exits.")
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), metavar="FILE",
    help="Write to a file: a Chrome trace to FILE.json, JSON lines to others.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="JSON lines on standard output.")
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after so many exits.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), help="End after this time.")
def trace(
    name: str, names: tuple[str, ...], vcpus: tuple[int, ...], output: Path | None, as_json: bool, count: int | None,
    seconds: float | None,
) -> int:  # fmt: skip
    """Show each VM exit of a running machine, until it ends or Ctrl-C.

    NAME is what the machine was started with: `vmonty run --accel soft --control NAME`.
    """
    if output is not None and as_json:
        raise UsageError("give either --output or --json")
    with Attached(name) as machine:
        written = TraceFile(output, frozenset(), sys.stderr) if output is not None else None
        timer = threading.Timer(seconds, machine.hang_up) if seconds is not None else None
        try:
            machine.request("trace", names=list(names), vcpus=list(vcpus))
            if timer is not None:
                timer.start()
            show(machine, written, as_json, count)
        except KeyboardInterrupt:
            pass  # that is how one ends it
        finally:
            if timer is not None:
                timer.cancel()
                timer.join()
            if written is not None:
                written.close()
    return 0


def show(machine: Attached, written: TraceFile | None, as_json: bool, count: int | None) -> None:
    """Write exits where they are wanted."""
    first: int | None = None
    seen = 0
    for message in machine.messages():
        if "dropped" in message:
            click.echo(f"vmonty: {message['dropped']} exits came faster than they could be sent", err=True)
        if "trace" not in message:
            continue
        record = record_of(message["trace"])
        first = record.left_ns if first is None else first
        if written is not None:
            written(record)
        else:
            click.echo(json.dumps(fields(record)) if as_json else line_for_people(record, first))
        seen += 1
        if seen == count:
            return
