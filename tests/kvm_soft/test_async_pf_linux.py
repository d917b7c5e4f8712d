"""Linux whose memory comes page by page, as after a post-copy migration: its tasks wait, the vCPU does not."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vmonty
from kvm_abi.missing_memory import MissingMemory
from vmonty.base.ram import Ram
from vmonty.kvm.soft import modules

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
# A boot takes 3 to 8 seconds of CPU time; a busy host needs longer.
BOOT_S, COMMAND_S = 240.0, 120.0


def copy_of(ram: Ram) -> int:
    """A file with what *ram* has."""
    fd = os.memfd_create("vmonty-test-copy")
    os.ftruncate(fd, ram.size)
    step = 1 << 20
    for at in range(0, ram.size, step):
        if any(data := ram.read(at, min(step, ram.size - at))):
            os.pwrite(fd, data, at)
    return fd


def take_away(ram: Ram) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    size = ctypes.c_long(ram.size)
    assert libc.fallocate(ram.fileno(), FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, ctypes.c_long(0), size) == 0


def notifications(vm: vmonty.VM) -> int:
    """How often Linux was told of a page that has come."""
    vm.console.sendline("grep HYP /proc/interrupts")
    return int(vm.console.expect(re.compile(rb"HYP: +(\d+) "), COMMAND_S).group(1))


WAYS = [("kvm_intel", {}), ("kvm_amd", {"npt": False})]


@pytest.mark.parametrize(("module", "parameters"), WAYS, ids=["ept", "shadow"])
def test_linux_goes_on_while_its_memory_comes(module: str, parameters: dict[str, bool]) -> None:
    with modules.only(module, **parameters), vmonty.VM(memory="128M", accel="soft") as vm:
        vm.start()
        vm.console.expect("/root # ", BOOT_S)
        assert notifications(vm) == 1  # the broadcast when it was turned on
        vm.pause()
        machine = vm._machine
        assert machine is not None
        ram = machine.memory.ram
        copy = copy_of(ram)
        take_away(ram)
        machine.vm.provider.memory_unmapped(ram.address, ram.size)
        missing = MissingMemory(ram)
        arguments = [missing.fileno(), copy, ram.address, ram.size]
        with subprocess.Popen(
            [sys.executable, Path(__file__).with_name("postcopy.py"), *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(missing.fileno(), copy),
        ) as server:  # fmt: skip
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            vm.resume()
            vm.console.sendline("head -c 1000000 /dev/zero | md5sum")
            vm.console.expect("879f4bba57ed37c9ec5e5aedf9864698", COMMAND_S)
            told = notifications(vm)
            vm.stop()
            server.communicate()
        missing.close()
        os.close(copy)
        assert told > 1
