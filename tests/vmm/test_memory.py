"""Guest-physical memory: its blocks, its bounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmonty.base.errors import GuestMemoryError, UsageError
from vmonty.vmm import memory as module
from vmonty.vmm.memory import HIGH_RAM_BASE, LOW_RAM_LIMIT, Block, GuestMemory, check_size, host_memory

GIB = 1 << 30


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> GuestMemory:
    """5 GiB, of which the host gives only the pages that a test touches."""
    monkeypatch.setattr(module, "host_memory", lambda: 64 * GIB)
    return GuestMemory(5 * GIB)


def test_small_memory_is_one_block() -> None:
    memory = GuestMemory(1 << 20)
    assert memory.blocks == [Block(0, 1 << 20, 0)]
    assert memory.low_end == 1 << 20


def test_the_hole_below_4_gib(large: GuestMemory) -> None:
    assert large.blocks == [Block(0, 3 * GIB, 0), Block(4 * GIB, 2 * GIB, 3 * GIB)]
    assert large.low_end == LOW_RAM_LIMIT == 3 * GIB
    large.write(LOW_RAM_LIMIT - 4, b"low!")
    large.write(HIGH_RAM_BASE, b"high")
    assert large.ram.read(3 * GIB - 4, 8) == b"low!high"
    large.view(6 * GIB - 1, 1)[0] = 7
    assert large.ram.read_u8(5 * GIB - 1) == 7


def test_exactly_up_to_the_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "host_memory", lambda: 64 * GIB)
    assert GuestMemory(3 * GIB).blocks == [Block(0, 3 * GIB, 0)]
    assert GuestMemory(3 * GIB + 4096).blocks[1] == Block(4 * GIB, 4096, 3 * GIB)


@pytest.mark.parametrize(
    ("address", "size"),
    [
        (LOW_RAM_LIMIT - 1, 2), (LOW_RAM_LIMIT, 1), (HIGH_RAM_BASE - 1, 1), (HIGH_RAM_BASE - 1, 2),
        (6 * GIB, 1), (6 * GIB - 1, 2), (1 << 63, 1), ((1 << 64) - 1, 1), (-1, 1), (-1, 2),
    ],
)  # fmt: skip
def test_outside(large: GuestMemory, address: int, size: int) -> None:
    for access in (large.read, large.view, lambda at, n: large.write(at, bytes(n))):
        with pytest.raises(GuestMemoryError, match="outside the guest's 5120 MiB"):
            access(address, size)


def test_a_negative_size_is_refused(large: GuestMemory) -> None:
    with pytest.raises(GuestMemoryError):
        large.read(0, -1)


@given(address=st.integers(0, (1 << 16) + 16), data=st.binary(max_size=64))
def test_write_then_read(address: int, data: bytes) -> None:
    memory = GuestMemory(1 << 16)
    if address + len(data) <= memory.size:
        memory.write(address, data)
        assert memory.read(address, len(data)) == data == bytes(memory.view(address, len(data)))
    else:
        with pytest.raises(GuestMemoryError):
            memory.write(address, data)


@pytest.mark.parametrize("size", [0, -4096, 1, 4095, 4097])
def test_sizes_that_no_machine_has(size: int) -> None:
    for refuse in (check_size, GuestMemory):
        with pytest.raises(UsageError, match="positive multiple of 4 KiB"):
            refuse(size)


def test_more_than_the_host_has() -> None:
    with pytest.raises(UsageError, match="more than this host has"):
        GuestMemory((host_memory() // 4096 + 1) * 4096)
    assert host_memory() > 1 << 24


def test_slots(large: GuestMemory) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.regions: list[tuple[object, ...]] = []
            self.written: list[tuple[int, int]] = []
            self.provider = self

        def set_user_memory_region(self, *region: object) -> None:
            self.regions.append(region)

        def memory_written(self, address: int, size: int) -> None:
            self.written.append((address - large.ram.address, size))

    vm = Recorder()
    large.attach(vm)  # type: ignore[arg-type]
    assert vm.regions == [(0, 0, large.ram, 0, 3 * GIB), (1, 4 * GIB, large.ram, 3 * GIB, 2 * GIB)]
    large.write(HIGH_RAM_BASE + 5, b"code")
    large.written(7, 9)
    assert vm.written == [(3 * GIB + 5, 4), (7, 9)]
