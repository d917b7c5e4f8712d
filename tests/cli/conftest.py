"""Running vmonty: in this process, as a child with plain streams, and as a child on a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vmm import kernels
from vmonty.cli.main import main

# Every wait of a test ends after this time, and fails it.
LIMIT_S = 30.0
TESTS = Path(__file__).parent.parent


@dataclass
class Result:
    """How a command ended."""

    status: int
    out: str
    err: str

    def refusal(self) -> str:
        """What it complains about; fails unless that is one line and the status is 2."""
        assert (self.status, self.out) == (2, ""), self
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("vmonty: ")
        return lines[0].removeprefix("vmonty: ")


@pytest.fixture
def vmonty(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command in this process, with no input; it must leave neither threads nor children."""

    def run(*arguments: object) -> Result:
        with open(os.devnull) as nothing, monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", nothing)
            return ended(*arguments)

    def ended(*arguments: object) -> Result:
        before = set(threading.enumerate())
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        # The software KVM's signal watch belongs to the process.
        left = {thread for thread in threading.enumerate() if thread.name != "kvm-signals"}
        assert left <= before
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        out, err = capfd.readouterr()
        status = end.value.code
        assert isinstance(status, int)
        return Result(status, out, err)

    return run


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a sound kernel that does nothing: on a fake KVM the guest is played anyway."""
    path = tmp_path_factory.mktemp("kernel") / "vmlinuz"
    path.write_bytes(kernels.bzimage(b"\xf4\xeb\xfd"))
    return path


def command(guest: str | None, kernel: Path, *more: str) -> list[str]:
    """``vmonty run`` of *kernel*; on a fake KVM that plays *guest*, or for None on this host's."""
    module = ["cli.vmonty_on_fake", guest] if guest else ["vmonty"]
    arguments = ["run", "--accel", "kvm", "--memory", "8M", "--grace", "0.2", "--kernel", str(kernel), *more]
    return [sys.executable, "-W", "error", "-m", *module, *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(TESTS), "TERM": "dumb"}


class Child:
    """A vmonty whose standard streams are pipes, or what *streams* says. Use it with ``with``."""

    def __init__(self, arguments: list[str], **streams: Any) -> None:
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | streams
        self.process = subprocess.Popen(arguments, env=environment(), **streams)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self.process.wait()

    def wait_for(self, text: bytes) -> None:
        """Read standard output up to *text*."""
        assert self.process.stdout is not None
        read_until(self.process.stdout.fileno(), text)

    def end(self) -> int:
        """Wait for its end; return the status."""
        return self.process.wait(LIMIT_S)

    def errors(self) -> str:
        """All of standard error; after the end."""
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()


def read_until(fd: int, text: bytes, limit_s: float = LIMIT_S) -> bytes:
    """What comes from *fd*, up to and with *text*."""
    seen = bytearray()
    deadline = time.monotonic() + limit_s
    while text not in seen:
        ready, _, _ = select.select([fd], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"{text!r} never came: {bytes(seen)!r}"
        data = os.read(fd, 4096)
        assert data, f"the end came before {text!r}: {bytes(seen)!r}"
        seen += data
    return bytes(seen)


class Terminal:
    """A vmonty on a terminal of its own, which controls it. Use it with ``with``."""

    def __init__(self, arguments: list[str]) -> None:
        self.master, self.slave = os.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            arguments, stdin=self.slave, stdout=self.slave, stderr=subprocess.PIPE, env=environment(),
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
        for fd in (self.master, self.slave):
            with contextlib.suppress(OSError):
                os.close(fd)

    @property
    def raw(self) -> bool:
        """Whether characters go through unprocessed."""
        _, output, _, local, *_ = termios.tcgetattr(self.slave)
        processed = local & (termios.ICANON | termios.ECHO | termios.ISIG | termios.IEXTEN) or output & termios.OPOST
        return not processed

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def wait_for(self, text: bytes) -> bytes:
        return read_until(self.master, text)

    def end(self) -> tuple[int, str]:
        """Wait for the end; return status and standard error. The terminal must be as it was before."""
        status = self.process.wait(LIMIT_S)
        assert self.process.stderr is not None
        assert termios.tcgetattr(self.slave) == self.before
        return status, self.process.stderr.read().decode()


@pytest.fixture
def on_terminal(kernel: Path) -> Iterator[Callable[..., Terminal]]:
    """Start a fake guest on a terminal and wait until it is ready."""
    with contextlib.ExitStack() as stack:

        def start(guest: str = "echo", *more: str) -> Terminal:
            terminal = stack.enter_context(Terminal(command(guest, kernel, *more)))
            terminal.wait_for(b"ready")
            return terminal

        yield start
