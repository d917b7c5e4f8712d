"""Viewers that mean harm: floods, silence, sizes that nobody has. Others see and type all the while."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.vmm.display.card import Driver
from tests.vmm.display.client import Client
from tests.vmm.display.conftest import Recorder, Serve
from tests.vmm.display.test_vnc import eventually, shown
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request
from websockets.sync.client import connect as websocket

from vmonty.vmm.display.vnc import security
from vmonty.vmm.display.vnc import server as servers
from vmonty.vmm.display.vnc.encodings import Encoding
from vmonty.vmm.display.vnc.server import MOST_HANDSHAKES, MOST_VIEWERS, SEND_BUFFER, VncServer, same_site

LIMIT_S = 20.0


def good_viewer_works(port: int, driver: Driver) -> None:
    with contextlib.closing(Client(port)) as good:
        good.update(False)
        assert good.picture == shown(driver)


def sent_away(viewer: socket.socket, limit_s: float = LIMIT_S) -> bool:
    """Whether the server ends the connection, whatever it says before."""
    viewer.settimeout(limit_s)
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


# ---- viewers that stop reading --------------------------------------------------------------------------------------

HUGE = (2560, 1600)  # whose picture no kernel's buffers take


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def stalled(port: int, driver: Driver) -> Client:
    """A viewer whose update has begun, and waits for it for ever."""
    driver.set_linear(*HUGE, 32)
    viewer = Client(port, (Encoding.RAW,))
    viewer.request(False)
    viewer.read(16)
    return viewer


def stalled_websocket(port: int, driver: Driver) -> socket.socket:
    """As stalled()."""
    driver.set_linear(*HUGE, 32)
    viewer = socket.create_connection(("127.0.0.1", port), LIMIT_S)
    viewer.sendall(upgrade())
    request = struct.pack(">BB4H", 3, 0, 0, 0, *HUGE)
    for said in (b"RFB 003.008\n", b"\1", b"\1", request):
        viewer.sendall(bytes((0x82, 0x80 | len(said))) + bytes(4) + said)  # masked by zeros
    received(viewer, 1000)  # of the picture, too: what comes before is shorter
    return viewer


def received(viewer: socket.socket, size: int) -> bytes:
    seen = b""
    while len(seen) < size:
        part = viewer.recv(size - len(seen))
        assert part, seen
        seen += part
    return seen


def upgrade(*headers: str) -> bytes:
    """What a browser asks of a WebSocket's server."""
    lines = ("GET / HTTP/1.1", "Host: 127.0.0.1:5700", "Upgrade: websocket", "Connection: Upgrade",
             "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13", *headers, "", "")  # fmt: skip
    return "\r\n".join(lines).encode()


@pytest.mark.parametrize("web", [False, True], ids=["tcp", "websocket"])
def test_one_who_never_reads_and_breaks_the_protocol(driver: Driver, serve: Serve, web: bool) -> None:
    """Nothing of it stays, though it has not taken its picture."""
    port, web_port = serve(websocket=0).ports
    before = open_files()
    if web:
        with stalled_websocket(web_port, driver) as deaf:
            deaf.sendall(b"\x82\x81\0\0\0\0\xee")
            eventually(lambda: open_files() <= before + 1)
    else:
        with contextlib.closing(stalled(port, driver)) as viewer:
            viewer.socket.sendall(b"\xee")
            eventually(lambda: open_files() <= before + 1)
    good_viewer_works(port, driver)


def test_a_stalled_viewer_is_sent_away(driver: Driver, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place is free when an exclusive viewer came."""
    monkeypatch.setattr(servers, "MOST_VIEWERS", 2)
    port = serve().ports[0]
    before = open_files()
    with contextlib.closing(stalled(port, driver)), contextlib.closing(Client(port, shared=False)):
        eventually(lambda: open_files() <= before + 3)
        good_viewer_works(port, driver)


def stop(server: VncServer) -> threading.Thread:
    """Its stop, on a thread that had eight seconds."""
    stopping = threading.Thread(target=server.stop)
    stopping.start()
    stopping.join(8)
    return stopping


@pytest.mark.parametrize("web", [False, True], ids=["tcp", "websocket"])
def test_the_end_waits_for_no_stalled_viewer(driver: Driver, serve: Serve, web: bool) -> None:
    server = serve(websocket=0)
    viewer = stalled_websocket(server.ports[1], driver) if web else stalled(server.ports[0], driver)
    with contextlib.closing(viewer):
        stopping = stop(server)
        late = stopping.is_alive()
    stopping.join()
    assert not late


def test_the_end_waits_for_no_silent_websocket(serve: Serve) -> None:
    server = serve(websocket=0)
    with socket.create_connection(("127.0.0.1", server.ports[1]), LIMIT_S) as silent:
        silent.sendall(b"GET / HTTP/1.1\r\n")
        with websocket(f"ws://127.0.0.1:{server.ports[1]}", compression=None) as other:
            other.recv(LIMIT_S)  # both were accepted
            stopping = stop(server)
            late = stopping.is_alive()
        stopping.join()
        assert not late
        assert sent_away(silent)


# ---- handshakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("web", [False, True], ids=["tcp", "websocket"])
def test_silent_ones_do_not_keep_others_out(driver: Driver, serve: Serve, web: bool) -> None:
    """Of more than may be in their handshake the oldest ones go."""
    server = serve(websocket=0)
    with contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.ports[web]), LIMIT_S))
            for _ in range(MOST_HANDSHAKES + MOST_VIEWERS)
        ]
        # Before their time is over.
        assert all(sent_away(viewer, 5) for viewer in silent[:MOST_VIEWERS])
        if web:
            with websocket(f"ws://127.0.0.1:{server.ports[1]}", compression=None) as viewer:
                assert viewer.recv(LIMIT_S) == b"RFB 003.008\n"
        else:
            good_viewer_works(server.ports[0], driver)


def test_viewers_leave_room_for_handshakes(driver: Driver, serve: Serve) -> None:
    """And the other way round: who is in is not sent away by connections that say nothing."""
    port = serve().ports[0]
    with contextlib.ExitStack() as stack:
        viewers = [stack.enter_context(contextlib.closing(Client(port))) for _ in range(MOST_VIEWERS - 1)]
        for _ in range(MOST_HANDSHAKES + 1):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), LIMIT_S))
        good_viewer_works(port, driver)
        for viewer in viewers:
            viewer.update(False)


def challenged(port: int) -> socket.socket:
    viewer = socket.create_connection(("127.0.0.1", port), LIMIT_S)
    for said, size in ((b"RFB 003.008\n", 12), (b"\2", 2), (b"", 16)):
        received(viewer, size)
        viewer.sendall(said)
    return viewer


def test_guesses_come_one_after_the_other(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections at the same time, and those that do not wait for their answer, have no more of them."""
    penalty, count = 0.05, 8
    monkeypatch.setattr(security, "PENALTY", penalty)
    (tmp_path / "password").write_text("geheim")
    port = serve(password_file=tmp_path / "password").ports[0]
    before = time.monotonic()
    with contextlib.ExitStack() as stack:
        guessing = [stack.enter_context(challenged(port)) for _ in range(count)]
        for number, viewer in enumerate(guessing):
            viewer.sendall(bytes(16))
            if number % 2:
                viewer.close()
        for viewer in guessing[::2]:
            assert received(viewer, 4) == b"\0\0\0\1"
        with contextlib.closing(Client(port, password="geheim")) as good:
            assert good.result == 0
    assert time.monotonic() - before >= count * penalty


# ---- pages of other sites -------------------------------------------------------------------------------------------


def answer_to(port: int, host: str, *origins: str) -> bytes:
    """The status of the answer to a browser's page."""
    with socket.create_connection(("127.0.0.1", port), LIMIT_S) as viewer:
        asked = upgrade(*(f"Origin: {origin}" for origin in origins))
        viewer.sendall(asked.replace(b"Host: 127.0.0.1:5700", b"Host: " + host.encode()))
        return received(viewer, 12)[9:]


@pytest.mark.parametrize(
    ("origins", "host"),
    [
        ([], "127.0.0.1:5700"), (["http://127.0.0.1:6080"], "127.0.0.1:5700"), (["http://localhost"], "127.0.0.1:5700"),
        (["http://[::1]:6080"], "[::1]:5700"), (["http://192.0.2.7:6080"], "192.0.2.7:5700"),
    ],
)  # fmt: skip
def test_pages_of_this_host_may_connect(serve: Serve, origins: list[str], host: str) -> None:
    """noVNC comes from another port, mostly."""
    assert answer_to(serve(websocket=0).ports[1], host, *origins) == b"101"


@pytest.mark.parametrize(("own", "status"), [("vm.example", None), ("127.0.0.1", 403)])
def test_a_name_counts_when_the_server_was_given_it(own: str, status: int | None) -> None:
    """Whoever owns any other one may let it lead here."""
    headers = Headers([("Origin", "https://vm.example:6080"), ("Host", "VM.example:5700")])
    asked = SimpleNamespace(respond=lambda status, text: status)
    assert same_site(own, asked, Request("/", headers)) == status  # type: ignore[arg-type, comparison-overlap]


@pytest.mark.parametrize(
    ("origins", "host"),
    [
        (["https://evil.example"], "127.0.0.1:5700"), (["null"], "127.0.0.1:5700"), (["http://["], "127.0.0.1:5700"),
        (["http://127.0.0.1.evil.example"], "127.0.0.1:5700"), (["http://127.0.0.1@evil.example"], "127.0.0.1:5700"),
        (["http://127.0.0.1", "https://evil.example"], "127.0.0.1:5700"), ([""], ""),
        (["https://evil.example"], "vm.example:5700"), (["http://evil.example:80"], "evil.example:5700"),
    ],
)  # fmt: skip
def test_pages_of_other_hosts_need_a_password(serve: Serve, tmp_path: Path, origins: list[str], host: str) -> None:
    assert answer_to(serve(websocket=0).ports[1], host, *origins) == b"403"
    (tmp_path / "password").write_text("geheim")
    if len(origins) == 1:
        server = serve(websocket=0, password_file=tmp_path / "password")
        assert answer_to(server.ports[1], host, *origins) == b"101"
