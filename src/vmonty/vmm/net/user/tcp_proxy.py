"""Each TCP connection of a guest is spliced to one of the host's. Source for the host's side: tcp(7), connect(2)."""

from __future__ import annotations

import contextlib
import errno
import secrets
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmonty.vmm.net.checksum import TCP, Buffer, correct, pseudo_header
from vmonty.vmm.net.loop import Timer
from vmonty.vmm.net.user.icmp import HOST_UNREACHABLE, NET_UNREACHABLE
from vmonty.vmm.net.user.ipv4 import Packet
from vmonty.vmm.net.user.tcp import Budget, State, Tcb
from vmonty.vmm.net.user.tcp_segment import ACK, FIN, RST, SYN, Options, template

if TYPE_CHECKING:
    from vmonty.vmm.net.user.backend import UserBackend

HEADER = struct.Struct("!HHIIBBHHH")
# An Ethernet's 1500 bytes less the headers.
MSS, MSS6 = 1460, 1440
MOST_CONNECTIONS = 512
# For all connections together: a guest must not fill the host's memory.
BUDGET = 128 << 20
# Close with a reset: SO_LINGER on, for no time.
LINGER_RESET = struct.pack("ii", 1, 0)
# What has ended, then what has yet to begin, then what one side has ended.
_WORTH = {State.TIME_WAIT: 0, State.CONNECTING: 1, State.SYN_SENT: 1, State.SYN_RECEIVED: 1, State.ESTABLISHED: 3}
_CLOSING = 2
_IN_PROGRESS = (errno.EINPROGRESS, errno.EAGAIN, errno.EINTR)
_UNREACHABLE = {errno.ENETUNREACH: NET_UNREACHABLE, errno.EHOSTUNREACH: HOST_UNREACHABLE}


def ends(key: bytes) -> tuple[bytes, bytes, int, int]:
    """Guest's and other's address, then their ports, of a connection's key."""
    size = len(key) // 2 - 2
    ports = key[2 * size :]
    return key[:size], key[size : 2 * size], int.from_bytes(ports[:2], "big"), int.from_bytes(ports[2:], "big")


class Connection:
    """The Tcb's Application and its Wire. *key* is guest's and other's addresses, then their ports, as bytes."""

    def __init__(self, service: Tcp, key: bytes, mac: bytes, outside: socket.socket) -> None:
        self._service = service
        self._stack = service.stack
        self.key = key
        self.socket = outside
        guest, other, guest_port, other_port = ends(key)
        self._template = template((mac, self._stack.mac), other, guest, (other_port, guest_port))
        self.tcb = Tcb(self, self, service.budget, MSS if len(guest) == 4 else MSS6, secrets.randbits(32))
        self.syn: Packet | None = None
        self.used = self._stack.clock()
        self._connecting = False
        self._reading = False
        self._drained = True  # nothing to read until epoll says otherwise
        self._blocked = False
        self._watching = (False, False)

    def worth(self) -> tuple[int, float]:
        """The least one makes room for another: by its state, then by when it was used."""
        return _WORTH.get(self.tcb.state, _CLOSING), self.used

    # ---- the Wire ---------------------------------------------------------------------------------------

    @property
    def congested(self) -> bool:
        """Whether the guest's ring is full."""
        return self._stack.congested

    def output(self, flags: int, seq: int, ack: int, window: int, options: bytes, payload: Buffer) -> None:
        """Send a segment to the guest."""
        stack = self._stack
        for frame, offload in self._template.build(
            stack.takes, self.tcb.mss, flags, seq, ack, window, options, payload
        ):
            stack.transmit(frame, offload)

    def clock(self) -> float:
        """The stack's time in seconds."""
        return self._stack.clock()

    def call_later(self, seconds: float, fn: Callable[[], None]) -> Timer:
        """A timer of the stack's loop."""

        def due() -> None:
            fn()
            self.watch()

        return self._stack.loop.call_later(seconds, due)

    # ---- the Application --------------------------------------------------------------------------------

    def established(self) -> None:
        """The handshake with the guest is done."""
        self._reading = True

    def read(self, size: int) -> bytes | None:
        """Bytes of the host's peer for the guest."""
        if self._drained:
            return None
        try:
            data = self.socket.recv(size)
        except BlockingIOError:
            self._drained = True
            return None
        except OSError:
            self.tcb.abort()
            return None
        if len(data) < size:
            self._drained = True  # spares the call that would say so
        if not data:
            self._reading = False
        return data

    def write(self, data: Buffer) -> int:
        """Bytes of the guest for the host's peer."""
        try:
            sent = self.socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.tcb.abort()
            return len(data)
        self._blocked = sent < len(data)
        return sent

    def finish(self) -> None:
        """The guest sends no more."""
        with contextlib.suppress(OSError):  # the peer has gone already; a read will tell
            self.socket.shutdown(socket.SHUT_WR)

    def aborted(self) -> None:
        """Pass the guest's reset on."""
        with contextlib.suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)

    def closed(self) -> None:
        """The end."""
        self._service.forget(self)
        if self._watching != (False, False):
            self._watching = (False, False)
            self._stack.loop.unwatch(self.socket.fileno())
        self.socket.close()

    # ---- the host's socket ------------------------------------------------------------------------------

    def connect(self, address: tuple[str, int]) -> None:
        """Begin to connect the host's socket; the guest hears of the result."""
        result = self.socket.connect_ex(address)
        if result in _IN_PROGRESS:
            self._connecting = True
            self.watch()
        else:
            self._connected(result)

    def _connected(self, result: int) -> None:
        self._connecting = False
        if result == 0:
            self.tcb.accept()
        else:
            if result in _UNREACHABLE and self.syn is not None:
                self._stack.unreachable(self.syn, _UNREACHABLE[result])
            self.tcb.refuse()
        self.syn = None
        self.watch()

    def _ready(self) -> None:
        if self._connecting:
            result = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if result == 0:
                try:
                    self.socket.getpeername()
                except OSError:
                    return  # not yet
            self._connected(result)
            return
        self.used = self._stack.clock()
        self._drained = False
        if self._blocked:
            self._blocked = False
            self.tcb.writable()
        self.flush()

    def flush(self) -> None:
        """Send what is to be sent, then wait for what it lacks."""
        self.tcb.flush()
        self.watch()

    def watch(self) -> None:
        """Watch the socket for what can be used now, and only that: epoll would call again and again."""
        if self.tcb.state is State.CLOSED:
            return
        wanted = (self._reading and not self.tcb.starved, self._connecting or self._blocked)
        if wanted == self._watching:
            return
        self._watching = wanted
        if wanted == (False, False):
            self._stack.loop.unwatch(self.socket.fileno())
        else:
            self._stack.loop.watch(self.socket.fileno(), self._ready, read=wanted[0], write=wanted[1])


class Tcp:
    """The connections of all guests."""

    def __init__(self, stack: UserBackend) -> None:
        self.stack = stack
        self.budget = Budget(BUDGET)
        self._connections: dict[bytes, Connection] = {}
        self._touched: set[Connection] = set()

    def input(self, packet: Packet) -> None:
        """A segment from a guest; dropped when malformed."""
        segment = packet.payload
        if len(segment) < HEADER.size:
            return
        source, target, seq, ack, words, flags, window, _, _ = HEADER.unpack_from(segment)
        size = words >> 4 << 2
        if not HEADER.size <= size <= len(segment):
            return
        if not packet.trusted:
            addresses = packet.source + packet.target
            if not correct(segment, pseudo_header(addresses, TCP, len(segment))):
                return
        key = b"".join((packet.source, packet.target, segment[:4]))
        connection = self._connections.get(key)
        if connection is not None and flags & (SYN | ACK | RST) == SYN and connection.tcb.state is State.TIME_WAIT:
            # A new incarnation; our initial numbers are random. RFC 9293, 3.6.1.
            connection.tcb.abort()
            connection = None
        if connection is not None:
            connection.used = self.stack.clock()
            connection.tcb.receive(seq, ack, flags, window, segment[20:size], segment[size:])
            self._touched.add(connection)
        elif flags & (SYN | ACK | RST | FIN) == SYN and source and target:
            self._open(packet, key, seq, window, Options.parse(segment[20:size]))
        elif not flags & RST:
            self._reset(packet, key, seq, ack, flags, len(segment) - size)

    def _open(self, packet: Packet, key: bytes, seq: int, window: int, options: Options) -> None:
        target = ends(key)[3]
        address = self.stack.tcp_destination(packet.target, target)
        if address is None:
            if packet.target in self.stack.mine or self.stack.belongs_here(packet.target):
                self._reset(packet, key, seq, 0, SYN, 0)
            return
        self._make_room()
        try:
            outside = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM)
        except OSError:
            self._reset(packet, key, seq, 0, SYN, 0)  # no file descriptor left
            return
        connection = self.adopt(outside, key, packet.mac)
        connection.syn = packet
        connection.tcb.syn_arrived(seq, window, options)
        connection.connect(address)

    def adopt(self, outside: socket.socket, key: bytes, mac: bytes) -> Connection:
        """A new connection between the guest's end in *key*, at *mac*, and the host's *outside*."""
        outside.setblocking(False)
        # What arrives whole from the guest leaves whole.
        outside.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = self._connections[key] = Connection(self, key, mac, outside)
        return connection

    def accepted(self, outside: socket.socket, guest: tuple[bytes, int], mac: bytes) -> Connection | None:
        """Open to a port of the guest's for the accepted connection *outside*; None without a free port."""
        self._make_room()
        for _ in range(64):
            port = 49152 + secrets.randbelow(16384)
            key = guest[0] + self.stack.gateway + guest[1].to_bytes(2, "big") + port.to_bytes(2, "big")
            if key not in self._connections:
                connection = self.adopt(outside, key, mac)
                connection.tcb.connect()
                return connection
        return None

    def _make_room(self) -> None:
        if len(self._connections) >= MOST_CONNECTIONS:
            least = min(self._connections.values(), key=Connection.worth)
            least.aborted()
            least.tcb.abort()

    def _reset(self, packet: Packet, key: bytes, seq: int, ack: int, flags: int, length: int) -> None:
        """Answer a segment that belongs to nothing. RFC 9293, 3.10.7.1."""
        _, _, guest_port, other_port = ends(key)
        frames = template((packet.mac, self.stack.mac), packet.target, packet.source, (other_port, guest_port))
        if flags & ACK:
            made = frames.build(self.stack.takes, MSS, RST, ack, 0, 0, b"", b"")
        else:
            length += (1 if flags & SYN else 0) + (1 if flags & FIN else 0)
            made = frames.build(self.stack.takes, MSS, RST | ACK, 0, seq + length, 0, b"", b"")
        for frame, offload in made:
            self.stack.transmit(frame, offload)

    def flush(self) -> None:
        """A batch of segments is over."""
        while self._touched:
            self._touched.pop().flush()

    def resume(self) -> None:
        """The guest's ring has room again."""
        for connection in list(self._connections.values()):
            if connection.tcb.starved:
                connection.flush()
            if self.stack.congested:
                return

    def forget(self, connection: Connection) -> None:
        """*connection* is over."""
        if self._connections.get(connection.key) is connection:
            del self._connections[connection.key]
        self._touched.discard(connection)

    def close(self) -> None:
        """Reset all connections."""
        for connection in list(self._connections.values()):
            connection.aborted()
            connection.tcb.abort()
