"""The real-time clock, on a clock that stands still."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmonty.vmm.hw.cmos import CENTURY, MODE_24_HOURS, MODE_BINARY, REGISTER_A, REGISTER_B, REGISTER_D, Cmos

NOON_ISH = datetime(2026, 12, 31, 13, 59, 58, tzinfo=UTC)  # a Thursday
SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR = 0, 2, 4, 6, 7, 8, 9
CLOCK = (SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY)


def register(cmos: Cmos, index: int) -> int:
    cmos.write(0, 1, index)
    return cmos.read(1, 1)


def store(cmos: Cmos, index: int, value: int) -> None:
    cmos.write(0, 1, index)
    cmos.write(1, 1, value)


@pytest.fixture
def cmos() -> Cmos:
    return Cmos(lambda: NOON_ISH)


def test_bcd(cmos: Cmos) -> None:
    shown = [register(cmos, index) for index in CLOCK]
    assert shown == [0x58, 0x59, 0x13, 5, 0x31, 0x12, 0x26, 0x20]


def test_binary(cmos: Cmos) -> None:
    store(cmos, REGISTER_B, MODE_24_HOURS | MODE_BINARY)
    shown = [register(cmos, index) for index in CLOCK]
    assert shown == [58, 59, 13, 5, 31, 12, 26, 20]


@pytest.mark.parametrize(
    ("hour", "bcd", "binary"), [(0, 0x12, 12), (1, 1, 1), (11, 0x11, 11), (12, 0x92, 0x8C), (23, 0x91, 0x8B)]
)
def test_twelve_hours(hour: int, bcd: int, binary: int) -> None:
    cmos = Cmos(lambda: NOON_ISH.replace(hour=hour))
    store(cmos, REGISTER_B, 0)
    assert register(cmos, HOURS) == bcd
    store(cmos, REGISTER_B, MODE_BINARY)
    assert register(cmos, HOURS) == binary


def test_sunday_is_1() -> None:
    assert register(Cmos(lambda: datetime(2027, 1, 3, tzinfo=UTC)), WEEKDAY) == 1
    assert register(Cmos(lambda: datetime(2027, 1, 2, tzinfo=UTC)), WEEKDAY) == 7


def test_a_driver_finds_a_sound_clock(cmos: Cmos) -> None:
    assert not register(cmos, REGISTER_A) & 0x80, "never in an update"
    assert register(cmos, REGISTER_B) & MODE_24_HOURS
    assert register(cmos, REGISTER_D) == 0x80, "battery and memory are good"


def test_writes(cmos: Cmos) -> None:
    store(cmos, 0x40, 0x1A5)
    assert register(cmos, 0x40) == 0xA5
    assert register(cmos, 0xC0) == 0xA5, "bit 7 of the index is the NMI mask"
    store(cmos, SECONDS, 0)
    assert register(cmos, SECONDS) == 0x58, "the clock cannot be set"
    store(cmos, REGISTER_D, 0)
    assert register(cmos, REGISTER_D) == 0x80


def test_the_index_cannot_be_read(cmos: Cmos) -> None:
    cmos.write(0, 1, 0x40)
    assert cmos.read(0, 1) == 0xFF


def test_it_shows_the_hosts_time() -> None:
    cmos = Cmos()
    before = datetime.now(UTC).year
    assert int(f"{register(cmos, CENTURY):x}{register(cmos, YEAR):02x}") in (before, before + 1)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 0xFFFF)), max_size=40))
def test_no_access_is_wrong(writes: list[tuple[int, int]]) -> None:
    cmos = Cmos(lambda: NOON_ISH)
    for offset, value in writes:
        cmos.write(offset, 1, value)
        assert 0 <= cmos.read(1, 1) <= 0xFF
    assert register(cmos, MINUTES) in (0x59, 59)
