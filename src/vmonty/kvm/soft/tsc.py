"""The host's time-stamp counter and its frequency."""

from __future__ import annotations

import errno
import functools
import time

from vmonty.base.hostcall import read_tsc

__all__ = ["check_tsc_khz", "host_tsc_khz", "read_tsc"]
# As a signed number of 32 bits.
MAX_GUEST_TSC_KHZ = 0x7FFF_FFFF


MEASURED_NS = 20_000_000
_BEGIN = time.monotonic_ns(), read_tsc()


@functools.cache
def host_tsc_khz() -> int:
    """kHz, by comparison with the monotonic clock since this module was imported, 20 ms at least.

    Usually those have passed when somebody asks first: nobody waits for the measurement.
    """
    begin_ns, begin = _BEGIN
    while time.monotonic_ns() - begin_ns < MEASURED_NS:
        pass
    end_ns, end = time.monotonic_ns(), read_tsc()
    return (end - begin) * 1_000_000 // (end_ns - begin_ns)


def check_tsc_khz(wanted: int) -> int:
    """*wanted*, if a guest's TSC can run at it. Raises OSError with EINVAL."""
    if wanted >= MAX_GUEST_TSC_KHZ:
        raise OSError(errno.EINVAL, "a TSC cannot be that fast")
    return wanted
