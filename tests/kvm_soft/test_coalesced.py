"""Coalesced MMIO and PIO zones and their ring; and the buses that carry them."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmonty.base.layout import flexible
from vmonty.kvm.soft.coalesced_mmio import COALESCED_MMIO_MAX, CoalescedMmio
from vmonty.kvm.soft.iodev import NR_IOBUS_DEVS, KvmIoBus, KvmIoBuses
from vmonty.kvm.uapi.run import kvm_coalesced_mmio_ring, kvm_coalesced_mmio_zone


def zone(address: int, size: int, pio: int = 0) -> kvm_coalesced_mmio_zone:
    made = kvm_coalesced_mmio_zone(addr=address, size=size)
    made.u.pio = pio
    return made


class User:
    """User space: the ring in its page, read as QEMU reads it."""

    def __init__(self) -> None:
        self.page = bytearray(4096)
        self.buses = KvmIoBuses()
        self.coalesced = CoalescedMmio(self.page, self.buses)
        self.ring = flexible(kvm_coalesced_mmio_ring, COALESCED_MMIO_MAX).from_buffer(self.page)

    def drain(self) -> list[tuple[int, bytes, int]]:
        found = []
        while self.ring.first != self.ring.last:
            entry = self.ring.coalesced_mmio[self.ring.first]
            found.append((entry.phys_addr, bytes(entry.data[: entry.len]), entry.u.pio))
            self.ring.first = (self.ring.first + 1) % COALESCED_MMIO_MAX
        return found


@pytest.fixture
def user() -> User:
    made = User()
    made.coalesced.register(zone(0x1000, 0x100))
    made.coalesced.register(zone(0xCF8, 4, pio=1))
    return made


def test_the_ring_fills_the_page() -> None:
    assert COALESCED_MMIO_MAX == 170


def test_writes_are_collected_in_order(user: User) -> None:
    assert user.buses.mmio.write(0x1000, 4, 0x11223344)
    assert user.buses.pio.write(0xCF8, 2, 0xAABB)
    assert user.buses.mmio.write(0x10FF, 1, 0x1FF)
    assert user.drain() == [(0x1000, b"\x44\x33\x22\x11", 0), (0xCF8, b"\xbb\xaa", 1), (0x10FF, b"\xff", 0)]


@pytest.mark.parametrize(("address", "size"), [(0xFFF, 1), (0x1100, 1), (0x10FE, 4), (0xFFE, 4), ((1 << 64) - 1, 8)])
def test_what_is_not_inside_goes_to_user_space(user: User, address: int, size: int) -> None:
    assert not user.buses.mmio.write(address, size, 0)
    assert user.drain() == []


def test_reads_are_not_coalesced(user: User) -> None:
    assert user.buses.mmio.read(0x1000, 4) is None


def test_a_full_ring_sends_writes_to_user_space(user: User) -> None:
    taken = [user.buses.mmio.write(0x1000, 4, number) for number in range(COALESCED_MMIO_MAX + 5)]
    assert taken == [True] * (COALESCED_MMIO_MAX - 1) + [False] * 6
    assert [data[0] for _, data, _ in user.drain()] == list(range(COALESCED_MMIO_MAX - 1))
    assert user.buses.mmio.write(0x1000, 4, 1)
    assert len(user.drain()) == 1


@given(st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFF))
def test_nonsense_in_the_ring_is_survived(first: int, last: int) -> None:
    user = User()
    user.coalesced.register(zone(0, 0x1000))
    user.ring.first, user.ring.last = first, last
    assert user.buses.mmio.write(8, 8, 1) is (last < 170 and (last + 1) % 170 != first)


def test_unregistering_takes_every_zone_that_contains_the_range(user: User) -> None:
    user.coalesced.register(zone(0x1000, 0x1000))
    user.coalesced.register(zone(0x1010, 0x10))
    user.coalesced.unregister(zone(0x5000, 1))
    user.coalesced.unregister(zone(0x1000, 0x20))
    assert not user.buses.mmio.write(0x1000, 4, 0)
    assert user.buses.mmio.write(0x1010, 4, 0)
    assert user.buses.pio.write(0xCF8, 4, 0)
    user.coalesced.unregister(zone(0xCF8, 4, pio=1))
    assert not user.buses.pio.write(0xCF8, 4, 0)


@pytest.mark.parametrize("call", [CoalescedMmio.register, CoalescedMmio.unregister])
def test_pio_is_0_or_1(user: User, call: object) -> None:
    assert callable(call)
    with pytest.raises(OSError) as caught:
        call(user.coalesced, zone(0, 4, pio=2))
    assert caught.value.errno == errno.EINVAL


# ---- the bus -------------------------------------------------------------------------------------------------


@dataclass
class Latch:
    """A device that takes everything, or with *only* just one value."""

    name: str
    only: int | None = None
    seen: list[tuple[int, int, int]] = field(default_factory=list)

    def read(self, address: int, size: int) -> int | None:
        return None if self.only is not None else 0x1122334455667788

    def write(self, address: int, size: int, value: int) -> bool:
        if self.only is not None and value != self.only:
            return False
        self.seen.append((address, size, value))
        return True


def test_an_access_reaches_devices_that_contain_it_in_order() -> None:
    bus = KvmIoBus()
    picky, wide, wildcard = Latch("picky", only=5), Latch("wide"), Latch("wildcard")
    bus.register(0x100, 2, picky)
    bus.register(0x100, 8, wide)
    bus.register(0x104, 0, wildcard)
    assert bus.write(0x100, 2, 5)
    assert bus.write(0x100, 2, 6)
    assert bus.write(0x104, 8, 1)
    assert not bus.write(0x106, 4, 1)
    assert (picky.seen, wide.seen, wildcard.seen) == ([(0x100, 2, 5)], [(0x100, 2, 6)], [(0x104, 8, 1)])
    assert bus.read(0x100, 2) == 0x7788
    assert bus.read(0x200, 2) is None


def test_registration_is_seen_by_accesses_that_were_made_before() -> None:
    bus = KvmIoBus()
    first, second = Latch("first"), Latch("second")
    assert not bus.write(0x10, 1, 0)
    bus.register(0x10, 1, first)
    assert bus.write(0x10, 1, 0)
    bus.unregister(first)
    bus.register(0x10, 1, second)
    assert bus.write(0x10, 1, 0)
    assert (len(first.seen), len(second.seen)) == (1, 1)


def test_a_bus_has_room_for_a_thousand() -> None:
    bus = KvmIoBus()
    for number in range(NR_IOBUS_DEVS):
        bus.register(number, 1, Latch(str(number)))
    with pytest.raises(OSError) as caught:
        bus.register(5000, 1, Latch("one too many"))
    assert caught.value.errno == errno.ENOSPC
    bus.register(5000, 1, Latch("an ioeventfd"), counted=False)
    for address in range(10_000):
        bus.write(address, 1, 0)
    assert len(bus._remembered) <= 4096
