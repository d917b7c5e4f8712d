"""A browser without a window, driven over its debugging protocol, with Debian's noVNC in it."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.server
import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.serving import serving
from websockets.sync.client import ClientConnection, connect

NOVNC = Path("/usr/share/novnc")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".js": "text/javascript"}  # noqa: RUF012

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002  # the base class's name
        """Say nothing."""


@contextlib.contextmanager
def files(folder: Path) -> Iterator[int]:
    """An HTTP server of *folder*; gives its port."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    with serving(server) as port:
        yield port


class Page:
    """One page of the browser."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._number = 0

    def call(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        self._connection.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._connection.recv(timeout=60))
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def evaluate(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not self.evaluate(expression):
            assert time.monotonic() < end, (
                f"{expression} did not become true; {self.evaluate('document.body.innerText')}"
            )
            time.sleep(0.1)

    def press(self, key: str, code: str, text: str = "", virtual: int = 0) -> None:
        extra = {"text": text} if text else {}
        names = {"key": key, "code": code, "windowsVirtualKeyCode": virtual}
        self.call("Input.dispatchKeyEvent", type="keyDown", **names, **extra)
        self.call("Input.dispatchKeyEvent", type="keyUp", **names)

    def screenshot(self) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


@contextlib.contextmanager
def page(url: str, profile: Path) -> Iterator[Page]:
    """A browser that shows *url*."""
    log = profile / "log"
    profile.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        browser = subprocess.Popen(
            ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--remote-debugging-port=0", "--window-size=1100,900", f"--user-data-dir={profile}", url],
            stdout=subprocess.DEVNULL, stderr=output,
        )  # fmt: skip
    try:
        end = time.monotonic() + 60
        while not (found := re.search(r"DevTools listening on ws://127.0.0.1:(\d+)/", log.read_text())):
            assert browser.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        with connect(f"ws://127.0.0.1:{found[1]}{_target(int(found[1]))}", max_size=None) as connection:
            yield Page(connection)
    finally:
        browser.terminate()
        browser.wait(30)


def _target(port: int) -> str:
    import urllib.request

    end = time.monotonic() + 60
    while time.monotonic() < end:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as answer:
            for target in json.load(answer):
                if target["type"] == "page":
                    return str(target["webSocketDebuggerUrl"]).split(str(port), 1)[1]
        time.sleep(0.1)
    raise AssertionError("the browser has no page")
