"""A VM's life, on a KVM whose guests are Python."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vmonty
from vmm import kernels
from vmm.fake_kvm import FakeKvm
from vmm.steps import Guest, In, Leave, Out, Wait
from vmonty import kvm
from vmonty.base.errors import GuestMemoryError, UsageError, VmontyError
from vmonty.cli.attach import Attached
from vmonty.kvm.uapi import Exit
from vmonty.vm import ConsoleEnded, ConsoleTimeout, Ending, Event, State, StateError
from vmonty.vm.build import Build
from vmonty.vm.console import ConsoleSession
from vmonty.vmm.inspection import CONTROL_REGISTERS, GENERAL_REGISTERS

RESET = Out(0x64, 0xFE)


def talkative(cpu: int) -> Guest:
    """Say that it is ready, then echo; r resets, ! is a triple fault."""
    yield Out(0x3FC, 0x0B)
    yield Out(0x3F9, 1)
    for byte in b"ready\n":
        yield Out(0x3F8, byte)
    while True:
        while not (yield In(0x3FD)) & 1:
            yield Wait()
        byte = yield In(0x3F8)
        yield Out(0x3F8, byte)
        if byte == ord("r"):
            yield RESET
        if byte == ord("!"):
            yield Leave(Exit.SHUTDOWN)


_made: FakeKvm


def made() -> FakeKvm:
    return _made


@pytest.fixture
def vm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., vmonty.VM]]:
    """Make VMs on the fake; their files must be closed in the end."""
    global _made
    _made = FakeKvm(talkative)
    monkeypatch.setitem(kvm.PROVIDERS, "linux", (__name__, "made"))
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(kernels.bzimage(b"\xf4\xeb\xfd"))
    yield lambda **fields: vmonty.VM(**{"kernel": kernel, "memory": "32M", "accel": "kvm", **fields})
    assert not _made.files


def test_a_console_dialogue(vm):
    with vm() as machine:
        machine.console.send("a")  # typed before the start: it waits
        machine.start()
        machine.console.expect("ready\n", 30)
        machine.console.expect("a", 30)
        machine.console.sendline("hello")
        assert machine.console.expect(re.compile(rb"h(e)llo\n"), 30).group(1) == b"e"
        assert machine.console.text == "ready\nahello\n"
        with pytest.raises(ConsoleTimeout, match="hello"):
            machine.console.expect("hello", 0.05)  # it was read already
        machine.stop()
        with pytest.raises(ConsoleEnded):
            machine.console.expect("more", 30)
    assert machine.outcome is not None
    assert machine.outcome.ending is Ending.STOPPED


def reset_and_end(machine):
    machine.reset()
    machine.console.expect("ready", 30)
    machine.console.send("!")
    outcome = machine.wait(30)
    assert outcome is not None
    assert outcome.ending is Ending.SHUTDOWN


def test_a_reset_goes_on_with_a_new_machine_unless_told_otherwise(vm):
    events = []
    with vm() as machine:
        machine.on("reset", lambda outcome: events.append(outcome.ending))
        machine.on(Event.ENDED, lambda outcome: events.append(outcome.ending))
        machine.start()
        machine.console.expect("ready", 30)
        machine.console.send("r")
        machine.console.expect("ready", 30)
        reset_and_end(machine)
    assert events == [Ending.RESET, Ending.RESET, Ending.SHUTDOWN]
    with vm(reboot=False) as machine:
        machine.start()
        machine.console.expect("ready", 30)
        machine.reset()
        assert machine.wait(30).ending is Ending.RESET


def test_who_reads_the_output_may_answer_while_a_machine_ends(vm, monkeypatch):
    """Its end waits for the last output to be read."""
    real, answered = Build.end, []

    def end(build, ended):
        answering = threading.Thread(target=machine.console.send, args=("b",), daemon=True)
        answering.start()
        answering.join(30)
        answered.append(not answering.is_alive())
        real(build, ended)

    monkeypatch.setattr(Build, "end", end)
    with vm() as machine:
        machine.start()
        machine.console.expect("ready\n", 30)
        machine.reset()
        machine.console.expect("ready\nb", 30)
    assert answered
    assert all(answered)


@pytest.mark.parametrize("event", ["reset", "ended"])
def test_a_callback_that_fails(vm, monkeypatch, event):
    """It is told of, and the VM goes on."""
    said = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: said.append(str(arguments.exc_value)))

    def fail(outcome):
        raise RuntimeError(f"on {event}")

    with vm() as machine:
        machine.on(event, fail)
        machine.start()
        machine.console.expect("ready", 30)
        reset_and_end(machine)
    assert said == [f"on {event}"]


def test_what_goes_wrong_at_an_end_is_its_outcome(vm, monkeypatch):
    real = Build.end

    def end(build, ended):
        real(build, ended)
        if len(ends) == 0:
            ends.append(ended)
            raise OSError("no space")

    ends: list[object] = []
    monkeypatch.setattr(Build, "end", end)
    with vm() as machine:
        machine.start()
        machine.console.expect("ready", 30)
        machine.reset()
        outcome = machine.wait(30)
    assert outcome is not None
    assert (outcome.ending, outcome.detail) == (Ending.ERROR, "internal error: OSError: no space")


def test_who_asks_during_a_reset_waits_for_the_next_machine(vm, monkeypatch):
    asked, made_anew = threading.Event(), Build.machine

    def slow(build, *arguments):
        if build._started:  # not for the first
            asking.start()
            asked.wait(30)
        return made_anew(build, *arguments)

    def ask():
        asked.set()
        sizes.append(len(machine.read_memory(0, 4)))

    sizes = []
    asking = threading.Thread(target=ask)
    monkeypatch.setattr(Build, "machine", slow)
    with vm() as machine:
        machine.start()
        machine.console.expect("ready", 30)
        machine.reset()
        machine.console.expect("ready", 30)
        asking.join(30)
        assert sizes == [4]


def test_a_paused_vm_stands_still_and_shows_its_state(vm):
    with vm(cpus=2) as machine:
        machine.start()
        machine.console.expect("ready", 30)
        with pytest.raises(StateError, match="must be paused"):
            machine.registers()
        machine.pause()
        assert machine.state is State.PAUSED
        machine.console.send("x")
        machine.set_registers(1, rax=0x1234, r15=(1 << 64) - 1)
        assert machine.registers(1)["rax"] == 0x1234
        machine.write_memory(0x9000, b"data")
        assert machine.read_memory(0x9000, 4) == b"data"
        assert "x" not in machine.console.text
        with pytest.raises(StateError, match="must be running"):
            machine.pause()
        machine.resume()
        machine.console.expect("x", 30)
    assert machine.state is State.ENDED


def test_what_cannot_be_is_refused(vm):
    with vm() as machine:
        with pytest.raises(StateError):
            machine.pause()
        machine.start()
        with pytest.raises(StateError, match="started once"):
            machine.start()
        with pytest.raises(StateError, match="before the VM starts"):
            machine.on_exit(lambda vcpu, reason: None)
        machine.pause()
        for wrong in ({"cpu": 7}, {"xyz": 1}, {"rax": -1}, {"rax": 1 << 64}):
            with pytest.raises(UsageError):
                machine.set_registers(**wrong)
        with pytest.raises(GuestMemoryError):
            machine.read_memory(1 << 40, 1)
        with pytest.raises(ValueError, match="no-such-event"):
            machine.on("no-such-event", print)
    with pytest.raises(StateError, match="ended"):
        machine.resume()
    with pytest.raises(StateError, match="opened once"):
        machine.open()


def test_a_hook_sees_each_exit(vm):
    seen = []
    with vm() as machine:
        machine.on_exit(lambda vcpu, reason: seen.append((vcpu.id, reason)))
        machine.start()
        machine.console.expect("ready", 30)
    assert seen.count((0, Exit.IO)) >= len("ready")


def test_time_is_limited(vm):
    with vm(timeout=0.05) as machine:
        machine.start()
        outcome = machine.wait(30)
    assert (outcome.ending, outcome.detail) == (Ending.STOPPED, "the time is over")


def test_a_paused_vm_can_be_reset_or_closed(vm):
    with vm() as machine:
        machine.start()
        machine.console.expect("ready", 30)
        machine.pause()
        machine.reset()
        machine.console.expect("ready", 30)
        machine.pause()


def test_the_log_and_the_output_have_every_byte(vm, tmp_path):
    got = bytearray()
    with vmonty.VM(vm(console_log=tmp_path / "log").settings, output=got.extend) as machine:
        machine.start()
        machine.console.expect("ready\n", 30)
    assert (tmp_path / "log").read_bytes() == bytes(got) == b"ready\n"
    with pytest.raises(VmontyError, match="console_log"), vm(console_log=tmp_path / "no" / "log"):
        pass


def test_old_output_is_dropped_but_not_the_place(monkeypatch):
    monkeypatch.setattr("vmonty.vm.console.MOST_KEPT", 100)
    console = ConsoleSession(lambda data: None)
    console.feed(b"first ")
    console.expect("first")
    for _ in range(100):
        console.feed(b"0123456789\n")
    console.feed(b"last")
    console.expect("last", 1)
    assert len(console.text) <= 150


def test_waiting_is_ended_by_another_thread(vm):
    with vm() as machine:
        machine.start()
        threading.Timer(0.05, machine.stop).start()
        assert machine.wait(30) is not None


def test_a_control_socket(vm, tmp_path):
    """What the socket does and what the API says are one."""
    with vm() as machine:
        path = machine.listen(tmp_path / "control")
        with pytest.raises(StateError, match="already"):
            machine.listen(tmp_path / "other")
        with Attached(path) as attached:
            assert attached.request("status")["state"] == "ready"
            machine.start()
            attached.request("pause")
            assert machine.state is State.PAUSED
            assert int(attached.request("registers")["rip"], 16) == machine.registers()["rip"]
            attached.request("resume")
            assert attached.request("registers").keys() == {*GENERAL_REGISTERS, *CONTROL_REGISTERS}
            assert machine.state is State.RUNNING
            with pytest.raises(VmontyError, match="use --accel soft"):
                attached.request("trace")
            attached.request("quit")
        assert machine.wait(10) is not None
    assert not path.exists()
