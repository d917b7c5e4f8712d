"""Where a kernel and all that it is given lie in memory."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmonty.base.errors import BootImageError
from vmonty.vmm import memory as memory_module
from vmonty.vmm.boot import acpi, linux, longmode, lowmem
from vmonty.vmm.boot.entry import TABLES
from vmonty.vmm.memory import GuestMemory

from . import kernels

MIB, GIB = 1 << 20, 1 << 30
PLATFORM = acpi.Platform(cpus=2, pm_base=0x600)
PROGRAM = bytes(range(256)) * 20
INITRD = b"an initrd that nobody unpacks" * 999


@pytest.fixture
def memory() -> GuestMemory:
    return GuestMemory(16 * MIB)


def zero_page(memory: GuestMemory) -> bytes:
    return memory.read(lowmem.INFORMATION, 4096)


def test_everything_is_where_the_zero_page_says(memory: GuestMemory) -> None:
    entry = linux.load(memory, kernels.bzimage(PROGRAM), INITRD, "console=ttyS0 quiet", PLATFORM).address
    assert entry == kernels.ENTRY
    assert memory.read(entry, len(PROGRAM)) == PROGRAM
    page = zero_page(memory)
    start, size = struct.unpack_from("<II", page, 0x218)
    assert memory.read(start, size) == INITRD
    assert start % 4096 == 0
    (command_line,) = struct.unpack_from("<I", page, 0x228)
    assert memory.read(command_line, 20) == b"console=ttyS0 quiet\0"
    (rsdp,) = struct.unpack_from("<Q", page, 0x70)
    assert memory.read(rsdp, 8) == b"RSD PTR "
    assert page[0x210] == 0xFF
    assert page[0x202:0x206] == b"HdrS", "the header is the kernel's own"
    assert page[:0x70] == bytes(0x70), "no text mode, no APM: nothing that would be believed"


def test_without_an_initrd(memory: GuestMemory) -> None:
    linux.load(memory, kernels.bzimage(PROGRAM), None, "", PLATFORM)
    assert struct.unpack_from("<II", zero_page(memory), 0x218) == (0, 0)


def test_the_command_lines_bytes_go_through(memory: GuestMemory) -> None:
    linux.load(memory, kernels.bzimage(PROGRAM), None, "name=Zoë \udcff", PLATFORM)
    assert memory.read(lowmem.COMMAND_LINE, 12) == b"name=Zo\xc3\xab \xff\0"


@pytest.mark.parametrize(
    ("length", "fits"), [(2046, True), (2047, True), (2048, False), (lowmem.COMMAND_LINE_ROOM, False)]
)
def test_length_of_the_command_line(memory: GuestMemory, length: int, fits: bool) -> None:
    if fits:
        linux.load(memory, kernels.bzimage(PROGRAM), None, "x" * length, PLATFORM)
        assert memory.read(lowmem.COMMAND_LINE, length + 1) == b"x" * length + b"\0"
    else:
        with pytest.raises(BootImageError, match=f"{length} bytes; this kernel takes 2047"):
            linux.load(memory, kernels.bzimage(PROGRAM), None, "x" * length, PLATFORM)


@pytest.mark.parametrize(
    ("size", "changes", "initrd", "complaint"),
    [
        (MIB, {}, b"", "too small for Linux"),
        (2 * MIB, {}, b"", "the kernel needs 4 MiB and the guest has 2 MiB"),
        (8 * MIB, {"init_size": 7 * MIB}, b"", "the kernel needs 9 MiB"),
        (8 * MIB, {"pref_address": 1 << 40}, b"", "give it more memory"),
        (8 * MIB, {}, bytes(4 * MIB + 1), "the initrd of 4 MiB does not fit"),
        (16 * MIB, {"initrd_addr_max": 4 * MIB}, INITRD, "does not fit"),
        (16 * MIB, {"initrd_addr_max": 0}, INITRD, "does not fit"),
    ],
)
def test_what_does_not_fit(size: int, changes: dict[str, int], initrd: bytes, complaint: str) -> None:
    with pytest.raises(BootImageError, match=complaint):
        linux.load(GuestMemory(size), kernels.bzimage(PROGRAM, **changes), initrd or None, "", PLATFORM)


def test_an_initrd_that_just_fits() -> None:
    memory = GuestMemory(8 * MIB)
    linux.load(memory, kernels.bzimage(PROGRAM), b"i" * (4 * MIB), "", PLATFORM)
    assert struct.unpack_from("<II", zero_page(memory), 0x218) == (4 * MIB, 4 * MIB)


def test_a_kernel_below_1_mib_is_moved_up(memory: GuestMemory) -> None:
    entry = linux.load(
        memory, kernels.bzimage(PROGRAM, pref_address=0, kernel_alignment=4096), None, "", PLATFORM
    ).address
    assert entry == lowmem.HIGH_MEMORY + linux.ENTRY_64


@settings(deadline=None)
@given(
    address=st.integers(0, 12 * MIB), alignment=st.integers(12, 22), room=st.integers(0, 8 * MIB),
    initrd=st.integers(0, 3 * MIB), limit=st.integers(MIB, (1 << 32) - 1),
)  # fmt: skip
def test_nothing_overlaps(address: int, alignment: int, room: int, initrd: int, limit: int) -> None:
    memory = GuestMemory(16 * MIB)
    kernel = kernels.bzimage(
        PROGRAM, pref_address=address, kernel_alignment=1 << alignment, init_size=room,
        initrd_addr_max=min(limit, 0xFFFF_FFFF),
    )  # fmt: skip
    try:
        entry = linux.load(memory, kernel, b"i" * initrd, "quiet", PLATFORM).address
    except BootImageError:
        return
    start = entry - linux.ENTRY_64
    assert start % (1 << alignment) == 0
    assert start >= max(address, lowmem.HIGH_MEMORY)
    initrd_start, size = struct.unpack_from("<II", zero_page(memory), 0x218)
    assert size == initrd
    spans = [
        (TABLES, longmode.TABLES_SIZE), (lowmem.INFORMATION, 4096),
        (lowmem.COMMAND_LINE, lowmem.COMMAND_LINE_ROOM), (lowmem.ACPI_TABLES, 0x1000),
        (start, max(room, len(PROGRAM) + 0x200)),
    ]  # fmt: skip
    if size:
        spans.append((initrd_start, size))
        assert initrd_start + size - 1 <= limit
    spans.sort()
    assert all(base + length <= above for (base, length), (above, _) in itertools.pairwise(spans))
    assert spans[-1][0] + spans[-1][1] <= memory.size


@pytest.mark.parametrize("size", [64 * MIB, 3 * GIB, 3 * GIB + 4096, 8 * GIB])
def test_memory_map(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(memory_module, "host_memory", lambda: 64 * GIB)
    memory = GuestMemory(size)
    linux.load(memory, kernels.bzimage(PROGRAM), None, "", PLATFORM)
    page = zero_page(memory)
    entries = [struct.unpack_from("<QQI", page, 0x2D0 + 20 * index) for index in range(page[0x1E8])]
    assert entries == lowmem.e820(memory)
    assert entries == sorted(entries)
    assert all(length > 0 for _, length, _ in entries)
    assert all(base + length <= above for (base, length, _), (above, _, _) in itertools.pairwise(entries))
    ram = [(base, base + length) for base, length, kind in entries if kind == lowmem.E820_RAM]
    blocks = [(block.base, block.base + block.size) for block in memory.blocks]
    assert ram[0] == (0, lowmem.LOW_RAM_END)
    assert [(lowmem.HIGH_MEMORY, blocks[0][1]), *blocks[1:]] == ram[1:]
    reserved = [(base, length) for base, length, kind in entries if kind == lowmem.E820_RESERVED]
    assert any(base <= lowmem.ACPI_TABLES < base + length for base, length in reserved)
