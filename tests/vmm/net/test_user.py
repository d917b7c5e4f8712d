"""The user network's protocols, frame by frame; its configuration; and guests that mean harm."""

from __future__ import annotations

import contextlib
import resource
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmonty.base.errors import UsageError
from vmonty.testing.net import FakeLoop, FrameGuest
from vmonty.vmm.net.backend import Gso, Offload
from vmonty.vmm.net.checksum import TCP, UDP, correct
from vmonty.vmm.net.loop import FULL_SECONDS
from vmonty.vmm.net.user import arp, dns, ipv4, neighbours, tcp_proxy, tftp, udp
from vmonty.vmm.net.user.backend import MOST_IN, MOST_OUT, UserBackend, UserCable
from vmonty.vmm.net.user.config import Forward, UserConfig
from vmonty.vmm.net.user.dns import resolvers
from vmonty.vmm.net.user.tcp import State
from vmonty.vmm.net.user.tcp_segment import ACK, FIN, RST, SYN, Options

ICMP = socket.IPPROTO_ICMP
GATEWAY, DNS, IP, MAC = FrameGuest.GATEWAY, FrameGuest.DNS, FrameGuest.IP, FrameGuest.MAC


class Net:
    def __init__(self, options: str = "") -> None:
        self.loop = FakeLoop()
        self.user = UserBackend(UserConfig.parse(options), self.loop, self.loop.clock)
        self.guest = FrameGuest(self.user)
        self.loop.settle()
        self.guest.send_ip(GATEWAY, ICMP, bytes(8))  # makes itself known
        self.loop.settle()
        self.guest.take()


@pytest.fixture
def net() -> Iterator[Net]:
    made = Net()
    yield made
    made.user.close()
    assert made.loop.watched == {}


# ---- configuration


def test_the_options_of_a_network_are_read():
    config = UserConfig.parse(
        "net=192.168.7.0/24,hostname=box,restrict=on,hostfwd=tcp::2222-:22,hostfwd=udp:127.0.0.1:53-192.168.7.20:53"
    )
    assert str(config.host) == "192.168.7.2"
    assert str(config.dns) == "192.168.7.3"
    assert str(config.leases[0]) == "192.168.7.15"
    assert config.restrict
    assert config.forwards == (
        Forward("tcp", IPv4Address("0.0.0.0"), 2222, None, 22),
        Forward("udp", IPv4Address("127.0.0.1"), 53, IPv4Address("192.168.7.20"), 53),
    )


@pytest.mark.parametrize(
    "text",
    [
        "nonsense", "nonsense=1", "net=10.0.2.0/30", "net=hello", "host=1.2.3.4", "host=10.0.2.3", "dns=x",
        "restrict=maybe", "tftp=/does/not/exist", "hostfwd=tcp:22", "hostfwd=tcp::70000-:22", "hostfwd=sctp::1-:1",
        "hostfwd=tcp::1-:0", "hostfwd=tcp::1-1.2.3.4:22", "bootfile=" + "x" * 128, "hostname=é", "dhcpstart=10.0.2.255",
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_and_named(text):
    with pytest.raises(UsageError, match=text.split("=")[0].split(":")[0]):
        UserConfig.parse(text)


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        forward = f"hostfwd=tcp:127.0.0.1:{taken.getsockname()[1]}-:22"
        with pytest.raises(UsageError, match="cannot be had"):
            UserBackend(UserConfig.parse(forward), FakeLoop())


# ---- ARP, IP, ICMP


@pytest.mark.parametrize("address", [GATEWAY, DNS])
def test_arp_answers_for_the_networks_addresses(net, address):
    net.user.send(
        [b"\xff" * 6 + MAC + b"\x08\x06" + arp.HEADER.pack(1, 0x800, 6, 4, 1, MAC, IP, bytes(6), address)], None
    )
    net.loop.settle()
    (frame,) = net.guest.take()
    assert frame[:12] == MAC + FrameGuest.GATEWAY_MAC
    assert arp.HEADER.unpack(frame[14:42])[4:] == (2, FrameGuest.GATEWAY_MAC, address, MAC, IP)


def test_arp_answers_for_nobody_else(net):
    other = bytes((10, 0, 2, 77))
    net.user.send(
        [b"\xff" * 6 + MAC + b"\x08\x06" + arp.HEADER.pack(1, 0x800, 6, 4, 1, MAC, IP, bytes(6), other)], None
    )
    net.loop.settle()
    assert net.guest.take() == []


def test_a_guest_cannot_take_the_gateways_address_or_fill_the_table(net):
    for number in range(1000):
        for address in (GATEWAY, bytes((10, 0, 2, number % 250 + 1)), number.to_bytes(4, "big")):
            mac = b"\x52\x54\x00\x00" + number.to_bytes(2, "big")
            request = arp.HEADER.pack(1, 0x800, 6, 4, 2, mac, address, bytes(6), GATEWAY)
            net.user.send([b"\xff" * 6 + mac + b"\x08\x06" + request], None)
            net.loop.settle()
    assert net.user.arp.lookup(GATEWAY) is None
    assert len(net.user.arp._known) <= neighbours.MOST_NEIGHBOURS


def test_an_echo_that_arrives_in_fragments_is_answered_in_fragments(net):
    message = bytearray(b"\x08\0\0\0\x12\x34\0\1" + bytes(n & 0xFF for n in range(4000)))
    message[2:4] = ipv4.checksum(message).to_bytes(2, "big")
    parts = [(at, bytes(message[at : at + 1480])) for at in range(0, len(message), 1480)]
    for at, part in reversed(parts):
        more = ipv4.MORE_FRAGMENTS if at + 1480 < len(message) else 0
        net.guest.send_ip(GATEWAY, ICMP, part, fragment=more | at >> 3)
    net.loop.settle()
    frames = net.guest.take()
    assert len(frames) == 3
    whole = bytearray(len(message))
    for frame in frames:
        offset = (int.from_bytes(frame[20:22], "big") & 0x1FFF) * 8
        whole[offset : offset + len(frame) - 34] = frame[34:]
    assert correct(whole)
    assert whole[:2] == b"\0\0"
    assert whole[4:] == message[4:]


@given(
    st.lists(st.tuples(st.integers(0, 8191), st.binary(max_size=64), st.booleans(), st.integers(0, 20)), max_size=80)
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fragments_are_kept_within_bounds_whatever_comes(net, pieces):
    for offset, data, more, number in pieces:
        net.guest.send_ip(GATEWAY, ICMP, data, fragment=(ipv4.MORE_FRAGMENTS if more else 0) | offset, number=number)
    net.loop.settle()
    incomplete = net.user._ipv4._reassembly._incomplete
    assert len(incomplete) <= ipv4.MOST_INCOMPLETE
    assert all(entry.held <= ipv4.MOST_DATAGRAM for entry in incomplete.values())


@pytest.mark.parametrize("target", ["127.0.0.1", "0.0.0.0", "10.0.2.99", "10.0.2.255", "224.0.0.1", "255.255.255.255"])
def test_a_guest_does_not_reach_the_hosts_loopback_by_its_own_name_nor_broadcasts(net, target):
    address = socket.inet_aton(target)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as service:
        service.bind(("127.0.0.1", 0))
        net.guest.send_udp(address, (5000, service.getsockname()[1]), b"hello")
        net.guest.send_tcp(address, (5000, 5001), 1, 0, SYN)
        net.loop.settle()
        assert net.loop.watched == {}
        assert not net.user.tcp._connections


def test_a_guest_speaks_only_for_its_own_network(net):
    for source in (GATEWAY, b"\x08\x08\x08\x08", bytes((10, 0, 2, 255))):
        net.guest.send_udp(b"\x01\x01\x01\x01", (5000, 53), b"x", source=source)
    net.loop.settle()
    assert net.loop.watched == {}


# ---- UDP


def test_a_datagram_to_the_gateway_reaches_the_hosts_loopback_and_is_answered(net):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as service:
        service.bind(("127.0.0.1", 0))
        service.settimeout(20)
        port = service.getsockname()[1]
        net.guest.send_udp(GATEWAY, (5000, port), b"question")
        net.loop.settle()
        data, peer = service.recvfrom(100)
        assert data == b"question"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            stranger.sendto(b"not asked", peer)
        service.sendto(b"answer", peer)
        net.loop.until(lambda: net.guest.frames)
        assert net.guest.datagrams() == [(port, 5000, b"answer")]


def test_idle_ports_are_closed_and_many_are_bounded(net):
    for port in range(udp.MOST_SOCKETS + 20):
        net.guest.send_udp(GATEWAY, (1000 + port, 9), b"x")
        net.loop.settle()
    assert len(net.loop.watched) == udp.MOST_SOCKETS
    net.loop.advance(udp.IDLE_SECONDS + 1)
    net.guest.send_udp(GATEWAY, (99, 9), b"x")
    net.loop.settle()
    assert len(net.loop.watched) == 1


# ---- DHCP


def dhcp(net: Net, kind: int, mac: bytes = MAC, *, options: bytes = b"", ciaddr: bytes = bytes(4)) -> list[bytes]:
    message = struct.pack(
        "!BBBBIHH4s4s4s4s16s192x4s", 1, 1, 6, 0, 77, 0, 0, ciaddr, *[bytes(4)] * 3, mac, b"\x63\x82\x53\x63"
    )
    net.guest.send_udp(b"\xff" * 4, (68, 67), message + bytes((53, 1, kind)) + options + b"\xff", source=bytes(4))
    net.loop.settle()
    return [data for source, target, data in net.guest.datagrams() if (source, target) == (67, 68)]


def kind_of(answer: bytes) -> int:
    return answer[answer.index(b"\x63\x82\x53\x63") + 6]


def test_an_address_is_offered_then_given(net):
    (offer,) = dhcp(net, 1)
    assert (kind_of(offer), offer[16:20], offer[28:34]) == (2, IP, MAC)
    (ack,) = dhcp(net, 3, options=b"\x32\x04" + IP + b"\x36\x04" + GATEWAY)
    assert (kind_of(ack), ack[16:20]) == (5, IP)


def test_an_address_of_another_network_is_denied(net):
    (nak,) = dhcp(net, 3, options=b"\x32\x04" + bytes((192, 168, 0, 9)))
    assert kind_of(nak) == 6


def test_a_request_to_another_server_is_not_ours(net):
    assert dhcp(net, 3, options=b"\x32\x04" + IP + b"\x36\x04\x01\x02\x03\x04") == []


def test_many_clients_do_not_use_up_the_pool(net):
    for number in range(300):
        (offer,) = dhcp(net, 1, b"\x52\x54\x00\x00" + number.to_bytes(2, "big"))
        assert offer[16:19] == IP[:3]
    (offer,) = dhcp(net, 1)
    assert kind_of(offer) == 2


# ---- DNS


def test_resolvers_are_read_as_the_c_library_does(tmp_path: Path):
    (tmp_path / "conf").write_text(
        "# x\nsearch a\nnameserver 10.1.1.1\nnameserver fe80::1%eth0\nnameserver  ::1\nnameserver bad.name\n"
    )
    assert resolvers(tmp_path / "conf")[0] == "10.1.1.1"
    assert "::1" in resolvers(tmp_path / "conf")
    assert resolvers(tmp_path / "missing") == []


def test_a_silent_resolver_is_followed_by_the_next_and_then_by_an_error(net):
    question = b"\x12\x34\x01\x00\0\1\0\0\0\0\0\0" + b"\3foo\0\0\1\0\1"
    servers = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
    try:
        for server in servers:
            server.bind(("127.0.0.1", 0))
            server.settimeout(20)
        net.user.dns.fixed = [server.getsockname() for server in servers]
        net.guest.send_udp(DNS, (4000, 53), question)
        net.loop.settle()
        assert servers[0].recv(100) == question
        net.loop.advance(3)
        data, peer = servers[1].recvfrom(100)
        assert data == question
        servers[1].sendto(b"\xff\xff" + question[2:], peer)  # another's answer
        servers[1].sendto(question[:2] + b"\x81\x80" + question[4:], peer)
        net.loop.until(lambda: net.guest.frames)
        assert net.guest.datagrams() == [(53, 4000, question[:2] + b"\x81\x80" + question[4:])]
        net.guest.send_udp(DNS, (4000, 53), question)
        net.loop.settle()
        net.loop.advance(10)
        ((_, _, answer),) = net.guest.datagrams()
        assert answer[2] & 0x80
        assert answer[3] & 0xF == 2
    finally:
        for server in servers:
            server.close()


QUESTION = b"\x12\x34\x01\x00\0\1\0\0\0\0\0\0" + b"\3foo\0\0\1\0\1"
ANSWER = QUESTION[:2] + b"\x81\x80" + QUESTION[4:]


@pytest.fixture
def servers(net) -> Iterator[list[socket.socket]]:
    """Three resolvers that are silent; the network knows all of them."""
    with contextlib.ExitStack() as closing:
        made = [closing.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(3)]
        for server in made:
            server.bind(("127.0.0.1", 0))
            server.settimeout(20)
        net.user.dns.fixed = [server.getsockname() for server in made]
        yield made


def test_the_only_resolver_is_asked_again(net, servers):
    del net.user.dns.fixed[1:]
    net.guest.send_udp(DNS, (4000, 53), QUESTION)
    net.loop.settle()
    peers = {servers[0].recvfrom(100)}
    for _ in range(3):
        net.guest.send_udp(DNS, (4000, 53), QUESTION)  # the guest's own repetition
        net.loop.advance(2.5)
        peers.add(servers[0].recvfrom(100))
        assert net.guest.datagrams() == []
    ((data, peer),) = peers  # the port too is the same
    assert data == QUESTION
    servers[0].sendto(ANSWER, peer)
    net.loop.until(lambda: net.guest.frames)
    assert net.guest.datagrams() == [(53, 4000, ANSWER)]
    assert net.loop.watched == {}


def test_a_late_answer_of_an_earlier_resolver_will_do(net, servers):
    net.guest.send_udp(DNS, (4000, 53), QUESTION)
    net.loop.settle()
    _, peer = servers[0].recvfrom(100)
    net.loop.advance(6)
    for server in servers[1:]:
        server.recvfrom(100)
    servers[0].sendto(ANSWER, peer)
    net.loop.until(lambda: net.guest.frames)
    assert net.guest.datagrams() == [(53, 4000, ANSWER)]


def test_a_resolver_that_refuses_is_not_asked_again(net, servers):
    servers[0].close()
    net.guest.send_udp(DNS, (4000, 53), QUESTION)
    net.loop.settle()
    net.loop.until(lambda: net.user.dns.fixed[0] not in next(iter(net.user.dns._questions.values())).sockets)
    assert servers[1].recv(100) == QUESTION
    del net.user.dns.fixed[1:]
    net.loop.advance(2.5)
    ((_, _, answer),) = net.guest.datagrams()
    assert answer[3] & 0xF == 2


def test_questions_have_a_bounded_number_of_sockets(net, servers):
    for number in range(dns.MOST_QUESTIONS + 20):
        net.guest.send_udp(DNS, (4000 + number, 53), QUESTION)
        net.loop.settle()
    net.loop.advance(6)
    assert len(net.loop.watched) == dns.MOST_SOCKETS
    assert len(net.user.dns._questions) == dns.MOST_QUESTIONS


# ---- TFTP


@pytest.fixture
def files(tmp_path: Path) -> Iterator[tuple[Net, Path]]:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").write_text("secret")
    (root / "image").write_bytes(bytes(range(256)) * 5)
    (root / "exact").write_bytes(bytes(1024))
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "folder").mkdir()
    made = Net(f"tftp={root}")
    yield made, root
    made.user.close()


def ask(net: Net, data: bytes, port: int = 3000) -> list[bytes]:
    net.guest.send_udp(GATEWAY, (port, 69), data)
    net.loop.settle()
    return [payload for _, _, payload in net.guest.datagrams()]


def test_a_file_is_served_block_by_block_and_a_last_short_one(files):
    net, _ = files
    (block,) = ask(net, b"\0\1exact\0octet\0")
    assert block == b"\0\3\0\1" + bytes(512)
    assert ask(net, b"\0\4\0\1") == [b"\0\3\0\2" + bytes(512)]
    assert ask(net, b"\0\4\0\1") == []  # an old acknowledgement is not answered twice
    assert ask(net, b"\0\4\0\2") == [b"\0\3\0\3"]
    assert ask(net, b"\0\4\0\3") == []
    assert not net.user._tftp._sessions


def test_options_are_acknowledged_as_taken(files):
    net, _ = files
    (answer,) = ask(net, b"\0\1image\0octet\0tsize\x000\0blksize\x0099999\0windowsize\x002\0weird\x001\0")
    assert answer == b"\0\6tsize\x001280\0blksize\x0065464\0windowsize\x002\0"
    (block,) = ask(net, b"\0\4\0\0")
    assert block[4:] == bytes(range(256)) * 5


def test_an_unanswered_block_is_repeated_and_then_given_up(files):
    net, _ = files
    ask(net, b"\0\1image\0octet\0")
    net.loop.advance(tftp.MOST_TRIES * tftp.SECONDS + 1)
    assert len(net.guest.datagrams()) == tftp.MOST_TRIES - 1
    assert not net.user._tftp._sessions


@pytest.mark.parametrize(
    "name", [b"../secret", b"link", b"folder", b"missing", b"/etc/passwd", b"..\\secret", b"", b"\xff\xfe", b"a" * 400]
)
def test_nothing_outside_of_the_directory_is_served(files, name):
    net, _ = files
    (answer,) = ask(net, b"\0\1" + name + b"\0octet\0")
    assert answer[:2] == b"\0\5"


def test_transfers_are_bounded_and_files_cannot_be_written(files):
    net, _ = files
    for port in range(100):
        ask(net, b"\0\1image\0octet\0", 2000 + port)
    assert len(net.user._tftp._sessions) == tftp.MOST_SESSIONS
    assert ask(net, b"\0\2new\0octet\0")[0][:4] == b"\0\5\0\2"


# ---- TCP through the host


def open_connection(net: Net, port: int, guest_port: int = 5000) -> int:
    """Open to the host's *port*; returns the number that the host starts with."""
    net.guest.send_tcp(GATEWAY, (guest_port, port), 100, 0, SYN, options=Options(1460, 7, True).build())
    net.loop.until(lambda: net.guest.frames)
    ((flags, seq, ack, _),) = net.guest.segments()
    assert (flags, ack) == (SYN | ACK, 101)
    net.guest.send_tcp(GATEWAY, (guest_port, port), 101, seq + 1, ACK)
    net.loop.settle()
    return seq


def test_a_connection_passes_bytes_both_ways_and_ends(net):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        seq = open_connection(net, port)
        host, _ = server.accept()
        with host:
            host.settimeout(20)
            net.guest.send_tcp(GATEWAY, (5000, port), 101, seq + 1, ACK | FIN, b"question")
            net.loop.settle()
            assert host.recv(100) == b"question"
            assert host.recv(100) == b""
            host.sendall(b"answer")
        net.loop.until(lambda: b"answer" in b"".join(net.guest.frames))
        net.loop.poll(0.05)
        segments = net.guest.segments()
        assert b"".join(payload for *_, payload in segments) == b"answer"
        assert segments[-1][0] & FIN
        net.guest.send_tcp(GATEWAY, (5000, port), 110, segments[-1][1] + 1, ACK)
        net.loop.settle()
    assert not net.user.tcp._connections


def test_a_host_that_resets_resets_the_guest(net):
    with socket.create_server(("127.0.0.1", 0)) as server:
        open_connection(net, server.getsockname()[1])
        host, _ = server.accept()
        host.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, tcp_proxy.LINGER_RESET)
        host.close()
        net.loop.until(lambda: net.guest.frames)
    assert net.guest.segments()[-1][0] & RST


def test_a_guest_that_resets_resets_the_host(net):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        open_connection(net, port)
        host, _ = server.accept()
        with host:
            net.guest.send_tcp(GATEWAY, (5000, port), 101, 0, RST)
            net.loop.settle()
            host.settimeout(20)
            with pytest.raises(ConnectionResetError):
                host.recv(1)


def test_a_segment_of_no_connection_is_reset(net):
    net.guest.send_tcp(GATEWAY, (1, 2), 50, 70, ACK)
    net.guest.send_tcp(GATEWAY, (1, 2), 50, 0, FIN, b"abc")
    net.guest.send_tcp(GATEWAY, (1, 2), 50, 0, RST)
    net.loop.settle()
    assert net.guest.segments() == [(RST, 70, 0, b""), (RST | ACK, 0, 54, b"")]


def test_connections_are_bounded_the_idlest_goes(net):
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as server:
        port = server.getsockname()[1]
        for number in range(tcp_proxy.MOST_CONNECTIONS + 10):
            net.loop.advance(0.001)
            net.guest.send_tcp(GATEWAY, (2000 + number, port), 100, 0, SYN)
            net.loop.settle()
        assert len(net.user.tcp._connections) == tcp_proxy.MOST_CONNECTIONS


def test_short_connections_do_not_reset_an_idle_one(net):
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as server:
        port = server.getsockname()[1]
        open_connection(net, port)
        (idle,) = net.user.tcp._connections.values()
        for number in range(tcp_proxy.MOST_CONNECTIONS + 10):
            net.loop.advance(0.001)
            net.guest.send_tcp(GATEWAY, (6000 + number, port), 100, 0, SYN)
            net.loop.settle()
        assert idle in net.user.tcp._connections.values()


def test_what_is_over_makes_room_before_what_is_in_use(net, monkeypatch):
    first = [
        State.TIME_WAIT, State.CONNECTING, State.SYN_RECEIVED, State.SYN_SENT, State.FIN_WAIT_2, State.CLOSE_WAIT,
        State.LAST_ACK, State.ESTABLISHED, State.ESTABLISHED,
    ]  # fmt: skip
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        for number in range(len(first)):
            net.guest.send_tcp(GATEWAY, (5000 + number, server.getsockname()[1]), 100, 0, SYN)
            net.loop.settle()
        made = list(net.user.tcp._connections.values())
        for number, (connection, state) in enumerate(zip(made, first, strict=True)):
            connection.tcb.state = state
            # By age alone they would go from the last to the first, but for those of one kind.
            kind = 3 if state is State.ESTABLISHED else min(number, 1) + (number > 3)
            connection.used = 100.0 - 10 * kind + number
        monkeypatch.setattr(tcp_proxy, "MOST_CONNECTIONS", 1)
        for number in range(len(made)):
            assert list(net.user.tcp._connections.values()) == made[number:]
            net.user.tcp._make_room()


def test_a_guest_without_room_stops_the_host_and_loses_nothing(net):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        seq = open_connection(net, port)
        host, _ = server.accept()
        with host:
            net.guest.room = 0
            stream = bytes(n % 253 for n in range(60_000))
            host.sendall(stream)
            for _ in range(20):
                net.loop.poll(0.005)
            assert len(net.user._outbox) <= MOST_OUT
            net.guest.room = None
            got = bytearray()
            while len(got) < len(stream):
                net.user.ready()
                net.loop.until(lambda: net.guest.frames)
                for _, at, _, payload in net.guest.segments():
                    if at == (seq + 1 + len(got)) & 0xFFFF_FFFF:
                        got += payload
                net.guest.send_tcp(GATEWAY, (5000, port), 101, seq + 1 + len(got) & 0xFFFF_FFFF, ACK)
                net.loop.settle()
            assert got == stream


# ---- a host without room


@contextlib.contextmanager
def no_descriptor() -> Iterator[None]:
    """This process gets none."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open("/dev/null") as first_free:
        number = first_free.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_forwarded_port_waits_for_descriptors():
    net = Net("hostfwd=tcp:127.0.0.1:0-:22")
    (forward,) = net.user.forwards
    fd = forward.socket.fileno()
    with socket.create_connection(("127.0.0.1", forward.port)):
        with no_descriptor():
            for _ in range(3):
                net.loop.until(lambda: fd not in net.loop.watched)  # it would be told of it again and again
                net.loop.advance(FULL_SECONDS)
                assert fd in net.loop.watched
        net.loop.until(lambda: net.guest.frames)
        assert net.guest.segments()[-1][0] == SYN
    with socket.create_connection(("127.0.0.1", forward.port)), no_descriptor():
        net.loop.until(lambda: fd not in net.loop.watched)
    net.user.close()
    net.loop.advance(FULL_SECONDS)
    assert net.loop.watched == {}


def test_without_descriptors_nothing_raises(files):
    net, _ = files
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(20)
        net.user.dns.fixed = [server.getsockname()]
        with no_descriptor():
            net.guest.send_udp(DNS, (4000, 53), QUESTION)
            net.guest.send_tcp(GATEWAY, (5000, 80), 100, 0, SYN)
            net.guest.send_udp(GATEWAY, (5000, 9), b"x")
            net.guest.send_udp(GATEWAY, (5000, 69), b"\0\1image\0octet\0")
            net.guest.send_ip(b"\x01\x01\x01\x01", ICMP, b"\x08\0\xf7\xff" + bytes(4))
            net.loop.settle()
        assert net.loop.watched == {}
        net.loop.advance(2.5)
        assert server.recv(100) == QUESTION  # in its next turn


def test_a_user_network_raises_the_limit_of_descriptors():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1] - 1, limits[1]))
        UserCable().close()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (limits[1], limits[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# ---- harm


def test_a_flood_is_bounded(net):
    for _ in range(MOST_IN * 2):
        net.user.send([bytes(60)], None)
    assert len(net.user._inbox) == MOST_IN
    net.loop.settle()
    assert not net.user._inbox


GARBAGE = st.one_of(
    st.binary(max_size=200),
    st.builds(
        lambda kind, body: FrameGuest.GATEWAY_MAC + MAC + kind + body,
        st.sampled_from([b"\x08\0", b"\x08\x06", b"\x86\xdd"]),
        st.binary(max_size=120),
    ),
)


@given(
    st.lists(GARBAGE, max_size=8),
    st.builds(
        Offload,
        st.booleans(),
        st.integers(0, 70000),
        st.integers(0, 70000),
        st.sampled_from(Gso),
        st.integers(0, 70000),
        st.integers(0, 70000),
    ),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_frames_raise_nothing(net, frames, offload):
    for frame in frames:
        net.user.send([frame[:7], frame[7:]], offload)
        net.loop.settle()


@given(
    st.sampled_from([UDP, TCP, ICMP, 2, 47]),
    st.sampled_from([GATEWAY, DNS, b"\xff" * 4, bytes((10, 0, 2, 99))]),
    st.binary(max_size=90),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_in_good_packets_raises_nothing(net, protocol, target, payload):
    net.user.send(
        [FrameGuest.GATEWAY_MAC + MAC + b"\x08\0" + ipv4_header(protocol, target, len(payload)), payload],
        Offload(True, 34, 6),
    )
    net.loop.settle()


def ipv4_header(protocol: int, target: bytes, size: int) -> bytes:
    fields = (0x45, 0, 20 + size, 1, 0, 64, protocol)
    return ipv4.HEADER.pack(*fields, ipv4.checksum(ipv4.HEADER.pack(*fields, 0, IP, target)), IP, target)


@given(st.sampled_from([67, 69, 53]), st.binary(max_size=600), st.binary(max_size=80))
@settings(max_examples=200, deadline=None)
def test_garbage_to_the_servers_raises_nothing(tmp_path_factory, port, body, options):
    net = Net(f"tftp={tmp_path_factory.getbasetemp()}")
    try:
        net.user.dns.fixed = [("127.0.0.1", 9)]
        target = DNS if port == 53 else GATEWAY
        prefix = struct.pack(
            "!BBBBIHH4s4s4s4s16s192x4s", 1, 1, 6, 0, 7, 0, 0, *[bytes(4)] * 4, MAC, b"\x63\x82\x53\x63"
        )
        for data in (body, body[:1] + bytes((len(body) % 7,)) + body[1:], prefix + options):
            net.guest.send_udp(target, (68, port), data)
            net.loop.settle()
    finally:
        net.user.close()


@given(
    st.lists(
        st.tuples(
            st.integers(-40, 80), st.integers(-5, 5), st.integers(0, 255), st.binary(max_size=30), st.integers(0, 65535)
        ),
        max_size=25,
    )
)
@settings(max_examples=150, deadline=None)
def test_arbitrary_segments_never_break_a_connection_object(segments):
    net = Net()
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            seq = open_connection(net, port)
            for ahead, ack, flags, payload, window in segments:
                net.guest.send_tcp(
                    GATEWAY, (5000, port), 101 + ahead, seq + 1 + ack & 0xFFFF_FFFF, flags, payload, window
                )
                net.loop.settle()
                net.loop.poll(0)
                net.loop.advance(0.3)
            assert net.user.tcp.budget.left <= tcp_proxy.BUDGET
    finally:
        net.user.close()
        assert net.user.tcp.budget.left == tcp_proxy.BUDGET
