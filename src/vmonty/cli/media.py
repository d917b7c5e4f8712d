"""``vmonty media``: the discs in the drives of a running machine."""

from __future__ import annotations

from pathlib import Path

import click

from vmonty.base.errors import UsageError
from vmonty.cli.attach import Attached


@click.command(epilog="Example:  vmonty media work cd0 second.iso")
@click.argument("machine", metavar="NAME|PATH")
@click.argument("drive", required=False)
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--eject", is_flag=True, help="Take the disc out.")
@click.option("--force", is_flag=True, help="Do it though the guest has locked the drive.")
def media(machine: str, drive: str | None, file: Path | None, eject: bool, force: bool) -> int:
    """Put the disc image FILE into DRIVE (cd0 is the first) of a machine that listens at a control socket.

    With --eject take the disc out; without a drive list what is in each. A guest that has locked its drive is asked to
    give the disc up, which it may do a moment later: try again then.
    """
    if (file is not None) == eject and drive is not None:
        raise UsageError("give a FILE for the drive, or --eject")
    if drive is None and (eject or force):
        raise UsageError("which DRIVE? The first is cd0")
    with Attached(machine) as attached:
        if drive is None:
            for name, there in attached.request("media").items():
                click.echo(f"{name}  {there or 'empty'}")
        elif eject:
            attached.request("eject", drive=drive, force=force)
        else:
            assert file is not None
            # The machine may have another working directory.
            attached.request("change", drive=drive, file=str(file.absolute()), force=force)
    return 0
