"""Ctrl-A c on a terminal: the monitor."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vmonty.cli import balloon
from vmonty.cli.monitor import ALIASES, INFO, WORDS, Monitor, Worker, answer

from .conftest import LIMIT_S, Terminal

SWITCH = b"\x01c"
PROMPT = b"(vmonty) "
MIB = 1 << 20

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
    assert ask(terminal, "c") == ""
    assert "running" in ask(terminal, "info status"), "c is cont, as in QEMU's"
    assert "there is no command 'device'" in ask(terminal, "device"), "device_add, and device_del"
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
    assert ask(terminal, "balloon 7") == ""
    assert "7 MiB" in ask(terminal, "info balloon"), "as in QEMU's"
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


class Ballooned:
    """A machine that is nothing but a balloon."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.balloon = SimpleNamespace(set_target=self.asked.append, state=lambda: self.state)
        self.state = {"memory": 8 * MIB, "target": 7 * MIB, "actual": 6 * MIB, "statistics": {"free_memory": 5}}

    def machine(self) -> Ballooned:
        return self


@pytest.mark.parametrize(
    ("said", "size"),
    [("256", 256 * MIB), ("' 256 '", 256 * MIB), ("256M", 256 * MIB), ("1G", 1 << 30), ("512K", 512 << 10)],
)
def test_a_size_without_a_unit_is_in_mib(said: str, size: int) -> None:
    target: Any = Ballooned()
    assert answer(target, f"balloon {said}") == ""
    assert target.asked == [size]
    assert "MiB" in WORDS["balloon"].help


def test_the_balloon_looks_as_its_command_shows_it() -> None:
    target: Any = Ballooned()
    shown = answer(target, "info balloon")
    assert shown == balloon.table(target.state)
    assert [line.split() for line in shown.splitlines()] == [
        ["memory", "8", "MiB"], ["target", "7", "MiB"], ["actual", "6", "MiB"], ["free_memory", "5"],
    ]  # fmt: skip


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_are_in_the_help(alias: str) -> None:
    assert f"also {alias}" in WORDS[ALIASES[alias]].help


class Typed:
    """A monitor and what it shows; *run* as the monitor's."""

    def __init__(self, target: object = None, **run: Any) -> None:
        self.shown = bytearray()
        self.monitor = Monitor(target, self.shown.extend, **run)  # type: ignore[arg-type]

    def __call__(self, keys: bytes) -> bytes:
        """What is shown for them."""
        self.shown.clear()
        self.monitor.keys(keys)
        return bytes(self.shown)


@pytest.mark.parametrize(
    "key", [b"\x1b[A", b"\x1b[1;5C", b"\x1b[3~", b"\x1b[I", b"\x1b[O", b"\x1b[[A", b"\x1bOP", b"\x1bO[", b"\x1bx"]
)
def test_a_key_that_is_more_than_a_character_takes_no_other_with_it(key: bytes) -> None:
    typed = Typed()
    assert typed(key + b"ab" + key + b"c") == b"abc"


def test_files_whose_names_are_not_utf_8() -> None:
    names: list[str] = []

    class Discs:
        def media(self) -> dict[str, str]:
            return {"cd0": os.fsdecode(b"/caf\xe9.iso")}

        def change_medium(self, drive: str, path: Path, *, force: bool) -> None:
            names.append(str(path))

    typed = Typed(Discs())
    assert rb"/caf\udce9.iso" in typed(b"info media\r")
    assert typed(b"change cd0 /caf\xe9.iso\r").endswith(b"\r\n" + PROMPT)
    assert [os.fsencode(name) for name in names] == [b"/caf\xe9.iso"]


def test_typing_while_a_command_is_under_way() -> None:
    jobs: list[Callable[[], None]] = []
    typed = Typed(Ballooned(), run=jobs.append)
    assert typed(b"fly\rbal") == b"fly\r\nbal"
    assert typed(b"\x15swim\r") == b"\r\x1b[Kswim\r\n"
    assert typed(b"inf") == b"inf"
    typed.shown.clear()
    jobs.pop(0)()
    assert typed.shown == b"\r\x1b[Kerror: there is no command 'fly'; see help\r\ninf"
    typed.shown.clear()
    jobs.pop(0)()
    assert typed.shown == b"\r\x1b[Kerror: there is no command 'swim'; see help\r\n(vmonty) inf"
    typed(b"\x15fly\ri")
    typed.monitor.hide()
    typed.shown.clear()
    jobs.pop(0)()
    assert typed.shown == b"error: there is no command 'fly'; see help\r\n", "no prompt: the keys are the guest's"
    typed.shown.clear()
    typed.monitor.show()
    assert typed.shown == b"\r\n(vmonty) i"


def test_a_worker_keeps_the_order_and_nobody_waiting() -> None:
    done: list[int] = []
    go, end = threading.Event(), threading.Event()
    worker = Worker()
    worker(lambda: done.append(go.wait(LIMIT_S)))
    for number in range(2, 100):
        worker(lambda number=number: done.append(number))  # type: ignore[misc]
    worker(end.set)
    assert done == []
    go.set()
    assert end.wait(LIMIT_S)
    assert done == list(range(1, 100))


@pytest.fixture
def hung(on_terminal: Start, tmp_path: Path) -> tuple[Terminal, Path]:
    """A monitor that waits for somebody to read a FIFO."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    terminal = on_terminal("echo", "--device", "VGA")
    terminal.type(SWITCH)
    terminal.wait_for(PROMPT)
    terminal.type(f"screendump {fifo}\r".encode())
    terminal.wait_for(b"fifo\r\n")
    return terminal, fifo


def test_leaving_while_a_command_hangs(hung: tuple[Terminal, Path]) -> None:
    terminal, _ = hung
    terminal.type(b"info status\r")
    terminal.wait_for(b"info status\r\n")
    terminal.type(b"\x01x")
    assert terminal.end()[0] == 0


def test_a_signal_while_a_command_hangs(hung: tuple[Terminal, Path]) -> None:
    terminal, _ = hung
    terminal.process.send_signal(signal.SIGTERM)
    status, errors = terminal.end()
    assert status == 143
    assert "Traceback" not in errors


def test_going_on_while_a_command_hangs(hung: tuple[Terminal, Path]) -> None:
    terminal, fifo = hung
    terminal.type(SWITCH + b"abc")
    assert terminal.wait_for(b"abc") == b"\r\nabc", "the guest's"
    terminal.type(SWITCH + b"info sta")
    terminal.wait_for(b"info sta")
    assert fifo.read_bytes().startswith(b"\x89PNG")
    terminal.wait_for(PROMPT + b"info sta")
    terminal.type(b"tus\r")
    assert b"running" in terminal.wait_for(PROMPT)
    terminal.type(b"\x01x")
    assert terminal.end()[0] == 0


def test_a_fifo_is_no_disc(on_terminal: Start, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "disc.iso").write_bytes(bytes(4096))
    terminal = on_terminal("echo", "--cdrom", str(tmp_path / "disc.iso"))
    terminal.type(SWITCH)
    terminal.wait_for(PROMPT)
    assert "neither a file nor a block device" in ask(terminal, f"change cd0 {tmp_path / 'fifo'}")


@pytest.mark.parametrize("word", ["quit", "q"])
def test_quit_is_the_last_that_is_shown(on_terminal: Start, word: str) -> None:
    terminal = on_terminal()
    terminal.type(SWITCH)
    terminal.wait_for(PROMPT)
    terminal.type(word.encode() + b"\r")
    assert terminal.end()[0] == 0
    assert terminal.wait_for(word.encode() + b"\r\n").endswith(word.encode() + b"\r\n")
    assert not select.select([terminal.master], [], [], 0)[0], os.read(terminal.master, 100)


@pytest.mark.parametrize("word", WORDS)
def test_every_word_is_in_a_test(word: str) -> None:
    assert f'"{word}' in Path(__file__).read_text()
