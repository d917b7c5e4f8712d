"""An ATA disk behind a PIIX3: commands by ports and by DMA, errors, resets, hostile tables."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmonty.vmm.block.device import BlockDevice
from vmonty.vmm.block.image import open_image
from vmonty.vmm.hw.ata import AtaDisk

from .conftest import SECTORS
from .driver import BUFFER, PORTS, Driver

READY, ERROR = 0x50, 0x51
ABORT, NOT_FOUND = 4, 0x10


@pytest.fixture
def driver(disk: BlockDevice) -> Driver:
    return Driver([AtaDisk(disk, serial="A serial"), None])


def words(data: bytes) -> tuple[int, ...]:
    return struct.unpack("<256H", data)


def identify(driver: Driver) -> bytes:
    driver.command(0xEC)
    assert driver.interrupted
    return driver.data_in(512)


def test_identify(driver: Driver) -> None:
    data = identify(driver)
    assert driver.status() == READY
    assert not driver.interrupted, "reading the status takes the interrupt back"
    found = words(data)
    assert struct.pack(">10H", *found[10:20]) == b"A serial            "
    assert found[60] | found[61] << 16 == SECTORS
    assert struct.unpack("<Q", data[200:208])[0] == SECTORS
    assert found[49] & 0x300 == 0x300, "LBA and DMA"
    assert found[83] & 0x400, "48-bit addresses"


@pytest.mark.parametrize(("code", "wide"), [(0x20, False), (0x24, True), (0xC4, False), (0x29, True)])
@pytest.mark.parametrize("width", [2, 4])
def test_reads_by_ports(driver: Driver, image: Path, code: int, wide: bool, width: int) -> None:
    driver.command(code, 77, 19, wide=wide)
    assert driver.data_in(19 * 512, width) == image.read_bytes()[77 * 512 :][: 19 * 512]
    assert driver.status() == READY


def test_a_count_of_zero_is_256_sectors(driver: Driver, image: Path) -> None:
    driver.command(0x20, 5, 0)
    data = bytearray(256 * 512)
    driver.channel.read_string(0, 2, memoryview(data))
    assert data == image.read_bytes()[5 * 512 :][: 256 * 512]
    assert driver.status() == READY


def test_cylinders_heads_sectors(driver: Driver, image: Path) -> None:
    driver.command(0x20, 2 << 8 | 9, 1, device=3)  # cylinder 2, head 3, sector 9 of 16 heads and 63 sectors
    sector = (2 * 16 + 3) * 63 + 8
    assert driver.data_in(512) == image.read_bytes()[sector * 512 :][:512]
    driver.command(0x91, 0, 32, device=7)  # now 8 heads and 32 sectors
    assert driver.status() == READY
    driver.command(0x20, 2 << 8 | 9, 1, device=3)
    sector = (2 * 8 + 3) * 32 + 8
    assert driver.data_in(512) == image.read_bytes()[sector * 512 :][:512]
    driver.command(0x20, 0, 1, device=0)  # there is no sector 0
    assert (driver.status(), driver.channel.read(1, 1)) == (ERROR, NOT_FOUND)


@pytest.mark.parametrize(("code", "wide"), [(0x30, False), (0x34, True), (0xC5, False), (0x39, True)])
def test_writes_by_ports(driver: Driver, image: Path, code: int, wide: bool) -> None:
    before, data = image.read_bytes(), random.Random(2).randbytes(3 * 512)
    driver.command(code, 100, 3, wide=wide)
    assert not driver.interrupted, "the first block is asked for by the status alone"
    driver.data_out(data)
    assert driver.interrupted
    assert driver.status() == READY
    driver.command(0xE7)
    assert driver.status() == READY
    assert image.read_bytes() == before[: 100 * 512] + data + before[103 * 512 :]


@pytest.mark.parametrize("master_first", [False, True])
def test_dma(driver: Driver, image: Path, master_first: bool) -> None:
    before = image.read_bytes()
    driver.table((BUFFER, 0x1200), (BUFFER + 0x8000, 0x400), (BUFFER + 0x4002, 0x200))
    if master_first:
        driver.start(to_memory=True)
    driver.command(0x25, 10, 12, wide=True)
    if not master_first:
        driver.start(to_memory=True)
    assert driver.interrupted
    assert driver.stop() == 4, "interrupt, and no longer active"
    assert driver.status() == READY
    parts = ((BUFFER, 0x1200), (BUFFER + 0x8000, 0x400), (BUFFER + 0x4002, 0x200))
    assert b"".join(driver.memory.read(*part) for part in parts) == before[10 * 512 : 22 * 512]
    driver.table((BUFFER, 0), end=True)  # a size of 0 is 64 KiB: more than is asked for
    driver.command(0xCA, 1000, 2)
    driver.start(to_memory=False)
    assert driver.master_status() == 5, "interrupt, and still active: the table is longer"
    driver.stop()
    assert image.read_bytes()[1000 * 512 :][:1024] == before[10 * 512 : 12 * 512]


def test_trim_by_dma(driver: Driver, image: Path) -> None:
    before = image.read_bytes()
    driver.memory.write(BUFFER, (8 << 48 | 16).to_bytes(8, "little").ljust(512, b"\0"))
    driver.table((BUFFER, 512))
    driver.command(0x06, 0, 1, feature=1, wide=True)
    driver.start(to_memory=False)
    assert driver.stop() == 4
    assert driver.status() == READY
    assert image.read_bytes() == before[: 16 * 512] + bytes(8 * 512) + before[24 * 512 :]


def test_a_table_that_is_too_short(driver: Driver) -> None:
    driver.table((BUFFER, 512))
    driver.command(0xC8, 0, 2)
    driver.start(to_memory=True)
    assert not driver.interrupted
    assert driver.master_status() & 5 == 0
    driver.control.write(0, 1, 4)
    driver.control.write(0, 1, 0)
    assert identify(driver), "a reset brings it back"


def test_a_table_outside_of_memory(driver: Driver) -> None:
    for regions in (((0xFFF0_0000, 512),), ((BUFFER, 0), ((1 << 20) - 512, 1024))):
        driver.table(*regions)
        driver.command(0xC8, 0, 200)
        driver.start(to_memory=True)
        assert driver.interrupted
        assert driver.stop() & 2, "the error bit"
        assert driver.status() == ERROR
    driver.host.ports.write(PORTS + 4, 4, 0xFFFF_FFF0)
    driver.command(0xC8, 0, 1)
    driver.start(to_memory=True)
    assert driver.stop() & 2
    assert driver.status() == ERROR


def test_without_leave_to_be_master(driver: Driver) -> None:
    driver.host.config(1, 4, 2, 1)
    driver.table((BUFFER, 512))
    driver.command(0xC8, 0, 1)
    driver.start(to_memory=True)
    assert not driver.interrupted
    assert driver.memory.read(BUFFER, 512) == bytes(512)


@pytest.mark.parametrize(
    ("code", "lba", "count", "wide", "error"),
    [
        (0x20, SECTORS, 1, False, NOT_FOUND), (0x20, SECTORS - 1, 2, False, NOT_FOUND),
        (0x20, 0xFFF_FFFF, 0, False, NOT_FOUND),
        (0x24, (1 << 48) - 1, 0, True, NOT_FOUND), (0x25, SECTORS, 1, True, NOT_FOUND), (0x30, SECTORS, 1, False, 16),
        (0x42, SECTORS - 3, 4, True, NOT_FOUND), (0x00, 0, 0, False, ABORT), (0xA0, 0, 0, False, ABORT),
        (0xA1, 0, 0, False, ABORT), (0xC6, 0, 3, False, ABORT), (0xC6, 0, 32, False, ABORT), (0xEF, 0, 0, False, ABORT),
        (0xB0, 0, 0, False, ABORT), (0x08, 0, 0, False, ABORT), (0xFF, 0, 0, False, ABORT),
    ],
)  # fmt: skip
def test_errors(driver: Driver, code: int, lba: int, count: int, wide: bool, error: int) -> None:
    driver.command(code, lba, count, wide=wide)
    assert driver.interrupted
    assert (driver.status(), driver.channel.read(1, 1)) == (ERROR, error)
    assert identify(driver)


def test_multiple_can_be_switched_off(driver: Driver) -> None:
    driver.command(0xC6, 0, 0)
    driver.command(0xC4, 0, 4)
    assert driver.status() == ERROR
    driver.command(0xC6, 0, 4)
    driver.command(0xC4, 0, 6)
    assert len(driver.data_in(4 * 512)) == 2048
    assert driver.interrupted
    assert len(driver.data_in(4 * 512)) == 1024


def test_a_disk_that_is_only_read(image: Path) -> None:
    with open_image(image, format="raw", read_only=True) as backend:
        driver = Driver([AtaDisk(backend), None])
        driver.command(0x30, 0, 1)
        assert (driver.status(), driver.channel.read(1, 1)) == (ERROR, ABORT)


def test_native_size_power_smart_and_modes(driver: Driver) -> None:
    driver.command(0xF8)
    assert [driver.channel.read(at, 1) for at in (3, 4, 5)] == [0xFF, 0x0F, 0]
    driver.command(0xE5)
    assert driver.channel.read(2, 1) == 0xFF
    driver.command(0xB0, 0xC24F00, 0, feature=0xDA)
    assert [driver.channel.read(at, 1) for at in (4, 5)] == [0x4F, 0xC2], "no threshold exceeded"
    driver.command(0xB0, 0xC24F00, 1, feature=0xD0)
    assert sum(driver.data_in(512)) & 0xFF == 0
    driver.command(0xEF, 0, 0x42, feature=3)
    assert words(identify(driver))[88] >> 8 == 1 << 2, "Ultra DMA 2 is selected"
    driver.command(0xEF, 0, 0, feature=0x82)
    assert not words(identify(driver))[85] & 0x20, "the write cache is off"


def test_reset_and_an_empty_place(driver: Driver) -> None:
    driver.command(0x20, 0, 8)
    driver.control.write(0, 1, 4)
    assert driver.control.read(0, 1) & 0x80
    driver.control.write(0, 1, 0)
    assert driver.status() == READY
    assert [driver.channel.read(at, 1) for at in (1, 2, 3, 4, 5)] == [1, 1, 1, 0, 0]
    driver.channel.write(6, 1, 0x10)
    assert driver.status() == 0, "nobody is at place 1"
    driver.channel.write(7, 1, 0xEC)
    assert driver.status() == 0
    empty = driver.controller.channels[1]
    assert empty.read(7, 1) == 0x7F
    empty.write(7, 1, 0xEC)


def test_interrupts_can_be_held_back(driver: Driver) -> None:
    driver.control.write(0, 1, 2)
    driver.command(0xE7)
    assert not driver.interrupted
    driver.control.write(0, 1, 0)
    assert driver.interrupted


def test_the_older_byte_of_a_register(driver: Driver) -> None:
    driver.channel.write(3, 1, 0x12)
    driver.channel.write(3, 1, 0x34)
    assert driver.channel.read(3, 1) == 0x34
    driver.control.write(0, 1, 0x80)
    assert driver.channel.read(3, 1) == 0x12


ACCESS = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 7), st.sampled_from((1, 2, 4)), st.integers(0, 0xFFFF_FFFF)),
    st.tuples(st.just("read"), st.integers(0, 7), st.sampled_from((1, 2, 4)), st.just(0)),
    st.tuples(st.just("control"), st.just(0), st.just(1), st.integers(0, 255)),
    st.tuples(st.just("master"), st.integers(0, 15), st.sampled_from((1, 2, 4)), st.integers(0, 0xFFFF_FFFF)),
    st.tuples(st.just("command"), st.sampled_from((0x20, 0x25, 0xC8, 0x30, 0x35, 0xA0, 0xEC, 0xC4, 0x39)), st.just(1),
              st.integers(0, SECTORS + 9)),
    st.tuples(st.just("string"), st.integers(0, 7), st.sampled_from((1, 2, 4)), st.integers(0, 3000)),
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(st.lists(ACCESS, max_size=60))
def test_no_sequence_of_accesses_harms(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int, int]]
) -> None:
    path = tmp_path_factory.mktemp("ata") / "disk"
    path.write_bytes(bytes(SECTORS * 512))
    with open_image(path, format="raw") as backend:
        driver = Driver([AtaDisk(backend), None])
        driver.table((BUFFER, 0x400), (0xFFF0_0000, 64))
        for kind, at, size, value in steps:
            if kind == "write":
                driver.channel.write(at, size, value)
            elif kind == "read":
                assert 0 <= driver.channel.read(at, size) < 1 << 8 * size
            elif kind == "control":
                driver.control.write(0, 1, value)
            elif kind == "master":
                driver.host.ports.write(PORTS + at, size, value)
            elif kind == "command":
                driver.command(at, value, 3)
            else:
                data = memoryview(bytearray(value // size * size))
                (driver.channel.read_string if value & 1 else driver.channel.write_string)(at, size, data)
        driver.control.write(0, 1, 4)
        driver.control.write(0, 1, 0)
        assert len(identify(driver)) == 512
