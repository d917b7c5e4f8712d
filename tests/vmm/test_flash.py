"""A flash chip: its commands, and the file that keeps what is programmed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmonty.base.ram import Ram
from vmonty.vmm.hw.flash import Flash

SIZE = 0x8000


@dataclass
class Board:
    path: Path
    shown: list[bool] = field(default_factory=list)
    changes: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.fd = os.open(self.path, os.O_RDWR)
        self.ram = Ram(SIZE)
        self.ram.write(0, self.path.read_bytes())
        self.chip = Flash(self.ram, self.fd, self.shown.append, lambda *range_: self.changes.append(range_))


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    path = tmp_path / "flash"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    made = Board(path)
    yield made
    os.close(made.fd)


def test_how_firmware_finds_it(board: Board) -> None:
    """Neither RAM, which would keep what is written, nor ROM, which would not change."""
    chip = board.chip
    chip.write(8, 1, 0x50)
    assert chip.read(8, 1) == 8
    chip.write(8, 1, 0x70)
    assert chip.read(8, 1) == 0
    chip.write(8, 1, 0xFF)
    assert chip.read(8, 4) == 0x0B0A0908
    chip.write(0, 1, 0x90)
    assert (chip.read(0, 1), chip.read(1, 1)) == (0x89, 0x18)


def test_erase_and_program(board: Board) -> None:
    chip = board.chip
    for command in (0x20, 0xD0):
        chip.write(0x1234, 1, command)
    assert chip.read(0, 1) == 0x80, "the status"
    chip.write(0x1234, 1, 0x10)
    chip.write(0x1234, 1, 0x5A)
    chip.write(0x1234, 1, 0x40)
    chip.write(0x1234, 1, 0xF0)
    assert chip.read(0x1234, 2) == 0x8080
    chip.write(0, 1, 0xFF)
    assert board.shown == [True, False, True], "the array is hidden while commands are under way"
    expected = bytearray(bytes(range(256)) * (SIZE // 256))
    expected[0x1000:0x2000] = b"\xff" * 0x1000
    expected[0x1234] = 0x50
    assert board.ram.read(0, SIZE) == board.path.read_bytes() == expected
    assert board.changes == [(0x1000, 0x1000), (0x1234, 1), (0x1234, 1)]


def test_the_write_buffer(board: Board) -> None:
    chip = board.chip
    for command in (0x20, 0xD0, 0xE8):
        chip.write(0, 1, command)
    assert chip.read(0, 1) == 0x80
    chip.write(0, 1, 7)
    chip.write(0x100, 4, 0x44332211)
    chip.write(0x104, 4, 0x88776655)
    chip.write(0x100, 1, 0xD0)
    chip.write(0, 1, 0xFF)
    assert chip.read(0x100, 8) == 0x8877665544332211


def test_sequences_that_are_none(board: Board) -> None:
    chip, before = board.chip, board.path.read_bytes()
    for sequence in ((0x20, 0x55), (0xE8, 0xFF)):
        for value in sequence:
            chip.write(0, 1, value)
        assert chip.read(0, 1) == 0xB0
        chip.write(0, 1, 0x50)
    assert board.path.read_bytes() == before


def test_a_file_that_cannot_be_written(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "no space")

    monkeypatch.setattr(os, "pwrite", full)
    for value in (0x10, 0):
        board.chip.write(5, 1, value)
    assert board.chip.read(5, 1) == 0xA0
    assert board.ram.read_u8(5) == 5


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(
            st.integers(0, SIZE - 8), st.sampled_from((1, 2, 4, 8)),
            st.one_of(st.sampled_from((0x10, 0x20, 0xD0, 0xE8, 0x70, 0x90, 0xFF)), st.integers(0, (1 << 64) - 1)),
        ),
        max_size=60,
    )
)  # fmt: skip
def test_no_sequence_harms(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int, int]]) -> None:
    path = tmp_path_factory.mktemp("flash") / "flash"
    path.write_bytes(bytes(SIZE))
    board = Board(path)
    try:
        for offset, size, value in steps:
            board.chip.write(offset, size, value)
            assert 0 <= board.chip.read(offset, size) < 1 << 8 * size
        assert path.stat().st_size == SIZE
        assert board.ram.read(0, SIZE) == path.read_bytes()
    finally:
        os.close(board.fd)
