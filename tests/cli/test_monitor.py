"""Ctrl-A c on a terminal: the monitor."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vmonty.cli.monitor import INFO, WORDS, Monitor, answer

from .conftest import Terminal

SWITCH = b"\x01c"
PROMPT = b"(vmonty) "

Start = Callable[..., Terminal]


def ask(terminal: Terminal, line: str) -> str:
    """What stands between the line and the next prompt."""
    terminal.type(line.encode() + b"\r")
    said = terminal.wait_for(PROMPT)
    assert said.startswith(line.encode() + b"\r\n"), said
    return said[len(line) + 2 : -len(PROMPT)].decode().replace("\r\n", "\n")


def test_the_keys_are_the_monitors_and_then_the_guests_again(on_terminal: Start) -> None:
    terminal = on_terminal()
    terminal.type(SWITCH)
    terminal.wait_for(PROMPT)
    assert "running" in ask(terminal, "info status")
    assert ask(terminal, "stop") == ""
    assert "paused" in ask(terminal, "info status")
    assert ask(terminal, "stop") == "error: the machine is paused already\n"
    assert ask(terminal, "c") == "error: there is no command 'c'; see help\n", "change, and cont"
    assert ask(terminal, "cont") == ""
    assert ask(terminal, "sto") == "", "a beginning is enough"
    assert ask(terminal, "cont") == ""
    assert "rip" in ask(terminal, "info registers")
    assert ask(terminal, "q uit") == "error: 'uit' is too much: it takes no argument\n"
    terminal.type(SWITCH + b"abc")
    assert terminal.wait_for(b"abc") == b"\r\nabc", "the guest's, which echoes; what the monitor got it has not seen"
    terminal.type(SWITCH)
    terminal.wait_for(PROMPT)
    assert ask(terminal, "quit now") == "error: 'now' is too much: it takes no argument\n"
    terminal.type(b"quit\r")
    assert terminal.end()[0] == 0


def test_keys_that_edit(on_terminal: Start) -> None:
    terminal = on_terminal()
    terminal.type(SWITCH)
    terminal.wait_for(PROMPT)
    terminal.type("nonsenseü\x7f\x7f\x15info stü\x7f\x1b[A\x1bOPatus!\x08\r".encode())
    assert b"running" in terminal.wait_for(b"\n" + PROMPT)
    terminal.type(b"\x01x")
    assert terminal.end()[0] == 0


def test_a_reset(on_terminal: Start) -> None:
    terminal = on_terminal()
    terminal.type(SWITCH)
    terminal.wait_for(PROMPT)
    terminal.type(b"system_reset\r")
    terminal.wait_for(b"ready")
    terminal.type(SWITCH + b"q")
    assert terminal.end()[0] == 0


def test_the_power_button(on_terminal: Start) -> None:
    terminal = on_terminal("polite")
    terminal.type(SWITCH + b"system_powerdown\r")
    assert terminal.end()[0] == 0


def test_a_guest_that_ignores_the_power_button_goes_on(on_terminal: Start) -> None:
    """It may be shutting down, and need its time."""
    terminal = on_terminal("deaf", "--grace", "0.1")
    terminal.type(SWITCH)
    terminal.wait_for(PROMPT)
    assert ask(terminal, "system_powerdown") == ""
    time.sleep(0.5)
    assert "running" in ask(terminal, "info status")


def test_discs_and_devices(on_terminal: Start, tmp_path: Path) -> None:
    disc = tmp_path / "a disc.iso"
    disc.write_bytes(bytes(4096))
    terminal = on_terminal("echo", "--cdrom", str(disc), "--device", "VGA", "--net", "none")
    terminal.type(SWITCH)
    terminal.wait_for(PROMPT)
    assert "a disc.iso" in ask(terminal, "info media")
    assert ask(terminal, "eject cd0") == ""
    assert "empty" in ask(terminal, "info media")
    assert ask(terminal, f"change cd0 '{disc}'") == ""
    assert ask(terminal, "eject -f cd0") == ""
    assert "no drive 'cd7'" in ask(terminal, "eject cd7")
    assert ask(terminal, "change cd0") == "error: it takes DRIVE FILE\n"
    assert ask(terminal, "info devices") == "nothing\n"
    slot = ask(terminal, "device_add device virtio-balloon").split()[1]
    assert "virtio-balloon" in ask(terminal, "info devices")
    assert ask(terminal, "balloon 6M") == ""
    assert "6 MiB" in ask(terminal, "info balloon")
    assert "cannot leave" in ask(terminal, "balloon 24G")
    assert "no size" in ask(terminal, "balloon x")
    assert "nothing to remove" in ask(terminal, "device_del 31")
    assert "no slot" in ask(terminal, f"device_del x{slot}")
    assert ask(terminal, f"screendump {tmp_path / 'screen.png'}") == ""
    assert (tmp_path / "screen.png").read_bytes().startswith(b"\x89PNG")
    assert "cannot be written" in ask(terminal, f"screendump {tmp_path}")
    assert ask(terminal, "eject 'cd0").startswith("error: No closing quotation")
    shown = ask(terminal, "help")
    assert all(f"\n{word} " in "\n" + shown for word in WORDS)
    assert ask(terminal, "info") == f"error: info: there are {', '.join(INFO)}\n"


def test_nothing_ends_the_terminal() -> None:
    class Broken:
        def __getattr__(self, name: str) -> object:
            raise RuntimeError("broken")

    assert answer(Broken(), "stop") == "internal error: RuntimeError: broken"  # type: ignore[arg-type]
    shown = bytearray()
    monitor = Monitor(Broken(), shown.extend)  # type: ignore[arg-type]
    monitor.keys(bytes(range(256)) * 40 + b"\r")
    assert shown.endswith(PROMPT)


@pytest.mark.parametrize("word", WORDS)
def test_every_word_is_in_a_test(word: str) -> None:
    assert f'"{word}' in Path(__file__).read_text()
