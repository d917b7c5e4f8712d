"""The host's time-stamp counter and its frequency."""

from __future__ import annotations

import errno
import time

from vmonty.base.hostcall import read_tsc

__all__ = ["HOST_TSC_KHZ", "check_tsc_khz", "read_tsc"]
# As a signed number of 32 bits.
MAX_GUEST_TSC_KHZ = 0x7FFF_FFFF


def _measure() -> int:
    """kHz, by comparison with the monotonic clock over 20 ms."""
    begin_ns, begin = time.monotonic_ns(), read_tsc()
    while time.monotonic_ns() - begin_ns < 20_000_000:
        pass
    end_ns, end = time.monotonic_ns(), read_tsc()
    return (end - begin) * 1_000_000 // (end_ns - begin_ns)


HOST_TSC_KHZ = _measure()


def check_tsc_khz(wanted: int) -> int:
    """*wanted*, if a guest's TSC can run at it. Raises OSError with EINVAL."""
    if wanted >= MAX_GUEST_TSC_KHZ:
        raise OSError(errno.EINVAL, "a TSC cannot be that fast")
    return wanted
