"""Guest RAM: every access is inside it or refused, and nothing of it goes away while it is in use."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmonty.base.errors import GuestMemoryError, UsageError
from vmonty.base.ram import PAGE_SIZE, Ram

SIZE = 2 * PAGE_SIZE
RAM = Ram(SIZE)
INTEGERS = st.integers(-(1 << 70), 1 << 70)
NEAR_THE_ENDS = st.one_of(st.integers(-16, 16), st.integers(SIZE - 16, SIZE + 16), INTEGERS)
WIDTHS = {"u8": 1, "u16": 2, "u32": 4, "u64": 8}


REFUSED = GuestMemoryError


def inside(offset: int, size: int) -> bool:
    return offset >= 0 and size >= 0 and offset + size <= SIZE


@given(offset=NEAR_THE_ENDS, size=NEAR_THE_ENDS)
def test_read_and_view_stay_inside(offset: int, size: int) -> None:
    for access in (RAM.read, RAM.view):
        if inside(offset, size):
            assert len(access(offset, size)) == size
        else:
            with pytest.raises(REFUSED):
                access(offset, size)


@given(offset=NEAR_THE_ENDS, data=st.binary(max_size=40))
def test_write_stays_inside(offset: int, data: bytes) -> None:
    if inside(offset, len(data)):
        RAM.write(offset, data)
        assert RAM.read(offset, len(data)) == data
    else:
        with pytest.raises(REFUSED):
            RAM.write(offset, data)


@given(offset=NEAR_THE_ENDS, size=st.integers(-16, 64), value=st.integers(-300, 300))
def test_fill_stays_inside(offset: int, size: int, value: int) -> None:
    if inside(offset, size):
        RAM.fill(offset, size, value)
        assert RAM.read(offset, size) == bytes([value & 0xFF]) * size
    else:
        with pytest.raises(REFUSED):
            RAM.fill(offset, size, value)


@pytest.mark.parametrize("name", WIDTHS)
@given(offset=NEAR_THE_ENDS, value=INTEGERS)
def test_numbers_are_little_endian_and_masked(name: str, offset: int, value: int) -> None:
    width = WIDTHS[name]
    read, write = getattr(RAM, f"read_{name}"), getattr(RAM, f"write_{name}")
    if inside(offset, width):
        write(offset, value)
        masked = value & ((1 << 8 * width) - 1)
        assert read(offset) == masked
        assert RAM.read(offset, width) == masked.to_bytes(width, "little")
    else:
        with pytest.raises(REFUSED):
            write(offset, value)
        with pytest.raises(REFUSED):
            read(offset)


@pytest.mark.parametrize("offset", [-1, SIZE - 7, SIZE, 1 << 62])
def test_error_tells_the_access(offset: int) -> None:
    with pytest.raises(GuestMemoryError) as caught:
        RAM.read_u64(offset)
    assert (caught.value.address, caught.value.size) == (offset, 8)
    assert hex(offset) in str(caught.value)


def test_refused_access_changes_nothing() -> None:
    ram = Ram(PAGE_SIZE)
    with pytest.raises(GuestMemoryError):
        ram.write(PAGE_SIZE - 2, b"abcd")
    assert ram.read(0, PAGE_SIZE) == bytes(PAGE_SIZE)


@pytest.mark.parametrize("size", [0, -PAGE_SIZE, 1, PAGE_SIZE + 1, 1 << 62], ids=hex)
def test_impossible_size(size: int) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(UsageError, match="RAM of"):
        Ram(size)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_new_ram_is_zero() -> None:
    assert Ram(PAGE_SIZE).read(0, PAGE_SIZE) == bytes(PAGE_SIZE)


def test_view_is_the_memory_itself() -> None:
    ram = Ram(PAGE_SIZE)
    view = ram.view(16, 4)
    view[:] = b"abcd"
    assert ram.read_u32(16) == int.from_bytes(b"abcd", "little")
    ram.write_u8(17, ord("X"))
    assert bytes(view) == b"aXcd"
    with pytest.raises(ValueError, match="different structures"):
        view[:] = b"too long"


def test_view_keeps_the_mapping_alive() -> None:
    ram = Ram(PAGE_SIZE)
    view = ram.view(0, PAGE_SIZE)
    view[0] = 0x5A
    address = ram.address
    del ram
    gc.collect()
    assert view[0] == 0x5A
    assert mapped(address)
    view.release()


def test_everything_goes_with_the_last_reference() -> None:
    ram = Ram(PAGE_SIZE, "vmonty-test-of-close")
    fd, address = ram.fileno(), ram.address
    assert "vmonty-test-of-close" in os.readlink(f"/proc/self/fd/{fd}")
    del ram
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(fd)
    assert not mapped(address)


def mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return "vmonty" in line
    return False


def test_file_is_the_memory() -> None:
    """Another process that gets the memfd shares the memory."""
    ram = Ram(PAGE_SIZE)
    os.pwrite(ram.fileno(), b"hello", 100)
    assert ram.read(100, 5) == b"hello"
    assert os.fstat(ram.fileno()).st_size == len(ram) == ram.size == PAGE_SIZE
    assert not os.get_inheritable(ram.fileno())


@pytest.mark.parametrize(
    "data", [b"ab", bytearray(b"ab"), memoryview(b"xabx")[1:3]], ids=["bytes", "bytearray", "view"]
)
def test_any_bytes_can_be_written(data: bytes | bytearray | memoryview) -> None:
    ram = Ram(PAGE_SIZE)
    ram.write(3, data)
    assert ram.read(3, 2) == b"ab"


def test_repr() -> None:
    assert repr(RAM) == f"<Ram 8 KiB at {RAM.address:#x}>"


def test_discarded_pages_read_as_zeroes_and_take_no_memory() -> None:
    ram = Ram(4 * PAGE_SIZE)
    ram.fill(0, 4 * PAGE_SIZE, 0x5A)
    before = os.fstat(ram.fileno()).st_blocks
    view = ram.view(PAGE_SIZE, PAGE_SIZE)
    ram.discard(PAGE_SIZE, 2 * PAGE_SIZE)
    assert (before - os.fstat(ram.fileno()).st_blocks) * 512 == 2 * PAGE_SIZE
    # Only now: a read may take the memory again.
    assert ram.read(0, 4 * PAGE_SIZE) == b"\x5a" * PAGE_SIZE + bytes(2 * PAGE_SIZE) + b"\x5a" * PAGE_SIZE
    view[0] = 7
    assert ram.read_u8(PAGE_SIZE) == 7
    ram.discard(0, 0)
    with pytest.raises(UsageError, match="whole pages"):
        ram.discard(1, PAGE_SIZE)
    with pytest.raises(GuestMemoryError):
        ram.discard(3 * PAGE_SIZE, 2 * PAGE_SIZE)
