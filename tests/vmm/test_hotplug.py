"""Devices that come and go: the registers, what a hostile guest may do with them, and Linux on both boards."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest

import vmonty
from vmonty.base.errors import DiskImageError, UsageError, VmontyError
from vmonty.kvm.api import System
from vmonty.vmm import boards
from vmonty.vmm.hotplug import GPE_PORT, SLOTS_PORT, HotPlug, plug, slots_of
from vmonty.vmm.hw.acpi_hotplug import (
    EVENT_PCI,
    GPE_ENABLE,
    GPE_STATUS,
    SLOTS_DOWN,
    SLOTS_EJECT,
    SLOTS_UP,
    GeneralEvents,
    SlotEvents,
)
from vmonty.vmm.machine import Config, Machine

from . import kernels
from .fake_kvm import FakeKvm

# Of the guest, for one answer on a busy host.
LIMIT_S = 120.0


def test_an_event_raises_the_line_while_it_is_enabled() -> None:
    levels: list[int] = []
    events = GeneralEvents(levels.append)
    events.happen(EVENT_PCI)
    assert (events.read(GPE_STATUS, 2), levels[-1]) == (1 << EVENT_PCI, 0)
    events.write(GPE_ENABLE, 1, 1 << EVENT_PCI)
    assert (events.read(GPE_ENABLE, 1), levels[-1]) == (1 << EVENT_PCI, 1)
    events.write(GPE_STATUS, 1, 1)  # another event's
    assert levels[-1] == 1
    events.write(GPE_STATUS, 1, 1 << EVENT_PCI)
    assert (events.read(GPE_STATUS, 4), levels[-1]) == (1 << 16 + EVENT_PCI, 0)


def test_each_change_is_told_once() -> None:
    ejected: list[int] = []
    slots = SlotEvents(ejected.append)
    slots.came(3)
    slots.came(31)
    slots.shall_go(4)
    assert slots.read(SLOTS_UP, 1) == 0  # a byte of it would lose the rest
    assert slots.read(SLOTS_UP, 4) == 1 << 31 | 1 << 3
    assert slots.read(SLOTS_UP, 4) == 0
    assert slots.read(SLOTS_DOWN, 4) == 1 << 4
    slots.write(SLOTS_EJECT, 4, 1 << 4 | 1)
    assert ejected == [0, 4]


@pytest.fixture
def machine() -> Any:
    with (
        System(FakeKvm()) as system,
        boards.create(system, Config(bytes(kernels.bzimage(b"\xf4")), memory=kernels.MEMORY), bytes) as made,
    ):
        yield made


def test_a_hostile_guest_only_loses_its_devices(machine: Machine) -> None:
    """Chips stay in their slots; nonsense in the registers is nothing."""
    slots = slots_of(machine)
    slot = plug(machine, "device", "virtio-rng")
    chips = slots.chips()
    assert chips == {0, 1}
    chance = random.Random(4)
    for _ in range(2000):
        port = chance.choice((GPE_PORT, SLOTS_PORT)) + chance.randrange(12)
        size = chance.choice((1, 2, 4))
        machine.ports.write(port, size, chance.randrange(1 << 8 * size) & ~(1 << slot))
        machine.ports.read(port, size)
    assert slots.devices() == {slot: "virtio-rng"}
    machine.ports.write(SLOTS_PORT + SLOTS_EJECT, 4, 0xFFFF_FFFF)
    assert slots.devices() == {}
    assert slots.chips() == chips
    assert plug(machine, "device", "virtio-rng") == slot


def test_what_cannot_be_plugged(machine: Machine, tmp_path: Path) -> None:
    before = set(slots_of(machine).devices())
    for kind, options, complaint in (
        ("disk", f"{tmp_path}/none.raw", "none.raw"),
        ("disk", f"{tmp_path}/x,if=ide", "virtio"),
        ("net", "none", "nothing"),
        ("net", "wire", "unknown"),
        ("device", "virtio-console", "cannot be added"),
        ("device", "VGA", "cannot be added"),
        ("device", "isa-debug-exit", "cannot be added"),
        ("device", "virtio-rng,x=1", "no property"),
        ("usb", "", "there are disk, net and device"),
    ):
        with pytest.raises((UsageError, DiskImageError), match=complaint):
            plug(machine, kind, options)
    assert set(slots_of(machine).devices()) == before
    for _ in range(2, 32):
        plug(machine, "device", "virtio-rng")
    with pytest.raises(UsageError, match="no free slot"):
        plug(machine, "device", "virtio-rng")


def test_a_guest_that_does_not_listen(machine: Machine) -> None:
    slot = plug(machine, "device", "virtio-rng")
    with pytest.raises(VmontyError, match="has not let go of virtio-rng in slot 2"):
        slots_of(machine).remove(slot, 0.01)
    with pytest.raises(UsageError, match="slot 9: there is nothing to remove; there is: 2"):
        slots_of(machine).remove(9, 0.01)


def test_a_machine_without_pci() -> None:
    config = Config(bytes(kernels.bzimage(b"\xf4")), memory=kernels.MEMORY, machine="microvm")
    with System(FakeKvm()) as system, boards.create(system, config, bytes) as made:
        with pytest.raises(UsageError, match="microvm has no PCI"):
            plug(made, "device", "virtio-rng")
        assert not isinstance(getattr(made, "hotplug", None), HotPlug)


@pytest.mark.parametrize("board", ["pc", "q35"])
def test_linux_takes_and_gives(board: str, tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(b"it came\n".ljust(1 << 20, b"\0"))
    # Its drivers are loaded by the device that it finds at its start.
    with vmonty.VM(machine=board, accel="soft", devices=["virtio-rng"], timeout=LIMIT_S * 4) as vm:

        def ask(command: str) -> str:
            vm.console.sendline(f"{command}; echo '<''end>'")
            vm.console.expect("<end>", LIMIT_S)
            return vm.console.text

        vm.start()
        vm.console.expect("userspace is up", LIMIT_S)
        (first,) = vm.devices()
        disk = vm.plug(disk=f"{image},format=raw")
        assert "it came\r\n" in ask("until [ -e /dev/vda ]; do usleep 10000; done; head -c 8 /dev/vda")
        ask("echo it went | dd of=/dev/vda conv=fsync")
        net = vm.plug(net="user")
        assert "eth0 is there" in ask("until [ -e /sys/class/net/eth0 ]; do usleep 10000; done; echo eth0 is there")
        assert vm.devices() == {first: "virtio-rng", disk: "virtio-blk", net: "virtio-net"}
        for slot in (disk, net, first):
            vm.unplug(slot, LIMIT_S)
        assert vm.devices() == {}
        assert "devices:0:" in ask("echo devices:$(grep -l 0x1af4 /sys/bus/pci/devices/*/vendor | wc -l):")
        assert image.read_bytes().startswith(b"it went\n")
        again = vm.plug(disk=f"{image},format=raw,ro")
        assert "it went\r\n" in ask("until [ -e /dev/vda ]; do usleep 10000; done; head -c 8 /dev/vda")
        assert list(vm.devices()) == [again]


def test_what_came_is_there_after_a_reset(tmp_path: Path) -> None:
    """In its slot, a card with its address, a disk with what was written even if nobody keeps that."""
    image = tmp_path / "disk.raw"
    image.write_bytes(b"it came\n".ljust(1 << 20, b"\0"))
    with vmonty.VM(accel="soft", machine="pc", devices=["virtio-rng"], timeout=LIMIT_S * 4) as vm:

        def boot() -> None:
            vm.console.expect("userspace is up", LIMIT_S)

        def ask(command: str) -> bytes:
            vm.console.sendline(f"echo $({command}) '<''end>'")
            return vm.console.expect(re.compile(rb"\n([^\n]*?) ?<end>"), LIMIT_S)[1]

        vm.start()
        boot()
        card, second, disk = vm.plug(net="user"), vm.plug(net="user"), vm.plug(disk=f"{image},format=raw,snapshot")
        other = vm.plug(device="virtio-balloon")
        vm.unplug(card, LIMIT_S)
        address = ask("until [ -e /sys/class/net/eth1 ]; do usleep 10000; done; cat /sys/class/net/eth1/address")
        assert address == b"52:54:00:12:34:57"
        ask("until [ -e /dev/vda ]; do usleep 10000; done; echo it went | dd of=/dev/vda conv=fsync")
        before = vm.devices()
        assert before.keys() > {second, disk, other}
        vm.console.sendline("reboot -f")
        boot()
        assert vm.devices() == before
        assert ask("head -c 7 /dev/vda") == b"it went"
        assert ask("cat /sys/class/net/eth0/address") == address
        vm.unplug(disk, LIMIT_S)
        third = vm.plug(net="user")
        assert ask("until [ -e /sys/class/net/eth1 ]; do usleep 10000; done; cat /sys/class/net/eth1/address") == (
            b"52:54:00:12:34:58"
        )
        vm.reset()
        boot()
        assert vm.devices() == {**{slot: name for slot, name in before.items() if slot != disk}, third: "virtio-net"}
        assert ask("ls /dev/vda 2>/dev/null | wc -l") == b"0"
    assert image.read_bytes().startswith(b"it came\n")
