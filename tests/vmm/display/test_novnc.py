"""noVNC in a browser: it shows the screen and types, over the server's WebSocket."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.vmm.display.browser import NOVNC, Page, files, page
from tests.vmm.display.card import TEXT_80X25, Driver
from tests.vmm.display.test_console import free_display, text_of, until
from tests.vmm.display.test_vnc import Recorder

import vmonty
from vmonty.vmm.display.screen import Screen
from vmonty.vmm.display.vnc.server import VncOptions, VncServer

pytestmark = pytest.mark.skipif(
    shutil.which("chromium") is None or not NOVNC.is_dir(), reason="chromium and novnc are not installed"
)
PIXEL = "Array.from(document.querySelector('canvas')?.getContext('2d').getImageData({}, {}, 1, 1).data).join()"


@pytest.fixture
def driver() -> Driver:
    driver = Driver()
    driver.set_mode(TEXT_80X25)
    driver.set_linear(640, 480, 32)
    driver.card.memory.write(0, bytes((10, 20, 30, 0)) * (640 * 480))
    return driver


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def browser(driver: Driver, recorder: Recorder, tmp_path: Path) -> Iterator[Page]:
    (tmp_path / "password").write_text("secret")
    options = VncOptions(port=0, websocket=0, password_file=tmp_path / "password")
    server = VncServer(options, "the guest", Screen(driver.card.mode, driver.card.memory), recorder, recorder)
    server.start()
    try:
        with files(NOVNC) as port:
            url = f"http://127.0.0.1:{port}/vnc_lite.html?host=127.0.0.1&port={server.ports[1]}&password=secret"
            with page(url, tmp_path / "profile") as shown:
                yield shown
    finally:
        server.stop()


def eventually(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within 10 s")


def test_novnc_shows_the_screen_and_types(driver: Driver, recorder: Recorder, browser: Page) -> None:
    browser.wait("document.getElementById('status')?.textContent === 'Connected to the guest'")
    browser.wait(f"{PIXEL.format(100, 100)} === '30,20,10,255'")
    driver.card.memory.write(4 * (640 * 300 + 200), bytes((0, 0, 255, 0)))
    browser.wait(f"{PIXEL.format(200, 300)} === '255,0,0,255'")
    assert browser.evaluate(PIXEL.format(201, 300)) == "30,20,10,255"
    browser.evaluate("document.querySelector('canvas').focus()")
    browser.press("a", "KeyA", "a", 65)
    browser.press("Enter", "Enter", "\r", 13)
    browser.press("ArrowLeft", "ArrowLeft", "", 37)
    eventually(lambda: len(recorder.keys) >= 6)
    assert recorder.keys == [(code, down) for code in (0x1E, 0x1C, 0xE04B) for down in (True, False)]
    driver.set_linear(800, 600, 32)
    browser.wait("document.querySelector('canvas').width === 800 && document.querySelector('canvas').height === 600")


# How many pixels of the canvas are not black.
LIT = """(() => { const c = document.querySelector('canvas'); if (!c || !c.width) return 0;
const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let n = 0;
for (let i = 0; i < d.length; i += 4) n += d[i] + d[i + 1] + d[i + 2] > 0; return n; })()"""


@pytest.mark.skipif(not Path("/usr/share/seabios/bios-256k.bin").exists(), reason="no SeaBIOS: apt-get install seabios")
def test_a_guest_is_typed_to_and_seen(tmp_path: Path) -> None:
    """SeaBIOS waits for Escape, and shows its menu: both by the browser."""
    display = free_display()
    with vmonty.VM(
        firmware="bios",
        boot="menu=on,wait=60000",
        memory="64M",
        accel="soft",
        vnc=f":{display},websocket={display + 1}",
    ) as machine:
        machine.start()
        with files(NOVNC) as port:
            url = f"http://127.0.0.1:{port}/vnc_lite.html?host=127.0.0.1&port={display + 1}"
            with page(url, tmp_path / "profile") as browser:
                browser.wait("document.getElementById('status')?.textContent === 'Connected to vmonty'")
                until(lambda: "Press ESC for boot menu" in text_of(machine), lambda: text_of(machine))
                before = lit(machine)
                browser.wait(f"{LIT} === {before}")
                browser.evaluate("document.querySelector('canvas').focus()")
                browser.press("Escape", "Escape", "", 27)
                until(lambda: "Select boot device" in text_of(machine), lambda: text_of(machine))
                assert lit(machine) > before
                browser.wait(f"{LIT} === {lit(machine)}")


def lit(machine: vmonty.VM) -> int:
    """How many pixels of the guest's screen are not black."""
    pixels = machine.screen.frame().pixels
    return sum(any(pixels[at : at + 3]) for at in range(0, len(pixels), 4))
