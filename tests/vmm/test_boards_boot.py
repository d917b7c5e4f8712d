"""Debian's cloud kernel to its shell on every board, on the software CPU; what it says of the hardware it finds."""

from __future__ import annotations

import re

import pytest

from vmonty import kvm
from vmonty.guests import busybox
from vmonty.kvm.soft import modules
from vmonty.vmm import boards
from vmonty.vmm.machine import Config
from vmonty.vmm.outcome import Ending

from .conftest import Screen

# A boot takes 3 to 8 seconds of CPU time; a busy host needs longer.
BOOT_LIMIT_S = 240.0
COMMAND_LINE = "console=ttyS0 cryptomgr.notests=1"
# What Linux prints when it does not like a table, a register or an interrupt.
COMPLAINTS = re.compile(
    rb"ACPI (?:BIOS )?(?:Error|Warning|Exception)|\[Firmware Bug\]|can't claim|can't assign|nobody cared|"
    rb"no compatible bridge window|BAR \d+: (?:failed|no space)|Oops|Call Trace"
)


@pytest.fixture(scope="module")
def guest() -> busybox.Guest:
    return busybox.build()


def boot(guest: busybox.Guest, screen: Screen, script: str, **changes: object) -> bytes:
    """Boot, type *script*, wait for the power-off that ends it; return all that was printed."""
    config = Config(
        guest.kernel.read_bytes(),
        guest.initrd.read_bytes(),
        COMMAND_LINE,
        256 << 20,
        **changes,  # type: ignore[arg-type]
    )
    with kvm.open("soft") as system, boards.create(system, config, screen.write) as machine:
        machine.serial.receive(script.encode() + b"\npoweroff -f\n")
        machine.start()
        outcome = machine.wait(BOOT_LIMIT_S)
    text = bytes(screen.text)
    assert outcome is not None, text[-2000:]
    assert outcome.ending is Ending.POWER_OFF, (outcome, text[-2000:])
    return text


@pytest.mark.parametrize("vendor", ["kvm_intel", "kvm_amd"])
@pytest.mark.parametrize("cpus", [1, 2])
@pytest.mark.parametrize("board", boards.BOARDS)
def test_to_userspace(guest: busybox.Guest, screen: Screen, board: str, cpus: int, vendor: str) -> None:
    with modules.only(vendor):
        text = boot(guest, screen, "echo cpus=$(nproc)", machine=board, cpus=cpus)
    assert b"cpus=%d\r\n" % cpus in text
    assert not (found := COMPLAINTS.search(text)), text[max(0, found.start() - 300) : found.end() + 300]


@pytest.mark.parametrize("board", boards.BOARDS)
def test_power_button(guest: busybox.Guest, screen: Screen, board: str) -> None:
    """ACPI tells of it, by a fixed event or the event device; the guest's acpid hears it and powers off."""
    config = Config(guest.kernel.read_bytes(), guest.initrd.read_bytes(), COMMAND_LINE, 256 << 20, machine=board)
    with kvm.open("soft") as system, boards.create(system, config, screen.write) as machine:
        machine.start()
        screen.wait_for(b"userspace is up", BOOT_LIMIT_S)
        machine.press_power_button()
        outcome = machine.wait(BOOT_LIMIT_S)
    assert outcome is not None, bytes(screen.text)[-1000:]
    assert outcome.ending is Ending.POWER_OFF
    assert b"reboot: Power down" in screen.text


def test_reset_of_a_microvm(guest: busybox.Guest, screen: Screen) -> None:
    """Linux resets by the register that ACPI names."""
    config = Config(
        guest.kernel.read_bytes(), guest.initrd.read_bytes(), f"{COMMAND_LINE} reboot=acpi", 256 << 20,
        machine="microvm",
    )  # fmt: skip
    with kvm.open("soft") as system, boards.create(system, config, screen.write) as machine:
        machine.serial.receive(b"reboot -f\n")
        machine.start()
        outcome = machine.wait(BOOT_LIMIT_S)
    assert outcome is not None, bytes(screen.text)[-1000:]
    assert outcome.ending is Ending.RESET
