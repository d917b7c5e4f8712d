"""Host calls that must not crash where a plain access would."""

from __future__ import annotations

import errno
import os

import pytest

from vmonty.base import hostcall
from vmonty.base.ram import PAGE_SIZE, Ram


def test_memory_that_is_gone_is_efault() -> None:
    ram = Ram(2 * PAGE_SIZE)
    ram.write_u64(PAGE_SIZE, 5)
    at = ram.address + PAGE_SIZE
    assert not hostcall.compare_exchange(at, 8, 4, 6)
    assert hostcall.compare_exchange(at, 8, 5, 6)
    assert hostcall.compare_exchange(at, 4, 6, 7)
    assert ram.read_u64(PAGE_SIZE) == 7
    os.ftruncate(ram.fileno(), PAGE_SIZE)
    for call in (
        lambda: hostcall.compare_exchange(at, 8, 7, 8),
        lambda: hostcall.read_memory(at, 8),
        lambda: hostcall.write_memory(at, b"x"),
    ):
        with pytest.raises(OSError) as raised:
            call()
        assert raised.value.errno == errno.EFAULT
