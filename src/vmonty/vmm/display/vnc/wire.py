"""What a viewer's connection is to the server: bytes in order, over TCP, TLS or a WebSocket."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import Protocol

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

# A WebSocket viewer's message of more is refused; the longest that one has to send is its clipboard.
MOST_MESSAGE = 1 << 20
# How long the last that a viewer is told may take to arrive.
FAREWELL_SECONDS = 1.0


class ProtocolError(Exception):
    """The viewer said what the protocol does not allow; its connection ends."""


class Disconnected(Exception):
    """The viewer is gone."""


class Stream(Protocol):
    """One connection. Both directions raise Disconnected when it has ended."""

    async def read(self, size: int) -> bytes:
        """Exactly *size* bytes."""
        ...

    async def send(self, data: bytes) -> None:
        """Send *data*, and wait until the viewer's side takes more."""
        ...

    async def start_tls(self, context: ssl.SSLContext) -> None:
        """Go on encrypted. Raises ProtocolError where that is not possible."""
        ...

    async def farewell(self, data: bytes) -> None:
        """Send *data*, and end it: in an orderly way if the viewer takes that within FAREWELL_SECONDS."""
        ...

    def close(self) -> None:
        """End it at once. What the viewer has not taken is lost: one that takes nothing would keep it for ever."""
        ...


class TcpStream:
    """A plain connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self, size: int) -> bytes:
        """See Stream."""
        try:
            return await self._reader.readexactly(size)
        except (asyncio.IncompleteReadError, OSError) as error:
            raise Disconnected from error

    async def send(self, data: bytes) -> None:
        """See Stream."""
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            raise Disconnected from error

    async def start_tls(self, context: ssl.SSLContext) -> None:
        """See Stream."""
        try:
            await self._writer.start_tls(context)
        except (ssl.SSLError, OSError) as error:
            raise Disconnected from error

    async def farewell(self, data: bytes) -> None:
        """See Stream."""
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(FAREWELL_SECONDS):
                self._writer.write(data)
                self._writer.close()
                await self._writer.wait_closed()
        self.close()

    def close(self) -> None:
        """See Stream."""
        self._writer.transport.abort()


class WebSocketStream:
    """Binary messages of a WebSocket, whose bounds mean nothing."""

    def __init__(self, connection: ServerConnection) -> None:
        self._connection = connection
        self._buffer = bytearray()

    async def read(self, size: int) -> bytes:
        """See Stream."""
        while len(self._buffer) < size:
            try:
                message = await self._connection.recv()
            except (ConnectionClosed, OSError) as error:
                raise Disconnected from error
            if isinstance(message, str):
                raise ProtocolError("text in a WebSocket that carries RFB")
            self._buffer += message
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    async def send(self, data: bytes) -> None:
        """See Stream."""
        try:
            await self._connection.send(data)
        except (ConnectionClosed, OSError) as error:
            raise Disconnected from error

    async def start_tls(self, context: ssl.SSLContext) -> None:
        """A WebSocket is encrypted from its start or not at all."""
        raise ProtocolError("TLS inside a WebSocket")

    async def farewell(self, data: bytes) -> None:
        """See Stream."""
        with contextlib.suppress(TimeoutError, ConnectionClosed, OSError):
            async with asyncio.timeout(FAREWELL_SECONDS):
                await self._connection.send(data)
                await self._connection.close()
        self.close()

    def close(self) -> None:
        """See Stream."""
        self._connection.transport.abort()
