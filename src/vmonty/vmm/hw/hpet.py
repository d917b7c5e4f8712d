"""High precision event timer: one counter and three comparators.

Source: IA-PC HPET Specification 1.0a, "Memory Map", "Theory of Operation". 64-bit counter at 100 MHz; comparators by
I/O APIC pins or in place of the PIT and the clock (LegacyReplacement); no FSB delivery.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

SIZE = 0x400
PERIOD_FS = 10_000_000
TICK_NS = 10
TIMERS = 3
VENDOR = 0x8086
CAPABILITY_LEGACY, CAPABILITY_64_BITS = 1 << 15, 1 << 13
REVISION = 1
# What the ACPI table repeats: the low half of the capabilities.
IDENTITY = VENDOR << 16 | CAPABILITY_LEGACY | CAPABILITY_64_BITS | (TIMERS - 1) << 8 | REVISION

CONFIG, STATUS, COUNTER, FIRST_TIMER, TIMER_SIZE = 0x10, 0x20, 0xF0, 0x100, 0x20
ENABLE, LEGACY_REPLACEMENT = 1, 2

LEVEL, INTERRUPT, PERIODIC, PERIODIC_CAPABLE, WIDE = 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5
SET_ACCUMULATOR, FORCE_32_BITS, ROUTE_SHIFT = 1 << 6, 1 << 8, 9
TIMER_WRITABLE = LEVEL | INTERRUPT | PERIODIC | SET_ACCUMULATOR | FORCE_32_BITS | 0x1F << ROUTE_SHIFT
# Pins of the I/O APIC that a comparator may drive: those of IRQ 2, 8 and 16 to 23.
ROUTES = 0x00FF_0104
LEGACY_IRQS = (0, 8)
MASK_32, MASK_64 = (1 << 32) - 1, (1 << 64) - 1
# A guest may ask for a tick of 10 ns; it gets no more interrupts than a host can make.
SHORTEST_WAIT_S = 50e-6


class Cancellable(Protocol):
    """A call that is still to come."""

    def cancel(self) -> None:
        """Don't make it."""
        ...


class _Timer:
    def __init__(self, number: int) -> None:
        self.number = number
        self.config = WIDE | PERIODIC_CAPABLE
        self.comparator = MASK_64
        self.period = 0
        self.call: Cancellable | None = None

    @property
    def mask(self) -> int:
        return MASK_32 if self.config & FORCE_32_BITS else MASK_64


class Hpet:
    """*lines* are the ends of GSI 0 to 23; *call_later* (seconds, function) makes the comparators match.

    *replace* is called with True when comparators 0 and 1 take the place of the PIT and the clock, else False.
    """

    def __init__(
        self, lines: Sequence[Callable[[int], None]], call_later: Callable[[float, Callable[[], None]], Cancellable],
        replace: Callable[[bool], None], now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:  # fmt: skip
        self._lines = lines
        self._call_later = call_later
        self._replace = replace
        self._now_ns = now_ns
        self._lock = threading.RLock()
        self._config = self._status = 0
        self._stopped_at = 0  # the counter's value while it stands still
        self._started_ns = 0  # when it would have been zero, while it runs
        self._timers = [_Timer(number) for number in range(TIMERS)]

    # ---- registers: 32-bit or 64-bit accesses, aligned --------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """A register or a half of one; anything else reads as zero."""
        if size not in (4, 8) or offset % size:
            return 0
        with self._lock:
            return self._register(offset & ~7) >> 8 * (offset & 7)

    def _register(self, offset: int) -> int:
        match offset:
            case 0x00:
                return PERIOD_FS << 32 | IDENTITY
            case 0x10:
                return self._config
            case 0x20:
                return self._status
            case 0xF0:
                return self._counter()
        if (found := self._timer(offset)) is not None:
            timer, register = found
            if register == 0:
                return ROUTES << 32 | timer.config
            return timer.comparator if register == 8 else 0
        return 0

    @staticmethod
    def _index(offset: int) -> tuple[int, int] | None:
        number, register = divmod(offset - FIRST_TIMER, TIMER_SIZE)
        return (number, register) if 0 <= number < TIMERS else None

    def _timer(self, offset: int) -> tuple[_Timer, int] | None:
        found = self._index(offset)
        return None if found is None else (self._timers[found[0]], found[1])

    def write(self, offset: int, size: int, value: int) -> None:
        """As read; writes of other sizes vanish."""
        if size not in (4, 8) or offset % size:
            return
        base, shift = offset & ~7, 8 * (offset & 7)
        with self._lock:
            mask = ((1 << 8 * size) - 1) << shift
            written = value << shift & mask
            match base:
                case 0x10:
                    self._configure(self._config & ~mask | written)
                case 0x20:
                    self._acknowledge(written)
                case 0xF0 if not self._config & ENABLE:
                    self._stopped_at = self._stopped_at & ~mask | written
                case _:
                    if (found := self._timer(base)) is not None:
                        self._write_timer(*found, written, mask)

    def _write_timer(self, timer: _Timer, register: int, written: int, mask: int) -> None:
        if register == 0:
            writable = TIMER_WRITABLE & mask
            timer.config = timer.config & ~writable | written & writable
            if not timer.config & LEVEL or not timer.config & INTERRUPT:
                self._lower(timer)
        elif register == 8:
            mask &= timer.mask
            new = timer.comparator & ~mask | written & mask
            if not timer.config & PERIODIC:
                timer.comparator = new
            else:
                # "Timer N Comparator": the accumulator itself only right after Tn_VAL_SET_CNF, else the period.
                if timer.config & SET_ACCUMULATOR:
                    timer.comparator = new
                timer.period = timer.period & ~mask | written & mask
            timer.config &= ~SET_ACCUMULATOR
        self._arm(timer)

    def _configure(self, value: int) -> None:
        value &= ENABLE | LEGACY_REPLACEMENT
        changed, self._config = value ^ self._config, value
        if changed & ENABLE:
            if value & ENABLE:
                self._started_ns = self._now_ns() - self._stopped_at * TICK_NS
            else:
                self._stopped_at = (self._now_ns() - self._started_ns) // TICK_NS & MASK_64
        if changed & LEGACY_REPLACEMENT:
            self._replace(bool(value & LEGACY_REPLACEMENT))
        for timer in self._timers:
            self._arm(timer)

    def _acknowledge(self, bits: int) -> None:
        for timer in self._timers:
            if bits >> timer.number & 1:
                self._lower(timer)

    # ---- time -----------------------------------------------------------------------------------------------------

    def _counter(self) -> int:
        if not self._config & ENABLE:
            return self._stopped_at
        return (self._now_ns() - self._started_ns) // TICK_NS & MASK_64

    def _arm(self, timer: _Timer) -> None:
        if timer.call is not None:
            timer.call.cancel()
            timer.call = None
        if not self._config & ENABLE or not timer.config & INTERRUPT:
            return
        ticks = (timer.comparator - self._counter()) & timer.mask
        if ticks > timer.mask >> 1 and not timer.config & FORCE_32_BITS:
            return  # in the past: centuries until it comes round
        wait = max(ticks * TICK_NS / 1e9, 0.0)
        timer.call = self._call_later(wait, lambda: self._match(timer))

    def _match(self, timer: _Timer) -> None:
        with self._lock:
            if timer.call is None:
                return
            timer.call = None
            if not self._config & ENABLE or not timer.config & INTERRUPT:
                return
            self._raise(timer)
            if timer.config & PERIODIC and timer.period:
                least = max(timer.period, int(SHORTEST_WAIT_S * 1e9 / TICK_NS))
                behind = (self._counter() - timer.comparator) & timer.mask
                # What was missed is skipped: a burst of old ticks helps nobody.
                steps = 1 if behind > timer.mask >> 1 else behind // least + 1
                timer.comparator = (timer.comparator + steps * least) & timer.mask
                self._arm(timer)

    # ---- lines ------------------------------------------------------------------------------------------------------

    def _line(self, timer: _Timer) -> Callable[[int], None] | None:
        if self._config & LEGACY_REPLACEMENT and timer.number < len(LEGACY_IRQS):
            return self._lines[LEGACY_IRQS[timer.number]]
        route = timer.config >> ROUTE_SHIFT & 0x1F
        # Pin 2 of the I/O APIC is GSI 0's.
        return self._lines[0 if route == 2 else route] if ROUTES >> route & 1 else None

    def _raise(self, timer: _Timer) -> None:
        line = self._line(timer)
        if timer.config & LEVEL:
            self._status |= 1 << timer.number
            if line is not None:
                line(1)
        elif line is not None:
            line(1)
            line(0)

    def _lower(self, timer: _Timer) -> None:
        if self._status >> timer.number & 1:
            self._status &= ~(1 << timer.number)
            if (line := self._line(timer)) is not None:
                line(0)
