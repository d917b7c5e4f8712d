"""The VNC server, with a viewer of the tests' own and with real ones."""

from __future__ import annotations

import contextlib
import logging
import random
import shutil
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.vmm.display.card import MODE_13, TEXT_80X25, Driver
from tests.vmm.display.client import Client
from tests.vmm.display.conftest import Recorder, Serve

from vmonty.base.errors import UsageError
from vmonty.vmm.display.screen import Screen
from vmonty.vmm.display.vnc.encodings import Encoding
from vmonty.vmm.display.vnc.server import MOST_VIEWERS, VncOptions, VncServer


def eventually(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within 5 s")


def shown(driver: Driver) -> bytearray:
    return Screen(driver.card.mode, driver.card.memory).frame().pixels


def scribble(driver: Driver, seed: int = 1) -> None:
    source = random.Random(seed)
    for row in range(25):
        cells = b"".join(bytes((source.randrange(32, 127), source.choice((7, 0x1F, 0x4E)))) for _ in range(70))
        driver.poke(0xB8000 + 160 * row, cells)


ALL = (Encoding.RAW, Encoding.HEXTILE, Encoding.ZRLE, Encoding.TIGHT)


@pytest.mark.parametrize("encoding", ALL)
@pytest.mark.parametrize("picture", ["text", "noise", "two colours", "one colour"])
def test_the_viewer_has_the_picture(
    driver: Driver, connect: Callable[..., Client], encoding: Encoding, picture: str
) -> None:
    if picture == "text":
        scribble(driver)
    else:
        driver.set_linear(200, 100, 32)
        source = random.Random(3)
        colours = {"noise": None, "two colours": (0x102030, 0xFFEEDD), "one colour": (0x123456,)}[picture]
        pixels = [source.getrandbits(24) if colours is None else source.choice(colours) for _ in range(20000)]
        driver.card.memory.write(0, b"".join(value.to_bytes(4, "little") for value in pixels))
    client = connect((encoding,))
    rectangles = client.update(False)
    assert {entry[4] for entry in rectangles} == {encoding}
    assert client.picture == shown(driver)
    driver.card.memory.write(0, b"\x41\x0f" * 3)
    changed = client.update()
    assert client.picture == shown(driver)
    assert sum(width * height for _, _, width, height, _ in changed) <= 64 * 16 * 2, "only what changed is sent"


@pytest.mark.parametrize("encoding", [Encoding.RAW, Encoding.HEXTILE, Encoding.ZRLE])
def test_colours_in_a_viewers_format(driver: Driver, connect: Callable[..., Client], encoding: Encoding) -> None:
    """Red and blue change places, big-endian: what the viewer decodes has the bytes turned round."""
    scribble(driver)
    form = struct.pack(">BBBBHHHBBBxxx", 32, 24, 1, 1, 255, 255, 255, 8, 16, 24)
    client = connect((encoding,), form=form)
    client.update(False)
    wanted = shown(driver)
    # The value is blue << 24 | green << 16 | red << 8: the bytes blue, green, red, 0 in this order.
    assert client.picture == wanted


def test_pixels_of_16_bits(driver: Driver, connect: Callable[..., Client]) -> None:
    driver.set_linear(64, 16, 32)
    driver.card.memory.write(0, bytes((0xFF, 0x80, 0, 0)))
    client = connect((), form=struct.pack(">BBBBHHHBBBxxx", 16, 16, 0, 1, 31, 63, 31, 11, 5, 0))
    client.request(False)
    assert client.read(4 + 12)[2:4] == b"\0\1"
    data = client.read(2 * 64 * 16)
    assert struct.unpack_from("<H", data)[0] == 31 | 32 << 5
    assert not any(data[2:])


def test_a_viewer_with_a_colour_map_gets_one(driver: Driver, connect: Callable[..., Client]) -> None:
    driver.set_linear(64, 16, 32)
    driver.card.memory.write(0, bytes((0xFF, 0, 0xFF, 0)))
    client = connect((), form=struct.pack(">BBBBHHHBBBxxx", 8, 8, 0, 0, 0, 0, 0, 0, 0, 0))
    client.request(False)
    kind, first, count = struct.unpack(">BxHH", client.read(6))
    assert (kind, first, count) == (1, 0, 256)
    colours = client.read(6 * 256)
    client.read(16)
    value = client.read(64 * 16)[0]
    assert struct.unpack_from(">HHH", colours, 6 * value) == (65535, 0, 65535)


def test_a_scroll_is_a_copy(driver: Driver, connect: Callable[..., Client]) -> None:
    scribble(driver)
    driver.indexed(0x3D4, 0xA, 0x20)  # no cursor: it stays where it is while lines move
    client = connect((Encoding.ZRLE, Encoding.COPY_RECT))
    client.update(False)
    driver.poke(0xB8000, driver.peek(0xB8000 + 160, 160 * 24) + b"n\x07" * 80)
    rectangles = client.update()
    assert client.picture == shown(driver)
    assert rectangles[0] == (0, 0, 720, 384, Encoding.COPY_RECT)
    assert sum(height for _, _, _, height, encoding in rectangles if encoding != Encoding.COPY_RECT) <= 32


@pytest.mark.parametrize("encoding", [Encoding.DESKTOP_SIZE, Encoding.EXTENDED_DESKTOP_SIZE])
def test_a_new_size(driver: Driver, connect: Callable[..., Client], encoding: Encoding) -> None:
    client = connect((Encoding.RAW, encoding))
    client.update(False)
    driver.set_mode(MODE_13)
    driver.poke(0xA0000, bytes(range(256)))
    assert client.update() == [(0, 0, 640, 400, encoding)]
    client.update()
    assert client.picture == shown(driver)


def test_a_scroll_beyond_the_viewers_picture_is_no_copy(driver: Driver, connect: Callable[..., Client]) -> None:
    """A copy has to lie in the picture that the viewer was told of, whatever the guest's mode is by now."""
    driver.set_linear(64, 64, 32)
    client = connect((Encoding.RAW, Encoding.COPY_RECT))
    client.update(False)
    driver.set_linear(640, 480, 32)
    lines = [random.Random(line).randbytes(4 * 640) for line in range(496)]
    driver.card.memory.write(0, b"".join(lines[:480]))
    client.update(False)
    driver.card.memory.write(0, b"".join(lines[16:]))
    for x, y, width, height, encoding in client.update():
        assert (x + width <= 64, y + height <= 64, encoding) == (True, True, Encoding.RAW)
    assert client.picture == b"".join(shown(driver)[4 * 640 * line :][: 4 * 64] for line in range(64))


def test_a_viewer_that_cannot_resize_sees_what_fits(driver: Driver, connect: Callable[..., Client]) -> None:
    client = connect((Encoding.RAW,))
    client.update(False)
    driver.set_linear(1024, 768, 32)
    driver.card.memory.write(0, b"\x11\x22\x33\x00" * 1024)
    client.update(False)
    assert (client.width, client.height) == (720, 400)
    assert client.picture[: 4 * 720] == b"\x11\x22\x33\x00" * 720


def test_keys_and_pointer(recorder: Recorder, connect: Callable[..., Client]) -> None:
    client = connect()
    for keysym in (ord("a"), 0xFF0D, 0xFF52, ord("s"), 0xFFC9):
        client.key(keysym, True)
        client.key(keysym, False)
    client.key(0x1234, True)
    client.point(0, 100, 100)
    client.point(1, 110, 95)
    client.point(4 | 8, 110, 95)
    client.point(0, 110, 95)
    eventually(lambda: len(recorder.moves) == 3)
    assert recorder.keys[::2] == [(0x1E, True), (0x1C, True), (0xE048, True), (0x1F, True), (0x58, True)]
    assert recorder.moves == [(10, 5, 0, 1), (0, 0, -1, 2), (0, 0, 0, 0)]


def test_what_a_viewer_held_is_let_go_when_it_leaves(recorder: Recorder, connect: Callable[..., Client]) -> None:
    client = connect()
    client.key(0xFFE3, True)
    client.point(1, 5, 5)
    eventually(lambda: len(recorder.keys) == 1 and len(recorder.moves) == 1)
    client.close()
    eventually(lambda: recorder.keys == [(0x1D, True), (0x1D, False)] and recorder.moves[-1] == (0, 0, 0, 0))


def test_qemus_extensions(recorder: Recorder, connect: Callable[..., Client]) -> None:
    client = connect((Encoding.RAW, Encoding.POINTER_TYPE_CHANGE, Encoding.EXTENDED_KEY_EVENT))
    client.update(False)
    assert client.seen == [Encoding.POINTER_TYPE_CHANGE, Encoding.EXTENDED_KEY_EVENT]
    client.socket.sendall(struct.pack(">BBHII", 255, 0, 1, 0xFF51, 0xCB))
    client.point(1, 0x7FFF + 3, 0x7FFF - 4)
    eventually(lambda: bool(recorder.keys and recorder.moves))
    assert recorder.keys == [(0xE04B, True)]
    assert recorder.moves == [(3, 4, 0, 1)]


def test_a_guest_that_wants_places(recorder: Recorder, connect: Callable[..., Client]) -> None:
    recorder.absolute = True
    client = connect()
    client.update(False)
    client.point(0, 0, 0)
    client.point(1, 719, 399)
    client.point(1, 2000, 200)  # outside: its edge
    client.point(8, 360, 200)
    client.point(0, 360, 200)
    eventually(lambda: len(recorder.places) == 4)
    edge = [(65535, 65535, 0, 1), (65535, 200 * 65535 // 399, 0, 1)]
    assert recorder.places == [(0, 0, 0, 0), *edge, (32813, 32849, -1, 0)]
    client.point(2, 360, 200)
    client.close()
    eventually(lambda: recorder.places[-2:] == [(32813, 32849, 0, 4), (32813, 32849, 0, 0)])
    assert recorder.moves == [(0, 0, 0, 0)], "a driver that has gone meanwhile lets go, too"


def test_a_driver_that_begins_to_want_places(recorder: Recorder, connect: Callable[..., Client]) -> None:
    client = connect((Encoding.RAW, Encoding.POINTER_TYPE_CHANGE))
    client.update(False)
    recorder.absolute = True
    assert client.update() == [(1, 0, 0, 0, Encoding.POINTER_TYPE_CHANGE)]
    client.point(0, 0x7FFF + 3, 0x7FFF)  # sent before it knew
    client.point(0, 1, 399)
    eventually(lambda: bool(recorder.places))
    assert recorder.moves == [(3, 0, 0, 0)]
    assert recorder.places == [(91, 65535, 0, 0)]
    recorder.absolute = False
    assert client.update() == [(0, 0, 0, 0, Encoding.POINTER_TYPE_CHANGE)]


def test_a_server_that_stops_says_nothing(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server = serve()
    client = Client(server.ports[0])
    try:
        client.update(False)
        server.stop()
        with pytest.raises(ConnectionError):
            client.read(1)
    finally:
        client.close()
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_resize_by_the_viewer_is_refused(connect: Callable[..., Client]) -> None:
    client = connect((Encoding.RAW, Encoding.EXTENDED_DESKTOP_SIZE))
    client.update(False)
    client.socket.sendall(struct.pack(">BxHHBx", 251, 800, 600, 1) + struct.pack(">IHHHHI", 1, 0, 0, 800, 600, 0))
    assert client.update()[0] == (1, 1, 720, 400, Encoding.EXTENDED_DESKTOP_SIZE)


@pytest.mark.parametrize("version", [b"RFB 003.003\n", b"RFB 003.007\n", b"RFB 003.008\n", b"RFB 003.889\n"])
def test_versions(driver: Driver, serve: Serve, version: bytes) -> None:
    with contextlib.closing(Client(serve().ports[0], version=version)) as client:
        client.update(False)
        assert client.picture == shown(driver)


def test_password(driver: Driver, serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("geheim\n")
    port = serve(password_file=tmp_path / "password").ports[0]
    with contextlib.closing(Client(port, password="geheim")) as client:
        client.update(False)
        assert client.picture == shown(driver)
    with contextlib.closing(Client(port, password="gelogen")) as client:
        assert client.result == 1
        assert b"wrong password" in client.read(4 + 14)
        with pytest.raises(ConnectionError):
            client.read(1)


def test_password_over_tls(serve: Serve, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "2",
         "-subj", "/CN=localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    port = serve(tls_cert=cert, tls_key=key).ports[0]
    with socket.create_connection(("127.0.0.1", port), 10) as plain:
        plain.recv(12)
        plain.sendall(b"RFB 003.008\n")
        assert plain.recv(2) == bytes((1, 19))
        plain.sendall(b"\x13")
        assert plain.recv(2) == b"\0\2"
        plain.sendall(b"\0\2")
        assert plain.recv(6) == struct.pack(">BBI", 0, 1, 260)
        plain.sendall(struct.pack(">I", 260))
        assert plain.recv(1) == b"\1"
        context = ssl.create_default_context(cafile=cert)
        context.check_hostname = False
        with context.wrap_socket(plain) as secure:
            assert secure.recv(4) == bytes(4)
            secure.sendall(b"\1")
            assert struct.unpack(">HH", secure.recv(4)) == (720, 400)


def test_an_exclusive_viewer_sends_others_away(serve: Serve) -> None:
    port = serve().ports[0]
    with contextlib.closing(Client(port)) as first, contextlib.closing(Client(port)) as second:
        first.update(False)
        second.update(False)
        with contextlib.closing(Client(port, shared=False)) as third:
            third.update(False)
            for viewer in (first, second):
                with pytest.raises((ConnectionError, OSError)):
                    viewer.update(False)


def test_an_exclusive_viewer_finds_a_place(driver: Driver, serve: Serve) -> None:
    port = serve().ports[0]
    with contextlib.ExitStack() as stack:
        for _ in range(MOST_VIEWERS):
            stack.callback(Client(port).close)
        last = stack.enter_context(contextlib.closing(Client(port, shared=False)))
        last.update(False)
        assert last.picture == shown(driver)


def test_only_so_many_viewers(serve: Serve) -> None:
    port = serve().ports[0]
    with contextlib.ExitStack() as stack:
        for _ in range(MOST_VIEWERS):
            stack.callback(Client(port).close)
        with pytest.raises((ConnectionError, OSError)):
            Client(port)


def test_unix_socket(driver: Driver, tmp_path: Path) -> None:
    recorder, path = Recorder(), tmp_path / "vnc"
    screen = Screen(driver.card.mode, driver.card.memory)
    server = VncServer(VncOptions(path=path), "m", screen, recorder, recorder)
    server.start()
    with socket.socket(socket.AF_UNIX) as viewer:
        viewer.connect(str(path))
        assert viewer.recv(12) == b"RFB 003.008\n"
        assert path.stat().st_mode & 0o777 == 0o600
    server.stop()
    server.stop()
    assert not path.exists()


def test_a_port_that_is_taken(serve: Serve, driver: Driver) -> None:
    port = serve().ports[0]
    screen = Screen(driver.card.mode, driver.card.memory)
    with pytest.raises(UsageError, match="cannot listen"):
        VncServer(VncOptions(port=port), "m", screen, Recorder(), Recorder()).start()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (":0", VncOptions()), (":7", VncOptions(port=5907)), ("0.0.0.0:1", VncOptions(host="0.0.0.0", port=5901)),
        ("[::1]:2", VncOptions(host="::1", port=5902)), ("unix:/run/x", VncOptions(path=Path("/run/x"))),
        (":1,websocket", VncOptions(port=5901, websocket=5701)), (":0,websocket=80", VncOptions(websocket=80)),
        (":0,password-file=p", VncOptions(password_file=Path("p"))),
        (":0,tls-cert=c,tls-key=k", VncOptions(tls_cert=Path("c"), tls_key=Path("k"))),
    ],
)  # fmt: skip
def test_options(text: str, expected: VncOptions) -> None:
    assert VncOptions.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "0", ":", ":x", ":-1", ":60000", ":0,what", ":0,websocket=0", ":0,tls-cert=c", ":0,password-file="]
)
def test_options_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError, match="--vnc"):
        VncOptions.parse(text)


MESSAGES = st.one_of(
    st.binary(max_size=40),
    st.builds(lambda body: b"\0" + body, st.binary(min_size=19, max_size=19)),
    st.builds(lambda codes: struct.pack(f">BxH{len(codes)}i", 2, len(codes), *codes), st.lists(
        st.sampled_from((0, 1, 5, 7, 16, -223, -257, -258, -308, 99)), max_size=8)),
    st.builds(lambda kind, body: struct.pack(">B", 3) + bytes((kind,)) + body, st.integers(0, 1),
              st.binary(min_size=8, max_size=8)),
    st.builds(lambda body: b"\4" + body, st.binary(min_size=7, max_size=7)),
    st.builds(lambda body: b"\5" + body, st.binary(min_size=5, max_size=5)),
    st.builds(lambda length: b"\6\0\0\0" + struct.pack(">i", length), st.sampled_from((-1, 0, 5, 1 << 21, 1 << 30))),
    st.builds(lambda body: b"\xff\0" + body, st.binary(min_size=10, max_size=10)),
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(MESSAGES, max_size=12))
def test_garbage_ends_only_its_own_connection(messages: list[bytes]) -> None:
    driver = Driver()
    driver.set_mode(TEXT_80X25)
    recorder = Recorder()
    server = VncServer(VncOptions(port=0), "m", Screen(driver.card.mode, driver.card.memory), recorder, recorder)
    server.start()
    try:
        with contextlib.closing(Client(server.ports[0])) as bad, contextlib.suppress(OSError):
            for message in messages:
                bad.socket.sendall(message)
            bad.request(False)
            bad.socket.settimeout(0.02)
            while bad.socket.recv(65536):
                pass
        with contextlib.closing(Client(server.ports[0])) as good:
            good.update(False)
            assert good.picture == shown(driver)
    finally:
        server.stop()


@pytest.mark.parametrize("start", [b"", b"RFB", b"GET / HTTP/1.1\r\n", b"RFB 003.008\n\x63", b"RFB 9x9.008\n"])
def test_half_handshakes(serve: Serve, start: bytes) -> None:
    port = serve().ports[0]
    with socket.create_connection(("127.0.0.1", port), 10) as viewer:
        viewer.sendall(start)
    with contextlib.closing(Client(port)) as good:
        good.update(False)


# ---- real viewers ---------------------------------------------------------------------------------------------------


def has(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def rgb(driver: Driver) -> bytes:
    pixels = shown(driver)
    made = bytearray(len(pixels) // 4 * 3)
    made[0::3], made[1::3], made[2::3] = pixels[2::4], pixels[1::4], pixels[0::4]
    return bytes(made)


@has("gvnccapture")
def test_gtk_vnc_sees_the_picture(driver: Driver, serve: Serve, tmp_path: Path) -> None:
    from PIL import Image

    scribble(driver)
    display = serve().ports[0] - 5900
    out = tmp_path / "screen.png"
    subprocess.run(["gvnccapture", "-q", f"127.0.0.1:{display}", out], check=True, timeout=60, capture_output=True)
    with Image.open(out) as image:
        assert image.size == (720, 400)
        assert image.convert("RGB").tobytes() == rgb(driver)


@has("vncsnapshot")
@pytest.mark.parametrize("encoding", ["raw", "hextile", "tight"])
def test_vncsnapshot_sees_the_picture(driver: Driver, serve: Serve, tmp_path: Path, encoding: str) -> None:
    from PIL import Image, ImageChops

    scribble(driver)
    display = serve().ports[0] - 5900
    out = tmp_path / "screen.jpg"
    subprocess.run(
        ["vncsnapshot", "-quality", "100", "-encodings", encoding, f"127.0.0.1:{display}", out],
        check=True, timeout=60, capture_output=True,
    )  # fmt: skip
    with Image.open(out) as image:
        wanted = Image.frombytes("RGB", (720, 400), rgb(driver))
        difference = ImageChops.difference(image.convert("RGB"), wanted).convert("L")
        histogram = difference.histogram()
    # JPEG is not exact: nearly all pixels are close, and a wrong picture is far off.
    assert sum(histogram[:64]) / sum(histogram) > 0.97
