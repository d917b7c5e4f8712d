"""The command ``vmonty``: options common to all, and errors as one line."""

from __future__ import annotations

import sys

import click

from vmonty import __version__
from vmonty.base.errors import UsageError, VmontyError
from vmonty.cli.bench import bench
from vmonty.cli.disk import disk
from vmonty.cli.doctor import doctor
from vmonty.cli.guest import guest
from vmonty.cli.run import run
from vmonty.cli.stat import stat


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vmonty")
def cli() -> None:
    """The full virtual machine, in Python.

    Try:  vmonty doctor   to see what this host offers,
          vmonty run      to boot a small Linux.
    """


cli.add_command(run)
cli.add_command(doctor)
cli.add_command(guest)
cli.add_command(disk)
cli.add_command(bench)
cli.add_command(stat)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; end the process: 0 success, 1 failure, 2 bad usage, 130 interrupted.

    A reader of standard output that went away is a silent 1: click sees to that.
    """
    try:
        status = cli.main(arguments, prog_name="vmonty", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("vmonty: interrupted", err=True)
        sys.exit(130)
    except click.exceptions.NoArgsIsHelpError as help_wanted:
        click.echo(help_wanted.format_message())
        sys.exit(0)
    except click.ClickException as error:
        click.echo(f"vmonty: {error.format_message()}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        click.echo("vmonty: interrupted", err=True)
        sys.exit(130)
    except UsageError as error:
        click.echo(f"vmonty: {error}", err=True)
        sys.exit(2)
    except VmontyError as error:
        click.echo(f"vmonty: {error}", err=True)
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else 0)
