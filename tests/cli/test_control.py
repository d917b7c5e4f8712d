"""The control socket: `vmonty run --control`, `vmonty trace`, `vmonty stat NAME`, and what it does with nonsense."""

from __future__ import annotations

import errno
import json
import os
import random
import socket
import stat as modes
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from vmm import kernels
from vmonty.base.errors import UsageError, VmontyError
from vmonty.cli.attach import Attached
from vmonty.cli.main import cli
from vmonty.kvm.exit_record import ExitRecord
from vmonty.vmm import control
from vmonty.vmm.control import LONGEST_LINE, ControlSocket, socket_path
from vmonty.vmm.tracing import Tracers

from .conftest import LIMIT_S, environment

# Prints a dot now and then, for ever: exits of two kinds, and something to pause.
TICKS = """
main:
again:
    xor eax, eax
    cpuid
    mov dx, 0x3f8
    mov al, '.'
    out dx, al
    mov ecx, 100000
spin: dec ecx
    jnz spin
    jmp again
"""


class Machine:
    """A `vmonty run --control` in a process of its own."""

    def __init__(self, folder: Path) -> None:
        image = folder / "vmlinuz"
        image.write_bytes(kernels.kernel(TICKS))
        self.path = folder / "control"
        self.process = subprocess.Popen(
            [
                sys.executable, "-W", "error", "-m", "vmonty", "run", "--accel", "soft", "--memory", "8M",
                "--cpus", "2", "--grace", "0.2", "--kernel", str(image), "--control", str(self.path),
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment(),
        )  # fmt: skip
        end = time.monotonic() + LIMIT_S
        while not self._prints():
            assert self.process.poll() is None, self.end()
            assert time.monotonic() < end
            time.sleep(0.02)

    def _prints(self) -> bool:
        try:
            with Attached(self.path) as attached:
                return bool(attached.request("stat")[f"kvm-{self.process.pid}/vcpu-0"]["io_exits"])
        except VmontyError:
            return False

    def end(self) -> tuple[int, bytes]:
        """Its status and complaints."""
        _, errors = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, errors


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    made = Machine(tmp_path_factory.mktemp("control"))
    yield made
    if made.process.poll() is None:
        made.process.kill()
    made.end()


def test_only_its_user_may_connect(machine: Machine) -> None:
    assert modes.S_IMODE(machine.path.stat().st_mode) == 0o600


def test_status_and_counters(machine: Machine) -> None:
    with Attached(machine.path) as attached:
        status = attached.request("status")
        assert (status["state"], status["cpus"], status["memory"]) == ("running", 2, 8 << 20)
        assert status["pid"] == machine.process.pid
        found = attached.request("stat")
        assert found[f"kvm-{machine.process.pid}/vcpu-0"]["exits"] > 0


def test_pause_registers_resume(machine: Machine) -> None:
    with Attached(machine.path) as attached:
        running = attached.request("registers")
        attached.request("pause")
        assert attached.request("status")["state"] == "paused"
        with pytest.raises(VmontyError, match="paused already"):
            attached.request("pause")
        first, second = attached.request("registers", cpu=0), attached.request("registers", cpu=0)
        assert first == second
        assert first.keys() == running.keys() >= {"rip", "cr3", "r15"}
        exits = attached.request("stat")[f"kvm-{machine.process.pid}/vcpu-0"]["exits"]
        time.sleep(0.05)
        assert attached.request("stat")[f"kvm-{machine.process.pid}/vcpu-0"]["exits"] == exits
        with pytest.raises(VmontyError, match="cpu 7"):
            attached.request("registers", cpu=7)
        attached.request("resume")
        assert attached.request("status")["state"] == "running"


def vmonty(*arguments: object) -> str:
    """What a command prints. (The fixture of this name wants no children, and the machine is one.)"""
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments], standalone_mode=False)
    assert done.exception is None, done.exception
    return done.stdout


def test_trace_for_programs(machine: Machine) -> None:
    text = vmonty("trace", machine.path, "--json", "--only", "CPUID", "--vcpu", 0, "--count", 5)
    records = [json.loads(line) for line in text.splitlines()]
    assert [(record["exit"], record["vcpu"]) for record in records] == [("CPUID", 0)] * 5
    assert len({record["rip"] for record in records}) == 1


def test_trace_for_people(machine: Machine) -> None:
    text = vmonty("trace", machine.path, "--seconds", 0.3)
    assert "IO_INSTRUCTION" in text
    assert "CPUID" in text


@pytest.mark.parametrize("name", ["exits.json", "exits.jsonl"])
def test_trace_to_a_file(machine: Machine, tmp_path: Path, name: str) -> None:
    vmonty("trace", machine.path, "--count", 4, "--output", tmp_path / name)
    text = (tmp_path / name).read_text()
    if name.endswith(".json"):
        assert [event["name"] for event in json.loads(text)].count("guest") == 4
    else:
        assert len([json.loads(line) for line in text.splitlines()]) == 4


def test_stat_attaches(machine: Machine) -> None:
    assert json.loads(vmonty("stat", machine.path, "--json"))["io_exits"] > 0
    assert "io_exits" in vmonty("stat", machine.path, "--once")


def test_devices_come(machine: Machine) -> None:
    """They go when the guest lets go of them: tests/vmm/test_hotplug.py; this one does not listen."""
    assert vmonty("device", "list", machine.path) == ""
    slot = vmonty("device", "add", machine.path, "--device", "virtio-rng").strip()
    assert json.loads(vmonty("device", "list", machine.path, "--json")) == {slot: "virtio-rng"}
    assert vmonty("device", "list", machine.path).split() == [slot, "virtio-rng"]
    with pytest.raises(AssertionError, match="has not let go of virtio-rng"):
        vmonty("device", "remove", machine.path, slot, "--seconds", 1)
    for arguments in ((), ("--net", "user", "--disk", "x")):
        with pytest.raises(AssertionError, match="give one of"):
            vmonty("device", "add", machine.path, *arguments)
    with pytest.raises(AssertionError, match="unknown device 'fan'"):
        vmonty("device", "add", machine.path, "--device", "fan")


def lines(machine: Machine, *requests: bytes) -> list[dict[str, Any]]:
    """The answers to raw lines, up to the end of the connection or one for each."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        made.settimeout(LIMIT_S)
        made.connect(str(machine.path))
        made.sendall(b"".join(requests))
        answers = made.makefile("rb")
        return [json.loads(line) for _, line in zip(range(len(requests)), answers, strict=False)]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"\n", "no JSON"), (b"{\n", "no JSON"), (b"\xff\xfe\n", "no JSON"), (b"[]\n", "object"), (b"7\n", "object"),
        (b"[" * 50_000 + b"\n", "no JSON"), (b"{}\n", "no command None"), (b'{"command": ["status"]}\n', "no command"),
        (b'{"command": "fly"}\n', "there are: balloon"), (b'{"command": "status", "x": 1}\n', "arguments are: none"),
        (b'{"command": "registers", "cpu": "0"}\n', "cpu"), (b'{"command": "registers", "cpu": -1}\n', "cpu -1"),
        (b'{"command": "registers", "cpu": true}\n', "cpu"), (b'{"command": "trace", "names": [1]}\n', "strings"),
        (b'{"command": "trace", "on": 1}\n', "on=1"), (b'{"command": "resume"}\n', "not paused"),
    ],
)  # fmt: skip
def test_nonsense_gets_an_error(machine: Machine, line: bytes, complaint: str) -> None:
    first, second = lines(machine, line, b'{"command": "status", "id": [1, "x"]}\n')
    assert complaint in first["error"]
    assert second["return"]["state"] == "running"
    assert second["id"] == [1, "x"]


def test_a_line_without_end(machine: Machine) -> None:
    (answer,) = lines(machine, b"x" * (LONGEST_LINE + 2))
    assert "at most" in answer["error"]
    with Attached(machine.path) as attached:
        assert attached.request("status")["state"] == "running"


def test_random_bytes_and_clients_that_go_away(machine: Machine) -> None:
    chance = random.Random(1)
    for _ in range(60):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
            made.connect(str(machine.path))
            if chance.random() < 0.5:
                made.sendall(b'{"command": "trace"}\n')
            made.sendall(chance.randbytes(chance.randrange(300)))
    with Attached(machine.path) as attached:
        assert attached.request("status")["state"] == "running"


def test_nobody_else_may_take_the_place(machine: Machine) -> None:
    with pytest.raises(UsageError, match="another machine listens"):
        ControlSocket(machine.path, Nothing())


def test_the_end(tmp_path: Path) -> None:
    """A reset makes a new machine, whose exits are traced as before; quit ends it, and takes the socket away."""
    machine = Machine(tmp_path)
    with Attached(machine.path) as attached, Attached(machine.path) as other:
        other.request("trace", names=["CPUID"])
        messages = other.messages()
        assert next(messages)["trace"]["exit"] == "CPUID"
        attached.request("reset")
        before = time.monotonic_ns()
        assert any(message["trace"]["time_ns"] > before for message in messages)
        assert attached.request("quit") == {}
        assert all("trace" in message for message in messages)  # and there is an end
    assert machine.end()[0] == 0
    assert not machine.path.exists()


class Nothing:
    """A machine that cannot do anything."""

    tracers = Tracers()

    def status(self) -> dict[str, Any]:
        raise RuntimeError("broken")

    def counters(self) -> dict[str, dict[str, int]]:
        return {}

    def registers(self, cpu: int) -> dict[str, int]:
        return {}

    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def reset(self) -> None: ...
    def power_down(self) -> None: ...
    def quit(self) -> None: ...


def test_names_and_dead_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    path = tmp_path / "vmonty" / "mine.sock"
    assert socket_path("mine") == path
    with ControlSocket("mine", Nothing()):
        assert modes.S_IMODE(path.parent.stat().st_mode) == 0o700
        with Attached("mine") as attached, pytest.raises(VmontyError, match="internal error: RuntimeError: broken"):
            attached.request("status")
    assert not path.exists()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as killed:
        killed.bind(str(path))
    with ControlSocket("mine", Nothing()), Attached("mine") as attached:
        assert attached.request("stat") == {}
    path.write_text("precious")
    with pytest.raises(UsageError, match="no socket"):
        ControlSocket("mine", Nothing())
    assert path.read_text() == "precious"
    path.parent.chmod(0o777)
    with pytest.raises(UsageError, match="others may write"):
        ControlSocket("yours", Nothing())
    with pytest.raises(UsageError, match="too long"):
        socket_path("x" * 200)
    with pytest.raises(UsageError, match="no machine listens"):
        Attached("nobody")


def test_a_host_without_descriptors_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accept, failures = socket.socket.accept, [errno.EMFILE, errno.ENFILE, errno.ENOMEM]

    def full(listener: socket.socket) -> Any:
        if failures:
            raise OSError(failures.pop(), "no room")
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", full)
    monkeypatch.setattr(control, "FULL_SECONDS", 0)
    with ControlSocket(tmp_path / "s", Nothing()), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(LIMIT_S)
        client.connect(str(tmp_path / "s"))
        client.sendall(b'{"command": "stat"}\n')
        assert json.loads(client.recv(100)) == {"return": {}}
    # The end does not wait.
    failures.append(errno.EMFILE)
    monkeypatch.setattr(control, "FULL_SECONDS", 10 * LIMIT_S)
    with ControlSocket(tmp_path / "s", Nothing()):
        pass


def test_a_reader_that_sleeps_does_not_hold_the_machine(tmp_path: Path) -> None:
    """What it does not take is dropped and counted."""
    target, path = Nothing(), tmp_path / "s"
    target.tracers = Tracers()
    record = ExitRecord(0, 0, 1, 1, "X", 0, 0)
    with ControlSocket(path, target), Attached(path) as attached:
        attached.request("trace")
        for _ in range(40_000):
            target.tracers(record)
        attached.request("trace", on=False)
        told = list(attached.waiting)
        seen = sum("trace" in message for message in told)
        dropped = sum(message.get("dropped", 0) for message in told)
        assert seen > 0
        assert dropped > 0
        assert seen + dropped == 40_000
    assert not target.tracers.active
    assert os.path.lexists(path) is False
