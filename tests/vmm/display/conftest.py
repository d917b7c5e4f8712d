"""A VNC server of an adapter's screen, and viewers of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
from tests.vmm.display.card import TEXT_80X25, Driver
from tests.vmm.display.client import Client

from vmonty.vmm.display.screen import Screen
from vmonty.vmm.display.vnc.server import VncOptions, VncServer

Serve = Callable[..., VncServer]


class Recorder:
    """A keyboard and a mouse that note what they are told."""

    def __init__(self) -> None:
        self.keys: list[tuple[int, bool]] = []
        self.moves: list[tuple[int, int, int, int]] = []
        self.places: list[tuple[int, int, int, int]] = []
        self.absolute = False
        self.leds = 0

    def key(self, code: int, pressed: bool) -> None:
        self.keys.append((code, pressed))

    def move(self, dx: int, dy: int, dz: int = 0, buttons: int = 0) -> None:
        self.moves.append((dx, dy, dz, buttons))

    def place(self, x: int, y: int, dz: int = 0, buttons: int = 0) -> None:
        self.places.append((x, y, dz, buttons))


@pytest.fixture
def driver() -> Driver:
    driver = Driver()
    driver.set_mode(TEXT_80X25)
    driver.load_font({code: bytes((code * 7 + line * 13) & 0xFF for line in range(16)) for code in range(1, 128)})
    return driver


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def serve(driver: Driver, recorder: Recorder) -> Iterator[Serve]:
    with contextlib.ExitStack() as stack:

        def start(**options: object) -> VncServer:
            screen = Screen(driver.card.mode, driver.card.memory)
            made = VncOptions(port=0, **options)  # type: ignore[arg-type]
            server = VncServer(made, "a machine", screen, recorder, recorder)
            server.start()
            stack.callback(server.stop)
            return server

        yield start


@pytest.fixture
def connect(serve: Serve) -> Iterator[Callable[..., Client]]:
    with contextlib.ExitStack() as stack:

        def make(*arguments: object, **options: object) -> Client:
            client = Client(serve().ports[0], *arguments, **options)  # type: ignore[arg-type]
            stack.callback(client.close)
            return client

        yield make
