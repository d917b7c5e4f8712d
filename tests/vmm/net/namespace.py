"""Linux's own TCP/IP stack as the guest: a network namespace whose tap interface is cabled to a backend."""

from __future__ import annotations

import contextlib
import http.server
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.serving import serving

from vmonty.base.errors import UsageError
from vmonty.vmm.eventloop import EventLoop
from vmonty.vmm.net.backend import Accepts, NetBackend
from vmonty.vmm.net.tap import TapBackend, open_tap

SECONDS = 60


def missing() -> str:
    """Why there can be no namespace here; empty when there can."""
    if shutil.which("ip") is None or shutil.which("busybox") is None:
        return "needs iproute2 and busybox (apt-get install iproute2 busybox)"
    if os.geteuid() != 0:
        return "needs root, to make a network namespace"
    try:
        fd, _ = open_tap("vmprobe%d")
    except UsageError as error:
        return str(error)
    os.close(fd)
    made = subprocess.run(["unshare", "-n", "true"], capture_output=True, text=True, timeout=SECONDS, check=False)
    return f"no network namespaces here: {made.stderr.strip()}" if made.returncode else ""


class Namespace:
    """A machine of its own, as far as its network goes; its interface is eth0."""

    def __init__(self, name: str) -> None:
        self.name = name

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start *command* inside."""
        words = ["ip", "netns", "exec", self.name, *command]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, *command: str) -> str:
        """The output of *command*, which must succeed."""
        with self.start(*command) as process:
            try:
                output, _ = process.communicate(timeout=SECONDS)
            except BaseException:
                process.kill()
                raise
        assert process.returncode == 0, f"{command} ended with {process.returncode}:\n{output}"
        return output


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=SECONDS)


@contextlib.contextmanager
def cabled(loop: EventLoop, backend: NetBackend, *, offloads: bool, address: str | None) -> Iterator[Namespace]:
    """A namespace on the other end of *backend*; with *address*, such as 10.0.2.15/24, also a route to 10.0.2.2."""
    name = f"vmonty-{os.getpid()}"
    _ip("netns", "add", name)
    try:
        fd, interface = open_tap("vmtest%d")
        tap = TapBackend(fd, loop)
        try:
            _ip("link", "set", interface, "netns", name)
            inside = ("-n", name, "link", "set")
            _ip(*inside, interface, "name", "eth0")
            _ip(*inside, "lo", "up")
            _ip(*inside, "eth0", "up")
            if address:
                _ip("-n", name, "addr", "add", address, "dev", "eth0")
                _ip("-n", name, "route", "add", "default", "via", "10.0.2.2")
            backend.start(lambda frame, offload: (tap.send([frame], offload), True)[1])
            tap.start(lambda frame, offload: (backend.send([frame], offload), True)[1])
            if offloads:
                accepts = Accepts.CHECKSUM | Accepts.TCP4 | Accepts.TCP6
                tap.guest_accepts(accepts)
                backend.guest_accepts(accepts)
            yield Namespace(name)
        finally:
            tap.close()
    finally:
        _ip("netns", "del", name)


@contextlib.contextmanager
def web_server(root: Path, host: str = "127.0.0.1") -> Iterator[int]:
    """A server of *root*'s files on this host's loopback, at *host*; its port."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(root))  # type: ignore[arg-type]

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Nothing."""

        def do_PUT(self) -> None:
            size = int(self.headers["Content-Length"])
            with (root / "put").open("wb") as file:
                while size:
                    data = self.rfile.read(min(size, 1 << 16))
                    assert data
                    file.write(data)
                    size -= len(data)
            self.send_response(201)
            self.end_headers()

    class Server(http.server.ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    with serving(Server((host, 0), Quiet)) as port:
        yield port


@contextlib.contextmanager
def resolver(address: bytes) -> Iterator[tuple[str, int]]:
    """A name server on the host that knows *address* for every name, by UDP."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))

        def serve() -> None:
            while True:
                question, peer = server.recvfrom(4096)
                if question == b"stop":
                    return
                end = question.index(b"\0", 12) + 5
                asked_for_a = question[end - 4 : end - 2] == b"\0\1"
                count = b"\0\1" if asked_for_a else b"\0\0"
                answer = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + address if asked_for_a else b""
                server.sendto(question[:2] + b"\x81\x80\0\1" + count + bytes(4) + question[12:end] + answer, peer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()
        finally:
            server.sendto(b"stop", server.getsockname())
            thread.join()
