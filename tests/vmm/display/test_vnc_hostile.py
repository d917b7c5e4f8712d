"""Viewers that mean harm: floods, silence, sizes that nobody has. Others see and type all the while."""

from __future__ import annotations

import contextlib
import resource
import socket
import struct
import time
from collections.abc import Callable

import pytest
from tests.vmm.display.card import Driver
from tests.vmm.display.client import Client
from tests.vmm.display.conftest import Recorder, Serve
from tests.vmm.display.test_vnc import eventually, shown
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect as websocket

from vmonty.vmm.display.vnc import server as servers
from vmonty.vmm.display.vnc.encodings import Encoding
from vmonty.vmm.display.vnc.server import MOST_VIEWERS, SEND_BUFFER

LIMIT_S = 20.0


def good_viewer_works(port: int, driver: Driver) -> None:
    with contextlib.closing(Client(port)) as good:
        good.update(False)
        assert good.picture == shown(driver)


def sent_away(viewer: socket.socket) -> bool:
    """Whether the server ends the connection, whatever it says before."""
    viewer.settimeout(LIMIT_S)
    with contextlib.suppress(ConnectionError):
        while viewer.recv(1 << 16):
            pass
    return True


@pytest.mark.parametrize("area", [(0, 0, 0xFFFF, 0xFFFF), (0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF), (0, 0, 0, 0)])
def test_rectangles_that_no_screen_has(
    driver: Driver, connect: Callable[..., Client], area: tuple[int, int, int, int]
) -> None:
    """What is sent lies within the screen."""
    viewer = connect((Encoding.RAW,))
    viewer.socket.sendall(struct.pack(">BB4H", 3, 0, *area))
    for x, y, width, height, _ in viewer.receive():
        assert x + width <= viewer.width
        assert y + height <= viewer.height
    viewer.update(False)
    assert viewer.picture == shown(driver)


def test_more_encodings_and_screens_than_there_are(driver: Driver, connect: Callable[..., Client]) -> None:
    viewer = connect()
    viewer.socket.sendall(struct.pack(">BxH", 2, 0xFFFF) + b"\x7f\xff\xff\xff" * 0xFFFE + bytes(4))
    viewer.socket.sendall(struct.pack(">BxHHBx", 251, 0xFFFF, 0xFFFF, 255) + bytes(16 * 255))
    viewer.update(False)
    assert viewer.picture == shown(driver)


def test_one_who_asks_and_never_reads(driver: Driver, serve: Serve) -> None:
    """What waits for it is bounded, and others get their pictures."""
    driver.set_linear(1024, 768, 32)
    port = serve().ports[0]
    with contextlib.closing(Client(port, (Encoding.RAW,))) as deaf:
        deaf.socket.setblocking(False)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        request = struct.pack(">BB4H", 3, 0, 0, 0, 1024, 768) * 1000
        end = time.monotonic() + 2
        while time.monotonic() < end:
            with contextlib.suppress(BlockingIOError):
                deaf.socket.send(request)
            time.sleep(0.01)
        good_viewer_works(port, driver)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
        # Some pictures of 3 MiB are on their way at any time; the requests ask for thousands.
        assert grown < 64 << 20


def test_a_flood_of_keys(driver: Driver, recorder: Recorder, serve: Serve) -> None:
    port = serve().ports[0]
    with contextlib.closing(Client(port)) as flooding:
        flooding.socket.sendall(struct.pack(">BBxxI", 4, 1, ord("a")) * 200_000)
        good_viewer_works(port, driver)
        eventually(lambda: len(recorder.keys) >= 1000)
    # What it held goes up with it.
    eventually(lambda: bool(recorder.keys) and recorder.keys[-1] == (0x1E, False))


def test_silent_ones_lose_their_places(driver: Driver, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """All places taken by connections that never finish their handshake are free again after its time."""
    monkeypatch.setattr(servers, "HANDSHAKE_SECONDS", 0.5)
    port = serve().ports[0]
    with contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), LIMIT_S)) for _ in range(MOST_VIEWERS)
        ]
        for number, viewer in enumerate(silent):
            viewer.sendall(b"RFB 003.008\n\x01"[: number % 13])
        assert all(sent_away(viewer) for viewer in silent)
        good_viewer_works(port, driver)


@pytest.mark.parametrize("size", [1, SEND_BUFFER + 1])
def test_what_is_no_rfb_in_a_websocket(driver: Driver, serve: Serve, size: int) -> None:
    """Text, or more than a message may have: that connection ends."""
    port, web = serve(websocket=0).ports
    with websocket(f"ws://127.0.0.1:{web}", compression=None) as viewer:
        assert viewer.recv(LIMIT_S) == b"RFB 003.008\n"
        viewer.send("x" if size == 1 else bytes(2 * size))
        with pytest.raises(ConnectionClosed):
            viewer.recv(LIMIT_S)
    good_viewer_works(port, driver)


@pytest.mark.parametrize("said", [b"\0" * 5000, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"GET /" + b"a" * 100_000])
def test_what_is_no_websocket(driver: Driver, serve: Serve, said: bytes) -> None:
    port, web = serve(websocket=0).ports
    with socket.create_connection(("127.0.0.1", web), LIMIT_S) as viewer:
        with contextlib.suppress(ConnectionError):
            viewer.sendall(said)
        assert sent_away(viewer)
    good_viewer_works(port, driver)
