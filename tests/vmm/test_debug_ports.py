"""Small ports: fast A20 and reset, POST codes, debug console, exit with a status."""

from __future__ import annotations

from vmonty.vmm.hw.debug_ports import DEBUG_CONSOLE_PRESENT, DebugConsole, DebugExit, PostPort
from vmonty.vmm.hw.port92 import Port92


def test_fast_reset_needs_a_rising_bit() -> None:
    resets: list[None] = []
    port = Port92(lambda: resets.append(None))
    assert port.read(0, 1) == 2, "the A20 gate is open"
    port.write(0, 1, 0)
    assert port.read(0, 1) == 0
    port.write(0, 1, 0xFF)
    port.write(0, 1, 1)
    assert len(resets) == 1


def test_post_codes() -> None:
    port = PostPort()
    for code in (1, 2, 2, 3):
        port.write(0, 1, code)
    assert list(port.codes) == [1, 2, 3]
    assert port.read(0, 1) == 3


def test_debug_console() -> None:
    said: list[bytes] = []
    port = DebugConsole(said.append)
    assert port.read(0, 1) == DEBUG_CONSOLE_PRESENT
    for byte in b"hi":
        port.write(0, 1, byte)
    assert b"".join(said) == b"hi"


def test_debug_exit() -> None:
    left: list[int] = []
    DebugExit(left.append).write(0, 4, 0x10)
    assert left == [0x21]
