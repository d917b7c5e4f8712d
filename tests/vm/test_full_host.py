"""The host's file system is full while a guest writes: the guest waits, and nothing is lost."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmonty
from vmonty.vmm.block.image import open_image

LIMIT_S = 120.0
MIB = 1 << 20


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system that is small")
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.usefixtures("busybox_guest")
def test_a_guest_waits_for_room(small: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = small / "disk.qcow2"
    with vmonty.VM(memory="128M", accel="soft", disks=[f"{image},size=64M"]) as vm:
        vm.start()
        vm.console.expect("/root # ", LIMIT_S)
        vm.console.sendline("yes vmonty | dd of=/dev/vda bs=64k count=128 iflag=fullblock conv=fsync && echo writ''ten")
        end = time.monotonic() + LIMIT_S
        while not caplog.records:
            assert time.monotonic() < end, vm.console.text
            time.sleep(0.05)
        assert "disk.qcow2: No space left on device; the guest waits" in caplog.text
        assert "written" not in vm.console.text
        subprocess.run(["mount", "-o", "remount,size=32m", small], check=True)
        vm.console.expect("written", LIMIT_S)
        vm.console.sendline("dmesg | grep -c 'I/O error'; poweroff -f")
        vm.console.expect("\r\n0\r\n", LIMIT_S)
        assert vm.wait(LIMIT_S) is not None
    with open_image(image, read_only=True) as disk:
        data = bytearray(8 * MIB)
        disk.preadv(0, [memoryview(data)])
    assert data == b"vmonty\n" * (8 * MIB // 7) + b"vmonty\n"[: 8 * MIB % 7]
