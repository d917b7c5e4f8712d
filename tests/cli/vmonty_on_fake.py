"""``python -m cli.vmonty_on_fake GUEST ARGUMENT…``: vmonty whose accelerator kvm is a fake that plays GUEST."""

from __future__ import annotations

import sys
from collections.abc import Callable

from vmm.fake_kvm import FakeKvm
from vmm.steps import Guest, In, Leave, Out, Spin, Wait
from vmonty import kvm
from vmonty.cli.main import main
from vmonty.kvm.uapi import Exit

POWER_OFF = Out(0x604, 5 << 10 | 1 << 13, 2)
RESET = Out(0x64, 0xFE)


def say(text: bytes) -> Guest:
    """Print on COM1."""
    for byte in text:
        yield Out(0x3F8, byte)


def echo(cpu: int) -> Guest:
    """Print what comes in, until q (power-off), r (reset) or ! (triple fault)."""
    yield Out(0x3FC, 0x0B)
    yield Out(0x3F9, 1)
    yield from say(b"ready\n")
    endings = {ord("q"): POWER_OFF, ord("r"): RESET, ord("!"): Leave(Exit.SHUTDOWN)}
    while True:
        while not (yield In(0x3FD)) & 1:
            yield Wait()
        byte = yield In(0x3F8)
        yield Out(0x3F8, byte)
        if byte in endings:
            yield endings[byte]


def deaf(cpu: int) -> Guest:
    """Never look at the input."""
    yield from say(b"ready\n")
    yield Wait()


def polite(cpu: int) -> Guest:
    """Power off when somebody presses the power button."""
    yield Out(0x602, 1 << 8, 2)
    yield from say(b"ready\n")
    while (yield Wait()) != 9:
        pass
    yield POWER_OFF


def debug_exit(cpu: int) -> Guest:
    """End with a status of one's own."""
    yield Out(0xF4, 21)


def flood(cpu: int) -> Guest:
    """Print for ever."""
    while True:
        yield from say(b"more and more\n")


def reset(cpu: int) -> Guest:
    """Ask for a reset at once."""
    yield from say(b"once\n")
    yield RESET


def panic(cpu: int) -> Guest:
    """Say Linux's last words, and spin."""
    yield from say(
        b"[    1.0] Kernel panic - not syncing: no init\n[    1.1] ---[ end Kernel panic - not syncing: no init ]---\n"
    )
    yield Spin(1.0)


def panic_reset(cpu: int) -> Guest:
    """As Linux with panic=-1."""
    yield from say(b"[    1.0] Kernel panic - not syncing: no init\n")
    yield RESET


def old_log(cpu: int) -> Guest:
    """Show what happened once, and reboot."""
    yield from say(b"[    1.0] Kernel panic - not syncing: no init\n[   99.0] reboot: Restarting system\n")
    yield RESET


GUESTS: dict[str, Callable[[int], Guest]] = {
    "echo": echo, "polite": polite, "debug-exit": debug_exit, "deaf": deaf, "flood": flood, "reset": reset,
    "panic": panic, "panic-reset": panic_reset, "old-log": old_log,
}  # fmt: skip
_guest = echo


def _made() -> FakeKvm:
    return FakeKvm(_guest)


if __name__ == "__main__":
    _guest = GUESTS[sys.argv[1]]
    kvm.PROVIDERS["linux"] = ("__main__", "_made")
    main(sys.argv[2:])
