"""Text for a guest's keyboard: as fast as the guest reads it, and told of when it does not."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import cast

import pytest

from vmonty.base.errors import UsageError
from vmonty.vmm.display import console
from vmonty.vmm.hw.ps2 import Ps2Keyboard
from vmonty.vmm.machine import Machine


class Guest:
    """A machine with a keyboard, that ends after some looks at whether it has."""

    def __init__(self, looks: int = 1 << 30) -> None:
        self.keyboard = Ps2Keyboard()
        self.name = "pc"
        self._looks = looks

    def wait(self, timeout: float) -> object | None:
        self._looks -= 1
        return None if self._looks > 0 else SimpleNamespace()


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "KEY_SECONDS", 0.0)


def type_text(guest: Guest, text: str) -> None:
    console.type_text(cast(Machine, guest), text)


def test_a_slow_guest_gets_all_of_it() -> None:
    guest, read, end = Guest(), bytearray(), threading.Event()

    def reads() -> None:
        while not (end.is_set() and not guest.keyboard._keys):
            if (byte := guest.keyboard.take()) is not None:
                read.append(byte)

    reader = threading.Thread(target=reads)
    reader.start()
    try:
        type_text(guest, "aB" * 100)
    finally:
        end.set()
        reader.join()
    assert bytes(read) == bytes.fromhex("1cf01c1232f032f012") * 100


def test_a_guest_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "PATIENCE_S", 0.01)
    with pytest.raises(UsageError, match=r"does not read its keyboard: it got 2\d % of the text"):
        type_text(Guest(), "a" * 75)
    guest = Guest()
    with pytest.raises(UsageError):
        type_text(guest, "A" * 75)
    assert bytes(iter(guest.keyboard.take, None)).endswith(b"\xf0\x12"), "Shift is not held"


def test_a_guest_that_ends_meanwhile() -> None:
    with pytest.raises(UsageError, match="the guest has ended: it got 50 % of the text"):
        type_text(Guest(looks=6), "a" * 5)
