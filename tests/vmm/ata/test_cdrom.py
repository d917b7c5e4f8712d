"""A CD-ROM drive behind a PIIX3: packets by ports and by DMA, sense data, media change, hostile packets."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmonty.vmm.block.device import BlockDevice
from vmonty.vmm.block.tray import Tray
from vmonty.vmm.hw.ata import CdRom
from vmonty.vmm.peripherals import open_cdrom

from .driver import BUFFER, Driver

BLOCKS = 40
READY, ERROR = 0x50, 0x51
NO_MEDIUM, CHANGED = (2, 0x3A, 0), (6, 0x28, 0)
TEST_UNIT_READY = bytes(6)


def read_10(first: int, count: int) -> bytes:
    return struct.pack(">BBIBHB", 0x28, 0, first, 0, count, 0)


@pytest.fixture
def iso(tmp_path: Path) -> Path:
    path = tmp_path / "iso"
    path.write_bytes(random.Random(3).randbytes(BLOCKS * 2048 + 512))
    return path


@pytest.fixture
def medium(iso: Path) -> Iterator[BlockDevice]:
    with open_cdrom(iso) as opened:
        yield opened


@pytest.fixture
def driver(medium: BlockDevice) -> Driver:
    made = Driver([CdRom(Tray(medium), serial="disc"), None])
    assert made.packet(TEST_UNIT_READY)[0] == ERROR, "power on: the medium is new"
    assert made.sense() == CHANGED
    return made


def test_the_signature_and_identify(driver: Driver) -> None:
    driver.command(0xEC)
    assert driver.status() == ERROR, "a packet device is none that IDENTIFY DEVICE knows"
    assert (driver.channel.read(4, 1), driver.channel.read(5, 1)) == (0x14, 0xEB)
    driver.command(0xA1)
    found = struct.unpack("<256H", driver.data_in(512))
    assert found[0] == 0x8580
    driver.command(0x08)
    assert driver.status() == 0
    assert (driver.channel.read(4, 1), driver.channel.read(5, 1)) == (0x14, 0xEB)


@pytest.mark.parametrize("limit", [0xFFFE, 2048, 512, 30, 0xFFFF])
def test_reads_by_ports(driver: Driver, iso: Path, limit: int) -> None:
    assert driver.packet(read_10(3, 4), limit) == (READY, iso.read_bytes()[3 * 2048 : 7 * 2048])
    twelve = struct.pack(">BBIIBB", 0xA8, 0, 39, 1, 0, 0)
    assert driver.packet(twelve, limit) == (READY, iso.read_bytes()[39 * 2048 : 40 * 2048])
    assert driver.packet(read_10(0, 0)) == (READY, b"")


def test_reads_by_dma(driver: Driver, iso: Path) -> None:
    driver.table((BUFFER, 2048), (BUFFER + 0x3000, 2048))
    driver.command(0xA0, 0, 0, device=0, feature=1)
    driver.data_out(read_10(5, 2).ljust(12, b"\0"))
    driver.start(to_memory=True)
    assert driver.interrupted
    assert driver.stop() == 4
    assert driver.channel.read(2, 1) & 3 == 3
    assert driver.status() == READY
    data = driver.memory.read(BUFFER, 2048) + driver.memory.read(BUFFER + 0x3000, 2048)
    assert data == iso.read_bytes()[5 * 2048 : 7 * 2048]


def test_what_it_tells(driver: Driver) -> None:
    assert driver.packet(bytes((0x25,)))[1] == struct.pack(">II", BLOCKS - 1, 2048)
    status, inquiry = driver.packet(bytes((0x12, 0, 0, 0, 36, 0)))
    assert status == READY
    assert (inquiry[0], inquiry[1], len(inquiry)) == (5, 0x80, 36)
    assert driver.packet(bytes((0x12, 0, 0, 0, 5, 0)))[1] == inquiry[:5], "as much as is asked for"
    _, toc = driver.packet(bytes((0x43, 0, 0, 0, 0, 0, 0, 0, 100, 0)))
    assert toc == struct.pack(">HBB", 18, 1, 1) + bytes((0, 0x14, 1, 0, 0, 0, 0, 0, 0, 0x14, 0xAA, 0, 0, 0, 0, BLOCKS))
    _, minutes = driver.packet(bytes((0x43, 2, 0, 0, 0, 0, 0xAA, 0, 100, 0)))
    assert minutes[-4:] == bytes((0, 0, (BLOCKS + 150) // 75, (BLOCKS + 150) % 75))
    _, configuration = driver.packet(bytes((0x46, 0, 0, 0, 0, 0, 0, 1, 0, 0)))
    assert len(configuration) == 4 + struct.unpack_from(">I", configuration)[0]
    assert configuration[6:8] == b"\0\x08", "a CD is in it"
    _, mode = driver.packet(bytes((0x5A, 0, 0x2A, 0, 0, 0, 0, 0, 128, 0)))
    assert len(mode) == 2 + struct.unpack_from(">H", mode)[0]
    assert mode[8:10] == b"\x2a\x12"


@pytest.mark.parametrize(
    ("cdb", "sense"),
    [
        (read_10(BLOCKS, 1), (5, 0x21, 0)), (read_10(0xFFFF_FFFF, 0xFFFF), (5, 0x21, 0)),
        (read_10(BLOCKS - 1, 2), (5, 0x21, 0)), (bytes((0x2A,)), (5, 0x20, 0)), (bytes((0xFF,)), (5, 0x20, 0)),
        (bytes((0x12, 1)), (5, 0x24, 0)), (bytes((0x5A, 0, 0x11)), (5, 0x24, 0)),
        (bytes((0x5A, 0, 0xEA)), (5, 0x39, 0)),
        (bytes((0x43, 0, 5)), (5, 0x24, 0)), (bytes((0x46, 3)), (5, 0x24, 0)), (bytes((0x4A, 0)), (5, 0x24, 0)),
    ],
)  # fmt: skip
def test_errors(driver: Driver, cdb: bytes, sense: tuple[int, int, int]) -> None:
    assert driver.packet(cdb)[0] == ERROR
    assert driver.channel.read(1, 1) >> 4 == sense[0], "the sense key stands in the error register"
    assert driver.sense() == sense
    assert driver.sense() == (0, 0, 0), "it is told once"
    assert driver.packet(TEST_UNIT_READY)[0] == READY


def test_media_change_and_eject(medium: BlockDevice) -> None:
    told: list[str] = []
    drive = CdRom(ejected=lambda: told.append("ejected"))
    driver = Driver([drive, None])
    assert driver.packet(TEST_UNIT_READY)[0] == ERROR
    assert driver.sense() == NO_MEDIUM
    drive.change(medium)
    event = bytes((0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8, 0))
    assert driver.packet(event)[1][4:6] == b"\2\2", "a new medium, which is present"
    assert driver.packet(event)[1][4:6] == b"\0\2", "told once"
    assert driver.packet(bytes((0x25,)))[0] == ERROR
    assert driver.sense() == CHANGED
    assert driver.packet(bytes((0x25,)))[0] == READY
    driver.packet(bytes((0x1E, 0, 0, 0, 1)))
    assert driver.packet(bytes((0x1B, 0, 0, 0, 2)))[0] == ERROR, "the guest has locked the tray"
    assert driver.sense() == (5, 0x53, 2)
    driver.packet(bytes((0x1E,)))
    assert driver.packet(bytes((0x1B, 0, 0, 0, 2)))[0] == READY
    assert told == ["ejected"]
    assert driver.packet(event)[1][4:6] == b"\3\1", "it was removed, and the tray is open"
    assert driver.packet(read_10(0, 1))[0] == ERROR
    assert driver.sense() == (2, 0x3A, 2)
    assert driver.packet(bytes((0x1B, 0, 0, 0, 3)))[0] == READY, "the tray goes in again"
    assert driver.packet(read_10(0, 1))[0] == ERROR
    assert driver.sense() == CHANGED
    assert driver.packet(read_10(0, 1))[0] == READY
    driver.packet(bytes((0x1E, 0, 0, 0, 1)))
    drive.request_eject()
    assert driver.packet(event)[1][4:6] == b"\1\2", "somebody pressed the button"
    drive.change(None)
    assert not drive.locked
    assert driver.packet(event)[1][4:6] == b"\3\0"
    assert driver.packet(read_10(0, 1))[0] == ERROR
    assert driver.sense() == NO_MEDIUM


def test_a_change_ends_a_transfer(medium: BlockDevice) -> None:
    """What the guest reads must not come from a file that is closed."""
    drive = CdRom(Tray(medium))
    driver = Driver([drive, None])
    driver.packet(TEST_UNIT_READY)
    driver.command(0xA0, 2048 << 8, 0, device=0)
    driver.data_out(read_10(0, 4).ljust(12, b"\0"))
    assert len(driver.data_in(2048)) == 2048
    driver.channel.exclusively(drive)(lambda: drive.change(None))
    assert driver.status() == ERROR
    assert driver.data_in(2048) == b""
    assert driver.packet(TEST_UNIT_READY)[0] == ERROR
    assert driver.sense() == NO_MEDIUM


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cdb=st.binary(min_size=12, max_size=12), limit=st.integers(0, 0xFFFF), dma=st.booleans())
def test_no_packet_harms(driver: Driver, cdb: bytes, limit: int, dma: bool) -> None:
    driver.command(0xA0, limit << 8, 0, device=0, feature=int(dma))
    driver.data_out(cdb)
    for _ in range(40):
        if not driver.control.read(0, 1) & 8:
            break
        data = memoryview(bytearray(0x2000))
        driver.channel.read_string(0, 2, data)
    driver.command(0x08)
    driver.sense()
    assert driver.packet(bytes((0x12, 0, 0, 0, 36, 0)))[1][0] == 5
