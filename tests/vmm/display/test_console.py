"""The screen of a whole machine: SeaBIOS on it, keys typed from outside, viewers over a reset, screenshots."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image
from tests.vmm.display.client import Client

import vmonty
from vmonty.base.errors import BootImageError, UsageError
from vmonty.cli.main import cli
from vmonty.vm import StateError
from vmonty.vm.settings import settings
from vmonty.vmm import firmware
from vmonty.vmm.peripherals import Disk

LIMIT_S = 120.0


@pytest.fixture(scope="module", autouse=True)
def bios() -> None:
    try:
        firmware.read("bios")
    except BootImageError as error:
        pytest.skip(str(error))


def until(condition: Callable[[], bool], what: Callable[[], str]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, what()
        time.sleep(0.1)


def text_of(machine: vmonty.VM) -> str:
    try:
        return machine.screen.text()
    except (UsageError, StateError) as error:  # no text, or between two machines
        return str(error)


def free_display() -> int:
    """One whose port nobody has at this moment."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if 5900 <= port <= 0xFFFF:
            return port - 5900


def test_menu_of_the_bios_on_the_screen_and_by_vnc(tmp_path: Path) -> None:
    display = free_display()
    with vmonty.VM(
        firmware="bios", boot="menu=on,wait=60000", memory="64M", accel="soft", vnc=f":{display}"
    ) as machine:
        machine.listen(tmp_path / "control")
        machine.start()
        until(lambda: "Press ESC for boot menu" in text_of(machine), lambda: text_of(machine))
        machine.type("\x1b")
        until(lambda: "Select boot device" in text_of(machine), lambda: text_of(machine))
        with contextlib.closing(Client(5900 + display, (16, 0))) as viewer:
            assert viewer.name == "vmonty"
            viewer.update(False)
            frame = machine.screen.frame()
            assert (viewer.width, viewer.height) == (frame.width, frame.height) == (720, 400)
            assert viewer.picture == frame.pixels
            machine.reset()
            # The viewer stays, and sees the next machine begin.
            until(lambda: "Select boot device" not in text_of(machine), lambda: text_of(machine))
            until(lambda: "Press ESC for boot menu" in text_of(machine), lambda: text_of(machine))
            viewer.update(False)
            assert any(viewer.picture)
        command = ["screenshot", str(tmp_path / "control")]
        CliRunner().invoke(cli, [*command, str(tmp_path / "screen.png")], catch_exceptions=False, standalone_mode=False)
        with Image.open(tmp_path / "screen.png") as image:
            assert image.size == (720, 400)
            assert len(image.getcolors() or ()) >= 2
        shown = CliRunner().invoke(cli, [*command, "--text"], catch_exceptions=False, standalone_mode=False)
        assert "SeaBIOS (version" in shown.output
        with pytest.raises(UsageError, match="no key"):
            machine.type("ß")


def test_a_machine_without_a_screen_says_so() -> None:
    machine = vmonty.VM(firmware="bios", memory="64M", accel="soft")
    with machine, pytest.raises(UsageError, match="add one with --vnc"):
        _ = machine.screen


def test_a_new_disk_is_made_and_an_old_one_kept(tmp_path: Path) -> None:
    path = tmp_path / "new.qcow2"
    wanted = Disk.parse(f"{path},size=64M")
    with contextlib.closing(wanted.open()) as made:
        assert made.size == 64 << 20
    assert path.read_bytes()[:4] == b"QFI\xfb"
    before = path.read_bytes()
    with contextlib.closing(Disk.parse(f"{path},size=1G").open()) as kept:
        assert kept.size == 64 << 20
    assert path.read_bytes() == before
    with pytest.raises(UsageError, match="no size"):
        Disk.parse("x,size=big")
    assert settings({"disks": f"{path},size=64M"}).plan().disks[0].size == 64 << 20


def test_a_cd_without_a_kernel_means_the_bios(tmp_path: Path) -> None:
    assert settings({"cdroms": tmp_path / "x.iso"}).plan().firmware == "bios"
    assert settings({"cdroms": tmp_path / "x.iso", "guest": "busybox"}).plan().firmware is None
    assert settings({}).plan().firmware is None


@pytest.mark.parametrize("value", ["", "nowhere", ":0,websocket=x"])
def test_a_bad_display_is_named(value: str) -> None:
    with pytest.raises(UsageError, match="vnc"):
        settings({"vnc": value})
    outcome = CliRunner().invoke(cli, ["run", "--firmware", "bios", "--vnc", value])
    assert isinstance(outcome.exception, UsageError)
