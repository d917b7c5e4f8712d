"""A panic of the guest's kernel: its lines, and that a machine whose kernel is dead ends, and no other."""

from __future__ import annotations

import pytest

import vmonty
from vmonty.guests import busybox
from vmonty.vmm.outcome import Ending
from vmonty.vmm.panicwatch import PanicWatch

LIMIT_S = 120.0
TEXT = b"[1.0] Kernel panic - not syncing: no init\r\nmore\n"


@pytest.mark.parametrize("cut", range(1, len(TEXT), 5))
def test_a_panic_is_noticed_however_its_line_arrives(cut: int) -> None:
    lines: list[str] = []
    watch = PanicWatch([], lambda registers: None)
    watch.told = lines.append
    watch.feed(TEXT[:cut])
    watch.feed(TEXT[cut:])
    watch.feed(b"later\n")
    assert lines == ["Kernel panic - not syncing: no init"]
    assert watch.reason == "no init"


def test_lines_without_end_take_no_memory() -> None:
    watch = PanicWatch([], lambda registers: None)
    for _ in range(100):
        watch.feed(bytes(1000))
    watch.feed(b"\nKernel panic - not syncing\n")
    assert watch.reason == ""
    assert len(watch._line) < 5000


@pytest.mark.parametrize(("machine", "cpus"), [("pc", 2), ("microvm", 1)])
def test_a_dead_kernel_ends_the_machine(busybox_guest: busybox.Guest, machine: str, cpus: int) -> None:
    told: list[str] = []
    with vmonty.VM(machine=machine, cpus=cpus, memory="256M", accel="soft") as vm:
        vm.on("panic", told.append)
        vm.start()
        vm.console.expect("userspace is up", LIMIT_S)
        vm.console.sendline("echo c >/proc/sysrq-trigger")
        outcome = vm.wait(LIMIT_S)
    assert outcome is not None
    assert (outcome.ending, outcome.detail) == (
        Ending.PANICKED, "the guest's kernel panicked: sysrq triggered crash",
    )  # fmt: skip
    assert outcome.registers["rip"] >> 63
    assert told == ["Kernel panic - not syncing: sysrq triggered crash"]


def test_a_kernel_without_a_root(busybox_guest: busybox.Guest) -> None:
    with vmonty.VM(
        kernel=busybox_guest.kernel, append="console=ttyS0 root=/dev/none", memory="256M", accel="soft"
    ) as vm:
        vm.start()
        outcome = vm.wait(LIMIT_S)
    assert outcome is not None
    assert outcome.ending is Ending.PANICKED
    assert "Unable to mount root fs" in outcome.detail


@pytest.mark.parametrize(
    "then", ["sleep 3", "dd if=/dev/zero of=/dev/null bs=100M count=30 2>/dev/null; usleep 1500000"]
)
def test_who_reads_an_old_log_goes_on(busybox_guest: busybox.Guest, then: str) -> None:
    """The line comes from a program: the kernel is busy, or waits, as it does."""
    with vmonty.VM(memory="256M", accel="soft") as vm:
        vm.start()
        vm.console.expect("userspace is up", LIMIT_S)
        line = "[ 1.5] ---[ end Kernel panic - not syncing: old ]---"
        vm.console.sendline(f"stty -echo; printf '\\n{line}\\n'; {then}; echo 'still 'here; poweroff -f")
        vm.console.expect("still here", LIMIT_S)
        outcome = vm.wait(LIMIT_S)
    assert outcome is not None
    assert outcome.ending is Ending.POWER_OFF
