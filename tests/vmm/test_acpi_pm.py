"""ACPI power management: soft-off, the power button, the timer."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmonty.vmm.hw.acpi_pm import (
    CONTROL_SCI_ENABLE,
    CONTROL_SLEEP_ENABLE,
    CONTROL_SLEEP_TYPE_SHIFT,
    PM1_CONTROL,
    PM1_ENABLE,
    PM1_STATUS,
    PM_TIMER,
    SIZE,
    SLEEP_TYPE_S5,
    STATUS_POWER_BUTTON,
    TIMER_HZ,
    AcpiPm,
)  # fmt: skip

SOFT_OFF = SLEEP_TYPE_S5 << CONTROL_SLEEP_TYPE_SHIFT


class Board:
    def __init__(self) -> None:
        self.offs = 0
        self.sci = 0
        self.chip = AcpiPm(self._off, self._drive)

    def _off(self) -> None:
        self.offs += 1

    def _drive(self, level: int) -> None:
        self.sci = level

    def read(self, offset: int, size: int = 2) -> int:
        return self.chip.read(offset, size) & ((1 << 8 * size) - 1)


@pytest.fixture
def board() -> Board:
    return Board()


def test_acpi_mode_is_on_from_the_start(board: Board) -> None:
    assert board.read(PM1_CONTROL) == CONTROL_SCI_ENABLE
    assert board.read(PM1_STATUS) == 0
    assert board.read(PM1_ENABLE) == 0


def test_soft_off(board: Board) -> None:
    # As acpi_hw_legacy_sleep() does it: the type first, then the type with SLP_EN.
    board.chip.write(PM1_CONTROL, 2, SOFT_OFF)
    assert board.offs == 0
    board.chip.write(PM1_CONTROL, 2, SOFT_OFF | CONTROL_SLEEP_ENABLE)
    assert board.offs == 1
    assert not board.read(PM1_CONTROL) & CONTROL_SLEEP_ENABLE, "SLP_EN reads as zero"


def test_soft_off_by_bytes(board: Board) -> None:
    board.chip.write(PM1_CONTROL + 1, 1, (SOFT_OFF | CONTROL_SLEEP_ENABLE) >> 8)
    assert board.offs == 1


@pytest.mark.parametrize("kind", [kind for kind in range(8) if kind != SLEEP_TYPE_S5])
def test_other_sleep_types_do_nothing(board: Board, kind: int) -> None:
    board.chip.write(PM1_CONTROL, 2, kind << CONTROL_SLEEP_TYPE_SHIFT | CONTROL_SLEEP_ENABLE)
    assert board.offs == 0


def test_power_button(board: Board) -> None:
    board.chip.press_power_button()
    assert board.sci == 0, "not before the guest has enabled it"
    board.chip.write(PM1_ENABLE, 2, STATUS_POWER_BUTTON)
    assert board.sci == 1
    assert board.read(PM1_STATUS, 4) == STATUS_POWER_BUTTON << 16 | STATUS_POWER_BUTTON
    board.chip.write(PM1_STATUS, 2, ~STATUS_POWER_BUTTON & 0xFFFF)
    assert board.sci == 1, "zeroes clear nothing"
    board.chip.write(PM1_STATUS, 2, STATUS_POWER_BUTTON)
    assert board.sci == 0
    assert board.read(PM1_STATUS) == 0
    board.chip.press_power_button()
    assert board.sci == 1


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ns = 0
        monkeypatch.setattr(time, "monotonic_ns", lambda: self.ns)


def test_timer_counts_at_its_frequency(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert board.read(PM_TIMER, 4) == 0
    clock.ns = 1_000_000_000
    assert board.read(PM_TIMER, 4) == TIMER_HZ


def test_timer_has_32_bits_and_wraps(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    period = -(-(1 << 32) * 1_000_000_000 // TIMER_HZ)
    clock.ns = period - 200
    assert board.read(PM_TIMER, 4) == 0xFFFF_FFFF
    clock.ns = period
    assert board.read(PM_TIMER, 4) == 0
    assert board.chip.read(PM_TIMER, 4) < 1 << 32


def test_timer_never_goes_back(board: Board) -> None:
    readings = [board.read(PM_TIMER, 4) for _ in range(1000)]
    assert all((after - before) & 0xFFFF_FFFF < 1 << 24 for before, after in itertools.pairwise(readings))


def test_timer_cannot_be_written(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch).ns = 10**9
    board.chip.write(PM_TIMER, 4, 0)
    assert board.read(PM_TIMER, 4) == TIMER_HZ


@given(st.lists(st.tuples(st.integers(0, SIZE - 1), st.sampled_from([1, 2, 4]), st.integers(0, 1 << 32)), max_size=40))
def test_no_access_is_wrong(writes: list[tuple[Any, ...]]) -> None:
    board = Board()
    for number, (offset, size, value) in enumerate(writes):
        if number % 5 == 4:
            board.chip.press_power_button()
        board.chip.write(offset, size, value)
        assert board.chip.read(offset, size) >= 0
        status, enable = board.read(PM1_STATUS), board.read(PM1_ENABLE)
        assert board.sci == int(bool(status & enable))
        control = board.read(PM1_CONTROL)
        assert control & CONTROL_SCI_ENABLE
        assert not control & CONTROL_SLEEP_ENABLE
