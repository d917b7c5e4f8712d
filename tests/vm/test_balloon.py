"""The balloon as users move it: from Python, by `vmonty balloon`, and Linux takes its memory back."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vmonty
from vmonty.base.errors import UsageError

LIMIT_S = 120.0
MIB = 1 << 20


pytestmark = pytest.mark.usefixtures("busybox_guest")


def settle(vm: vmonty.VM, size: int) -> None:
    """Until the guest has what it shall have."""
    end = time.monotonic() + LIMIT_S
    while (state := vm.balloon())["actual"] != size:
        assert time.monotonic() < end, state
        time.sleep(0.1)


def free_mib(vm: vmonty.VM) -> int:
    vm.console.sendline("echo free:$(($(sed -n 's/MemFree: *\\([0-9]*\\).*/\\1/p' /proc/meminfo) / 1024))")
    found = vm.console.expect(re.compile(rb"\nfree:(\d+)\r"), LIMIT_S)
    return int(found[1])


def run(*words: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "vmonty", "balloon", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def test_linux_gives_and_takes_back(tmp_path: Path) -> None:
    with vmonty.VM(memory="256M", accel="soft", devices="virtio-balloon") as vm:
        vm.start()
        vm.console.expect("userspace is up", LIMIT_S)
        before = free_mib(vm)
        assert vm.balloon("176M")["target"] == 176 * MIB
        settle(vm, 176 * MIB)
        assert before - free_mib(vm) > 70
        path = vm.listen(tmp_path / "control")
        done = run(path, "236M")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[:2] == ["memory              256 MiB", "target              236 MiB"]
        settle(vm, 236 * MIB)
        assert before - free_mib(vm) < 40
        shown = json.loads(run(path, "--json").stdout)
        assert shown["actual"] == 236 * MIB
        assert 0 < shown["statistics"]["free_memory"] < shown["statistics"]["total_memory"] <= 256 * MIB
        done = run(path, "1G")
        assert done.returncode == 1
        assert "a balloon cannot leave the guest" in done.stderr


def test_a_machine_without_one() -> None:
    with vmonty.VM(memory="128M", accel="soft", machine="pc") as vm:
        vm.start()
        with pytest.raises(UsageError, match="has no balloon"):
            vm.balloon()
        slot = vm.plug(device="virtio-balloon")
        assert vm.balloon()["memory"] == 128 * MIB
        with pytest.raises(UsageError, match="this machine has one"):
            vm.plug(device="virtio-balloon")
        assert list(vm.devices()) == [slot]
