"""A reset makes a new machine on the same network: the host's ports, a tap interface and a capture stay."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.vmm.net.namespace import missing

import vmonty
from vmm import kernels
from vmm.fake_kvm import FakeKvm
from vmonty.base.errors import UsageError
from vmonty.kvm.api import System
from vmonty.vm.build import Build
from vmonty.vm.plan import Plan
from vmonty.vmm.hotplug import SLOTS_PORT, plug, slots_of
from vmonty.vmm.hw.acpi_hotplug import SLOTS_EJECT
from vmonty.vmm.machine import Machine
from vmonty.vmm.peripherals import Network

REASON = missing()
FRAME = b"\xff" * 6 + bytes(54)


class Resets:
    """One machine after another."""

    def __init__(self, folder: Path, *networks: str) -> None:
        kernel = folder / "vmlinuz"
        kernel.write_bytes(kernels.kernel(kernels.SPIN))
        self.build = Build(Plan(kernel, memory=kernels.MEMORY, networks=tuple(map(Network.parse, networks))))
        self.system = System(FakeKvm())
        self.machine = self._next()

    def _next(self) -> Machine:
        return self.build.machine(self.system, bytes)

    def end(self) -> None:
        """What ``Build.end`` does."""
        self.build.end(self.machine)

    def reset(self) -> None:
        """End the machine, and make another."""
        self.end()
        self.machine = self._next()

    def eject(self, slot: int) -> None:
        """What the guest writes when it lets go of the device in *slot*."""
        self.machine.ports.write(SLOTS_PORT + SLOTS_EJECT, 4, 1 << slot)

    @property
    def ports(self) -> list[int]:
        """The forwarded ones."""
        return [forward.port for network in self.machine.networks for forward in network.forwards]

    def close(self) -> None:
        """End all."""
        self.end()
        self.build.close()
        self.system.close()


@contextlib.contextmanager
def resets(folder: Path, *networks: str) -> Iterator[Resets]:
    with contextlib.closing(Resets(folder, *networks)) as made:
        yield made


def taken(port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> bool:
    """Can nobody else have *port* of the loopback?"""
    with socket.socket(socket.AF_INET, kind) as other:
        try:
            other.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def test_forwarded_ports_stay_open(tmp_path: Path) -> None:
    with resets(
        tmp_path, "user,hostfwd=tcp:127.0.0.1:0-:22,hostfwd=udp:127.0.0.1:0-:53", "none", "user,hostfwd=::0-:80"
    ) as made:
        before = made.ports
        made.end()
        assert taken(before[0])
        assert taken(before[1], socket.SOCK_DGRAM)
        with socket.create_connection(("127.0.0.1", before[0]), 20):  # it waits for the next one's guest
            made.machine = made._next()
            assert made.ports == before
        made.reset()
        assert made.ports == before
    assert not taken(before[0])


def test_a_capture_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "dump"
    with resets(tmp_path, f"user,pcap={file}") as made:
        for count in range(1, 4):
            made.machine.networks[0].send([FRAME], None)
            made.reset()
            assert file.read_bytes().count(FRAME) == count


def test_nothing_keeps_the_machine_before(tmp_path: Path) -> None:
    with resets(tmp_path, "user,hostfwd=tcp:127.0.0.1:0-:22") as made:
        before = weakref.ref(made.machine)
        made.reset()
        gc.collect()
        assert before() is None


def test_a_card_that_is_removed_gives_its_ports_back(tmp_path: Path) -> None:
    with resets(tmp_path, "user,hostfwd=tcp:127.0.0.1:0-:22") as made:
        (port,) = made.ports
        (slot,) = slots_of(made.machine).devices()
        made.eject(slot)
        assert not taken(port)
        assert plug(made.machine, "net", f"user,hostfwd=tcp:127.0.0.1:{port}-:22") == slot
        for _ in range(2):
            made.reset()
            assert made.ports == [port]
        made.eject(slot)
        assert not taken(port)
        made.reset()
        assert made.ports == []


def test_a_card_that_came_while_it_ran_keeps_its_ports(tmp_path: Path) -> None:
    with resets(tmp_path) as made:
        plug(made.machine, "net", f"user,hostfwd=tcp:127.0.0.1:0-:22,pcap={tmp_path / 'dump'}")
        before = made.ports
        made.end()
        assert taken(before[0])
        made.machine = made._next()
        assert made.ports == before
        with pytest.raises(UsageError, match="cannot be had"):
            plug(made.machine, "net", f"user,hostfwd=tcp:127.0.0.1:{before[0]}-:22")
    assert not taken(before[0])


def test_the_ports_of_a_captured_network_are_told(tmp_path: Path) -> None:
    (tmp_path / "vmlinuz").write_bytes(kernels.kernel(kernels.SPIN))
    net = f"user,hostfwd=tcp:127.0.0.1:0-:22,pcap={tmp_path / 'dump'}"
    with vmonty.VM(kernel=tmp_path / "vmlinuz", accel="soft", memory=kernels.MEMORY, net=net) as vm:
        (port,) = vm.forwarded_ports
        assert taken(port)


@pytest.mark.skipif(bool(REASON), reason=REASON)
def test_a_tap_interface_stays(tmp_path: Path) -> None:
    name = f"vmt{os.getpid()}"
    with resets(tmp_path, f"tap,ifname={name}") as made:
        before = socket.if_nametoindex(name)
        made.end()
        assert socket.if_nametoindex(name) == before
        made.machine = made._next()
        made.reset()
        assert socket.if_nametoindex(name) == before
        os.system(f"ip link del {name}")
        made.reset()  # it is made again, as at the start
        assert socket.if_nametoindex(name) != before
    assert name not in [found for _, found in socket.if_nameindex()]
