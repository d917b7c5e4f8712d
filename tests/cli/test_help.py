"""Every command explains itself, and every option has a test."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from vmonty import __version__
from vmonty.cli.main import cli

from .conftest import Result

Run = Callable[..., Result]


def commands(
    command: click.Command = cli, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command and group, with the words that lead to it."""
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from commands(child, (*path, name))


TREE = dict(commands())
NAMES = [" ".join(("vmonty", *path)) for path in TREE]


@pytest.mark.parametrize("path", TREE, ids=NAMES)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help(vmonty: Run, path: tuple[str, ...], option: str) -> None:
    result = vmonty(*path, option)
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith(f"Usage: {' '.join(('vmonty', *path))} ")
    assert re.search(r"(Example|Try):\s+vmonty \w+", result.out), "there is an example"
    for parameter in TREE[path].params:
        if isinstance(parameter, click.Option):
            assert parameter.help
            assert parameter.help[0].isupper()
            assert parameter.help.endswith((".", "]"))


@pytest.mark.parametrize("path", TREE, ids=NAMES)
def test_the_examples_can_be_typed(path: tuple[str, ...]) -> None:
    command = TREE[path]
    text = " ".join(filter(None, (command.help, command.epilog)))
    text = re.sub(r"\s+", " ", text)
    for found in re.finditer(r"(?:Example|Try): +vmonty (.*?)(?: \||  | to |$)", text):
        words = shlex.split(found[1])
        here: click.Command = cli
        while isinstance(here, click.Group):
            child = here.get_command(click.Context(here), words.pop(0))
            assert child is not None
            here = child
        here.make_context("example", words)


@pytest.mark.parametrize("path", [path for path, command in TREE.items() if isinstance(command, click.Group)])
def test_a_group_without_a_command_shows_its_help(vmonty: Run, path: tuple[str, ...]) -> None:
    result = vmonty(*path)
    assert (result.status, result.err) == (0, "")
    assert result.out == vmonty(*path, "--help").out


def test_version(vmonty: Run) -> None:
    assert vmonty("--version") == Result(0, f"vmonty, version {__version__}\n", "")


@pytest.mark.parametrize("words", [["nonsense"], ["guest", "nonsense"], ["guest", "build", "nonsense"], ["--nonsense"]])
def test_what_is_no_command(vmonty: Run, words: list[str]) -> None:
    assert "nonsense" in vmonty(*words).refusal()


@pytest.mark.parametrize("path", TREE, ids=NAMES)
def test_every_option_is_in_a_test(path: tuple[str, ...]) -> None:
    """A meta-test: an option that no test of this folder mentions fails here."""
    texts = "".join(source.read_text() for source in Path(__file__).parent.glob("*.py"))
    for parameter in TREE[path].params:
        if isinstance(parameter, click.Option):
            name = max(parameter.opts, key=len)
            assert re.search(rf"[\"']{name}\b", texts), f"{' '.join(path)} {name} is in no test"
