"""Files that a guest's output goes to: a host that takes no more, and machines that follow one another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmonty.base.errors import UsageError
from vmonty.kvm.api import System
from vmonty.vm.build import Build
from vmonty.vm.console import ConsoleSession
from vmonty.vm.plan import Plan
from vmonty.vmm import boards, outputfile
from vmonty.vmm.catalogue import TYPES
from vmonty.vmm.hotplug import SLOTS_PORT, plug
from vmonty.vmm.hw.acpi_hotplug import SLOTS_EJECT
from vmonty.vmm.machine import Config, Machine
from vmonty.vmm.outputfile import OutputFile

from . import kernels
from .fake_kvm import FakeKvm

FULL = Path("/dev/full")  # where each write finds no room
DEBUG_CONSOLE, COM2, COM3 = 0x402, 0x2F8, 0x3E8


def say(machine: Machine, port: int, text: bytes) -> None:
    for byte in text:
        machine.ports.write(port, 1, byte)


@pytest.mark.parametrize("most", [1, 3, 100])
def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    write = os.write
    monkeypatch.setattr(outputfile.os, "write", lambda fd, data: write(fd, data[:most]))
    file = OutputFile(tmp_path / "out", "test", anew=True)
    file.write(b"all of it")
    file.write(b"")
    file.close()
    file.close()
    file.write(b"too late")
    assert (tmp_path / "out").read_bytes() == b"all of it"


def test_a_full_disk_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    file = OutputFile(FULL, "test", anew=True)
    for _ in range(3):
        file.write(b"lost")
    file.close()
    assert caplog.messages == ["vmonty: test: /dev/full: No space left on device; the rest is dropped"]


def test_nothing_is_written_behind_a_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Even if there is room later on."""
    write, free = os.write, 4

    def limited(fd: int, data: bytes) -> int:
        nonlocal free
        if not free:
            free = 1000
            raise OSError(28, "No space left on device")
        written = write(fd, data[:free])
        free -= written
        return written

    monkeypatch.setattr(outputfile.os, "write", limited)
    file = OutputFile(tmp_path / "out", "test", anew=True)
    file.write(b"as far as it goes")
    file.write(b"later")
    assert (tmp_path / "out").read_bytes() == b"as f"
    assert len(caplog.messages) == 1


def test_the_console_goes_on_without_its_log(caplog: pytest.LogCaptureFixture) -> None:
    said = bytearray()
    console = ConsoleSession(lambda data: None, said.extend, FULL)
    console.feed(b"first ")
    console.feed(b"second")
    console.close()
    assert (console.text, bytes(said)) == ("first second", b"first second")
    assert caplog.messages == ["vmonty: console_log: /dev/full: No space left on device; the rest is dropped"]


@pytest.fixture
def system() -> Iterator[System]:
    with System(FakeKvm()) as made:
        yield made


def test_a_guest_goes_on_without_its_files(system: System, caplog: pytest.LogCaptureFixture) -> None:
    devices = f"isa-serial,file={FULL}", f"isa-debugcon,file={FULL}"
    config = Config(bytes(kernels.bzimage(b"\xf4")), memory=kernels.MEMORY, devices=devices)
    with boards.create(system, config, bytes) as machine:
        say(machine, COM2, b"one")
        say(machine, DEBUG_CONSOLE, b"two")
        port = TYPES.create(f"virtio-serial,file={FULL}", "device").realize(machine).ports[0]
        port.output(b"three")
        port.output(b"four")
    assert caplog.messages == [
        f"vmonty: {what}: /dev/full: No space left on device; the rest is dropped"
        for what in ("isa-serial", "isa-debugcon", "virtio-serial")
    ]


@pytest.fixture
def firmware(tmp_path: Path) -> str:
    file = tmp_path / "firmware"
    file.write_bytes(b"\xf4" * 0x10000)
    return str(file)


def test_a_file_is_emptied_once_for_all_machines_of_a_vm(system: System, firmware: str, tmp_path: Path) -> None:
    """Also one of a device that comes later, and one that two devices write to."""
    serial, debug, late = tmp_path / "serial", tmp_path / "debug", tmp_path / "late"
    for path in (serial, debug, late):
        path.write_bytes(b"of another VM, a long time ago")
    devices = (
        f"isa-serial,file={serial}", f"isa-serial,index=3,file={serial}", f"isa-debugcon,file={debug}",
    )  # fmt: skip
    build = Build(Plan(firmware=firmware, memory=16 << 20, devices=devices))
    for number in (b"1", b"2", b"3"):
        machine = build.machine(system, bytes)
        say(machine, COM2, b"a" + number)
        say(machine, COM3, b"b" + number)
        say(machine, DEBUG_CONSOLE, b"debug" + number)
        if number == b"2":
            slot = plug(machine, "device", f"virtio-serial,file={late}")
            assert late.read_bytes() == b""
            late.write_bytes(b"kept")
            machine.ports.write(SLOTS_PORT + SLOTS_EJECT, 4, 1 << slot)
            plug(machine, "device", f"virtio-serial,file={late}")
        build.end(machine)
    build.close()
    assert serial.read_bytes() == b"a1b1a2b2a3b3"
    assert debug.read_bytes() == b"debug1debug2debug3"
    assert late.read_bytes() == b"kept"


def test_another_vm_begins_anew(system: System, firmware: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    for text in (b"the first", b"the 2nd"):
        build = Build(Plan(firmware=firmware, memory=16 << 20, devices=(f"isa-debugcon,file={log}",)))
        machine = build.machine(system, bytes)
        say(machine, DEBUG_CONSOLE, text)
        build.end(machine)
        build.close()
        assert log.read_bytes() == text


def test_a_file_that_cannot_be_opened_says_so(system: System, tmp_path: Path) -> None:
    path = tmp_path / "no" / "file"
    config = Config(bytes(kernels.bzimage(b"\xf4")), memory=kernels.MEMORY, devices=(f"isa-serial,file={path}",))
    with pytest.raises(UsageError, match=r"isa-serial: .*no/file cannot be written: No such file"):
        boards.create(system, config, bytes)
    assert not config.begun
