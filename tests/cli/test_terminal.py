"""A guest's console on a terminal: raw while it runs, and as it was before, however it ends."""

from __future__ import annotations

import os
import signal
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import LIMIT_S, Terminal, command

CTRL_A, CTRL_C, CTRL_D, CTRL_Z = b"\x01", b"\x03", b"\x04", b"\x1a"

Start = Callable[..., Terminal]


def test_keys(on_terminal: Start) -> None:
    terminal = on_terminal()
    assert terminal.raw
    terminal.type(b"a" + CTRL_C + CTRL_Z + CTRL_D + b"z")
    terminal.wait_for(b"a" + CTRL_C + CTRL_Z + CTRL_D + b"z")
    terminal.type(CTRL_A + b"h")
    shown = terminal.wait_for(b"Ctrl-A Ctrl-A   send Ctrl-A\r\n")
    assert b"Ctrl-A x   end the virtual machine" in shown
    terminal.type(CTRL_A + CTRL_A + b"1")
    assert terminal.wait_for(b"1") == CTRL_A + b"1"
    terminal.type(CTRL_A + b"?")
    terminal.wait_for(b"send Ctrl-A\r\n")
    terminal.type(CTRL_A + b"n" + b"2")
    assert terminal.wait_for(b"2") == b"2", "any other key after Ctrl-A is dropped"
    terminal.type(CTRL_A)
    terminal.type(b"x")
    status, errors = terminal.end()
    assert status == 0
    assert "leave with Ctrl-A x" in errors
    assert errors.splitlines()[0] == "vmonty: using kvm, as asked"


def test_power_off(on_terminal: Start) -> None:
    terminal = on_terminal()
    terminal.type(b"q")
    assert terminal.end()[0] == 0


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)],
    ids=lambda value: str(value),
)
def test_signals(on_terminal: Start, number: int, status: int) -> None:
    terminal = on_terminal()
    terminal.process.send_signal(number)
    assert terminal.end()[0] == status


def test_timeout(on_terminal: Start) -> None:
    assert on_terminal("echo", "--timeout", "0.2").end()[0] == 124


def test_triple_fault(on_terminal: Start) -> None:
    terminal = on_terminal()
    terminal.type(b"!")
    status, errors = terminal.end()
    assert status == 1
    assert "vmonty: the guest ended in a triple fault\n" in errors
    assert "    rip 0000000000200200" in errors
    assert "    cr0 " in errors


def test_reset_boots_again(on_terminal: Start) -> None:
    terminal = on_terminal()
    terminal.type(b"r")
    terminal.wait_for(b"ready")
    assert terminal.raw
    terminal.type(b"q")
    assert terminal.end()[0] == 0


def test_the_terminal_hangs_up(on_terminal: Start) -> None:
    terminal = on_terminal()
    os.close(terminal.slave)
    os.close(terminal.master)
    assert terminal.process.wait(LIMIT_S) == 129
    assert terminal.process.stderr is not None
    assert "Traceback" not in terminal.process.stderr.read().decode()


def test_ending_while_nobody_reads_the_screen(kernel: Path) -> None:
    """A terminal that is stopped: the guest waits for it, and Ctrl-A x still ends the machine."""
    with Terminal(command("flood", kernel)) as terminal:
        terminal.wait_for(b"more")
        termios.tcflow(terminal.slave, termios.TCOOFF)
        terminal.type(CTRL_A + b"x")
        assert terminal.process.wait(LIMIT_S) == 0


def test_the_guest_ends_while_the_monitor_writes_to_a_stopped_terminal(kernel: Path) -> None:
    with Terminal(command("polite", kernel, "--grace", str(LIMIT_S))) as terminal:
        terminal.wait_for(b"ready")
        terminal.type(CTRL_A + b"c")
        terminal.wait_for(b"(vmonty) ")
        termios.tcflow(terminal.slave, termios.TCOOFF)
        terminal.type(b"help\r")
        time.sleep(0.5)  # nobody can see that it writes; if it does not yet, the test shows less, and is no less green
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.end()[0] == 0, "it powers itself off, in time"


def test_bad_input_leaves_the_terminal_alone(kernel: Path) -> None:
    with Terminal(command("echo", kernel, "--initrd", "/nonexistent")) as terminal:
        status, errors = terminal.end()
        assert status == 2
        assert errors == "vmonty: the initrd /nonexistent cannot be read: No such file or directory\n"
