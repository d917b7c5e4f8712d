"""The host's time-stamp counter and its frequency."""

from __future__ import annotations

import errno
import functools
import time
from collections.abc import Callable

from vmonty.base.hostcall import read_tsc

__all__ = ["check_tsc_khz", "clock_ns", "host_tsc_khz", "moment", "read_tsc", "time_scale"]
# As a signed number of 32 bits.
MAX_GUEST_TSC_KHZ = 0x7FFF_FFFF


NSEC_PER_SEC = 1_000_000_000
MEASURED_NS = 20_000_000
# Readings of a moment; one that another thread or process interrupts is not the best of them.
READINGS = 5


def moment(clock: Callable[[], int] = time.monotonic_ns) -> tuple[int, int]:
    """A clock of the host's, by default the monotonic one in nanoseconds, and its TSC, at the same time."""
    best, taken = (0, 0), 1 << 64
    for _ in range(READINGS):
        before = read_tsc()
        now = clock()
        after = read_tsc()
        if after - before < taken:
            best, taken = (now, before + after >> 1), after - before
    return best


_BEGIN = moment()


@functools.cache
def host_tsc_khz() -> int:
    """kHz, by comparison with the monotonic clock since this module was imported, 20 ms at least.

    Usually those have passed when somebody asks first: nobody waits for the measurement.
    """
    begin_ns, begin = _BEGIN
    while time.monotonic_ns() - begin_ns < MEASURED_NS:
        pass
    end_ns, end = moment()
    return (end - begin) * 1_000_000 // (end_ns - begin_ns)


def check_tsc_khz(wanted: int) -> int:
    """*wanted*, if a guest's TSC can run at it. Raises OSError with EINVAL."""
    if wanted >= MAX_GUEST_TSC_KHZ:
        raise OSError(errno.EINVAL, "a TSC cannot be that fast")
    return wanted


@functools.cache
def time_scale(tsc_khz: int) -> tuple[int, int]:
    """kvm_get_time_scale(): (mul, shift) with ns = ((tsc << shift) * mul) >> 32, a negative shift is to the right."""
    shift, numerator, denominator = 0, NSEC_PER_SEC, tsc_khz * 1000
    while numerator >= denominator:
        denominator *= 2
        shift += 1
    while 2 * numerator < denominator:
        numerator *= 2
        shift -= 1
    return (numerator << 32) // denominator, shift


def clock_ns(ticks: int) -> int:
    """pvclock_scale_delta(): nanoseconds of *ticks* of the host's TSC, as guests make them of theirs."""
    mul, shift = time_scale(host_tsc_khz())
    ticks = max(ticks, 0)
    return (ticks << shift if shift >= 0 else ticks >> -shift) * mul >> 32
