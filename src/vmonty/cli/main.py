"""The command ``vmonty``: options common to all, and errors as one line."""

from __future__ import annotations

import gc
import sys
from importlib import import_module

import click

from vmonty import __version__
from vmonty.base.errors import UsageError, VmontyError

COMMANDS = ("run", "doctor", "guest", "disk", "bench", "stat", "trace", "screenshot", "device", "media", "balloon")


class Commands(click.Group):
    """Each command is in the module of its name, which only its callers wait for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, None when there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"vmonty.cli.{cmd_name}"), cmd_name)
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vmonty")
@click.pass_context
def cli(context: click.Context) -> None:
    """The full virtual machine, in Python.

    Try:  vmonty doctor   to see what this host offers,
          vmonty run      to boot a small Linux.
    """
    if context.invoked_subcommand != "run":
        gc.enable()  # that command does it when its guest starts


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; end the process: 0 success, 1 failure, 2 bad usage, 130 interrupted.

    A reader of standard output that went away is a silent 1: click sees to that.
    """
    # All that a start makes stays: looking for garbage in it would take a tenth of its time, once it has begun, too.
    gc.disable()
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
    finally:
        gc.enable()
    sys.exit(status if isinstance(status, int) else 0)
