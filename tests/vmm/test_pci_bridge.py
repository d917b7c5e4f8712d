"""Bridges: buses behind them, what they pass on; and what firmware does to a whole tree."""

from __future__ import annotations

import pytest

from vmonty.vmm.boot import pci_setup
from vmonty.vmm.boot.dsdt import Window
from vmonty.vmm.hw.pci import PcieRootPort

from .pci_driver import Latch, PciHost, plain

LOW, HIGH = Window(0xC000_0000, 0xCFFF_FFFF), Window(0x8_0000_0000, 0x8_FFFF_FFFF)


class Tree(PciHost):
    """Slot 2: a root port with a device behind it; slot 3: a device on the root bus."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.port, self.behind, self.beside = PcieRootPort("port", 2), plain(), plain()
        for device, value in ((self.behind, 0xBB), (self.beside, 0xAA)):
            device.add_bar(0, Latch(value), 4096)
            device.add_bar(1, Latch(value), 32, io=True)
            device.add_bar(2, Latch(value), 1 << 14, wide=True)
        self.bus.add(self.port, slot=2)
        self.bus.add(self.beside, slot=3)
        self.port.secondary.add(self.behind, slot=0)


@pytest.fixture
def tree() -> Tree:
    return Tree()


@pytest.fixture
def ready(tree: Tree) -> Tree:
    pci_setup.assign(tree.bus, LOW, HIGH, lambda slot, pin: 16 + slot + pin)
    return tree


def test_the_bus_behind_appears_with_its_number(tree: Tree) -> None:
    assert tree.config(2, 0x0E, 1) == 1, "a bridge's header"
    assert tree.config(0, 0, 4, bus=1) == 0xFFFF_FFFF
    tree.config(2, 0x18, 4, 0x00_01_01_00)
    assert tree.config(0, 0, 4, bus=1) == 0x5678_1234
    assert tree.config(1, 0, 4, bus=1) == 0xFFFF_FFFF


def test_firmware_gives_every_bar_an_address(ready: Tree) -> None:
    seen = set()
    for bus, slot, value in ((0, 3, 0xAA), (1, 0, 0xBB)):
        memory = ready.config(slot, 0x10, 4, bus=bus)
        ports = ready.config(slot, 0x14, 4, bus=bus) & ~3
        wide = ready.config(slot, 0x18, 4, bus=bus) & ~15 | ready.config(slot, 0x1C, 4, bus=bus) << 32
        assert LOW.first <= memory <= LOW.last
        assert ready.mmio.read(memory, 1) == ready.mmio.read(wide, 1) == ready.ports.read(ports, 1) == value
        assert (wide >= HIGH.first) == (bus == 0), "64-bit BARs behind a bridge go to its one window"
        seen |= {memory, ports, wide}
        assert ready.config(slot, 0x3C, 1, bus=bus) == 16 + (3 if bus == 0 else 2)
    assert len(seen) == 6


@pytest.mark.parametrize(("command", "passes"), [(7, True), (5, False), (0, False)])
def test_a_bridge_passes_on_what_its_command_register_lets(ready: Tree, command: int, passes: bool) -> None:
    memory = ready.config(0, 0x10, 4, bus=1)
    ready.config(2, 4, 2, command)
    assert (ready.mmio.find(memory, 1) is not None) == passes


def test_outside_its_window_nothing_passes(ready: Tree) -> None:
    ready.config(0, 0x10, 4, 0xCFF0_0000, bus=1)
    assert ready.mmio.find(0xCFF0_0000, 1) is None
    ready.config(2, 0x20, 4, 0xCFF0_CFF0)
    assert ready.mmio.read(0xCFF0_0000, 1) == 0xBB


def test_interrupts_go_through(ready: Tree) -> None:
    ready.behind.set_irq(1)
    ready.port.set_irq(1)
    ready.behind.set_irq(0)
    assert ready.lines == [(2, 0, 1)], "the pin of the slot stays up while the port itself raises it"
    ready.port.set_irq(0)
    assert ready.lines == [(2, 0, 1), (2, 0, 0)]


def test_messages_need_the_bridge_to_be_bus_master() -> None:
    tree = Tree()
    msix = tree.behind.add_msix(1, 4)
    pci_setup.assign(tree.bus, LOW, HIGH, lambda slot, pin: 0)
    table = tree.config(0, 0x20, 4, bus=1)
    for word, value in enumerate((0xFEE0_0000, 0, 0x41, 0)):
        tree.mmio.write(table + 4 * word, 4, value)
    tree.config(0, 0x42, 2, 0x8000, bus=1)
    tree.config(0, 4, 2, 7, bus=1)
    msix.notify(0)
    assert tree.messages == []
    tree.config(2, 4, 2, 7)
    msix.notify(0)
    assert tree.messages == [(0xFEE0_0000, 0x41)]


def test_the_express_capability(ready: Tree) -> None:
    assert ready.config(2, 0x40, 1) == 0x10
    assert ready.config(2, 0x42, 2) == 0x0142, "version 2, a root port with a slot"
    assert ready.config(2, 0x5A, 2) & 0x40, "something is in the slot"


def test_what_does_not_fit_stays_without_address() -> None:
    host, device = PciHost(), plain()
    device.add_bar(0, Latch(), 1 << 28)
    device.add_bar(1, Latch(), 1 << 28)
    host.bus.add(device, slot=3)
    pci_setup.assign(host.bus, LOW, HIGH, lambda slot, pin: 0)
    assert [host.config(3, offset, 4) for offset in (0x10, 0x14)] == [0xC000_0000, 0]
