"""Limits on a disk's speed, on a clock of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmonty.base.errors import UsageError
from vmonty.vmm.block.image import open_image
from vmonty.vmm.block.throttle import BURST_S, Limits, ThrottledDevice
from vmonty.vmm.peripherals import Disk


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(
    ("limits", "reads", "writes", "least"),
    [
        (Limits(bps=1 << 20), 20, 20, 40 * 65536 / (1 << 20)),
        (Limits(bps_rd=1 << 20), 20, 20, 20 * 65536 / (1 << 20)),
        (Limits(bps_wr=1 << 20), 20, 40, 40 * 65536 / (1 << 20)),
        (Limits(iops=10), 20, 20, 4.0),
        (Limits(iops_rd=10), 20, 20, 2.0),
        (Limits(iops_wr=10, bps_rd=1 << 30), 20, 20, 2.0),
        (Limits(), 20, 20, 0.0),
    ],
)
def test_rates(tmp_path: Path, limits: Limits, reads: int, writes: int, least: float) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    clock = Clock()
    with ThrottledDevice(open_image(image, format="raw"), limits, clock=clock.time, sleep=clock.sleep) as disk:
        for _ in range(reads):
            disk.read(0, 65536)
        for _ in range(writes):
            disk.write(0, bytes(65536))
        disk.flush()
        assert disk.size == 1 << 20
    # The first come at once: a burst, and the last one's own time.
    assert least - BURST_S - 0.2 <= clock.now - 100 <= least


@pytest.mark.parametrize("wrong", [{"bps": -1}, {"bps": 1, "bps_rd": 1}, {"iops": 1, "iops_wr": 1}])
def test_limits_that_make_no_sense(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        Limits(**wrong)


def test_a_disk_of_the_command_line_is_limited(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    with Disk.parse(f"{image},format=raw,iops=1000000").open() as disk:
        assert isinstance(disk, ThrottledDevice)
        assert disk.read(0, 512) == bytes(512)
