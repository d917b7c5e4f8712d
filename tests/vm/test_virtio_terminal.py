"""The Python API's console is the machine's terminal: with a virtio console that one, as on the command line."""

from __future__ import annotations

import pytest

import vmonty

LIMIT_S = 120.0


@pytest.mark.usefixtures("busybox_guest")
def test_a_virtio_console_gets_what_is_sent() -> None:
    line = "console=hvc0 quiet cryptomgr.notests=1"
    with vmonty.VM(memory="128M", accel="soft", devices="virtio-console", append=line) as vm:
        vm.console.send("echo typed before the star''t\n")
        vm.start()
        vm.console.expect("typed before the start", LIMIT_S)
        vm.console.sendline("tty; poweroff -f")
        vm.console.expect("/dev/hvc0", LIMIT_S)
        assert vm.wait(LIMIT_S) is not None
