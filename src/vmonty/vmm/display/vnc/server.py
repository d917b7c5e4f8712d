"""The VNC server: listens, and lets several viewers see the screen and type.

It runs on a thread of its own. A viewer that breaks the protocol, or floods, ends only its own connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response
from websockets.protocol import State
from websockets.typing import Subprotocol

from vmonty.base.errors import UsageError
from vmonty.vmm.display.input import Input, Keyboard, Mouse
from vmonty.vmm.display.screen import Frame
from vmonty.vmm.display.vnc.security import Access, Guesses, handshake
from vmonty.vmm.display.vnc.viewer import FRAME_TIME, Viewer
from vmonty.vmm.display.vnc.wire import MOST_MESSAGE, Disconnected, ProtocolError, Stream, TcpStream, WebSocketStream
from vmonty.vmm.unixsocket import UnixListener

FIRST_PORT, FIRST_WEBSOCKET_PORT = 5900, 5700
MOST_DISPLAY = 0xFFFF - FIRST_PORT
MOST_VIEWERS = 32
# Of connections that are no viewers yet. All of them can have a wrong password looked at within their time.
MOST_HANDSHAKES = 16
HANDSHAKE_SECONDS = 20.0
# What waits to be sent to one viewer, in bytes, before the server waits for it.
SEND_BUFFER = 1 << 20
_USE = "--vnc takes [HOST]:DISPLAY or unix:PATH, then ,password-file=F ,websocket=PORT ,tls-cert=F ,tls-key=F"
BINARY = Subprotocol("binary")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VncOptions:
    """Where to listen: *host* and *port*, or the socket *path*; *websocket* is a second port, for browsers."""

    host: str = "127.0.0.1"
    port: int = FIRST_PORT
    path: Path | None = None
    websocket: int | None = None
    password_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None

    @classmethod
    def parse(cls, text: str) -> VncOptions:
        """From ``:0``, ``HOST:1,websocket=5701`` or ``unix:PATH``. Raises UsageError that names what is wrong."""
        address, *settings = text.split(",")
        kind, _, rest = address.rpartition(":")
        if address.startswith("unix:"):
            if not (path := address.removeprefix("unix:")):
                raise UsageError(f"--vnc {text}: the socket has no path. {_USE}")
            options = cls(path=Path(path))
        elif rest.isascii() and rest.isdigit() and int(rest) <= MOST_DISPLAY and (kind or address.startswith(":")):
            options = cls(host=kind.strip("[]") or "127.0.0.1", port=FIRST_PORT + int(rest))
        else:
            raise UsageError(f"--vnc {text}: no display is called {address!r}. {_USE}")
        for setting in settings:
            key, _, value = setting.partition("=")
            match key:
                case "password-file" if value:
                    options = replace(options, password_file=Path(value))
                case "tls-cert" if value:
                    options = replace(options, tls_cert=Path(value))
                case "tls-key" if value:
                    options = replace(options, tls_key=Path(value))
                case "websocket" if value.isascii() and value.isdigit() and 0 < int(value) <= 0xFFFF:
                    options = replace(options, websocket=int(value))
                case "websocket" if not value:
                    options = replace(options, websocket=options.port - FIRST_PORT + FIRST_WEBSOCKET_PORT)
                case _:
                    raise UsageError(f"--vnc {text}: {setting!r} is no option. {_USE}")
        if (options.tls_cert is None) != (options.tls_key is None):
            raise UsageError(f"--vnc {text}: tls-cert and tls-key come together")
        return options

    def access(self) -> Access:
        """Who may connect. Raises UsageError for files that cannot be read."""
        password = context = None
        if self.password_file is not None:
            try:
                password = self.password_file.read_text().rstrip("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"the VNC password file {self.password_file} cannot be read: {error}") from error
            if not password:
                raise UsageError(f"the VNC password file {self.password_file} is empty")
        if self.tls_cert is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            try:
                context.load_cert_chain(self.tls_cert, self.tls_key)
            except (OSError, ssl.SSLError) as error:
                raise UsageError(f"the VNC certificate {self.tls_cert} or its key cannot be used: {error}") from error
        return Access(password, context)


class Picture(Protocol):
    """A screen."""

    def frame(self) -> Frame:
        """What it shows now."""
        ...


class VncServer:
    """The server of one screen. ``start`` listens, ``stop`` ends all; both from any thread but its own."""

    def __init__(self, options: VncOptions, name: str, screen: Picture, keyboard: Keyboard, mouse: Mouse) -> None:
        self.options = options
        self._access = options.access()
        self._name = name
        self._screen = screen
        self._keyboard = keyboard
        self._mouse = mouse
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vnc", daemon=True)
        self._viewers: dict[asyncio.Task[None], Stream] = {}
        self._handshakes: dict[asyncio.Task[None], None] = {}  # the oldest first
        self._guesses = Guesses()
        self._opening: list[ServerConnection] = []  # WebSockets that may not have said yet what they want
        self._ending = False
        self._resources = contextlib.AsyncExitStack()
        self._ports: list[int] = []
        self._frame: Frame | None = None
        self._frame_time = 0.0

    def start(self) -> None:
        """Listen. Raises UsageError when the address cannot be had."""
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        except (OSError, ValueError) as error:  # ValueError: what can be no host's name
            self.stop()
            where = self.options.path or f"{self.options.host}:{self.options.port}"
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"VNC cannot listen on {where}: {reason}") from error
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every connection and the thread. A second call does nothing."""
        if not self._thread.is_alive():
            return
        try:
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    @property
    def ports(self) -> list[int]:
        """Where it listens: the RFB port, then the WebSocket's."""
        return list(self._ports)

    async def _listen(self) -> None:
        options = self.options
        if options.path is not None:
            listener = UnixListener(options.path)
            await self._resources.enter_async_context(await asyncio.start_unix_server(self._tcp, sock=listener.socket))
            self._resources.callback(listener.remove)  # comes before the server's end
        else:
            server = await asyncio.start_server(self._tcp, options.host, options.port)
            await self._resources.enter_async_context(server)
            self._ports.append(server.sockets[0].getsockname()[1])
        if options.websocket is not None:
            sockets = await serve(
                self._websocket, options.host, options.websocket, ssl=self._access.tls, compression=None,
                create_connection=self._noted(),
                process_request=None if self._access.password else partial(same_site, options.host),
                subprotocols=[BINARY], select_subprotocol=_subprotocol, max_size=MOST_MESSAGE, logger=logger,
            )  # fmt: skip
            await self._resources.enter_async_context(sockets)
            self._ports.append(next(iter(sockets.sockets)).getsockname()[1])

    async def _end(self) -> None:
        self._ending = True
        await asyncio.sleep(0)  # what was not begun ends by itself
        for connection in self._opening:
            connection.transport.abort()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._resources.aclose()

    # ---- viewers ----------------------------------------------------------------------------------------------

    def current_frame(self) -> Frame:
        """The picture, not older than half a frame; viewers share it."""
        now = time.monotonic()
        if self._frame is None or now - self._frame_time >= FRAME_TIME / 2:
            self._frame, self._frame_time = self._screen.frame(), now
        return self._frame

    async def _tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.set_write_buffer_limits(high=SEND_BUFFER)
        await self._serve(TcpStream(reader, writer), self._access)

    def _noted(self) -> type[ServerConnection]:
        """WebSockets that are noted when they begin, and bounded: else the silent ones are their library's alone."""
        begun = self._begun

        class Connection(ServerConnection):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                super().connection_made(transport)
                begun(self)

        return Connection

    def _begun(self, connection: ServerConnection) -> None:
        waiting = [other for other in self._opening if other.state is State.CONNECTING]
        if len(waiting) >= MOST_HANDSHAKES:
            waiting.pop(0).transport.abort()
        self._opening = [*waiting, connection]

    async def _websocket(self, connection: ServerConnection) -> None:
        # It is encrypted already where encryption is asked for.
        await self._serve(WebSocketStream(connection), replace(self._access, tls=None))

    async def _serve(self, stream: Stream, access: Access) -> None:
        task = asyncio.current_task()
        assert task is not None
        if self._ending:
            stream.close()
            return
        if len(self._handshakes) >= MOST_HANDSHAKES:
            oldest = next(iter(self._handshakes))
            del self._handshakes[oldest]
            oldest.cancel()
        self._handshakes[task] = None
        try:
            viewer = Viewer(stream, self._name, self.current_frame, Input(self._keyboard, self._mouse))
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                await handshake(stream, access, self._guesses)
                shared = await viewer.shares()
            self._handshakes.pop(task, None)
            if not shared:
                self._disconnect_all()
            elif len(self._viewers) >= MOST_VIEWERS:
                raise Disconnected("there are too many")
            self._viewers[task] = stream
            await viewer.run()
        except (Disconnected, ProtocolError, TimeoutError) as error:
            logger.info("a VNC viewer's connection ended: %s", error or type(error).__name__)
        except asyncio.CancelledError:
            # Of _end(), or for a newer one. Python 3.11 would log a traceback for a connection's cancelled task.
            logger.info("a VNC viewer's connection was ended")
        finally:
            self._handshakes.pop(task, None)
            self._viewers.pop(task, None)
            stream.close()

    def _disconnect_all(self) -> None:
        for stream in self._viewers.values():
            stream.close()
        self._viewers.clear()


def same_site(own: str, connection: ServerConnection, request: Request) -> Response | None:
    """Refuse pages of other sites: a browser lets any page connect to this machine, and there is no password.

    A name proves nothing unless it is that which the server was given, *own*: anybody's may lead to this machine.
    """
    origins = request.headers.get_all("Origin")
    if not origins:
        return None  # no browser
    hosts = [_host("//" + host) for host in request.headers.get_all("Host")]
    origin = _host(origins[0]) if len(origins) == 1 else None
    address = _address(origin)
    is_here = origin == "localhost" or (address is not None and address.is_loopback)
    if is_here or (origin is not None and hosts == [origin] and (origin == own or address is not None)):
        return None
    logger.info("a VNC viewer's connection was refused: a page of %s", ", ".join(origins))
    return connection.respond(
        HTTPStatus.FORBIDDEN, "Pages of other hosts need a server with a password: --vnc …,password-file=F\n"
    )


def _host(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def _address(host: str | None) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """What *host* is, where it is no name."""
    try:
        return ipaddress.ip_address(host or "")
    except ValueError:
        return None


def _subprotocol(connection: ServerConnection, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    """``binary`` for viewers that ask for it; newer ones name none."""
    return BINARY if BINARY in offered else None
