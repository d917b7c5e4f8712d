"""Devices that come and go: the registers, what a hostile guest may do with them, and Linux on both boards."""

from __future__ import annotations

import contextlib
import random
import re
import threading
from pathlib import Path
from typing import Any, cast

import pytest

import vmonty
from vmonty.base.errors import DiskImageError, UsageError, VmontyError
from vmonty.cli.run import Session
from vmonty.cli.terminal import Console
from vmonty.kvm.api import System
from vmonty.vm.build import Build
from vmonty.vm.plan import Plan
from vmonty.vmm import accel, boards
from vmonty.vmm.catalogue import TYPES
from vmonty.vmm.hotplug import GPE_PORT, SLOTS_PORT, Addition, HotPlug, plug, slots_of
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
from vmonty.vmm.inspection import StateError
from vmonty.vmm.machine import Config, Machine
from vmonty.vmm.outcome import Ending
from vmonty.vmm.peripherals import Disk

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


def test_who_waits_for_a_removal_hears_of_the_end(machine: Machine) -> None:
    slots, complaints = slots_of(machine), list[str]()
    slot = plug(machine, "device", "virtio-rng")

    def remove() -> None:
        try:
            slots.remove(slot, LIMIT_S)
        except VmontyError as error:
            complaints.append(str(error))

    waiting = threading.Thread(target=remove)
    waiting.start()
    while not machine.ports.read(SLOTS_PORT + SLOTS_DOWN, 4):  # it has asked the guest
        assert waiting.is_alive()
    slots.end()
    waiting.join(LIMIT_S)
    assert complaints == ["the machine has ended, or was reset, before it let go of virtio-rng in slot 2"]


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


def _random_device(machine: Machine) -> None:
    TYPES.create("virtio-rng", "device").realize(machine)


def _kernel(folder: Path, program: str) -> Path:
    path = folder / "kernel"
    path.write_bytes(kernels.kernel(program))
    return path


def test_two_that_come_at_once_have_two_numbers(machine: Machine) -> None:
    slots, numbers = slots_of(machine), list[int]()

    def second(made: Machine, number: int) -> None:
        numbers.append(number)
        _random_device(made)

    other = threading.Thread(target=slots.add, args=(Addition(second, "virtio-rng"),))

    def first(made: Machine, number: int) -> None:
        other.start()
        other.join(0.2)  # it gets as far as it can
        second(made, number)

    slots.add(Addition(first, "virtio-rng"))
    other.join(LIMIT_S)
    assert numbers == [0, 1]
    assert list(slots.devices()) == [2, 3]


def test_a_guest_that_ejects_as_soon_as_it_can(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    slots, closed = slots_of(machine), list[str]()

    class Lock:
        """When it is free the guest ejects everything, once."""

        lock, depth, armed = threading.RLock(), 0, True

        def __enter__(self) -> None:
            self.lock.acquire()
            self.depth += 1

        def __exit__(self, *_: object) -> None:
            self.depth -= 1
            self.lock.release()
            if self.armed and not self.depth:
                self.armed = False
                machine.ports.write(SLOTS_PORT + SLOTS_EJECT, 4, 0xFFFF_FFFF)

    monkeypatch.setattr(slots, "_lock", Lock())
    slots.add(Addition(lambda made, _: _random_device(made), "virtio-rng", lambda: closed.append("the image")))
    assert slots.devices() == {}
    assert closed == ["the image"]
    machine.close()
    assert closed == ["the image"]


@pytest.mark.parametrize("error", [OSError("stuck"), VmontyError("stuck"), ValueError("stuck")], ids=repr)
def test_a_device_that_does_not_close_well_is_gone(machine: Machine, error: Exception) -> None:
    slots, closed = slots_of(machine), list[str]()

    def fail() -> None:
        raise error

    def make(made: Machine, _: int) -> None:
        made.resources.callback(fail)
        _random_device(made)

    slot = slots.add(Addition(make, "virtio-rng", lambda: closed.append("the image")))
    plugged = slots._plugged[slot]
    # A bug of ours ends the machine, which its vCPU's thread sees to.
    with pytest.raises(ValueError) if isinstance(error, ValueError) else contextlib.nullcontext():
        machine.ports.write(SLOTS_PORT + SLOTS_EJECT, 4, 1 << slot)
    assert closed == ["the image"]
    assert plugged.gone.is_set()
    assert "stuck" in plugged.complaint


def test_a_reset_while_an_image_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left behind in the machine that is gone, and the image is free again."""
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    reset, opened = threading.Event(), Disk.open

    def slow(disk: Disk) -> Any:
        backend = opened(disk)
        vm.reset()
        assert reset.wait(LIMIT_S)
        return backend

    def loops() -> int:
        return sum(thread.name.startswith("disk ") for thread in threading.enumerate())

    before = loops()
    with vmonty.VM(kernel=_kernel(tmp_path, kernels.SPIN), accel="soft", memory=kernels.MEMORY) as vm:
        vm.on("reset", lambda _: reset.set())
        vm.start()
        with monkeypatch.context() as patch:
            patch.setattr(Disk, "open", slow)
            with pytest.raises(StateError, match="was reset"):
                vm.plug(disk=f"{image},format=raw")
        assert (vm.devices(), loops()) == ({}, before)
        slot = vm.plug(disk=f"{image},format=raw")
        assert vm.devices() == {slot: "virtio-blk"}
    assert loops() == before


def test_a_session_takes_nothing_for_a_machine_that_has_ended(tmp_path: Path) -> None:
    plan = Plan(_kernel(tmp_path, kernels.RESET), memory=kernels.MEMORY, accel="soft")
    choice = accel.choose(plan.accel)
    with contextlib.closing(Build(plan)) as build, choice.system as system:
        session = Session(choice, build, True, 0)
        session.machine = machine = build.machine(system, bytes)
        assert session._loop(cast(Console, None)).ending is Ending.RESET
        with pytest.raises(StateError, match="has ended"):
            plug(machine, "device", "virtio-rng")


def test_what_is_being_added_at_the_end_is_in_the_next_machine(tmp_path: Path) -> None:
    plan = Plan(_kernel(tmp_path, kernels.SPIN), memory=kernels.MEMORY)
    under_way, go_on, closed = threading.Event(), threading.Event(), list[str]()

    def make(made: Machine, _: int) -> None:
        under_way.set()
        assert go_on.wait(LIMIT_S)
        _random_device(made)
        made.resources.callback(closed.append, "a device")

    with contextlib.closing(Build(plan)) as build, System(FakeKvm()) as system:
        machine = build.machine(system, bytes)
        adding = threading.Thread(target=slots_of(machine).add, args=(Addition(make, "virtio-rng"),), daemon=True)
        ending = threading.Thread(target=build.end, args=(machine,), daemon=True)
        adding.start()
        assert under_way.wait(LIMIT_S)
        ending.start()
        ending.join(0.2)
        assert ending.is_alive()
        go_on.set()
        for thread in (adding, ending):
            thread.join(LIMIT_S)
        assert closed == ["a device"]
        with build.machine(system, bytes) as following:
            assert slots_of(following).devices() == {2: "virtio-rng"}


def test_what_went_is_gone_after_a_reset(tmp_path: Path) -> None:
    """Also a device of the command line, whose slot another one may have by then."""
    plan = Plan(
        _kernel(tmp_path, kernels.SPIN), memory=kernels.MEMORY,
        devices=("virtio-rng", "virtio-balloon", "virtio-rng"),
    )  # fmt: skip
    with contextlib.closing(Build(plan)) as build, System(FakeKvm()) as system:
        machine = build.machine(system, bytes)
        assert slots_of(machine).devices() == {2: "virtio-rng", 3: "virtio-balloon", 4: "virtio-rng"}
        machine.ports.write(SLOTS_PORT + SLOTS_EJECT, 4, 1 << 2 | 1 << 3)
        assert plug(machine, "net", "user") == 2
        for _ in range(2):
            build.end(machine)
            machine = build.machine(system, bytes)
            assert slots_of(machine).devices() == {2: "virtio-net", 4: "virtio-rng"}
            assert machine.balloon is None
        # The slot is empty, not given back.
        machine.ports.write(SLOTS_PORT + SLOTS_EJECT, 4, 1 << 2)
        build.end(machine)
        with build.machine(system, bytes) as last:
            assert slots_of(last).devices() == {4: "virtio-rng"}


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
