"""A read-only TFTP server. Source: RFC 1350; RFC 2347 to 2349 (options); RFC 7440 (window)."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vmonty.vmm.net.loop import Timer
from vmonty.vmm.net.user.ipv4 import Packet

if TYPE_CHECKING:
    from vmonty.vmm.net.user.backend import UserBackend

PORT = 69
RRQ, WRQ, DATA, ACK, ERROR, OACK = range(1, 7)
NOT_DEFINED, NOT_FOUND, ACCESS_VIOLATION, ILLEGAL = 0, 1, 2, 4
BLOCK, LEAST_BLOCK, MOST_BLOCK, MOST_WINDOW = 512, 8, 65464, 64
MOST_SESSIONS, SECONDS, MOST_TRIES = 16, 1.0, 6
MOST_REQUEST = 512


@dataclass(eq=False)
class _Session:
    fd: int
    size: int
    server: bytes
    client: tuple[bytes, int]
    block_size: int = BLOCK
    window: int = 1
    acknowledged: int = 0  # blocks, not cut to 16 bits
    sent: int = 0
    negotiating: bytes = b""
    tries: int = 0
    timeout: float = SECONDS
    timer: Timer | None = None

    @property
    def last_block(self) -> int:
        """The number of the block that ends the file, which is a short one."""
        return self.size // self.block_size + 1


class Tftp:
    """Serves the files below *root*."""

    def __init__(self, stack: UserBackend, root: Path) -> None:
        self._stack = stack
        self._root = root.resolve()
        self._sessions: dict[tuple[bytes, int], _Session] = {}

    def input(self, packet: Packet, source_port: int, target_port: int, payload: memoryview) -> None:
        """A message of a client to the server's port, which all sessions share: the client's port tells them apart."""
        if len(payload) < 4:
            return
        if packet.target not in (self._stack.gateway, b"\xff" * 4):
            return
        client = packet.source, source_port
        match int.from_bytes(payload[:2], "big"):
            case 1:
                self._read_request(client, bytes(payload[2:]))
            case 2:
                self._error(client, ACCESS_VIOLATION, "this server is read-only")
            case 4:
                self._acknowledged(client, int.from_bytes(payload[2:4], "big"))
            case 5:
                self._end(client)
            case _:
                self._error(client, ILLEGAL, "not a request")

    def _read_request(self, client: tuple[bytes, int], request: bytes) -> None:
        words = request.split(b"\0")
        if len(request) > MOST_REQUEST or len(words) < 3 or words[-1]:
            self._error(client, ILLEGAL, "a malformed request")
            return
        name, mode, *rest = words[:-1]
        if mode.lower() not in (b"octet", b"netascii"):
            self._error(client, ILLEGAL, "the mode must be octet")
            return
        self._end(client)
        try:
            fd, size = self._open(name)
        except PermissionError:
            self._error(client, ACCESS_VIOLATION, "access violation")
            return
        except (OSError, ValueError):
            self._error(client, NOT_FOUND, "file not found")
            return
        if len(self._sessions) >= MOST_SESSIONS:
            self._end(next(iter(self._sessions)))
        session = self._sessions[client] = _Session(fd, size, self._stack.gateway, client)
        session.negotiating = self._options(session, dict(zip(rest[::2], rest[1::2], strict=False)))
        self._send(client)

    def _open(self, name: bytes) -> tuple[int, int]:
        """(fd, size) of a regular file below the root, symbolic links followed only within."""
        path = (self._root / os.fsdecode(name).replace("\\", "/").lstrip("/")).resolve(strict=True)
        if not path.is_relative_to(self._root):
            raise PermissionError
        # Not blocking: it might be a pipe.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise PermissionError
        return fd, status.st_size

    @staticmethod
    def _options(session: _Session, asked: dict[bytes, bytes]) -> bytes:
        """Take what is understood; the answer, empty when there is none to give."""
        answer = b""
        for name, text in asked.items():
            value = int(text) if text.isdigit() and len(text) < 10 else -1
            match name.lower():
                case b"blksize" if value >= LEAST_BLOCK:
                    value = session.block_size = min(value, MOST_BLOCK)
                case b"tsize" if value >= 0:
                    value = session.size
                case b"timeout" if 1 <= value <= 255:
                    session.timeout = float(value)
                case b"windowsize" if value >= 1:
                    value = session.window = min(value, MOST_WINDOW)
                case _:
                    continue
            answer += name + b"\0" + str(value).encode() + b"\0"
        return answer

    def _acknowledged(self, client: tuple[bytes, int], number: int) -> None:
        session = self._sessions.get(client)
        if session is None:
            self._error(client, ILLEGAL, "no transfer")
            return
        if session.negotiating:
            if number != 0:
                return
            session.negotiating = b""
        else:
            # The 16 bits name a block of the window that is under way; others are old.
            ahead = number - session.acknowledged & 0xFFFF
            if ahead == 0 and session.window == 1:
                return  # a duplicate must not be answered twice: the sorcerer's apprentice, RFC 1123, 4.2.3.1
            if ahead > session.sent - session.acknowledged:
                return
            session.acknowledged += ahead
        session.tries = 0
        if session.acknowledged >= session.last_block:
            self._end(client)
            return
        session.sent = session.acknowledged
        self._send(client)

    def _send(self, client: tuple[bytes, int]) -> None:
        session = self._sessions.get(client)
        if session is None:
            return
        if session.timer is not None:
            session.timer.cancel()
        session.tries += 1
        if session.tries > MOST_TRIES:
            self._end(client)
            return
        session.timer = self._stack.loop.call_later(session.timeout, lambda: self._again(client, session))
        if session.negotiating:
            self._reply(client, OACK.to_bytes(2, "big") + session.negotiating)
            return
        while session.sent < min(session.acknowledged + session.window, session.last_block):
            try:
                data = os.pread(session.fd, session.block_size, session.sent * session.block_size)
            except OSError:
                self._error(client, NOT_DEFINED, "the file cannot be read")
                self._end(client)
                return
            session.sent += 1
            full = session.block_size if session.sent < session.last_block else session.size % session.block_size
            if len(data) < full:
                self._error(client, NOT_DEFINED, "the file has shrunk")
                self._end(client)
                return
            self._reply(client, data_header(session.sent) + data[:full])

    def _again(self, client: tuple[bytes, int], session: _Session) -> None:
        if self._sessions.get(client) is session:
            session.sent = session.acknowledged
            self._send(client)

    def _error(self, client: tuple[bytes, int], code: int, text: str) -> None:
        self._reply(client, ERROR.to_bytes(2, "big") + code.to_bytes(2, "big") + text.encode() + b"\0")

    def _reply(self, client: tuple[bytes, int], data: bytes) -> None:
        self._stack.udp.send(self._stack.gateway, PORT, *client, data)

    def _end(self, client: tuple[bytes, int]) -> None:
        session = self._sessions.pop(client, None)
        if session is not None:
            os.close(session.fd)
            if session.timer is not None:
                session.timer.cancel()

    def close(self) -> None:
        """End all transfers."""
        for client in list(self._sessions):
            self._end(client)


def data_header(block: int) -> bytes:
    """The header of DATA number *block*, which wraps: files may have more blocks than 16 bits count."""
    return bytes((0, DATA)) + (block & 0xFFFF).to_bytes(2, "big")
