"""A guest's console on plain streams: in scripts, in pipes, and where streams are missing."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmm import kernels
from vmonty import kvm
from vmonty.base.errors import KvmUnavailable

from .conftest import LIMIT_S, Child, command, environment


def test_input_reaches_the_guest(kernel: Path) -> None:
    text = bytes(range(256)).replace(b"q", b"").replace(b"r", b"").replace(b"!", b"") * 4 + b"q"
    done = subprocess.run(
        command("echo", kernel), input=text, capture_output=True, timeout=LIMIT_S, check=False, env=environment()
    )
    assert (done.returncode, done.stdout) == (0, b"ready\n" + text), "Ctrl-A is nothing special in a pipe"
    assert done.stderr == b"vmonty: using kvm, as asked\n"


def test_the_end_of_input_is_not_the_end_of_the_guest(kernel: Path) -> None:
    done = subprocess.run(
        command("echo", kernel, "--timeout", "0.5"), input=b"abc", capture_output=True, timeout=LIMIT_S, check=False,
        env=environment(),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (124, b"ready\nabc")


def test_a_reader_that_goes_away_ends_it(kernel: Path) -> None:
    with Child(command("flood", kernel), stdin=subprocess.DEVNULL) as child:
        child.wait_for(b"more")
        assert child.process.stdout is not None
        child.process.stdout.close()
        assert child.end() == 0
        assert child.errors() == "vmonty: using kvm, as asked\n"


def test_a_full_disk_ends_it_and_says_so(kernel: Path) -> None:
    with open("/dev/full", "wb") as full, Child(command("flood", kernel), stdout=full) as child:
        assert child.end() == 1
        assert child.errors().endswith("vmonty: standard output cannot be written: No space left on device\n")


def test_a_reader_that_does_not_read_holds_up_the_guest_not_us(kernel: Path) -> None:
    with Child(command("flood", kernel), pipesize=4096) as child:
        child.wait_for(b"more")
        # A pipe of one page takes no second byte until the first one is read.
        assert select.select([child.process.stdout], [], [], LIMIT_S)[0]
        child.process.terminate()
        assert child.end() == 143


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(kernel: Path, number: int) -> None:
    with Child(command("echo", kernel)) as child:
        child.wait_for(b"ready")
        child.process.send_signal(number)
        assert child.end() == 128 + number
        assert "Traceback" not in child.errors()


def test_sigterm_presses_the_power_button(kernel: Path) -> None:
    with Child(command("polite", kernel, "--grace", "60")) as child:
        child.wait_for(b"ready")
        child.process.terminate()
        assert child.end() == 0


def test_a_second_sigterm_does_not_wait(kernel: Path) -> None:
    with Child(command("deaf", kernel, "--grace", "600")) as child:
        child.wait_for(b"ready")
        deadline = time.monotonic() + LIMIT_S
        while child.process.poll() is None and time.monotonic() < deadline:
            child.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(0.1)
        assert child.end() == 143


def test_a_guest_that_chooses_its_status(kernel: Path) -> None:
    line = command("debug-exit", kernel, "--device", "isa-debug-exit,iobase=0xf4,iosize=4")
    done = subprocess.run(
        line, stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT_S, check=False, env=environment()
    )
    assert done.returncode == 21 << 1 | 1


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--machine", "z80", "unknown machine 'z80'; there are: pc, q35, microvm"),
        ("--machine", "pc,colour=red", "pc has no property 'colour'; there are: "),
        ("--machine", "q35,root-ports=99", "root-ports is a number from 0 to 16, not '99'"),
        ("--cpu", "i486", "unknown CPU model 'i486'"),
        ("--cpu", "Haswell,+nonsense", "unknown CPU feature 'nonsense'"),
        ("--device", "floppy", "unknown device 'floppy'"),
        ("--grace", "-1", "--grace needs a number of seconds from 0"),
    ],
)
def test_bad_choices_are_told_in_one_line(kernel: Path, option: str, value: str, complaint: str) -> None:
    line = command("echo", kernel, option, value)
    done = subprocess.run(
        line, stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT_S, check=False, env=environment()
    )
    assert done.returncode == 2
    assert complaint in done.stderr.decode()
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("option", "expected"), [("--machine", "microvm"), ("--cpu", "Haswell"), ("--device", "isa-debugcon")]
)
def test_help_lists_what_there_is(option: str, expected: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vmonty", "run", option, "help"], capture_output=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0
    assert expected in done.stdout.decode()


def test_endless_input_is_not_swallowed(kernel: Path) -> None:
    """A guest that does not listen: the writer has to wait, as in any pipe."""
    with Child(command("deaf", kernel)) as child:
        child.wait_for(b"ready")
        assert child.process.stdin is not None
        pipe = child.process.stdin.fileno()
        os.set_blocking(pipe, False)
        written = 0
        while select.select([], [pipe], [], 0.3)[1]:
            written += os.write(pipe, bytes(4096))
            assert written < 1 << 20
        child.process.terminate()
        assert child.end() == 143


@pytest.mark.parametrize(("closed", "status"), [("<&-", 124), (">&-", 124), ("<&- >&-", 124), ("2>&-", 124)])
def test_streams_that_are_closed(kernel: Path, closed: str, status: int) -> None:
    line = command("echo", kernel, "--timeout", "0.3")
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *line],
        stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT_S, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == status
    assert b"Traceback" not in done.stderr
    assert done.stdout == (b"" if ">&-" in closed.replace("2>&-", "") else b"ready\n")


def test_no_reboot(kernel: Path) -> None:
    line = command("reset", kernel, "--no-reboot")
    done = subprocess.run(
        line, stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT_S, check=False, env=environment()
    )
    assert (done.returncode, done.stdout) == (0, b"once\n")


@pytest.mark.parametrize("board", ["pc", "q35"])
def test_the_board_is_chosen(kernel: Path, board: str) -> None:
    done = subprocess.run(
        command("echo", kernel, "--machine", board), input=b"q", capture_output=True, timeout=LIMIT_S, check=False,
        env=environment(),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, b"ready\nq")


def test_a_panic_is_a_failure_with_its_reason(kernel: Path) -> None:
    line = command("panic", kernel, "--timeout", "20")
    done = subprocess.run(
        line, stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT_S, check=False, env=environment()
    )
    assert done.returncode == 1
    assert b"vmonty: the guest's kernel panicked: no init\n" in done.stderr
    assert b"    rip " in done.stderr


@pytest.mark.parametrize(("guest", "status"), [("panic-reset", 1), ("old-log", 0)])
def test_a_reset_by_a_panic_is_a_failure_where_resets_end_it(kernel: Path, guest: str, status: int) -> None:
    done = subprocess.run(
        command(guest, kernel, "--no-reboot"), stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT_S,
        check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == status
    assert (b"panicked: no init; it asked for a reset" in done.stderr) is bool(status)


def test_resets_go_on_until_the_timeout(kernel: Path) -> None:
    line = command("reset", kernel, "--timeout", "0.5")
    done = subprocess.run(
        line, stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT_S, check=False, env=environment()
    )
    assert done.returncode == 124
    assert done.stdout.count(b"once\n") > 1


@pytest.mark.parametrize("arguments", [["doctor"], ["doctor", "--json"], ["--help"]])
def test_output_into_a_closed_pipe(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "vmonty", *arguments], stdout=write, stderr=subprocess.PIPE, timeout=LIMIT_S, check=False
    )
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == b""


# ---- on the host's own KVM --------------------------------------------------------------------------------


@pytest.fixture
def echo_kernel(tmp_path: Path) -> Path:
    try:
        kvm.open("linux").close()
    except KvmUnavailable as error:
        pytest.skip(f"accelerator kvm: {error}")
    if shutil.which("nasm") is None:
        pytest.skip("nasm is not on this host: apt-get install nasm")
    path = tmp_path / "echo"
    path.write_bytes(kernels.kernel(kernels.ECHO))
    return path


@pytest.mark.parametrize(("text", "status"), [(b"hello q", 0), (b"oops !", 1)])
def test_echo_on_a_real_kvm(echo_kernel: Path, text: bytes, status: int) -> None:
    done = subprocess.run(
        command(None, echo_kernel), input=text, capture_output=True, timeout=LIMIT_S, check=False, env=environment()
    )
    assert (done.returncode, done.stdout) == (status, b"ready\n" + text)
    assert (b"triple fault" in done.stderr and b"rip " in done.stderr) is bool(status)


def test_the_command_line_option_append(echo_kernel: Path, tmp_path: Path) -> None:
    path = tmp_path / "command-line"
    path.write_bytes(kernels.kernel(kernels.COMMAND_LINE))
    for more, printed in ((["--append", "a=1 b=ü"], "a=1 b=ü"), ([], "console=ttyS0")):
        done = subprocess.run(
            command(None, path, *more), stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT_S, check=False,
            env=environment(),
        )  # fmt: skip
        assert (done.returncode, done.stdout.decode()) == (0, printed)
