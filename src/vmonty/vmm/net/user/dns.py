"""DNS: the guest's questions go to the host's resolvers. Source: RFC 1035, 4.1.1 and 4.2; resolv.conf(5).

Each question has a socket of its own, so a port that others would have to guess; a resolver that is silent is
followed by the next.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from vmonty.vmm.net.loop import Timer
from vmonty.vmm.net.user import icmp6
from vmonty.vmm.net.user.ipv4 import Packet

if TYPE_CHECKING:
    from vmonty.vmm.net.user.backend import UserBackend

PORT = 53
HEADER_SIZE, QUESTION_LIMIT = 12, 4096
RESPONSE, SERVFAIL = 0x80, 2
MOST_QUESTIONS, SECONDS_EACH = 128, 2.5
MOST_RESOLVERS = 3  # as the C library


def resolvers(path: Path) -> list[str]:
    """The addresses of resolv.conf's name servers, those without an interface's name; empty when it cannot be read."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            try:
                found.append(str(ip_address(words[1])))
            except ValueError:
                continue
    return found[:MOST_RESOLVERS]


@dataclass(eq=False)
class _Question:
    guest: tuple[bytes, int]
    data: bytes
    socket: socket.socket | None = None
    server: str = ""
    attempt: int = 0
    timer: Timer | None = None


class Dns:
    """The network's name server. Resolvers are (address, port), by default those of /etc/resolv.conf at that moment."""

    def __init__(self, stack: UserBackend, resolv_conf: Path = Path("/etc/resolv.conf")) -> None:
        self._stack = stack
        self._resolv_conf = resolv_conf
        self.fixed: list[tuple[str, int]] = []
        self._questions: dict[tuple[tuple[bytes, int], bytes], _Question] = {}

    def servers(self) -> list[tuple[str, int]]:
        """Where questions go now."""
        return self.fixed or [(address, PORT) for address in resolvers(self._resolv_conf)]

    def input(self, packet: Packet, source_port: int, target_port: int, payload: memoryview) -> None:
        """A question from a guest."""
        if self._stack.config.restrict or not HEADER_SIZE <= len(payload) <= QUESTION_LIMIT or payload[2] & RESPONSE:
            return
        key = (packet.source, source_port), bytes(payload[:2])
        if key in self._questions:
            return  # asked again while we wait; the next resolver has its turn by itself
        if len(self._questions) >= MOST_QUESTIONS:
            self._end(next(iter(self._questions)))
        self._questions[key] = _Question(key[0], bytes(payload))
        self._ask(key)

    def _ask(self, key: tuple[tuple[bytes, int], bytes]) -> None:
        question = self._questions.get(key)
        if question is None:
            return
        self._disconnect(question)
        servers = self.servers()
        while question.attempt < len(servers):
            server = servers[question.attempt]
            question.attempt += 1
            family = socket.AF_INET6 if ":" in server[0] else socket.AF_INET
            try:
                outside = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            except OSError:
                break
            try:
                outside.connect(server)  # the kernel then drops answers of anybody else
                outside.send(question.data)
            except OSError:
                outside.close()
                continue
            question.socket = outside
            self._stack.loop.watch(outside.fileno(), lambda: self._answer(key, question))
            question.timer = self._stack.loop.call_later(SECONDS_EACH, lambda: self._ask(key))
            return
        data = bytearray(question.data[:HEADER_SIZE])
        data[2] |= RESPONSE
        data[3] = data[3] & 0x70 | SERVFAIL
        data[4:12] = bytes(8)
        self._reply(question, bytes(data))
        self._end(key)

    def _answer(self, key: tuple[tuple[bytes, int], bytes], question: _Question) -> None:
        if self._questions.get(key) is not question or question.socket is None:
            return
        try:
            data = question.socket.recv(65535)
        except BlockingIOError:
            return
        except OSError:
            self._ask(key)  # refused: the next
            return
        if len(data) >= HEADER_SIZE and data[:2] == key[1]:
            self._reply(question, data)
            self._end(key)

    def _reply(self, question: _Question, data: bytes) -> None:
        mine = self._stack.dns_address if len(question.guest[0]) == 4 else icmp6.DNS
        self._stack.udp.send(mine, PORT, *question.guest, data)

    def _disconnect(self, question: _Question) -> None:
        if question.timer is not None:
            question.timer.cancel()
        if question.socket is not None:
            self._stack.loop.unwatch(question.socket.fileno())
            question.socket.close()
            question.socket = None

    def _end(self, key: tuple[tuple[bytes, int], bytes]) -> None:
        self._disconnect(self._questions.pop(key))

    def close(self) -> None:
        """Close all sockets."""
        for key in list(self._questions):
            self._end(key)
