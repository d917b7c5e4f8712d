"""The host's time-stamp counter and its frequency."""

from __future__ import annotations

import time

from vmonty.base.hostcall import read_tsc

__all__ = ["HOST_TSC_KHZ", "read_tsc"]


def _measure() -> int:
    """kHz, by comparison with the monotonic clock over 20 ms."""
    begin_ns, begin = time.monotonic_ns(), read_tsc()
    while time.monotonic_ns() - begin_ns < 20_000_000:
        pass
    end_ns, end = time.monotonic_ns(), read_tsc()
    return (end - begin) * 1_000_000 // (end_ns - begin_ns)


HOST_TSC_KHZ = _measure()
