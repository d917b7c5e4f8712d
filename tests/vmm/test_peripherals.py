"""Disks and network cards from the command line's words, and on either kind of board."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmonty.base.errors import UsageError
from vmonty.kvm.api import System
from vmonty.vmm import boards
from vmonty.vmm.block.throttle import Limits
from vmonty.vmm.boards.microvm import Microvm
from vmonty.vmm.boards.pci_host import PciMachine
from vmonty.vmm.machine import Config
from vmonty.vmm.peripherals import Disk, Network

from . import kernels
from .fake_kvm import FakeKvm


@pytest.mark.parametrize(
    ("text", "disk"),
    [
        ("a.img", Disk(Path("a.img"))),
        ("/x/a.img,format=qcow2,ro", Disk(Path("/x/a.img"), "qcow2", read_only=True)),
        ("a,,b.img,snapshot,if=virtio", Disk(Path("a,b.img"), snapshot=True)),
        ("a,bps_rd=1M,bps_wr=512K,iops=9", Disk(Path("a"), limits=Limits(bps_rd=1 << 20, bps_wr=1 << 19, iops=9))),
        ("a,ro=on,snapshot=off,format=raw", Disk(Path("a"), "raw", read_only=True)),
    ],
)
def test_disks(text: str, disk: Disk) -> None:
    assert Disk.parse(text) == disk


@pytest.mark.parametrize(
    "text",
    [
        "", ",ro", "a,format=zip", "a,if=scsi", "a,ro=maybe", "a,size=3", "a,iops=", "a,iops=-1", "a,bps=fast",
        "a,bps=1M,bps_rd=1M", "a,if=ide,iops=3",
    ],
)  # fmt: skip
def test_disks_that_cannot_be(text: str) -> None:
    with pytest.raises(UsageError, match=r"--disk|limit|size"):
        Disk.parse(text)


def test_networks() -> None:
    assert Network.parse("none").kind == "none"
    assert Network.parse("tap,ifname=t0,mac=52:54:00:00:00:07").mac == bytes.fromhex("525400000007")
    made = Network.parse("user,hostfwd=tcp::2222-:22,pcap=/tmp/x,mac=525400000007")
    assert made.user is not None
    assert made.user.forwards[0].guest_port == 22
    assert made.capture == Path("/tmp/x")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "unknown"), ("bridge", "unknown"), ("none,mac=525400000007", "no option"), ("tap,hostfwd=x", "no option"),
        ("user,mac=nonsense", "six bytes"), ("user,mac=ff:ff:ff:ff:ff:ff", "six bytes"), ("user,what=1", "no option"),
    ],
)  # fmt: skip
def test_networks_that_cannot_be(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Network.parse(text)


@pytest.mark.parametrize("board", ["pc", "q35", "microvm"])
def test_devices_find_their_place_and_end_with_the_machine(board: str, image: bytes, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    fake = FakeKvm()
    config = Config(
        image, memory=kernels.MEMORY, machine=board, devices=("virtio-rng", "virtio-balloon,deflate-on-oom=off"),
    )  # fmt: skip
    cards = [Network.parse("user"), Network.parse("none")]
    with Disk.parse(f"{path},snapshot").open() as disk, System(fake) as system:
        with boards.create(system, config, lambda data: None, [disk], networks=cards) as machine:
            if isinstance(machine, PciMachine):
                ids = {device.config_read(2, 2) for device in machine.pci.devices().values()}
                assert {0x1041, 0x1042, 0x1044, 0x1045} <= ids
            else:
                assert isinstance(machine, Microvm)
                assert len(machine.slots) == 4
        disk.write(0, b"still open")
    assert not fake.files


def test_a_full_microvm_says_so(image: bytes) -> None:
    config = Config(image, memory=kernels.MEMORY, machine="microvm", devices=("virtio-rng",) * 17)
    fake = FakeKvm()
    with System(fake) as system, pytest.raises(UsageError, match="slots"):
        boards.create(system, config, lambda data: None)
    assert not fake.files


def test_a_virtio_console_takes_the_terminal(image: bytes) -> None:
    with System(FakeKvm()) as system:
        config = Config(image, memory=kernels.MEMORY, devices=("virtio-console",))
        with boards.create(system, config, lambda data: None) as machine:
            machine.terminal.receive(b"typed")
            assert machine.terminal.backlog() == 5
            assert machine.serial.backlog() == 0


def test_an_image_of_a_kind_that_cannot_be_made(tmp_path: Path) -> None:
    disk = Disk.parse(f"{tmp_path}/x,format=vmdk,size=1M")
    with pytest.raises(UsageError, match="only raw and qcow2 images can be made, not vmdk"):
        disk.open()
    assert list(tmp_path.iterdir()) == []
