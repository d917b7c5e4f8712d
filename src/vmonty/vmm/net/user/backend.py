"""The user network as a whole: frames from the guest to the protocols, theirs to the guest."""

from __future__ import annotations

import contextlib
import resource
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from vmonty.vmm.eventloop import EventLoop
from vmonty.vmm.net.backend import ETHERNET_HEADER, MOST_FRAME, Accepts, Cable, NetBackend, Offload, Receive
from vmonty.vmm.net.checksum import TCP, UDP, Buffer
from vmonty.vmm.net.loop import Loop
from vmonty.vmm.net.user import icmp6
from vmonty.vmm.net.user.arp import Arp
from vmonty.vmm.net.user.config import UserConfig
from vmonty.vmm.net.user.dhcp import SERVER_PORT as DHCP_PORT
from vmonty.vmm.net.user.dhcp import Dhcp
from vmonty.vmm.net.user.dns import PORT as DNS_PORT
from vmonty.vmm.net.user.dns import Dns
from vmonty.vmm.net.user.hostfwd import HostForward, listen
from vmonty.vmm.net.user.icmp import Icmp
from vmonty.vmm.net.user.icmp6 import Icmp6
from vmonty.vmm.net.user.ipv4 import Builder, Ipv4, Packet
from vmonty.vmm.net.user.ipv6 import Builder6, Ipv6
from vmonty.vmm.net.user.tcp_proxy import Tcp
from vmonty.vmm.net.user.tcp_segment import Takes
from vmonty.vmm.net.user.tftp import PORT as TFTP_PORT
from vmonty.vmm.net.user.tftp import Tftp
from vmonty.vmm.net.user.udp import Udp

LOOPBACK, LOOPBACK6 = "127.0.0.1", "::1"
# Frames that wait, from and for the guest; more are dropped.
MOST_IN, MOST_OUT = 1024, 512
BATCH = 64
NOWHERE = bytes(4)
FIRST_MULTICAST = 224


class UserCable(Cable):
    """A user network, whose forwarded ports it keeps. Raises UsageError for one that cannot be had."""

    def __init__(self, config: UserConfig | None = None) -> None:
        self._config = config or UserConfig()
        _raise_limit()
        self._ports = listen(self._config.forwards)

    def plug(self, loop: Loop) -> NetBackend:
        return UserBackend(self._config, ports=[port.dup() for port in self._ports])

    def close(self) -> None:
        while self._ports:
            self._ports.pop().close()


def _raise_limit() -> None:
    """Let this process have as many descriptors as it may: a guest's connections alone can use up the usual 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # the system's own limit was lowered below it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class UserBackend(NetBackend):
    """NAT without privileges, on an EventLoop of its own or on *loop*.

    *ports* are those of the host that are forwarded, see ``hostfwd.listen``; closed with it. Without, it makes them,
    and raises UsageError for one that cannot be had.
    """

    offloads = True

    def __init__(
        self,
        config: UserConfig | None = None,
        loop: Loop | None = None,
        clock: Callable[[], float] = time.monotonic,
        ports: Sequence[socket.socket] | None = None,
    ) -> None:
        self.config = config or UserConfig()
        if ports is None:
            ports = listen(self.config.forwards)
        self._own = EventLoop("user network") if loop is None else None
        self.loop: Loop = loop if loop is not None else self._own  # type: ignore[assignment]
        self.clock = clock
        assert self.config.host is not None
        assert self.config.dns is not None
        self.gateway, self.dns_address = self.config.host.packed, self.config.dns.packed
        # What is served here; over IPv6 as over IPv4.
        self.gateways = (self.gateway, icmp6.GATEWAY)
        self.mine = (self.gateway, self.dns_address, *icmp6.MINE)
        self._network = int(self.config.net.network_address)
        self._mask = int(self.config.net.netmask)
        self._broadcast = self.config.net.broadcast_address.packed
        # Locally administered, and as QEMU's: R U and the address.
        self.mac = b"\x52\x55" + self.gateway
        self.takes = Takes()
        self.closed = False
        self._receive: Receive | None = None
        self._receiving = threading.RLock()
        self._inbox: deque[tuple[bytes, bool]] = deque()
        self._scheduled = False
        self._outbox: deque[tuple[Buffer, Offload | None]] = deque()
        self.arp = Arp(self.mac, self.mine[:2], self.belongs, lambda frame: self.transmit(frame, None))
        self._ipv4, self._builder = Ipv4(), Builder(self.mac)
        self._ipv6, self._builder6, self.icmp6 = Ipv6(), Builder6(self.mac), Icmp6(self)
        self.icmp, self.udp, self.tcp, self.dns = Icmp(self), Udp(self), Tcp(self), Dns(self)
        self.udp.serve(b"", DHCP_PORT, Dhcp(self).input)
        for address in (self.dns_address, icmp6.DNS):
            self.udp.serve(address, DNS_PORT, self.dns.input)
        self._tftp = Tftp(self, self.config.tftp) if self.config.tftp is not None else None
        if self._tftp is not None:
            self.udp.serve(self.gateway, TFTP_PORT, self._tftp.input)
        # A cable that is closed has no ports.
        self.forwards = [HostForward(self, *pair) for pair in zip(self.config.forwards, ports, strict=False)]

    # ---- the device's side ------------------------------------------------------------------------------

    def start(self, receive: Receive) -> None:
        self._receive = receive
        if self._own is not None:
            self._own.start()
        for forward in self.forwards:
            self.loop.call_soon(forward.start)

    def guest_accepts(self, accepts: Accepts) -> None:
        checksum = Accepts.CHECKSUM in accepts
        with self._receiving:
            self.takes = Takes(checksum, checksum and Accepts.TCP4 in accepts, checksum and Accepts.TCP6 in accepts)
            # What waits was made for another driver.
            self._outbox = deque(entry for entry in self._outbox if entry[1] is None)

    def send(self, frame: Sequence[Buffer], offload: Offload | None) -> None:
        if len(self._inbox) >= MOST_IN or sum(map(len, frame)) > MOST_FRAME:
            return
        # A frame whose checksum is still to be made was never on a wire that could have spoilt it.
        self._inbox.append((b"".join(frame), offload is not None and offload.needs_checksum))
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self._drain)

    def ready(self) -> None:
        if self._outbox:
            self.loop.call_soon(self._resume)

    def close(self) -> None:
        with self._receiving:
            self._receive = None
            if self.closed:
                return
            self.closed = True
        if self._own is not None:
            self._own.stop()
        self.loop.run(self._close_parts)

    def _close_parts(self) -> None:
        for forward in self.forwards:
            forward.close()
        for part in (self.tcp, self.udp, self.icmp, self.icmp6, self.dns, self._tftp):
            if part is not None:
                part.close()

    # ---- on the loop's thread ---------------------------------------------------------------------------

    def _drain(self) -> None:
        self._scheduled = False
        try:
            for _ in range(BATCH):
                if not self._inbox:
                    break
                self._input(*self._inbox.popleft())
        finally:
            # An error is reported by the loop, and costs one frame.
            if self._inbox and not self._scheduled:
                self._scheduled = True
                self.loop.call_soon(self._drain)
            self.tcp.flush()

    def _input(self, frame: bytes, trusted: bool) -> None:
        if self.closed or len(frame) < ETHERNET_HEADER or (not frame[0] & 1 and frame[:6] != self.mac):
            return
        kind = frame[12:14]
        if kind == b"\x08\x00":
            packet = self._ipv4.parse(frame, trusted, self.clock())
            if packet is not None:
                self._packet(packet)
        elif kind == b"\x08\x06":
            self.arp.input(frame)
        elif kind == b"\x86\xdd" and self.config.ipv6:
            packet = self._ipv6.parse(frame, trusted, self.clock())
            if packet is not None:
                self._packet6(packet)

    def _packet(self, packet: Packet) -> None:
        source = packet.source
        if source != NOWHERE:
            # A guest speaks for addresses of its network, not for others and not for ours.
            if not self.belongs(source) or source in self.mine or source == self._broadcast:
                return
            self.arp.learn(source, packet.mac)
        elif packet.protocol != UDP:
            return
        if packet.protocol == TCP:
            if packet.target[0] < FIRST_MULTICAST:
                self.tcp.input(packet)
        elif packet.protocol == UDP:
            self.udp.input(packet)
        elif packet.protocol == socket.IPPROTO_ICMP:
            self.icmp.input(packet)

    def _packet6(self, packet: Packet) -> None:
        source = packet.source
        if source != icmp6.UNSPECIFIED:
            if not icmp6.belongs(source) or source in self.mine:
                return
            self.icmp6.learn(source, packet.mac)
        elif packet.protocol != icmp6.PROTOCOL:
            return
        if packet.protocol == icmp6.PROTOCOL:
            self.icmp6.input(packet)
        elif packet.protocol == UDP:
            self.udp.input(packet)
        elif packet.protocol == TCP and packet.target[0] != icmp6.MULTICAST:
            self.tcp.input(packet)

    def transmit(self, frame: Buffer, offload: Offload | None) -> None:
        """Give *frame* to the guest, or keep it until there is room; beyond that it is lost."""
        with self._receiving:
            if self._receive is None:
                return
            if not self._outbox and self._receive(frame, offload):
                return
            if len(self._outbox) >= MOST_OUT:
                return
            self._outbox.append((frame, offload))
            # ready() may have come between the refusal and now, and seen nothing that waits.
            if len(self._outbox) == 1 and self._receive(frame, offload):
                self._outbox.clear()

    @property
    def congested(self) -> bool:
        """Whether frames wait for the guest."""
        return bool(self._outbox)

    def _resume(self) -> None:
        with self._receiving:
            while self._outbox:
                if self._receive is None or not self._receive(*self._outbox[0]):
                    return
                self._outbox.popleft()
        self.tcp.resume()

    # ---- for the protocols ------------------------------------------------------------------------------

    def belongs(self, address: bytes) -> bool:
        """Whether *address* is one of the network."""
        return int.from_bytes(address, "big") & self._mask == self._network

    def may_reach(self, address: bytes) -> bool:
        """Whether a guest may send to *address*: the host or the world, unless restricted; never a broadcast."""
        if self.config.restrict:
            return False
        if address in self.gateways:
            return True
        first = address[0]
        if len(address) == 16:
            # ::/80 holds the unspecified and the loopback address, and IPv4's by another name.
            return not (first == icmp6.MULTICAST or icmp6.belongs(address) or not any(address[:10]))
        return not (first in (0, 127) or first >= FIRST_MULTICAST or self.belongs(address))

    def outside_address(self, address: bytes) -> str:
        """What *address* is for the host: 10.0.2.2 is its loopback, fec0::2 that of IPv6."""
        if len(address) == 16:
            return LOOPBACK6 if address == icmp6.GATEWAY else socket.inet_ntop(socket.AF_INET6, address)
        return LOOPBACK if address == self.gateway else socket.inet_ntoa(address)

    def tcp_destination(self, address: bytes, port: int) -> tuple[str, int] | None:
        """Where a connection to *address* goes; None when it must not."""
        if address in (self.dns_address, icmp6.DNS) and port == DNS_PORT and not self.config.restrict:
            servers = self.dns.servers()
            return servers[0] if servers else None
        return (self.outside_address(address), port) if self.may_reach(address) else None

    def belongs_here(self, address: bytes) -> bool:
        """Whether *address*, of either kind, is one of the network: one that is ours, or a guest's."""
        return icmp6.belongs(address) if len(address) == 16 else self.belongs(address)

    def unreachable(self, packet: Packet, code: int) -> None:
        """Tell the sender of *packet* that it could not be delivered; *code* is ICMP's."""
        (self.icmp if len(packet.source) == 4 else self.icmp6).unreachable(packet, code)

    def send_ip(
        self, source: bytes, target: bytes, protocol: int, payload: Buffer, mac: bytes | None = None, hops: int = 64
    ) -> None:
        """Send a packet to a guest; one for an address that nobody has yet waits for it, for a while."""
        neighbours = self.arp if len(target) == 4 else self.icmp6
        mac = mac or neighbours.lookup(target)
        if mac is None:
            neighbours.when_known(target, lambda: self.send_ip(source, target, protocol, payload))
            return
        if len(target) == 4:
            frames = self._builder.build(mac, source, target, protocol, payload)
        else:
            frames = self._builder6.build(mac, source, target, protocol, payload, hops)
        for frame in frames:
            self.transmit(frame, None)
