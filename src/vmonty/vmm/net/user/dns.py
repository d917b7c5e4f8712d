"""DNS: the guest's questions go to the host's resolvers. Source: RFC 1035, 4.1.1 and 4.2; resolv.conf(5).

Each question has sockets of its own, so ports that others would have to guess. A resolver that is silent is followed
by the next, the last by the first again; the answer of any of them will do.
"""

from __future__ import annotations

import socket
from collections import Counter
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from vmonty.vmm.net.loop import FULL, Timer
from vmonty.vmm.net.user import icmp6
from vmonty.vmm.net.user.ipv4 import Packet

if TYPE_CHECKING:
    from vmonty.vmm.net.user.backend import UserBackend

PORT = 53
HEADER_SIZE, QUESTION_LIMIT = 12, 4096
RESPONSE, SERVFAIL = 0x80, 2
MOST_QUESTIONS, MOST_SOCKETS = 128, 128
# A resolver may have to ask others first, and datagrams are lost.
MOST_TURNS, SECONDS_EACH = 4, 2.5
MOST_RESOLVERS = 3  # as the C library

# Who asked, address and port, and the question's number.
Key = tuple[tuple[bytes, int], bytes]


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
    asked: Counter[tuple[str, int]] = field(default_factory=Counter)
    sockets: dict[tuple[str, int], socket.socket] = field(default_factory=dict)
    refused: set[tuple[str, int]] = field(default_factory=set)
    turns: int = 0
    timer: Timer | None = None


class Dns:
    """The network's name server. Resolvers are (address, port), by default those of /etc/resolv.conf at that moment."""

    def __init__(self, stack: UserBackend, resolv_conf: Path = Path("/etc/resolv.conf")) -> None:
        self._stack = stack
        self._resolv_conf = resolv_conf
        self.fixed: list[tuple[str, int]] = []
        self._questions: dict[Key, _Question] = {}

    def servers(self) -> list[tuple[str, int]]:
        """Where questions go now."""
        return self.fixed or [(address, PORT) for address in resolvers(self._resolv_conf)]

    def input(self, packet: Packet, source_port: int, target_port: int, payload: memoryview) -> None:
        """A question from a guest."""
        if self._stack.config.restrict or not HEADER_SIZE <= len(payload) <= QUESTION_LIMIT or payload[2] & RESPONSE:
            return
        key = (packet.source, source_port), bytes(payload[:2])
        if key in self._questions:
            return  # asked again while we wait; we repeat it by ourselves
        if len(self._questions) >= MOST_QUESTIONS:
            self._end(next(iter(self._questions)))
        self._questions[key] = _Question(key[0], bytes(payload))
        self._ask(key)

    def _ask(self, key: Key) -> None:
        question = self._questions.get(key)
        if question is None:
            return
        if question.timer is not None:
            question.timer.cancel()
        while question.turns < MOST_TURNS:
            servers = [server for server in self.servers() if server not in question.refused]
            if not servers:
                break
            server = min(servers, key=lambda server: question.asked[server])
            question.asked[server] += 1
            try:
                self._send(key, question, server)
            except OSError as error:
                # Without room it is as silent as one that is far away.
                if not isinstance(error, BlockingIOError) and error.errno not in FULL:
                    question.refused.add(server)
                    self._drop(question, server)
                    continue
            question.timer = self._stack.loop.call_later(SECONDS_EACH, lambda: self._silent(key, question))
            return
        data = bytearray(question.data[:HEADER_SIZE])
        data[2] |= RESPONSE
        data[3] = data[3] & 0x70 | SERVFAIL
        data[4:12] = bytes(8)
        self._reply(question, bytes(data))
        self._end(key)

    def _send(self, key: Key, question: _Question, server: tuple[str, int]) -> None:
        outside = question.sockets.get(server)
        if outside is None:
            if sum(len(one.sockets) for one in self._questions.values()) >= MOST_SOCKETS:
                if question.sockets:
                    self._drop(question, next(iter(question.sockets)))  # no late answer then
                else:
                    self._end(next(one for one in self._questions if one != key))
            family = socket.AF_INET6 if ":" in server[0] else socket.AF_INET
            outside = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            question.sockets[server] = outside
            outside.connect(server)  # the kernel then drops answers of anybody else
            self._stack.loop.watch(outside.fileno(), lambda: self._answer(key, question, server))
        outside.send(question.data)

    def _silent(self, key: Key, question: _Question) -> None:
        question.turns += 1
        self._ask(key)

    def _drop(self, question: _Question, server: tuple[str, int]) -> None:
        if (outside := question.sockets.pop(server, None)) is not None:
            self._stack.loop.unwatch(outside.fileno())
            outside.close()

    def _answer(self, key: Key, question: _Question, server: tuple[str, int]) -> None:
        outside = question.sockets.get(server)
        if self._questions.get(key) is not question or outside is None:
            return
        try:
            data = outside.recv(65535)
        except BlockingIOError:
            return
        except OSError:
            question.refused.add(server)
            self._drop(question, server)
            self._ask(key)
            return
        if len(data) >= HEADER_SIZE and data[:2] == key[1]:
            self._reply(question, data)
            self._end(key)

    def _reply(self, question: _Question, data: bytes) -> None:
        mine = self._stack.dns_address if len(question.guest[0]) == 4 else icmp6.DNS
        self._stack.udp.send(mine, PORT, *question.guest, data)

    def _end(self, key: Key) -> None:
        question = self._questions.pop(key)
        if question.timer is not None:
            question.timer.cancel()
        for server in list(question.sockets):
            self._drop(question, server)

    def close(self) -> None:
        """Close all sockets."""
        for key in list(self._questions):
            self._end(key)
