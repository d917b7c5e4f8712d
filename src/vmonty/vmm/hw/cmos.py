"""MC146818 real-time clock and its CMOS memory. Source: the MC146818 data sheet, "Address Map", "Registers"."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Protocol

REGISTER_A, REGISTER_B, REGISTER_C, REGISTER_D = 10, 11, 12, 13
UPDATE_IN_PROGRESS = 0x80
RATE_32KHZ_1024HZ = 0x26
MODE_SET, PERIODIC, ALARM, UPDATE = 0x80, 0x40, 0x20, 0x10
MODE_BINARY, MODE_24_HOURS = 4, 2
INTERRUPT_REQUEST = 0x80
VALID_RAM = 0x80
HOURS, PM = 4, 0x80
SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM = 1, 3, 5
DONT_CARE = 0xC0
CENTURY = 0x32
INDEX_READ = 0xFF  # the index port is write-only on a PC
CLOCK = (0, 2, HOURS, 6, 7, 8, 9, CENTURY)

# The update cycle of the data sheet: the flag rises this long before the registers change.
UPDATE_LEAD_US = 244
BASE_HZ = 32768


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Cancellable(Protocol):
    """A call that is still to come."""

    def cancel(self) -> None:
        """Don't make it."""
        ...


CallLater = Callable[[float, Callable[[], None]], Cancellable]


class _Never:
    def cancel(self) -> None:
        pass


def _never(seconds: float, callback: Callable[[], None]) -> Cancellable:
    """A clock without interrupts."""
    return _Never()


def _no_line(level: int) -> None:
    """An interrupt that is not wired."""


class Cmos:
    """Index port at offset 0, data port at offset 1. The clock is *now()*, until the guest sets it; then it goes on
    from there. *irq* is the level of IRQ 8; *call_later* (seconds, function) makes its alarms and ticks.
    """

    def __init__(
        self, now: Callable[[], datetime] = _utc_now, irq: Callable[[int], None] = _no_line,
        call_later: CallLater = _never,
    ) -> None:  # fmt: skip
        self._now = now
        self._irq = irq
        self._call_later = call_later
        self._lock = threading.Lock()
        self._index = 0
        self.connected = True  # the board's side: False cuts the clock off its interrupt line
        self._memory = bytearray(128)
        self._memory[REGISTER_A] = RATE_32KHZ_1024HZ
        self._memory[REGISTER_B] = MODE_24_HOURS
        self._memory[REGISTER_D] = VALID_RAM
        self._ahead = timedelta()
        self._stopped: dict[int, int] = {}  # clock registers while the SET bit holds the clock
        self._second: Cancellable | None = None
        self._period: Cancellable | None = None

    def store(self, index: int, data: bytes) -> None:
        """The board's side: put *data* into the memory, as firmware expects it."""
        self._memory[index : index + len(data)] = data

    def load(self, index: int, size: int) -> bytes:
        """The board's side: what is in the memory."""
        return bytes(self._memory[index : index + size])

    def store_memory_size(self, low: int, high: int) -> None:
        """Say to firmware how much RAM there is below (*low*) and above (*high*) 4 GiB, in bytes."""
        kib = low >> 10
        extended = min(max(kib - 1024, 0), 0xFFFF)
        self.store(0x15, (640).to_bytes(2, "little"))
        self.store(0x17, extended.to_bytes(2, "little"))
        self.store(0x30, extended.to_bytes(2, "little"))
        self.store(0x34, min(max(kib - 16 * 1024, 0) >> 6, 0xFFFF).to_bytes(2, "little"))
        self.store(0x5B, min(high >> 16, 0xFF_FFFF).to_bytes(3, "little"))

    # ---- ports ------------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """The selected register; the index does not read back."""
        with self._lock:
            return self._register(self._index) if offset == 1 else INDEX_READ

    def write(self, offset: int, size: int, value: int) -> None:
        """Select a register (bit 7, the NMI mask, is ignored), or write it."""
        with self._lock:
            if offset == 0:
                self._index = value & 0x7F
                return
            index, value = self._index, value & 0xFF
            if index in CLOCK:
                self._set_clock(index, value)
            elif index == REGISTER_A:
                self._memory[index] = value & 0x7F
                self._start_period()
            elif index == REGISTER_B:
                self._set_mode(value)
            elif index not in (REGISTER_C, REGISTER_D):
                self._memory[index] = value

    def _register(self, index: int) -> int:
        if index == REGISTER_A:
            updating = self._time().microsecond >= 1_000_000 - UPDATE_LEAD_US and not self._stopped
            return self._memory[index] | (UPDATE_IN_PROGRESS if updating else 0)
        if index == REGISTER_C:
            causes, self._memory[index] = self._memory[index], 0
            self._irq(0)
            return causes
        if index in CLOCK:
            return self._stopped[index] if self._stopped else self._encode(index, self._fields()[index])
        return self._memory[index]

    # ---- the clock -----------------------------------------------------------------------------------------------

    def _time(self) -> datetime:
        return self._now() + self._ahead

    def _fields(self) -> dict[int, int]:
        now = self._time()
        return {
            0: now.second, 2: now.minute, HOURS: now.hour, 6: now.isoweekday() % 7 + 1, 7: now.day, 8: now.month,
            9: now.year % 100, CENTURY: now.year // 100,
        }  # fmt: skip

    def _encode(self, index: int, value: int) -> int:
        mode, afternoon = self._memory[REGISTER_B], 0
        if index in (HOURS, HOURS_ALARM) and not mode & MODE_24_HOURS:
            value, afternoon = value % 12 or 12, PM if value >= 12 else 0
        return (value if mode & MODE_BINARY else value // 10 << 4 | value % 10) | afternoon

    def _decode(self, index: int, value: int) -> int:
        mode, afternoon = self._memory[REGISTER_B], 0
        if index == HOURS and not mode & MODE_24_HOURS:
            value, afternoon = value & ~PM, 12 if value & PM else 0
        number = value if mode & MODE_BINARY else (value >> 4) * 10 + (value & 15)
        return number % 12 + afternoon if index == HOURS and not mode & MODE_24_HOURS else number

    def _set_clock(self, index: int, value: int) -> None:
        if self._stopped:
            self._stopped[index] = value
            return
        registers = {at: self._encode(at, field) for at, field in self._fields().items()}
        registers[index] = value
        self._run_from(registers)

    def _run_from(self, registers: dict[int, int]) -> None:
        """Let the clock go on from what the registers say; what is no time leaves it as it was."""
        field = {at: self._decode(at, value) for at, value in registers.items()}
        try:
            wanted = datetime(
                field[CENTURY] * 100 + field[9], field[8], field[7], field[HOURS], field[2], field[0], tzinfo=UTC
            )
            self._ahead = wanted - self._now().replace(microsecond=0)
            self._time()
        except (ValueError, OverflowError):
            self._ahead = timedelta()

    # ---- interrupts --------------------------------------------------------------------------------------------------

    def _set_mode(self, value: int) -> None:
        before = self._memory[REGISTER_B]
        if value & MODE_SET and not before & MODE_SET:
            self._stopped = {at: self._encode(at, field) for at, field in self._fields().items()}
            value &= ~UPDATE  # as the data sheet says
        self._memory[REGISTER_B] = value
        if before & MODE_SET and not value & MODE_SET and self._stopped:
            registers, self._stopped = self._stopped, {}
            self._run_from(registers)
        if (value ^ before) & PERIODIC:
            self._start_period()
        wanted = bool(value & (ALARM | UPDATE)) and not value & MODE_SET
        if wanted and self._second is None:
            self._await_second()
        elif not wanted and self._second is not None:
            self._second.cancel()
            self._second = None

    def _raise(self, cause: int) -> None:
        self._memory[REGISTER_C] |= cause
        if self._memory[REGISTER_B] & cause:
            self._memory[REGISTER_C] |= INTERRUPT_REQUEST
            self._irq(int(self.connected))

    def _await_second(self) -> None:
        self._second = self._call_later(1 - self._time().microsecond / 1e6, self._on_second)

    def _on_second(self) -> None:
        with self._lock:
            if self._second is None:
                return
            self._raise(UPDATE)
            if self._alarm_is_now():
                self._raise(ALARM)
            self._await_second()

    def _alarm_is_now(self) -> bool:
        fields = self._fields()
        for alarm, index in ((SECONDS_ALARM, 0), (MINUTES_ALARM, 2), (HOURS_ALARM, HOURS)):
            wanted = self._memory[alarm]
            if wanted & DONT_CARE != DONT_CARE and wanted != self._encode(index, fields[index]):
                return False
        return True

    def _interval(self) -> float | None:
        """Seconds between periodic interrupts; None when they are off."""
        rate = self._memory[REGISTER_A] & 15
        if not rate or not self._memory[REGISTER_B] & PERIODIC:
            return None
        # Rates 1 and 2 are those of 8 and 9: "Periodic Interrupt Rate and Square Wave Output Frequency".
        return float((1 << (rate if rate > 2 else rate + 7) - 1) / BASE_HZ)

    def _start_period(self) -> None:
        if self._period is not None:
            self._period.cancel()
            self._period = None
        if (interval := self._interval()) is not None:
            self._period = self._call_later(interval, self._on_period)

    def _on_period(self) -> None:
        with self._lock:
            interval = self._interval()
            if self._period is None or interval is None:
                return
            self._raise(PERIODIC)
            self._period = self._call_later(interval, self._on_period)
