"""Tap interfaces: what goes wrong is told; with privileges the frames are Linux's."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time

import pytest
from tests.vmm.net.namespace import cabled, missing

from vmonty.base.errors import UsageError
from vmonty.vmm.eventloop import EventLoop
from vmonty.vmm.net import tap
from vmonty.vmm.net.backend import Accepts, Gso, NetBackend, Offload
from vmonty.vmm.net.hub import Hub

REASON = missing()


@pytest.mark.parametrize("name", ["", "x" * 16, "a/b", "a\0b"])
def test_an_impossible_name_is_refused(name):
    with pytest.raises(UsageError, match="interface name"):
        tap.open_tap(name)


@pytest.mark.parametrize(
    ("number", "hint"), [(errno.ENOENT, "modprobe tun"), (errno.EACCES, "--net user"), (errno.EPERM, "--net user")]
)
def test_without_the_device_the_error_says_what_to_do(monkeypatch, number, hint):
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tap.os, "open", refuse)
    with pytest.raises(UsageError, match=hint):
        tap.open_tap("tap0")


def test_without_privileges_the_error_names_the_command(monkeypatch, tmp_path):
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    real = os.open
    monkeypatch.setattr(tap.os, "open", lambda path, flags: real("/dev/null", os.O_RDWR))
    monkeypatch.setattr(tap.fcntl, "ioctl", refuse)
    with pytest.raises(UsageError, match="ip tuntap add tap7 mode tap user"):
        tap.open_tap("tap7")


class Answering(NetBackend):
    """Keeps what Linux sends."""

    offloads = True

    def __init__(self) -> None:
        self.seen: list[tuple[bytes, Offload | None]] = []

    def start(self, receive):
        self.receive = receive

    def send(self, frame, offload):
        self.seen.append((b"".join(frame), offload))

    def ready(self):
        raise AssertionError("nothing was refused")

    def close(self):
        self.seen.clear()


@pytest.mark.skipif(bool(REASON), reason=REASON)
def test_linux_leaves_checksums_undone_for_one_who_takes_them():
    loop, backend = EventLoop("tap under test"), Answering()
    loop.start()
    try:
        with cabled(loop, backend, offloads=True, address="10.0.2.15/24") as guest:
            guest.run("ip", "neigh", "add", "10.0.2.9", "lladdr", "52:54:00:00:00:01", "dev", "eth0")
            guest.run("python3", "-c", "import socket;socket.socket(2, 2).sendto(b'data', ('10.0.2.9', 9))")
            deadline = time.monotonic() + 20
            while not any(frame[23:24] == b"\x11" for frame, _ in backend.seen) and time.monotonic() < deadline:
                loop.run(lambda: None)
            found = [
                offload for frame, offload in backend.seen if frame[23:24] == b"\x11" and frame[12:14] == b"\x08\0"
            ]
        assert found[0] == Offload(True, 34, 6, Gso.NONE, 0, 0)
    finally:
        loop.stop()


@pytest.mark.skipif(bool(REASON), reason=REASON)
def test_two_stations_at_a_hub_talk():
    loop, hub = EventLoop("hub under test"), Hub()
    loop.start()
    fd, name = tap.open_tap("vmhub%d")
    second = tap.TapBackend(fd, loop)
    port = hub.port()
    port.start(lambda frame, offload: (second.send([frame], offload), True)[1])
    second.start(lambda frame, offload: (port.send([frame], offload), True)[1])
    try:
        os.system(f"ip addr add 10.99.7.1/24 dev {name} && ip link set {name} up")
        with cabled(loop, hub.port(), offloads=False, address=None) as guest:
            guest.run("ip", "addr", "add", "10.99.7.2/24", "dev", "eth0")
            assert "2 packets received" in guest.run("busybox", "ping", "-c2", "-i0.05", "10.99.7.1")
    finally:
        second.close()
        loop.stop()


@pytest.mark.skipif(bool(REASON), reason=REASON)
def test_what_waits_for_a_machine_that_has_ended_is_not_the_next_ones():
    """Its driver may have taken checksums that are not made."""
    loop, cable = EventLoop("tap under test"), tap.TapCable("vmstale%d")
    loop.start()
    seen: list[bytes] = []
    came = threading.Event()

    def receive(frame, _):
        seen.append(bytes(frame[42:]))
        if seen[-1] == b"new":
            came.set()
        return True

    with cable, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        os.system(
            f"ip addr add 10.99.8.1/24 dev {cable.name} && ip link set {cable.name} up && "
            f"ip neigh add 10.99.8.2 lladdr 52:54:00:00:00:01 dev {cable.name}"
        )
        first = cable.plug(loop)
        host.sendto(b"old", ("10.99.8.2", 9))
        first.close()
        with contextlib.closing(cable.plug(loop)) as second:
            second.start(receive)
            host.sendto(b"new", ("10.99.8.2", 9))
            assert came.wait(20)
            assert b"old" not in seen
    loop.stop()


@pytest.mark.skipif(bool(REASON), reason=REASON)
def test_an_interface_that_is_deleted_under_us_raises_nothing():
    loop, cable = EventLoop("tap under test"), tap.TapCable("vmgone%d")
    with cable, contextlib.closing(cable.plug(loop)) as backend:
        os.system(f"ip link del {cable.name}")
        backend.start(lambda frame, offload: True)
        backend.guest_accepts(Accepts.CHECKSUM)
        backend.send([bytes(60)], None)
    with contextlib.closing(cable.plug(loop)) as nowhere:
        nowhere.start(lambda frame, offload: True)
        nowhere.send([bytes(60)], None)
    loop.stop()
