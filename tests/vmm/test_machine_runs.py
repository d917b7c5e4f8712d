"""Machines that run real code: kernels of a few instructions, on every KVM that this host has."""

from __future__ import annotations

import threading

import pytest

from vmonty.kvm.api import System
from vmonty.vmm import boards
from vmonty.vmm.machine import Config
from vmonty.vmm.outcome import Ending, Outcome

from . import kernels
from .conftest import LIMIT_S, Screen


def run(system: System, screen: Screen, source: str, **changes: object) -> Outcome:
    made = Config(kernels.kernel(source), memory=kernels.MEMORY, **changes)  # type: ignore[arg-type]
    with boards.create(system, made, screen.write) as machine:
        machine.start()
        outcome = machine.wait(LIMIT_S)
    assert outcome is not None, f"it did not end; it printed {bytes(screen.text)!r}"
    return outcome


def test_it_prints_and_powers_off(system: System, screen: Screen) -> None:
    outcome = run(system, screen, kernels.HELLO)
    assert screen.text == b"hello from CPL 0\n"
    assert outcome.ending is Ending.POWER_OFF
    assert not outcome.registers


def test_it_finds_its_command_line(system: System, screen: Screen) -> None:
    run(system, screen, kernels.COMMAND_LINE, command_line="console=ttyS0 quiet")
    assert screen.text == b"console=ttyS0 quiet"


def test_reset(system: System, screen: Screen) -> None:
    assert run(system, screen, kernels.RESET).ending is Ending.RESET


def test_triple_fault_shows_the_registers(system: System, screen: Screen) -> None:
    outcome = run(system, screen, kernels.TRIPLE_FAULT)
    assert outcome.ending is Ending.SHUTDOWN
    assert outcome.registers["rax"] == 0x1122_3344_5566_7788
    assert kernels.ENTRY < outcome.registers["rip"] < kernels.ENTRY + 0x200
    assert outcome.registers["cs"] == 0x10
    assert "1122334455667788" in outcome.register_dump()


@pytest.mark.parametrize(("source", "says"), [(kernels.HALT, b"halting\n"), (kernels.SPIN, b"spinning\n")])
def test_stop_from_another_thread(system: System, screen: Screen, source: str, says: bytes) -> None:
    made = Config(kernels.kernel(source), memory=kernels.MEMORY, cpus=2)
    with boards.create(system, made, screen.write) as machine:
        machine.start()
        screen.wait_for(says)
        threading.Thread(target=machine.stop).start()
        outcome = machine.wait(LIMIT_S)
    assert outcome is not None
    assert outcome.ending is Ending.STOPPED


def test_echo(system: System, screen: Screen) -> None:
    with boards.create(system, Config(kernels.kernel(kernels.ECHO), memory=kernels.MEMORY), screen.write) as machine:
        machine.serial.receive(b"early, ")
        machine.start()
        screen.wait_for(b"ready\nearly, ")
        machine.serial.receive(b"late, q")
        outcome = machine.wait(LIMIT_S)
    assert outcome is not None
    assert outcome.ending is Ending.POWER_OFF
    assert screen.text == b"ready\nearly, late, q"


def test_two_processors(system: System, screen: Screen) -> None:
    assert run(system, screen, kernels.TWO_PROCESSORS, cpus=2).ending is Ending.POWER_OFF
    assert screen.text == b"1both run\n"


def test_one_after_another_on_one_system(system: System, screen: Screen) -> None:
    for _ in range(3):
        run(system, screen, kernels.HELLO)
    assert screen.text == b"hello from CPL 0\n" * 3
