"""Where a VNC server listens: what is there already stays, and what cannot be is said in one line."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
from tests.vmm.display.card import Driver
from tests.vmm.display.conftest import Recorder

from vmonty.base.errors import UsageError
from vmonty.vmm.display.screen import Screen
from vmonty.vmm.display.vnc.server import VncOptions, VncServer


def server_at(options: VncOptions, driver: Driver) -> VncServer:
    return VncServer(options, "m", Screen(driver.card.mode, driver.card.memory), Recorder(), Recorder())


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "vnc"]


def refused(options: VncOptions, driver: Driver) -> str:
    """What is said of an address that cannot be had."""
    before = threads()
    with pytest.raises(UsageError) as told:
        server_at(options, driver).start()
    assert threads() == before
    assert "\n" not in str(told.value)
    return str(told.value)


def test_a_file_is_left_alone(driver: Driver, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_text("precious")
    assert "no socket" in refused(VncOptions(path=path), driver)
    assert path.read_text() == "precious"


@pytest.mark.parametrize("name", ["", "missing/vnc", "x" * 200])
def test_a_path_that_no_socket_can_have(driver: Driver, tmp_path: Path, name: str) -> None:
    assert str(tmp_path) in refused(VncOptions(path=tmp_path / name), driver)
    assert tmp_path.is_dir()


def test_another_machines_socket_is_left_alone(driver: Driver, tmp_path: Path) -> None:
    path = tmp_path / "vnc"
    first = server_at(VncOptions(path=path), driver)
    first.start()
    try:
        assert "another machine listens" in refused(VncOptions(path=path), driver)
        with socket.socket(socket.AF_UNIX) as viewer:
            viewer.connect(str(path))
            assert viewer.recv(12) == b"RFB 003.008\n"
    finally:
        first.stop()
    assert not path.exists()


def test_so_is_one_whose_queue_is_full(driver: Driver, tmp_path: Path) -> None:
    path = tmp_path / "vnc"
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(str(path))
        busy.listen(0)
        waiting.connect(str(path))
        assert "another machine listens" in refused(VncOptions(path=path), driver)
    assert path.is_socket()


def test_a_dead_ones_is_replaced(driver: Driver, tmp_path: Path) -> None:
    path = tmp_path / "vnc"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    server = server_at(VncOptions(path=path), driver)
    server.start()
    assert path.stat().st_mode & 0o777 == 0o600
    server.stop()
    assert not path.exists()


def test_only_its_own_file_goes_at_the_end(driver: Driver, tmp_path: Path) -> None:
    path = tmp_path / "vnc"
    first, second = (server_at(VncOptions(path=path), driver) for _ in range(2))
    first.start()
    path.unlink()  # by its user
    second.start()
    first.stop()
    with socket.socket(socket.AF_UNIX) as viewer:
        viewer.connect(str(path))
        assert viewer.recv(12) == b"RFB 003.008\n"
    second.stop()
    assert not path.exists()


@pytest.mark.parametrize("text", ["a..b:0", "a" * 64 + ":0", "a\0b:0", "unix:a\0b"])
def test_what_is_no_address(driver: Driver, text: str) -> None:
    assert "VNC cannot listen on" in refused(VncOptions.parse(text), driver)


def test_a_socket_needs_a_path() -> None:
    with pytest.raises(UsageError, match="no path"):
        VncOptions.parse("unix:")


def test_a_websockets_port_that_is_taken(driver: Driver) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot listen" in refused(VncOptions(port=0, websocket=taken.getsockname()[1]), driver)
