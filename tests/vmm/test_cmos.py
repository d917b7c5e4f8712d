"""The real-time clock, on a clock that stands still."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmonty.vmm.hw.cmos import (
    ALARM,
    CENTURY,
    MODE_24_HOURS,
    MODE_BINARY,
    MODE_SET,
    PERIODIC,
    REGISTER_A,
    REGISTER_B,
    REGISTER_C,
    REGISTER_D,
    UPDATE,
    Cmos,
)

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
    index = -1
    minutes = {0x59, 59}
    for offset, value in writes:
        cmos.write(offset, 1, value)
        if offset == 0:
            index = value & 0x7F
        elif index < 10:
            minutes = set(range(0x100))  # the clock was set
        assert 0 <= cmos.read(1, 1) <= 0xFF
    assert register(cmos, MINUTES) in minutes


# ---- a clock that is set, and that interrupts -------------------------------------------------------------------


class Board:
    """A clock whose time goes on when ``go`` says so; ``line`` records the levels of IRQ 8."""

    def __init__(self) -> None:
        self.time = NOON_ISH
        self.line: list[int] = []
        self.calls: list[tuple[datetime, Callable[[], None]]] = []
        self.cmos = Cmos(lambda: self.time, self.line.append, self.call_later)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Board:
        self.calls.append((self.time + timedelta(seconds=seconds), callback))
        return self

    def cancel(self) -> None:
        self.calls.clear()

    def go(self, seconds: float) -> None:
        end = self.time + timedelta(seconds=seconds)
        while self.calls and self.calls[0][0] <= end:
            self.time, callback = self.calls.pop(0)
            callback()
        self.time = end


@pytest.fixture
def board() -> Board:
    return Board()


def test_the_clock_goes_on_from_what_was_set(board: Board) -> None:
    store(board.cmos, REGISTER_B, MODE_24_HOURS | MODE_SET)
    for index, value in zip(CLOCK, (0x59, 0x58, 0x23, 7, 0x28, 0x02, 0x24, 0x20), strict=True):
        store(board.cmos, index, value)
    board.go(5)
    assert register(board.cmos, SECONDS) == 0x59, "it stands still while SET is on"
    store(board.cmos, REGISTER_B, MODE_24_HOURS)
    board.go(62)
    assert [register(board.cmos, index) for index in (YEAR, MONTH, DAY, HOURS)] == [0x24, 0x02, 0x29, 0x00]


def test_a_time_that_does_not_exist_is_not_taken(board: Board) -> None:
    store(board.cmos, MONTH, 0x13)
    assert register(board.cmos, MONTH) == 0x12


def test_update_in_progress_shows_just_before_the_second(board: Board) -> None:
    board.go(0.999_9)
    assert register(board.cmos, REGISTER_A) & 0x80
    board.go(0.000_2)
    assert not register(board.cmos, REGISTER_A) & 0x80


def test_update_interrupt(board: Board) -> None:
    store(board.cmos, REGISTER_B, MODE_24_HOURS | UPDATE)
    board.go(0.5)
    assert board.line == []
    board.go(0.6)
    assert board.line == [1]
    assert register(board.cmos, REGISTER_C) == 0x80 | UPDATE
    assert register(board.cmos, REGISTER_C) == 0, "reading clears it"
    assert board.line[1] == 0


def test_alarm(board: Board) -> None:
    for index, value in ((1, 0x01), (3, 0x00), (5, 0xFF)):
        store(board.cmos, index, value)
    store(board.cmos, REGISTER_B, MODE_24_HOURS | ALARM)
    board.go(2.5)
    assert board.line == []
    board.go(1)
    assert board.line == [1], "13:59:58 and three seconds: 14:00:01, any hour"
    assert register(board.cmos, REGISTER_C) & ALARM
    store(board.cmos, REGISTER_B, MODE_24_HOURS)
    assert not board.calls, "nothing is to come any more"


def test_periodic_interrupt(board: Board) -> None:
    store(board.cmos, REGISTER_A, 0x2F)  # 2 Hz
    store(board.cmos, REGISTER_B, MODE_24_HOURS | PERIODIC)
    board.go(0.6)
    assert register(board.cmos, REGISTER_C) == 0x80 | PERIODIC
    board.go(0.5)
    assert register(board.cmos, REGISTER_C) == 0x80 | PERIODIC
    store(board.cmos, REGISTER_A, 0x20)
    assert not board.calls


def test_memory_sizes_as_firmware_reads_them(board: Board) -> None:
    board.cmos.store_memory_size(3 << 30, 2 << 30)
    assert board.cmos.load(0x15, 4) == (640).to_bytes(2, "little") + b"\xff\xff"
    assert int.from_bytes(board.cmos.load(0x34, 2), "little") << 16 == (3 << 30) - (16 << 20)
    assert int.from_bytes(board.cmos.load(0x5B, 3), "little") << 16 == 2 << 30
