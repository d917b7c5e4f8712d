"""A panic of the guest's kernel: its lines, and that a machine whose kernel is dead ends, and no other."""

from __future__ import annotations

import pytest

import vmonty
from vmonty.guests import busybox
from vmonty.vmm.outcome import Ending
from vmonty.vmm.panicwatch import PanicWatch

LIMIT_S = 120.0
TEXT = b"[1.0] Kernel panic - not syncing: no init\r\nmore\n"


def watch() -> tuple[PanicWatch, list[str]]:
    lines: list[str] = []
    made = PanicWatch([], lambda registers: None)
    made.told = lines.append
    return made, lines


@pytest.mark.parametrize("cut", range(1, len(TEXT), 5))
def test_a_panic_is_noticed_however_its_line_arrives(cut: int) -> None:
    made, lines = watch()
    feed = made.reader()
    feed(TEXT[:cut])
    feed(TEXT[cut:])
    feed(b"later\n")
    assert lines == ["Kernel panic - not syncing: no init"]
    assert made.reason == "no init"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"Kernel panic - not syncing: a", "a"), (b"[    1.5] Kernel panic - not syncing: a\r", "a"),
        (b"[    1.5][    T1] Kernel panic - not syncing:  a b ", "a b"), (b"Kernel panic - not syncing", ""),
        (b"[    1.5] ---[ end Kernel panic - not syncing: a ]---\r", "a"),
        (b"he said Kernel panic - not syncing: a", None), (b"[1.5] [ Kernel panic - not syncing: a", None),
    ],
)  # fmt: skip
def test_what_a_line_says(line: bytes, reason: str | None) -> None:
    """Only at its beginning, behind time and printer, it is the kernel's own."""
    made, _ = watch()
    made.reader()(line + b"\n")
    assert made.seen == (reason is not None)
    assert made.reason == (reason or "")
    made.close()


def test_an_ordinary_reboot_after_it() -> None:
    made, _ = watch()
    feed = made.reader()
    feed(TEXT)
    assert made.seen
    feed(b"[    2.0] reboot: Restarting system\n")
    assert not made.seen


def test_lines_without_end_take_no_memory_and_no_time() -> None:
    made, lines = watch()
    feed = made.reader()
    for piece in (
        bytes(1 << 20),
        b"Kernel panic - not syncing:" + b" " * (1 << 20) + b"\rx\n",
        b"[" * (1 << 20) + b"\n",
    ):
        feed(piece)
    feed(b"Kernel panic - not syncing\n")
    assert lines == ["Kernel panic - not syncing"]


def test_only_the_first_is_told() -> None:
    made, lines = watch()
    feed = made.reader()
    feed(b"Kernel panic - not syncing: a\nreboot: it\n" * 1000)
    assert lines == ["Kernel panic - not syncing: a"]


def test_each_console_has_its_lines() -> None:
    made, lines = watch()
    first, second = made.reader(), made.reader()
    for at in range(len(TEXT)):
        first(TEXT[at : at + 1])
        second(b"x")
    assert lines == ["Kernel panic - not syncing: no init"]


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


def test_a_dead_machine_that_is_paused_stays(busybox_guest: busybox.Guest) -> None:
    """Somebody looks at it; it ends when they let it go on."""
    with vmonty.VM(memory="256M", accel="soft") as vm:
        vm.start()
        vm.console.expect("userspace is up", LIMIT_S)
        vm.console.sendline("echo c >/proc/sysrq-trigger")
        vm.console.expect("end Kernel panic", LIMIT_S)
        vm.pause()
        assert vm.wait(3) is None
        vm.resume()
        outcome = vm.wait(LIMIT_S)
    assert outcome is not None
    assert outcome.ending is Ending.PANICKED
