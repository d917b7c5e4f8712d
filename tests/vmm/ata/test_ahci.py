"""An AHCI controller as a driver sees it: commands, the queue, errors, resets, hostile lists and tables."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmonty.base.errors import GuestMemoryError
from vmonty.vmm.block.device import BlockDevice
from vmonty.vmm.block.tray import Tray
from vmonty.vmm.hw.ata import AtaDisk, CdRom
from vmonty.vmm.hw.ata.ahci_port import CI, CMD, IE, IS, SACT, SCTL, SERR, SIG, SSTS, TFD
from vmonty.vmm.hw.ata.drive import Aborted
from vmonty.vmm.peripherals import open_cdrom

from .ahci_driver import BUFFER, LIST, RECEIVED, SLOT, TABLE_SIZE, TABLES, AhciDriver
from .conftest import SECTORS

READY, FAILED = 0x50, 0x51
BY_REGISTER, BY_PIO, DEVICE_BITS, OVERFLOW, INTERFACE, HOST_BUS, TASK_FILE = 1, 2, 8, 1 << 24, 1 << 27, 1 << 29, 1 << 30
IDENTIFY, READ_DMA_EXT, WRITE_DMA_EXT, READ_SECTORS, WRITE_SECTORS, FLUSH = 0xEC, 0x25, 0x35, 0x24, 0x34, 0xEA
READ_QUEUED, WRITE_QUEUED, READ_LOG, PACKET, TRIM = 0x60, 0x61, 0x2F, 0xA0, 0x06


@pytest.fixture
def driver(disk: BlockDevice) -> AhciDriver:
    return AhciDriver([AtaDisk(disk, serial="seven", sata=True)])


def test_what_it_is(driver: AhciDriver) -> None:
    assert driver.host.config(1, 0, 4) == 0x2922_8086
    assert driver.host.config(1, 8, 4) >> 8 == 0x01_0601
    assert driver.read(0x00) & 0x1F == 5, "six ports"
    assert driver.read(0x00) >> 8 & 0x1F == 31, "32 slots"
    assert driver.read(0x0C) == 0x3F
    assert (driver.port_read(SSTS), driver.port_read(SIG), driver.port_read(TFD)) == (0x113, 0x101, 0x150)
    assert (driver.port_read(SSTS, 1), driver.port_read(SIG, 1), driver.port_read(TFD, 1)) == (0, 0xFFFF_FFFF, 0x7F)
    assert driver.memory.read(RECEIVED + 0x40, 4) == b"\x34\0\x50\1", "the drive's first FIS waited for the area"


def test_identify(driver: AhciDriver) -> None:
    assert driver.command(IDENTIFY) == (BY_PIO, READY)
    words = struct.unpack("<256H", driver.memory.read(BUFFER, 512))
    assert words[76] & 0x100, "it has a queue"
    assert words[75] == 31
    assert words[100] == SECTORS
    assert driver.moved() == 512
    assert driver.interrupted is False, "what was acknowledged is quiet"
    assert (1, 0, 1) in driver.host.lines
    setup = driver.memory.read(RECEIVED + 0x20, 20)
    assert (setup[0], setup[2], setup[15]) == (0x5F, READY, READY)


@pytest.mark.parametrize(
    ("read", "write", "cause"), [(READ_DMA_EXT, WRITE_DMA_EXT, BY_REGISTER), (READ_SECTORS, WRITE_SECTORS, BY_PIO)]
)
def test_reads_and_writes(driver: AhciDriver, image: Path, read: int, write: int, cause: int) -> None:
    regions = [(BUFFER + 0x100, 512), (BUFFER + 0x1000, 1024), (BUFFER + 0x4000, 512)]
    assert driver.command(read, 7, 4, regions=regions) == (cause, READY)
    data = b"".join(driver.memory.read(base, size) for base, size in regions)
    assert data == image.read_bytes()[7 * 512 : 11 * 512]
    assert driver.moved() == 2048
    assert driver.command(write, 100, 4, regions=regions, write=True) == (BY_REGISTER, READY)
    assert driver.command(FLUSH) == (BY_REGISTER, READY)
    assert image.read_bytes()[100 * 512 : 104 * 512] == data
    assert driver.port_read(CI) == 0


def test_descriptors_decide_how_much_moves(driver: AhciDriver, image: Path) -> None:
    causes, status = driver.command(READ_DMA_EXT, 0, 4, regions=[(BUFFER, 1024)])
    assert (causes, status) == (BY_REGISTER | OVERFLOW, READY)
    assert driver.moved() == 1024
    before = image.read_bytes()
    causes, status = driver.command(WRITE_DMA_EXT, 0, 4, regions=[(BUFFER, 1024)], write=True)
    assert causes == BY_REGISTER | TASK_FILE
    assert status == 0x4 << 8 | FAILED
    assert image.read_bytes() == before, "half a write is none"


def trim(*ranges: tuple[int, int]) -> bytes:
    """The data of DATA SET MANAGEMENT."""
    return b"".join(struct.pack("<Q", count << 48 | first) for first, count in ranges).ljust(512, b"\0")


def test_trim(driver: AhciDriver, image: Path) -> None:
    before = image.read_bytes()
    region = [(BUFFER, 512)]
    driver.memory.write(BUFFER, trim((8, 16), (0, 0), (SECTORS - 8, 8)))
    assert driver.command(TRIM, 0, 1, feature=1, regions=region, write=True) == (BY_REGISTER, READY)
    after = bytearray(before)
    after[8 * 512 : 24 * 512] = bytes(16 * 512)
    after[-8 * 512 :] = bytes(8 * 512)
    assert image.read_bytes() == after
    driver.memory.write(BUFFER, trim((100, 1), (SECTORS - 8, 9)))
    assert driver.command(TRIM, 0, 1, feature=1, regions=region, write=True) == (
        BY_REGISTER | TASK_FILE, 0x10 << 8 | FAILED,
    )  # fmt: skip
    for feature, count in ((0, 1), (2, 1), (1, 0), (1, 9)):
        driver.restart()
        causes, status = driver.command(TRIM, 0, count, feature=feature, regions=[(BUFFER, 512 * 16)], write=True)
        assert (causes, status) == (BY_REGISTER | TASK_FILE, 0x4 << 8 | FAILED)
    assert image.read_bytes() == after, "nothing of what lies outside in part"


def test_a_queue(driver: AhciDriver, image: Path) -> None:
    data = image.read_bytes()
    slots = (3, 0, 31)
    for slot in slots:
        driver.prepare(
            READ_QUEUED, 10 * slot, slot << 3, feature=2, slot=slot, regions=[(BUFFER + 1024 * slot, 1024)]
        )  # fmt: skip
    driver.issue(*slots, queued=True)
    assert (driver.port_read(CI), driver.port_read(SACT)) == (0, 0)
    assert driver.acknowledge() == DEVICE_BITS
    for slot in slots:
        assert driver.memory.read(BUFFER + 1024 * slot, 1024) == data[10 * slot * 512 :][:1024]
    driver.prepare(WRITE_QUEUED, 500, 4 << 3, feature=2, slot=4, device=0xC0, regions=[(BUFFER, 1024)], write=True)
    driver.issue(4, queued=True)
    assert image.read_bytes()[500 * 512 : 502 * 512] == data[:1024]
    bits = driver.memory.read(RECEIVED + 0x58, 8)
    assert (bits[0], bits[4:]) == (0xA1, (1 << 4).to_bytes(4, "little"))


def test_the_queue_tells_which_command_failed(driver: AhciDriver) -> None:
    driver.prepare(READ_QUEUED, SECTORS, 5 << 3, feature=1, slot=5)
    driver.prepare(READ_QUEUED, 0, 6 << 3, feature=1, slot=6)
    driver.issue(5, 6, queued=True)
    assert driver.acknowledge() == DEVICE_BITS | TASK_FILE
    assert driver.port_read(TFD) == 0x10 << 8 | FAILED
    assert driver.port_read(SACT) == 1 << 5 | 1 << 6, "nothing goes on after an error"
    driver.restart()
    assert (driver.port_read(CI), driver.port_read(SACT)) == (0, 0)
    assert driver.command(READ_LOG, 0x10, 1) == (BY_PIO, READY)
    log = driver.memory.read(BUFFER, 512)
    assert (log[0], log[2], log[3]) == (5, FAILED, 0x10)
    assert sum(log) & 0xFF == 0
    assert driver.command(READ_LOG, 0, 1)[1] == READY
    assert driver.memory.read(BUFFER + 0x20, 2) == b"\1\0"


def test_an_error_holds_the_list(driver: AhciDriver) -> None:
    driver.prepare(READ_DMA_EXT, SECTORS, 1, slot=0)
    driver.prepare(IDENTIFY, slot=1)
    driver.issue(0, 1)
    assert driver.acknowledge() == BY_REGISTER | TASK_FILE
    assert driver.port_read(CI) == 3
    driver.issue(2)
    assert driver.acknowledge() == 0
    driver.restart()
    assert driver.port_read(CI) == 0
    assert driver.command(IDENTIFY) == (BY_PIO, READY)


def test_soft_reset(driver: AhciDriver) -> None:
    driver.prepare(0, flags=0, control=4, regions=())
    driver.issue(0)
    assert driver.port_read(TFD) & 0x80, "busy"
    driver.prepare(0, flags=0, control=0, regions=())
    driver.issue(0)
    assert (driver.port_read(TFD), driver.port_read(SIG)) == (0x150, 0x101)
    assert driver.acknowledge() == 0, "told by the status alone"


def test_link_and_controller_resets_wait_for_a_command(driver: AhciDriver) -> None:
    driver.loop.waits = True
    driver.prepare(IDENTIFY)
    driver.issue(0)
    driver.port_write(SCTL, 1)
    assert driver.port_read(SSTS) == 0
    assert driver.port_read(CI) == 0
    driver.port_write(SCTL, 0)
    assert driver.port_read(SSTS) == 0, "the drive still has its old command"
    driver.loop.go()
    assert driver.port_read(SSTS) == 0x113
    assert driver.port_read(SERR) == 1 << 26
    assert driver.port_read(IS) & 0x40
    driver.port_write(SERR, 1 << 26)
    assert not driver.port_read(IS) & 0x40
    driver.restart()
    driver.issue(0)
    driver.write(0x04, 1 << 31 | 1)
    assert driver.read(0x04) & 1
    driver.loop.go()
    assert driver.read(0x04) == 1 << 31
    assert driver.port_read(CMD) & 0xC011 == 0
    driver.loop.waits = False
    driver.write(0x04, 1 << 31 | 2)
    driver.start()
    assert driver.command(IDENTIFY) == (BY_PIO, READY)


class Interrupting(AtaDisk):
    """While it flushes, its driver does something."""

    act = staticmethod(lambda: None)

    def _flush(self) -> None:
        self.act()
        super()._flush()


@pytest.mark.parametrize("fails", [False, True])
def test_a_list_that_is_stopped_meanwhile(disk: BlockDevice, fails: bool) -> None:
    """The old command tells nothing, neither its end nor its failure, and the next ones are carried out."""
    drive = Interrupting(disk, sata=True)
    driver = AhciDriver([drive])

    def restart() -> None:
        driver.port_write(CMD, 1 << 4)
        assert driver.port_read(CMD) & 1 << 15, "the list still runs"
        driver.restart()
        driver.prepare(IDENTIFY, slot=0)
        driver.issue(0)
        if fails:
            raise Aborted

    drive.act = restart  # type: ignore[method-assign]
    driver.prepare(FLUSH, slot=0)
    driver.issue(0)
    assert driver.acknowledge() == BY_PIO, "of the second command alone"
    assert driver.port_read(CI) == 0
    assert driver.memory.read(BUFFER, 2) == b"\x40\0"


def test_interrupts_are_masked_and_come_back(driver: AhciDriver) -> None:
    driver.port_write(IE, 0)
    driver.prepare(IDENTIFY)
    driver.issue(0)
    assert not driver.interrupted
    driver.port_write(IE, BY_PIO)
    assert driver.interrupted
    driver.write(0x08, 1)
    assert driver.interrupted, "the port still has something to tell"
    driver.write(0x04, 1 << 31)
    assert not driver.interrupted
    driver.write(0x04, 1 << 31 | 2)
    assert driver.interrupted
    driver.acknowledge()
    assert not driver.interrupted


MSI = 0x80


def test_messages_in_place_of_the_line(driver: AhciDriver) -> None:
    host, config = driver.host, driver.host.config
    assert config(SLOT, MSI, 1) == 5
    for offset, size, value in ((4, 4, 0xFEE0_1000), (8, 4, 0), (12, 2, 0x4041), (2, 2, 1)):
        config(SLOT, MSI + offset, size, value)
    assert config(SLOT, MSI + 2, 2) == 0x81
    host.lines.clear()
    driver.prepare(IDENTIFY)
    driver.issue(0)
    assert host.messages == [(0xFEE0_1000, 0x4041)]
    driver.issue(0)
    assert len(host.messages) == 1, "the driver knows that there is something"
    driver.write(0x08, 1)
    assert len(host.messages) == 2, "the port was not asked: there still is"
    driver.acknowledge()
    assert len(host.messages) == 2
    driver.write(0x04, 1 << 31)
    driver.issue(0)
    assert len(host.messages) == 2, "interrupts are off"
    driver.write(0x04, 1 << 31 | 2)
    assert len(host.messages) == 3
    assert not host.lines
    config(SLOT, MSI + 2, 2, 0)
    assert host.lines[-1] == (SLOT, 0, 1), "the line again"
    config(SLOT, MSI + 2, 2, 1)
    assert host.lines[-1] == (SLOT, 0, 0)
    assert len(host.messages) == 4, "what waits is told the new way"


def test_a_message_that_may_not_be_sent_waits(driver: AhciDriver) -> None:
    """Without bus mastering there are none; nor has one told anybody then."""
    host, config = driver.host, driver.host.config
    for offset, size, value in ((4, 4, 0xFEE0_1000), (8, 4, 0), (12, 2, 0x4041), (2, 2, 1)):
        config(SLOT, MSI + offset, size, value)
    driver.write(0x04, 1 << 31)
    driver.prepare(IDENTIFY)
    driver.issue(0)
    command = config(SLOT, 4, 2)
    config(SLOT, 4, 2, command & ~4)
    driver.write(0x04, 1 << 31 | 2)
    assert host.messages == []
    config(SLOT, 4, 2, command)
    assert host.messages == [(0xFEE0_1000, 0x4041)]


def test_a_cdrom(tmp_path: Path) -> None:
    path = tmp_path / "iso"
    path.write_bytes(random.Random(3).randbytes(40 * 2048))
    with open_cdrom(path) as medium:
        drive = CdRom(Tray(medium))
        driver = AhciDriver([drive])
        assert driver.port_read(SIG) == 0xEB14_0101
        ready = bytes(6)
        assert driver.command(PACKET, packet=ready, regions=()) == (BY_REGISTER | TASK_FILE, 0x60 << 8 | FAILED)
        driver.restart()
        read = struct.pack(">BBIBHB", 0x28, 0, 5, 0, 2, 0)
        assert driver.command(PACKET, packet=read, feature=1) == (BY_REGISTER, READY)
        assert driver.memory.read(BUFFER, 4096) == path.read_bytes()[5 * 2048 : 7 * 2048]
        assert driver.moved() == 4096
        driver.controller.exclusively(0)(lambda: drive.change(None))
        assert driver.command(PACKET, packet=read)[1] == 0x20 << 8 | FAILED, "not ready"


# ---- hostile drivers ------------------------------------------------------------------------------------------------


def still_works(driver: AhciDriver) -> None:
    driver.write(0x04, 1 << 31 | 1)
    assert driver.read(0x04) == 1 << 31
    driver.write(0x04, 1 << 31 | 2)
    driver.start()
    assert driver.command(IDENTIFY) == (BY_PIO, READY)


@pytest.mark.parametrize(
    "broken",
    ["list", "table", "region", "received", "kind", "length", "no master", "regions"],
)
def test_what_cannot_be_fetched(driver: AhciDriver, broken: str) -> None:
    outside = 0xFFFF_F000
    driver.prepare(READ_DMA_EXT)
    wanted = HOST_BUS
    if broken == "list":
        driver.port_write(0x00, outside)
    elif broken == "table":
        driver.memory.write(LIST + 8, struct.pack("<Q", outside))
    elif broken == "region":
        driver.prepare(READ_DMA_EXT, regions=[(BUFFER, 256), (outside, 256)])
    elif broken == "received":
        driver.port_write(0x08, outside)
    elif broken in ("kind", "length"):
        driver.prepare(READ_DMA_EXT, **{broken: 1})  # type: ignore[arg-type]
        wanted = INTERFACE
    elif broken == "no master":
        driver.host.config(1, 0x04, 2, 2)
    else:
        driver.memory.write(LIST + 8, struct.pack("<Q", (1 << 20) - 0x200))
        driver.memory.write((1 << 20) - 0x200, driver.memory.read(TABLES, 0x80))
        driver.memory.write(LIST, struct.pack("<I", 5 | 0xFFFF << 16))
        driver.memory.write((1 << 20) - 0x180, bytes(0x180))
    driver.issue(0)
    assert driver.acknowledge() & wanted
    if broken == "no master":
        driver.host.config(1, 0x04, 2, 6)
    still_works(driver)


def test_registers_of_no_port_and_odd_widths(driver: AhciDriver) -> None:
    assert driver.read(0x100 + 0x80 * 6) == 0
    driver.write(0x100 + 0x80 * 6 + CI, 0xFFFF_FFFF)
    driver.port_write(CI, 0xFFFF_FFFF, port=1)
    assert driver.port_read(CI, 1) == 0
    driver.host.mmio.write(0xFEB0_0100 + CI, 1, 1)
    assert driver.port_read(CI) == 0
    assert driver.host.mmio.read(0xFEB0_0000, 8) == driver.read(0) | driver.read(4) << 32
    assert driver.host.mmio.read(0xFEB0_0001, 1) == driver.read(0) >> 8 & 0xFF


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.binary(min_size=16, max_size=16),
    fis=st.binary(min_size=20, max_size=20),
    regions=st.lists(st.tuples(st.integers(0, 1 << 21), st.integers(0, (1 << 32) - 1)), max_size=6),
    sane=st.booleans(),
    queued=st.booleans(),
    packets=st.booleans(),
    cdb=st.binary(min_size=12, max_size=12),
)
def test_no_table_harms(
    disk: BlockDevice, header: bytes, fis: bytes, regions: list[tuple[int, int]], sane: bool, queued: bool,
    packets: bool, cdb: bytes,
) -> None:  # fmt: skip
    driver = AhciDriver([CdRom(Tray(disk)) if packets else AtaDisk(disk, sata=True)])
    if sane:  # so that it gets further
        header = struct.pack("<IIQ", 5 | len(regions) << 16, 0, TABLES)
        fis = bytes((0x27, 0x80, PACKET if packets else fis[2])) + fis[3:]
    driver.memory.write(LIST, header)
    entries = b"".join(struct.pack("<QII", base, 0, size) for base, size in regions)
    driver.memory.write(TABLES, fis.ljust(0x40, b"\0") + cdb.ljust(0x40, b"\0") + entries)
    assert 0x80 + len(entries) <= TABLE_SIZE
    driver.issue(0, queued=queued)
    driver.acknowledge()
    still = AhciDriver([AtaDisk(disk, sata=True)])
    still_works(still)
    driver.write(0x04, 1 << 31 | 1)
    assert driver.read(0x04) == 1 << 31


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(writes=st.lists(st.tuples(st.integers(0, 0x17F), st.integers(0, (1 << 32) - 1)), max_size=30))
def test_no_register_harms(disk: BlockDevice, writes: list[tuple[int, int]]) -> None:
    driver = AhciDriver([AtaDisk(disk, sata=True)])
    driver.prepare(IDENTIFY)
    for register, value in writes:
        driver.write(register & ~3, value)
        driver.read(register & ~3)
    still_works(driver)


def test_memory_refuses_what_is_outside(driver: AhciDriver) -> None:
    """The tests above rely on it."""
    with pytest.raises(GuestMemoryError):
        driver.memory.view((1 << 20) - 1, 2)
