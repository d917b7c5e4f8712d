"""Buses: who answers at an address."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmonty.base.errors import UsageError
from vmonty.vmm.bus import Bus, Range

LIMIT = 0x1_0000


class Echo:
    """A device that remembers its accesses and reads as all ones in more bits than anyone asked for."""

    def __init__(self) -> None:
        self.accesses: list[tuple[int, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.accesses.append((offset, size))
        return (1 << 128) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        self.accesses.append((offset, size, value))


@pytest.fixture
def bus() -> Bus:
    return Bus("the port space", LIMIT)


def test_a_device_sees_offsets(bus: Bus) -> None:
    device = Echo()
    assert bus.place(0x3F8, 8, device, "serial") == Range(0x3F8, 8, "serial")
    assert bus.read(0x3F8, 1) == 0xFF
    assert bus.read(0x3FC, 4) == 0xFFFF_FFFF
    bus.write(0x3FF, 1, 0x5A)
    assert device.accesses == [(0, 1), (4, 4), (7, 1, 0x5A)]


@pytest.mark.parametrize(("address", "size"), [(0x3F7, 1), (0x400, 1), (0x3FF, 2), (0x3F7, 2), (0x3F7, 8), (0, 1)])
def test_nobody_home(bus: Bus, address: int, size: int) -> None:
    device = Echo()
    bus.place(0x3F8, 8, device, "serial")
    assert bus.read(address, size) == (1 << 8 * size) - 1
    bus.write(address, size, 0)
    assert device.accesses == []


def test_neighbours_touch_and_do_not_mix(bus: Bus) -> None:
    low, middle, high = Echo(), Echo(), Echo()
    bus.place(0x20, 0x10, high, "high")
    bus.place(0x00, 0x10, low, "low")
    bus.place(0x10, 0x10, middle, "middle")
    for address in (0x0F, 0x10, 0x1F, 0x20):
        bus.read(address, 1)
    assert (low.accesses, middle.accesses, high.accesses) == ([(15, 1)], [(0, 1), (15, 1)], [(0, 1)])
    assert [placed.name for placed in bus.ranges()] == ["low", "middle", "high"]


def test_an_access_that_leaves_its_device_reaches_nobody(bus: Bus) -> None:
    low, high = Echo(), Echo()
    bus.place(0, 2, low, "low")
    bus.place(2, 2, high, "high")
    assert bus.read(1, 2) == 0xFFFF
    assert not low.accesses
    assert not high.accesses


@pytest.mark.parametrize(("base", "size"), [(0x3F8, 8), (0x3F7, 2), (0x3FF, 1), (0x3F0, 0x20), (0x3FA, 1), (0, LIMIT)])
def test_overlap_names_both(bus: Bus, base: int, size: int) -> None:
    bus.place(0x3F8, 8, Echo(), "serial")
    with pytest.raises(UsageError, match=r"intruder at .* overlaps serial at 0x3f8"):
        bus.place(base, size, Echo(), "intruder")
    assert len(bus.ranges()) == 1


@pytest.mark.parametrize(("base", "size"), [(-1, 2), (0, 0), (0, -1), (0, LIMIT + 1), (LIMIT, 1), (LIMIT - 1, 2)])
def test_outside_the_bus(bus: Bus, base: int, size: int) -> None:
    with pytest.raises(UsageError, match="outside the port space"):
        bus.place(base, size, Echo(), "lost")


def test_the_last_address(bus: Bus) -> None:
    device = Echo()
    bus.place(LIMIT - 1, 1, device, "last")
    assert bus.read(LIMIT - 1, 1) == 0xFF
    assert bus.read(LIMIT - 1, 2) == 0xFFFF
    assert device.accesses == [(0, 1)]


@given(
    placements=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 12)), max_size=12),
    accesses=st.lists(st.tuples(st.integers(0, 80), st.sampled_from([1, 2, 4, 8])), max_size=30),
)
def test_as_a_map_of_addresses(placements: list[tuple[int, int]], accesses: list[tuple[int, int]]) -> None:
    bus, owner = Bus("a small bus", 64), dict[int, tuple[Echo, int]]()
    for base, size in placements:
        device = Echo()
        cells = range(base, base + size)
        if cells[-1] >= 64 or any(cell in owner for cell in cells):
            with pytest.raises(UsageError):
                bus.place(base, size, device, "refused")
        else:
            bus.place(base, size, device, "placed")
            owner |= dict.fromkeys(cells, (device, base))
    for address, size in accesses:
        owners = {owner.get(cell) for cell in range(address, address + size)}
        expected = owners.pop() if len(owners) == 1 else None
        bus.write(address, size, 0)
        if expected is not None:
            device, base = expected
            assert device.accesses.pop() == (address - base, size, 0)
    assert not any(device.accesses for device, _ in owner.values())


def test_a_device_can_leave_and_come_back_elsewhere(bus: Bus) -> None:
    device = Echo()
    placed = bus.place(0x3F8, 8, device, "serial")
    neighbour = bus.place(0x400, 8, Echo(), "neighbour")
    bus.remove(placed)
    assert bus.find(0x3F8, 1) is None
    assert bus.ranges() == [neighbour]
    bus.place(0x2F8, 8, device, "serial")
    assert bus.find(0x2F9, 1) == (device, 1)
    with pytest.raises(UsageError, match="serial at 0x3f8 is not in the port space"):
        bus.remove(placed)
