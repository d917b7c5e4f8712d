"""The user network against Linux's TCP/IP stack and ordinary programs."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.vmm.net.namespace import Namespace, cabled, missing, resolver, web_server

from vmonty.testing.net import LossyBackend
from vmonty.vmm.eventloop import EventLoop
from vmonty.vmm.net.user.backend import UserBackend
from vmonty.vmm.net.user.config import UserConfig

REASON = missing()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)

ADDRESS = "10.0.2.15/24"

# Answers with the digest of all that came, once the other side has closed its half.
DIGEST_SERVER = """
import hashlib, socket
with socket.create_server(("", 8000)) as server:
    client, _ = server.accept()
    digest = hashlib.sha256()
    while data := client.recv(65536):
        digest.update(data)
    client.sendall(digest.hexdigest().encode())
    client.close()
"""


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    made = EventLoop("network under test")
    made.start()
    yield made
    made.stop()


class Network:
    """A user network and the namespace behind it."""

    def __init__(self, user: UserBackend, guest: Namespace) -> None:
        self.user, self.guest = user, guest


@pytest.fixture(params=[True, False], ids=["offloads", "plain"])
def network(request: pytest.FixtureRequest, loop: EventLoop, tmp_path: Path) -> Iterator[Network]:
    (tmp_path / "tftp").mkdir()
    config = UserConfig.parse(
        f"hostname=guest,tftp={tmp_path / 'tftp'},bootfile=pxe.0,"
        "hostfwd=tcp:127.0.0.1:0-:8000,hostfwd=udp:127.0.0.1:0-:9000"
    )
    user = UserBackend(config, loop)
    try:
        with cabled(loop, user, offloads=request.param, address=ADDRESS) as guest:
            yield Network(user, guest)
    finally:
        user.close()


def file_of(path: Path, size: int) -> str:
    data = os.urandom(size)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def wait_for_port(guest: Namespace, port: int) -> None:
    deadline = time.monotonic() + 20
    while f":{port:04X} 00000000:0000" not in guest.run("cat", "/proc/net/tcp", "/proc/net/udp"):
        assert time.monotonic() < deadline
        time.sleep(0.02)  # there is no event for another program's listen()


def test_the_gateway_and_the_name_server_answer_pings(network):
    for address in ("10.0.2.2", "10.0.2.3"):
        assert "3 packets received" in network.guest.run("busybox", "ping", "-c3", "-i0.05", "-s3000", address)


def test_a_download_from_the_host_arrives_whole(network, tmp_path):
    digest = file_of(tmp_path / "file", 64 << 20)
    with web_server(tmp_path) as port:
        output = network.guest.run("sh", "-c", f"busybox wget -q -O - http://10.0.2.2:{port}/file | sha256sum")
    assert output.split()[0] == digest


def test_an_upload_to_the_host_arrives_whole(network, tmp_path):
    digest = file_of(tmp_path / "file", 32 << 20)
    put = (
        "import http.client,sys;c=http.client.HTTPConnection('10.0.2.2',int(sys.argv[1]));"
        "c.request('PUT','/',open(sys.argv[2],'rb'),{'Content-Length':str(32<<20)});assert c.getresponse().status==201"
    )
    with web_server(tmp_path) as port:
        network.guest.run("python3", "-c", put, str(port), str(tmp_path / "file"))
    assert hashlib.sha256((tmp_path / "put").read_bytes()).hexdigest() == digest


def test_a_closed_port_of_the_host_refuses(network):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        command = f"busybox nc 10.0.2.2 {taken.getsockname()[1]}"
        assert "refused" in network.guest.run("sh", "-c", f"{command} 2>&1; true")


def test_a_dhcp_client_gets_the_networks_settings(network):
    script = network.user.config.tftp / "script"  # type: ignore[operator]
    script.write_text('#!/bin/sh\n[ "$1" = bound ] && env\nexit 0\n')
    script.chmod(0o755)
    output = network.guest.run("busybox", "udhcpc", "-f", "-q", "-n", "-i", "eth0", "-s", str(script))
    settings = dict(line.split("=", 1) for line in output.splitlines() if "=" in line)
    assert settings["ip"] == "10.0.2.15"
    assert settings["router"] == settings["siaddr"] == settings["serverid"] == "10.0.2.2"
    assert (settings["dns"], settings["mask"], settings["hostname"]) == ("10.0.2.3", "24", "guest")
    assert settings["boot_file"] == "pxe.0"


def test_names_are_asked_of_the_hosts_resolver(network):
    with resolver(bytes((192, 0, 2, 7))) as address:
        network.user.dns.fixed = [address]
        assert "192.0.2.7" in network.guest.run("busybox", "nslookup", "some.example", "10.0.2.3")


@pytest.mark.parametrize("block", [512, 1428, 8192])
def test_tftp_serves_a_file(network, tmp_path, block):
    digest = file_of(tmp_path / "tftp" / "image", 700_001)
    target = tmp_path / "fetched"
    network.guest.run("busybox", "tftp", "-g", "-b", str(block), "-r", "image", "-l", str(target), "10.0.2.2")
    assert hashlib.sha256(target.read_bytes()).hexdigest() == digest


def test_a_forwarded_port_reaches_the_guest_both_ways(network):
    server = network.guest.start("python3", "-c", DIGEST_SERVER)
    wait_for_port(network.guest, 8000)
    data = os.urandom(5 << 20)
    with socket.create_connection(("127.0.0.1", network.user.forwards[0].port), timeout=60) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)  # half closed: the answer comes after the end
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    assert answer.decode() == hashlib.sha256(data).hexdigest()
    server.communicate(timeout=60)


def test_a_forwarded_port_nobody_listens_on_is_reset(network):
    with (
        socket.create_connection(("127.0.0.1", network.user.forwards[0].port), timeout=60) as client,
        pytest.raises(ConnectionResetError),
    ):
        client.recv(1)


def test_datagrams_pass_both_ways_also_large_ones(network):
    echo = (
        "import socket;s=socket.socket(2,2);s.bind(('',9000))\n"
        "for _ in range(3):\n d,p=s.recvfrom(65535);s.sendto(d[::-1],p)"
    )
    server = network.guest.start("python3", "-c", echo)
    wait_for_port(network.guest, 9000)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(20)
        client.connect(("127.0.0.1", network.user.forwards[1].port))
        for size in (1, 1472, 20_000):
            data = os.urandom(size)
            client.send(data)
            assert client.recv(65535) == data[::-1]
    server.communicate(timeout=60)


@pytest.mark.parametrize("loss", [0.01, 0.05])
def test_streams_survive_a_cable_that_loses_and_reorders(loop, tmp_path, loss):
    digest = file_of(tmp_path / "file", 4 << 20)
    user = UserBackend(UserConfig.parse("hostfwd=tcp:127.0.0.1:0-:8000"), loop)
    lossy = LossyBackend(user, seed=7, loss=loss, reorder=0.05)
    try:
        with cabled(loop, lossy, offloads=True, address=ADDRESS) as guest, web_server(tmp_path) as port:
            output = guest.run("sh", "-c", f"busybox wget -q -O - http://10.0.2.2:{port}/file | sha256sum")
            assert output.split()[0] == digest
            server = guest.start("python3", "-c", DIGEST_SERVER)
            wait_for_port(guest, 8000)
            with socket.create_connection(("127.0.0.1", user.forwards[0].port), timeout=60) as client:
                client.sendall((tmp_path / "file").read_bytes())
                client.shutdown(socket.SHUT_WR)
                with client.makefile() as answer:
                    assert answer.read() == digest
            server.communicate(timeout=60)
    finally:
        user.close()
    assert lossy.lost
    assert lossy.reordered


def test_a_restricted_guest_reaches_neither_host_nor_world(loop, tmp_path):
    user = UserBackend(UserConfig(restrict=True), loop)
    try:
        with cabled(loop, user, offloads=True, address=ADDRESS) as guest, web_server(tmp_path) as port:
            assert "1 packets received" in guest.run("busybox", "ping", "-c1", "10.0.2.2")
            assert "refused" in guest.run("sh", "-c", f"busybox wget -q -O - http://10.0.2.2:{port}/ 2>&1; true")
    finally:
        user.close()
