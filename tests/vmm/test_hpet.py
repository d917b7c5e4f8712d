"""The event timer, on a clock that goes on when it is told to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmonty.vmm.hw import hpet
from vmonty.vmm.hw.hpet import Hpet

TIMER_0, TIMER_1, COMPARATOR = 0x100, 0x120, 8


class Board:
    """``lines`` records (gsi, level); ``go`` lets nanoseconds pass."""

    def __init__(self) -> None:
        self.now = 1_000_000
        self.lines: list[tuple[int, int]] = []
        self.replaced: list[bool] = []
        self.calls: list[Call] = []
        ends = [lambda level, gsi=gsi: self.lines.append((gsi, level)) for gsi in range(24)]  # type: ignore[misc]
        self.chip = Hpet(ends, self.call_later, self.replaced.append, lambda: self.now)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Call:
        call = Call(self, self.now + round(seconds * 1e9), callback)
        self.calls.append(call)
        return call

    def go(self, nanoseconds: int) -> None:
        end = self.now + nanoseconds
        while due := [call for call in self.calls if call.at <= end]:
            first = min(due, key=lambda call: call.at)
            self.calls.remove(first)
            self.now = max(self.now, first.at)
            first.callback()
        self.now = end

    def write(self, offset: int, value: int, size: int = 8) -> None:
        self.chip.write(offset, size, value)

    def read(self, offset: int, size: int = 8) -> int:
        return self.chip.read(offset, size) & (1 << 8 * size) - 1


class Call:
    def __init__(self, board: Board, at: int, callback: Callable[[], None]) -> None:
        self.board, self.at, self.callback = board, at, callback

    def cancel(self) -> None:
        if self in self.board.calls:
            self.board.calls.remove(self)


@pytest.fixture
def board() -> Board:
    return Board()


def test_capabilities(board: Board) -> None:
    assert board.read(0, 4) == hpet.IDENTITY
    assert board.read(4, 4) == 10_000_000, "femtoseconds: 100 MHz"
    assert board.read(TIMER_0) >> 32 == hpet.ROUTES


def test_the_counter_runs_while_enabled(board: Board) -> None:
    board.go(1000)
    assert board.read(hpet.COUNTER) == 0
    board.write(hpet.CONFIG, hpet.ENABLE)
    board.go(1000)
    assert board.read(hpet.COUNTER) == 100
    board.write(hpet.COUNTER, 5)
    assert board.read(hpet.COUNTER) == 100, "it cannot be set while it runs"
    board.write(hpet.CONFIG, 0)
    board.write(hpet.COUNTER + 4, 1, 4)
    assert board.read(hpet.COUNTER) == 1 << 32 | 100
    assert board.read(hpet.COUNTER + 4, 4) == 1


def test_one_shot(board: Board) -> None:
    board.write(hpet.CONFIG, hpet.ENABLE)
    board.write(TIMER_0, hpet.INTERRUPT | 16 << hpet.ROUTE_SHIFT)
    board.write(TIMER_0 + COMPARATOR, 500)
    board.go(4990)
    assert board.lines == []
    board.go(10)
    assert board.lines == [(16, 1), (16, 0)]
    board.go(100_000)
    assert len(board.lines) == 2


def test_level(board: Board) -> None:
    board.write(hpet.CONFIG, hpet.ENABLE)
    board.write(TIMER_0, hpet.INTERRUPT | hpet.LEVEL | 17 << hpet.ROUTE_SHIFT)
    board.write(TIMER_0 + COMPARATOR, 10)
    board.go(100)
    assert board.lines == [(17, 1)]
    assert board.read(hpet.STATUS) == 1
    board.write(hpet.STATUS, 1)
    assert board.lines == [(17, 1), (17, 0)]
    assert board.read(hpet.STATUS) == 0


def test_periodic_in_place_of_the_pit(board: Board) -> None:
    board.write(hpet.CONFIG, hpet.ENABLE | hpet.LEGACY_REPLACEMENT)
    assert board.replaced == [True]
    board.write(TIMER_0, hpet.INTERRUPT | hpet.PERIODIC | hpet.SET_ACCUMULATOR)
    board.write(TIMER_0 + COMPARATOR, 100_000)
    board.write(TIMER_0 + COMPARATOR, 100_000)
    board.go(3_500_000)
    assert board.lines == [(0, 1), (0, 0)] * 3
    assert board.read(TIMER_0 + COMPARATOR) == 400_000
    board.write(hpet.CONFIG, 0)
    assert board.replaced == [True, False]
    assert board.calls == []


def test_the_clocks_place_is_timer_1s(board: Board) -> None:
    board.write(hpet.CONFIG, hpet.ENABLE | hpet.LEGACY_REPLACEMENT)
    board.write(TIMER_1, hpet.INTERRUPT)
    board.write(TIMER_1 + COMPARATOR, 1)
    board.go(100)
    assert board.lines == [(8, 1), (8, 0)]


def test_a_tick_shorter_than_a_host_can_make(board: Board) -> None:
    board.write(hpet.CONFIG, hpet.ENABLE)
    board.write(TIMER_0, hpet.INTERRUPT | hpet.PERIODIC | hpet.SET_ACCUMULATOR | 16 << hpet.ROUTE_SHIFT)
    board.write(TIMER_0 + COMPARATOR, 1)
    board.go(1_000_000)
    assert len(board.lines) <= 2 * (1_000_000 * 1e-9 / hpet.SHORTEST_WAIT_S + 2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 0x3FF), st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1)),
                max_size=30))  # fmt: skip
def test_no_access_is_wrong(accesses: list[tuple[int, int, int]]) -> None:
    board = Board()
    for offset, size, value in accesses:
        board.chip.write(offset & -size, size, value & (1 << 8 * size) - 1)
        assert board.chip.read(offset & -size, size) >= 0
        board.go(100_000)
    assert len(board.calls) <= hpet.TIMERS
