"""What waits for a port's commands, and commands that take long."""

from __future__ import annotations

import errno
import struct
import threading
from collections.abc import Callable, Sequence

import pytest

from vmonty.base.errors import BlockError
from vmonty.vmm.block.buffers import total
from vmonty.vmm.block.device import BlockDevice
from vmonty.vmm.block.tray import Tray
from vmonty.vmm.hw.ata import ahci_port
from vmonty.vmm.hw.ata.ahci_port import BYTES_AT_ONCE, CI, CMD, TFD
from vmonty.vmm.hw.ata.cdrom import PACKET, CdRom
from vmonty.vmm.hw.ata.disk import AtaDisk

from .ahci_driver import BUFFER, AhciDriver

FLUSH = 0xE7
READY = 0x50


class Telling(AtaDisk):
    """Tells of each flush."""

    flushed: Callable[[], None] = staticmethod(lambda: None)

    def _flush(self) -> None:
        self.flushed()
        super()._flush()


@pytest.fixture
def drive(disk: BlockDevice) -> Telling:
    return Telling(disk, sata=True)


@pytest.fixture
def driver(drive: Telling) -> AhciDriver:
    return AhciDriver([drive])


def test_what_nobody_waits_for_any_more_does_not_happen(driver: AhciDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A medium that was to be put in is closed by then."""
    monkeypatch.setattr(ahci_port, "MOST_WAIT_S", 0)
    happened: list[str] = []
    driver.loop.waits = True
    driver.prepare(FLUSH, regions=())
    driver.issue(0)
    with pytest.raises(BlockError) as caught:
        driver.controller.exclusively(0)(lambda: happened.append("late"))
    assert caught.value.errno == errno.EBUSY
    driver.loop.go()
    assert (happened, driver.port_read(CI)) == ([], 0)
    driver.controller.exclusively(0)(lambda: happened.append("now"))
    assert happened == ["now"]


def test_what_happened_at_the_last_moment_has_happened(driver: AhciDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(ahci_port.Call):
        def wait(self, seconds: float) -> bool:
            driver.loop.go()
            return False

    monkeypatch.setattr(ahci_port, "Call", Late)
    happened: list[str] = []
    driver.loop.waits = True
    driver.prepare(FLUSH, regions=())
    driver.issue(0)
    driver.controller.exclusively(0)(lambda: happened.append("in time"))
    assert happened == ["in time"]


def test_it_comes_before_the_next_command(driver: AhciDriver, drive: Telling) -> None:
    """A driver that issues a command during each keeps the list filled for ever."""
    happened: list[str] = []

    def flushed() -> None:
        happened.append("flush")
        if len(happened) == 1:
            driver.controller.ports[0].when_idle(lambda: happened.append("idle"))
        if len(happened) < 5:
            driver.issue(happened.count("flush") % 2)

    drive.flushed = flushed  # type: ignore[method-assign]
    driver.prepare(FLUSH, regions=(), slot=0)
    driver.prepare(FLUSH, regions=(), slot=1)
    driver.issue(0)
    assert happened[:3] == ["flush", "idle", "flush"]
    assert driver.port_read(TFD) == READY


def test_one_that_fails_is_told_and_the_port_lives_on(
    driver: AhciDriver, drive: Telling, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: told.append(arguments.exc_type))

    def flushed() -> None:
        driver.controller.ports[0].when_idle(lambda: [][1])

    drive.flushed = flushed  # type: ignore[method-assign]
    for number in range(2):
        driver.command(FLUSH, regions=())
        assert driver.port_read(TFD) == READY
        assert told == [IndexError] * (number + 1)


class Huge(BlockDevice):
    """A disc of 5 GiB with nothing on it, which counts what is read."""

    size = 5 << 30
    read_only = True

    def __init__(self) -> None:
        self.bytes_read = 0
        self.largest = 0
        self.act: Callable[[], None] = lambda: None

    def preadv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        assert offset == self.bytes_read
        self.bytes_read += total(buffers)
        self.largest = max(self.largest, total(buffers))
        self.act()

    def pwritev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        raise AssertionError

    discard = write_zeroes = pwritev  # type: ignore[assignment]

    def flush(self) -> None: ...

    def close(self) -> None: ...


REGION = 4 << 20
REGIONS = (4 << 30) // REGION + 1


def read_it(driver: AhciDriver) -> None:
    size = REGIONS * REGION
    packet = struct.pack(">BBII", 0xA8, 0, 0, size // 2048)
    driver.prepare(PACKET, feature=1, packet=packet, regions=[(BUFFER, REGION)] * REGIONS)
    driver.issue(0)


def with_disc(disc: Huge) -> AhciDriver:
    driver = AhciDriver([CdRom(Tray(disc))], memory=8 << 20)
    driver.command(PACKET, packet=bytes(6), regions=())  # it was told of the disc
    driver.restart()
    return driver


def test_a_packet_that_moves_more_than_the_header_can_say() -> None:
    disc = Huge()
    driver = with_disc(disc)
    read_it(driver)
    assert driver.port_read(TFD) == READY
    assert disc.bytes_read == REGIONS * REGION
    assert driver.moved() == REGION, "modulo 4 GiB"
    assert disc.largest == BYTES_AT_ONCE


def test_a_long_packet_ends_when_it_is_taken_back() -> None:
    disc = Huge()
    driver = with_disc(disc)
    disc.act = lambda: driver.port_write(CMD, 0)
    read_it(driver)
    assert disc.bytes_read == BYTES_AT_ONCE
    assert not driver.port_read(CMD) & 1 << 15, "the list does not run"
