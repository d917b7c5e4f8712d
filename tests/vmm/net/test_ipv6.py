"""IPv6 of the user network: frame by frame, with Linux's own stack as the guest, and with guests that mean harm."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.vmm.net.namespace import cabled, missing, web_server

from vmonty.testing.net import FakeLoop, FrameGuest
from vmonty.vmm.eventloop import EventLoop
from vmonty.vmm.net.backend import Offload
from vmonty.vmm.net.checksum import TCP, UDP, checksum, correct, pseudo_header
from vmonty.vmm.net.user import icmp6, ipv6
from vmonty.vmm.net.user.backend import UserBackend
from vmonty.vmm.net.user.config import UserConfig
from vmonty.vmm.net.user.ipv4 import Packet
from vmonty.vmm.net.user.tcp_segment import ACK, RST, SYN

ICMP6 = socket.IPPROTO_ICMPV6
MAC, ROUTER_MAC = FrameGuest.MAC, FrameGuest.GATEWAY_MAC
ME = bytes.fromhex("fec0000000000000505400fffe123456")
LINK = bytes.fromhex("fe80000000000000505400fffe123456")
GATEWAY, DNS, ROUTER = icmp6.GATEWAY, icmp6.DNS, icmp6.LINK_LOCAL
ALL_ROUTERS = bytes.fromhex("ff02") + bytes(13) + b"\x02"
LIMIT_S = 60.0
no_ipv6 = pytest.mark.skipif(
    not Path("/proc/net/if_inet6").exists()
    or "00000000000000000000000000000001" not in Path("/proc/net/if_inet6").read_text(),
    reason="this host has no IPv6 loopback address",
)


class Net:
    def __init__(self, options: str = "") -> None:
        self.loop = FakeLoop()
        self.user = UserBackend(UserConfig.parse(options), self.loop, self.loop.clock)
        self.guest = FrameGuest(self.user)
        self.loop.settle()

    def send(self, target: bytes, protocol: int, payload: bytes, source: bytes = ME, hops: int = 64) -> None:
        header = ipv6.HEADER.pack(6 << 28, len(payload), protocol, hops, source, target)
        self.user.send([ROUTER_MAC + MAC + ipv6.ETHERTYPE, header, payload], None)
        self.loop.settle()

    def icmp(self, target: bytes, message: bytes, source: bytes = ME, hops: int = 64) -> None:
        """With its checksum made."""
        value = checksum(message, pseudo_header(source + target, ICMP6, len(message)))
        self.send(target, ICMP6, message[:2] + value.to_bytes(2, "big") + message[4:], source, hops)

    def take(self) -> list[Packet]:
        """The packets that came, their checksums right."""
        reader, found = ipv6.Ipv6(), []
        for frame in self.guest.take():
            if frame[12:14] == ipv6.ETHERTYPE and (packet := reader.parse(frame, False, 0.0)):
                addresses = packet.source + packet.target
                assert correct(packet.payload, pseudo_header(addresses, packet.protocol, len(packet.payload)))
                found.append(packet)
        return found


@pytest.fixture
def net() -> Iterator[Net]:
    made = Net()
    yield made
    made.user.close()
    assert made.loop.watched == {}


def test_a_router_tells_the_prefix_and_the_name_server_and_repeats_it(net: Net) -> None:
    net.icmp(ALL_ROUTERS, bytes((133, 0, 0, 0, 0, 0, 0, 0)), LINK, 255)
    (packet,) = net.take()
    assert (packet.source, packet.target, packet.header[7]) == (ROUTER, LINK, 255)
    message = bytes(packet.payload)
    assert message[0] == 134
    assert int.from_bytes(message[6:8], "big") == 1800
    options, at = {}, 16
    while at < len(message):
        options[message[at]] = message[at + 2 : at + message[at + 1] * 8]
        at += message[at + 1] * 8
    assert at == len(message)
    assert options[1] == ROUTER_MAC
    assert options[3][:2] == bytes((64, 0xC0))
    assert options[3][14:] == bytes.fromhex("fec0") + bytes(14)
    assert options[25][-16:] == DNS
    net.loop.advance(601)
    (packet,) = net.take()
    assert packet.target == icmp6.ALL_NODES
    # Not from beyond the link.
    net.icmp(ALL_ROUTERS, bytes((133, 0, 0, 0, 0, 0, 0, 0)), LINK, 64)
    assert net.take() == []


@pytest.mark.parametrize("address", [GATEWAY, DNS, ROUTER])
def test_our_addresses_are_solicited_and_answer_echo(net: Net, address: bytes) -> None:
    ask = bytes((135, 0, 0, 0, 0, 0, 0, 0)) + address
    net.icmp(icmp6.SOLICITED_NODE + address[13:], ask + b"\x01\x01" + MAC, LINK, 255)
    (packet,) = net.take()
    assert (
        bytes(packet.payload[:1]) + bytes(packet.payload[4:]) == b"\x88\xe0\0\0\0" + address + b"\x02\x01" + ROUTER_MAC
    )
    # Somebody who tries the address for itself is told that it is taken.
    net.icmp(icmp6.SOLICITED_NODE + address[13:], ask, bytes(16), 255)
    (packet,) = net.take()
    assert packet.target == icmp6.ALL_NODES
    assert packet.payload[4] == 0xA0
    body = bytes(range(200)) * 15
    net.icmp(address, b"\x80\0\0\0\x12\x34\0\1" + body[:1000])
    (packet,) = net.take()
    assert (packet.source, packet.target) == (address, ME)
    assert bytes(packet.payload[:2]) + bytes(packet.payload[4:]) == b"\x81\0\x12\x34\0\1" + body[:1000]


def test_an_echo_in_fragments_is_answered_in_fragments(net: Net) -> None:
    message = b"\x80\0\0\0\x12\x34\0\1" + os.urandom(4000)
    value = checksum(message, pseudo_header(ME + GATEWAY, ICMP6, len(message)))
    message = message[:2] + value.to_bytes(2, "big") + message[4:]
    for at in reversed(range(0, len(message), 1024)):
        more = at + 1024 < len(message)
        net.send(GATEWAY, ipv6.FRAGMENTED, ipv6.FRAGMENT.pack(ICMP6, 0, at | more, 7) + message[at : at + 1024])
    (packet,) = net.take()
    assert bytes(packet.payload[4:]) == message[4:]


@no_ipv6
def test_datagrams_reach_the_hosts_loopback_and_back(net: Net) -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as server:
        server.bind(("::1", 0))
        server.settimeout(LIMIT_S)
        port = server.getsockname()[1]
        head = struct.pack("!HHHH", 4000, port, 13, 0)
        value = checksum(head + b"hello", pseudo_header(ME + GATEWAY, UDP, 13))
        net.send(GATEWAY, UDP, head[:6] + value.to_bytes(2, "big") + b"hello")
        data, peer = server.recvfrom(100)
        assert data == b"hello"
        server.sendto(b"world", peer)
        net.loop.until(lambda: net.guest.frames)
    (packet,) = net.take()
    assert (packet.source, packet.target) == (GATEWAY, ME)
    assert struct.unpack("!HH", packet.payload[:4]) == (port, 4000)
    assert bytes(packet.payload[8:]) == b"world"


@pytest.mark.parametrize(
    "target",
    ["::1", "::", "::ffff:127.0.0.1", "::127.0.0.1", "fe80::99", "fec0::99", "ff02::1", "ff0e::1"],
)  # fmt: skip
def test_nothing_leads_to_the_host_but_the_gateway(net: Net, target: str) -> None:
    address = socket.inet_pton(socket.AF_INET6, target)
    assert not net.user.may_reach(address)
    assert net.user.tcp_destination(address, 80) is None
    head = struct.pack("!HHIIBBHHH", 4000, 80, 1, 0, 0x50, SYN, 100, 0, 0)
    value = checksum(head, pseudo_header(ME + address, TCP, 20))
    net.send(address, TCP, head[:16] + value.to_bytes(2, "big") + head[18:])
    assert [packet.payload[13] for packet in net.take()] in ([], [RST | ACK])
    assert net.loop.watched == {}


def test_restricted_and_switched_off() -> None:
    for options, answers in (("restrict=on", 1), ("ipv6=off", 0)):
        net = Net(options)
        assert not net.user.may_reach(GATEWAY) or options == "ipv6=off"
        net.icmp(GATEWAY, b"\x80\0\0\0\x12\x34\0\1")
        assert len(net.take()) == answers
        net.user.close()


@given(
    st.sampled_from([UDP, TCP, ICMP6, 0, 43, 44, 60, 59, 135]),
    st.sampled_from([GATEWAY, DNS, ROUTER, icmp6.ALL_NODES, ME, bytes(15) + b"\x01", b"\x20\x01" + bytes(14)]),
    st.sampled_from([ME, LINK, bytes(16), GATEWAY, b"\xff" * 16]),
    st.one_of(
        st.binary(max_size=120),
        st.builds(lambda kind, rest: bytes((kind, 0)) + rest, st.integers(128, 137), st.binary(max_size=60)),
        st.builds(
            lambda next_, size, rest: bytes((next_, size)) + rest,
            st.integers(0, 60),
            st.integers(0, 9),
            st.binary(max_size=90),
        ),
    ),
    st.booleans(),
    st.sampled_from([255, 64]),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_raises_nothing(
    net: Net, protocol: int, target: bytes, source: bytes, payload: bytes, sums: bool, hops: int
) -> None:
    net.user.config = UserConfig(restrict=True)  # or the fuzz would speak to the world
    if sums and len(payload) >= 4:
        value = checksum(payload[:2] + b"\0\0" + payload[4:], pseudo_header(source + target, ICMP6, len(payload)))
        payload = payload[:2] + value.to_bytes(2, "big") + payload[4:]
    net.send(target, protocol, payload, source, hops)
    frame = (
        ROUTER_MAC + MAC + ipv6.ETHERTYPE + ipv6.HEADER.pack(6 << 28, 2000, protocol, hops, source, target) + payload
    )
    net.user.send([frame], Offload(True, 54, 6))
    net.user.send([frame[: len(frame) // 2]], None)
    net.loop.settle()
    assert len(net.user.icmp6._known) <= 256


# ---- Linux


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    made = EventLoop("network under test")
    made.start()
    yield made
    made.stop()


@no_ipv6
@pytest.mark.skipif(bool(missing()), reason=missing())
@pytest.mark.parametrize("offloads", [True, False], ids=["offloads", "plain"])
def test_linux_configures_itself_pings_and_moves_files_both_ways(
    loop: EventLoop, tmp_path: Path, offloads: bool
) -> None:
    data = os.urandom(16 << 20)
    (tmp_path / "file").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    put = (
        "import http.client,sys;c=http.client.HTTPConnection('fec0::2',int(sys.argv[1]));"
        "c.request('PUT','/',open(sys.argv[2],'rb'),{'Content-Length':str(16<<20)});assert c.getresponse().status==201"
    )
    user = UserBackend(UserConfig(), loop)
    try:
        with cabled(loop, user, offloads=offloads, address=None) as guest, web_server(tmp_path, "::1") as port:
            deadline = time.monotonic() + LIMIT_S
            while not re.search(
                r"inet6 fec0::\S+/64 scope site dynamic(?!.*tentative)", guest.run("ip", "-6", "addr", "show", "eth0")
            ):
                assert time.monotonic() < deadline, guest.run("ip", "-6", "addr", "show", "eth0")
                time.sleep(0.1)  # address detection has no event for us
            assert "default via fe80::2 " in guest.run("ip", "-6", "route")
            for address in ("fec0::2", "fec0::3", "fe80::2%eth0"):
                assert "2 packets received" in guest.run("busybox", "ping", "-6", "-c2", "-i0.05", "-s3000", address)
            output = guest.run("sh", "-c", f"busybox wget -q -O - http://[fec0::2]:{port}/file | sha256sum")
            assert output.split()[0] == digest
            guest.run("python3", "-c", put, str(port), str(tmp_path / "file"))
            assert hashlib.sha256((tmp_path / "put").read_bytes()).hexdigest() == digest
            assert "refused" in guest.run("sh", "-c", "busybox wget -q -O - http://[fec0::2]:1/ 2>&1; true")
    finally:
        user.close()
