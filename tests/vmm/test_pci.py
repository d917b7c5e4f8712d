"""PCI functions and buses, as a driver meets them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmonty.base.errors import UsageError
from vmonty.vmm.hw.pci import Ecam, Msix

from .pci_driver import Latch, PciHost, plain

COMMAND, STATUS = 4, 6


@pytest.fixture
def host() -> PciHost:
    return PciHost()


def test_enumeration_finds_what_is_plugged_in(host: PciHost) -> None:
    host.bus.add(plain(), slot=3)
    found = {slot: host.config(slot, 0, 4) for slot in range(32)}
    assert {slot for slot, identity in found.items() if identity != 0xFFFF_FFFF} == {3}
    assert found[3] == 0x5678_1234
    assert host.config(3, 8, 4) >> 8 == 0x0880_00
    assert host.config(3, 0x3D, 1) == 1
    assert host.config(3, 0, 4, bus=1) == 0xFFFF_FFFF, "there is no second bus"


def test_identity_cannot_be_written(host: PciHost) -> None:
    host.bus.add(plain(), slot=3)
    for offset in (0, 8, 0x2C, 0x34):
        before = host.config(3, offset, 4)
        host.config(3, offset, 4, before ^ 0xFFFF_FFFF)
        assert host.config(3, offset, 4) == before
    host.config(3, 0x3C, 1, 11)
    assert host.config(3, 0x3C, 1) == 11, "the interrupt line is a note of the firmware's"


@pytest.mark.parametrize("size", [16, 4096, 1 << 20])
def test_a_bar_tells_its_size_and_decodes_where_it_is_put(host: PciHost, size: int) -> None:
    device, latch = plain(), Latch(0x55)
    device.add_bar(0, latch, size)
    host.bus.add(device, slot=3)
    assert host.size_bar(3, 0) == size
    host.config(3, 0x10, 4, 0xE000_0000)
    assert host.mmio.find(0xE000_0000, 4) is None, "not before memory space is enabled"
    host.config(3, COMMAND, 2, 2)
    assert host.mmio.read(0xE000_0000, 1) == 0x55
    assert host.mmio.find(0xE000_0000 + size, 1) is None
    host.config(3, 0x10, 4, 0xE800_0000)
    assert host.mmio.find(0xE000_0000, 1) is None
    host.mmio.write(0xE800_0004, 4, 7)
    assert latch.writes == [(4, 4, 7)]
    host.config(3, COMMAND, 2, 0)
    assert host.mmio.find(0xE800_0000, 1) is None


def test_a_port_bar(host: PciHost) -> None:
    device = plain()
    device.add_bar(2, Latch(0xAA), 32, io=True)
    host.bus.add(device, slot=3)
    assert host.config(3, 0x18, 4) == 1
    assert host.size_bar(3, 2) == 32
    host.config(3, 0x18, 4, 0xC000)
    host.config(3, COMMAND, 2, 1)
    assert host.ports.read(0xC01F, 1) == 0xAA
    host.config(3, 0x18, 4, 0x1_C000)
    assert host.ports.find(0xC000, 1) is None, "beyond the 64 KiB of ports nothing decodes"


def test_a_64_bit_bar(host: PciHost) -> None:
    device, moves = plain(), []
    device.add_bar(4, Latch(1), 1 << 14, wide=True, prefetchable=True, moved=moves.append)
    host.bus.add(device, slot=3)
    assert host.config(3, 0x20, 4) == 0xC
    host.config(3, 0x24, 4, 0xFFFF_FFFF)
    assert host.config(3, 0x24, 4) == 0xFFFF_FFFF
    host.config(3, 0x20, 4, 0)
    host.config(3, 0x24, 4, 0x10)
    host.config(3, COMMAND, 2, 2)
    assert host.mmio.read(0x10_0000_0000, 1) == 1
    host.config(3, COMMAND, 2, 0)
    assert moves == [0x10_0000_0000, None]


def test_of_two_bars_at_one_place_the_first_answers_until_it_goes(host: PciHost) -> None:
    for slot, value in ((3, 0x33), (4, 0x44)):
        device = plain()
        device.add_bar(0, Latch(value), 4096)
        host.bus.add(device, slot=slot)
        host.config(slot, 0x10, 4, 0xE000_0000)
        host.config(slot, COMMAND, 2, 2)
    assert host.mmio.read(0xE000_0000, 1) == 0x33
    host.config(3, COMMAND, 2, 0)
    assert host.mmio.read(0xE000_0000, 1) == 0x44


def test_a_rom_has_its_own_switch(host: PciHost) -> None:
    device = plain()
    device.add_rom(Latch(0xAA55), 4096)
    host.bus.add(device, slot=3)
    host.config(3, COMMAND, 2, 2)
    host.config(3, 0x30, 4, 0xE000_0000)
    assert host.mmio.find(0xE000_0000, 2) is None
    host.config(3, 0x30, 4, 0xE000_0001)
    assert host.mmio.read(0xE000_0000, 2) == 0xAA55


@pytest.mark.parametrize("size", [0, 8, 24, 4097])
def test_a_bar_of_an_impossible_size(size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        plain().add_bar(0, Latch(), size)


def test_capabilities_are_linked(host: PciHost) -> None:
    device = plain()
    first = device.add_capability(9, b"\x10\x20\x30", b"\0\xff\0")
    second = device.add_capability(9, bytes(6))
    host.bus.add(device, slot=3)
    assert host.config(3, STATUS, 2) & 0x10
    assert host.config(3, 0x34, 1) == first == 0x40
    assert host.config(3, first, 2) == second << 8 | 9
    assert second % 4 == 0
    assert host.config(3, second + 1, 1) == 0
    host.config(3, first, 4, 0xFFFF_FFFF)
    host.config(3, first + 4, 1, 0xFF)
    assert host.config(3, first, 4) == 0xFF10_0009 | second << 8
    assert host.config(3, first + 4, 1) == 0x30


def test_intx_and_its_disable_bit(host: PciHost) -> None:
    device = plain(interrupt_pin=2)
    host.bus.add(device, slot=3)
    device.set_irq(1)
    device.set_irq(1)
    assert host.lines == [(3, 1, 1)]
    assert host.config(3, STATUS, 2) & 8
    host.config(3, COMMAND, 2, 1 << 10)
    assert host.lines == [(3, 1, 1), (3, 1, 0)]
    assert host.config(3, STATUS, 2) & 8, "the status shows the interrupt though it is disabled"
    host.config(3, COMMAND, 2, 0)
    device.set_irq(0)
    assert host.lines[2:] == [(3, 1, 1), (3, 1, 0)]


def test_a_slot_holds_one_device(host: PciHost) -> None:
    host.bus.add(plain(), slot=3)
    with pytest.raises(UsageError, match=r"slot 0x3.0 of pci.0 holds plain"):
        host.bus.add(plain(), slot=3)
    host.bus.add(plain(), slot=3, function=1)
    with pytest.raises(UsageError, match="there is no slot"):
        host.bus.add(plain(), slot=32)
    assert [host.bus.add(plain()) for _ in range(3)] == [1, 2, 4]


def test_unplugged(host: PciHost) -> None:
    device = plain()
    device.add_bar(0, Latch(), 4096)
    host.bus.add(device, slot=3)
    host.config(3, 0x10, 4, 0xE000_0000)
    host.config(3, COMMAND, 2, 2)
    device.set_irq(1)
    host.bus.remove(device)
    assert host.lines[-1] == (3, 0, 0)
    assert host.mmio.ranges() == []
    assert host.config(3, 0, 4) == 0xFFFF_FFFF
    with pytest.raises(UsageError, match="is not on"):
        host.bus.remove(device)


def test_the_reset_control_register(host: PciHost) -> None:
    host.ports.write(0xCF9, 1, 2)
    assert host.resets == 0
    host.ports.write(0xCF9, 1, 6)
    host.ports.write(0xCF9, 1, 6)
    assert host.resets == 1
    assert host.ports.read(0xCF9, 1) == 6


def test_memory_mapped_configuration_space_reaches_extended_registers(host: PciHost) -> None:
    host.bus.add(plain(express=True), slot=3)
    ecam = Ecam(host.bus)
    assert ecam.read(3 << 15, 4) == 0x5678_1234
    assert ecam.read(3 << 15 | 0x100, 4) == 0
    assert ecam.read(4 << 15, 4) == 0xFFFF_FFFF
    assert ecam.read(1 << 20, 4) == 0xFFFF_FFFF
    ecam.write(3 << 15 | 4, 2, 7)
    assert host.config(3, COMMAND, 2) == 7


# ---- MSI-X ----------------------------------------------------------------------------------------------------


MSIX_BAR, TABLE = 0xE000_0000, 0xE000_0000


@pytest.fixture
def msix(host: PciHost) -> PciHost:
    device = plain()
    device.add_msix(3, 1)
    host.bus.add(device, slot=3)
    host.config(3, 0x14, 4, MSIX_BAR)
    host.config(3, COMMAND, 2, 6)
    for vector in range(3):
        for word, value in enumerate((0xFEE0_0000, 0, 0x40 + vector, 0)):
            host.mmio.write(TABLE + 16 * vector + 4 * word, 4, value)
    return host


def control(host: PciHost, value: int | None = None) -> int:
    return host.config(3, 0x42, 2, value)


def function(host: PciHost) -> Msix:
    made = host.bus.devices()[3, 0].msix
    assert made is not None
    return made


def pending(host: PciHost) -> int:
    return host.mmio.read(MSIX_BAR + 0x800, 8)


def test_msix_capability(msix: PciHost) -> None:
    assert msix.config(3, 0x40, 1) == 0x11
    assert control(msix) == 2, "the table's size less one"
    assert (msix.config(3, 0x44, 4), msix.config(3, 0x48, 4)) == (1, 0x801)


def test_messages_go_out_once_enabled(msix: PciHost) -> None:
    function(msix).notify(1)
    assert (msix.messages, pending(msix)) == ([], 0), "switched off there is no message and no memory of it"
    control(msix, 0x8000)
    function(msix).notify(1)
    assert msix.messages == [(0xFEE0_0000, 0x41)]
    assert control(msix) == 0x8002


def test_masked_vectors_wait(msix: PciHost) -> None:
    control(msix, 0x8000)
    msix.mmio.write(TABLE + 16 + 12, 4, 1)
    for _ in range(2):
        function(msix).notify(1)
    function(msix).notify(2)
    assert msix.messages == [(0xFEE0_0000, 0x42)]
    assert pending(msix) == 2
    msix.mmio.write(TABLE + 16 + 12, 4, 0)
    assert msix.messages == [(0xFEE0_0000, 0x42), (0xFEE0_0000, 0x41)]
    assert pending(msix) == 0


def test_the_function_mask(msix: PciHost) -> None:
    control(msix, 0xC000)
    function(msix).notify(0)
    function(msix).notify(2)
    assert (msix.messages, pending(msix)) == ([], 5)
    control(msix, 0x8000)
    assert msix.messages == [(0xFEE0_0000, 0x40), (0xFEE0_0000, 0x42)]


def test_no_message_without_bus_mastering(msix: PciHost) -> None:
    control(msix, 0x8000)
    msix.config(3, COMMAND, 2, 2)
    function(msix).notify(0)
    assert msix.messages == []


def test_a_vector_that_is_not_there(msix: PciHost) -> None:
    control(msix, 0x8000)
    function(msix).notify(3)
    function(msix).notify(-1)
    assert msix.messages == []


@given(st.lists(st.tuples(st.integers(0, 0xFFF), st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1))))
def test_any_access_to_the_tables_bar(accesses: list[tuple[int, int, int]]) -> None:
    host = PciHost()
    device = plain()
    device.add_msix(3, 1)
    host.bus.add(device, slot=3)
    host.config(3, 0x14, 4, MSIX_BAR)
    host.config(3, COMMAND, 2, 6)
    control(host, 0x8000)
    for offset, size, value in accesses:
        host.mmio.write(MSIX_BAR + offset, size, value & ((1 << 8 * size) - 1))
        assert 0 <= host.mmio.read(MSIX_BAR + offset, size) < 1 << 8 * size
    for vector in range(3):
        function(host).notify(vector)
    assert all(address % 4 == 0 for address, _ in host.messages)


@given(st.lists(st.tuples(st.integers(0, 255), st.sampled_from([1, 2, 4]), st.integers(0, (1 << 32) - 1))))
def test_any_access_to_configuration_space(accesses: list[tuple[int, int, int]]) -> None:
    """A hostile guest never makes the bus raise, nor two devices answer at one place."""
    host = PciHost()
    for slot in (3, 4):
        device = plain()
        device.add_bar(0, Latch(), 1 << 12)
        device.add_bar(1, Latch(), 1 << 8, io=True)
        device.add_bar(2, Latch(), 1 << 20, wide=True)
        device.add_msix(2, 4)
        device.add_rom(Latch(), 2048)
        host.bus.add(device, slot=slot)
    for offset, size, value in accesses:
        for slot in (3, 4):
            host.config(slot, offset & -size, size, value & ((1 << 8 * size) - 1))
    ranges = host.mmio.ranges()
    assert all(left.end <= right.base for left, right in itertools.pairwise(ranges))
