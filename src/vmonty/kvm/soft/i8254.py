"""The 8254 programmable interval timer, as KVM's in-kernel PIT.

Three counters of 1.193181 MHz at ports 0x40–0x43. Counter 0 drives GSI 0 from a timer; counter 2's gate and output,
and a refresh bit that toggles in time, are at port 0x61 when the PIT was created with KVM_PIT_SPEAKER_DUMMY.

Counts are computed from the time since they were loaded; section titles are those of the 8254 data sheet ("Mode
Definitions", "Read Operations"). Counting follows the data sheet in every mode, odd counts of mode 3 and BCD
included (KVM leaves both out). As in KVM: a gate triggers modes 1, 2, 3 and 5 again but doesn't suspend 0 and 4; OUT
of modes 2, 4 and 5 is high for the one clock at which hardware's is low; counter 0 in mode 5 doesn't count.

Reinjection (KVM_REINJECT_CONTROL, on at first): a tick that comes before the guest has acknowledged the last one is
counted, and raised when it does; unmasking GSI 0 forgets the backlog. Without it such ticks are lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from vmonty.kvm.soft.iodev import KvmIoBus
from vmonty.kvm.soft.timer import HrTimers, Timer
from vmonty.kvm.uapi.flags import KVM_PIT_FLAGS_HPET_LEGACY, KVM_PIT_FLAGS_SPEAKER_DATA_ON
from vmonty.kvm.uapi.irq import kvm_pit_channel_state, kvm_pit_state, kvm_pit_state2

__all__ = ["KVM_PIT_FREQ", "MIN_PERIOD_NS", "Channel", "Pit", "PitIrqs", "SpeakerPort"]

KVM_PIT_FREQ = 1193181
# KVM's min_timer_period_us: no guest may keep a host busy with ticks.
MIN_PERIOD_NS = 200_000
PIT_GSI = 0

# How a count is transferred: the control word's RW field; WORD1 is the second half of a WORD0.
LSB, MSB, WORD0, WORD1 = 1, 2, 3, 4
# The mode of a counter that was never programmed.
UNPROGRAMMED = 0xFF
_ONE_SHOT, _PERIODIC = (0, 1, 4), (2, 3)
_FIELDS = tuple(str(field[0]) for field in kvm_pit_channel_state._fields_)


class PitIrqs(Protocol):
    """What the PIT needs of the interrupt routing (irq_comm.IrqComm)."""

    def set_irq(self, gsi: int, level: int, irq_source_id: int = ..., line_status: bool = ...) -> int:
        """Drive a GSI."""
        ...

    def request_irq_source_id(self) -> int:
        """A source of its own for the lines it shares."""
        ...

    def register_ack_notifier(self, gsi: int, callback: Callable[[], None]) -> None:
        """Be told when the guest has acknowledged *gsi*."""
        ...

    def unregister_ack_notifier(self, gsi: int, callback: Callable[[], None]) -> None:
        """No longer."""
        ...

    def register_mask_notifier(self, gsi: int, callback: Callable[[bool], None]) -> None:
        """Be told when the guest masks or unmasks *gsi*."""
        ...

    def unregister_mask_notifier(self, gsi: int, callback: Callable[[bool], None]) -> None:
        """No longer."""
        ...

    def nmi_watchdog_tick(self) -> None:
        """The PIT's wire to LINT0 of APICs that take it as NMI."""
        ...


def from_bcd(value: int) -> int:
    """The number whose decimal digits are the nibbles of *value* (a nibble above 9 counts as that much)."""
    return sum((value >> 4 * digit & 0xF) * 10**digit for digit in range(8))


def to_bcd(value: int) -> int:
    """*value* modulo 10,000 as four nibbles."""
    return sum(value // 10**digit % 10 << 4 * digit for digit in range(4))


class Channel:
    """One counter: registers named as in kvm_pit_channel_state. *ticks* are CLK pulses since the count was loaded."""

    def __init__(self, gate: int) -> None:
        self.count = 0x10000
        self.latched_count = self.count_latched = 0
        self.status_latched = self.status = 0
        self.read_state = self.write_state = self.write_latch = self.rw_mode = 0
        self.mode = UNPROGRAMMED
        self.bcd = 0
        self.gate = gate
        self.count_load_time = 0

    def get_state(self) -> kvm_pit_channel_state:
        """The registers."""
        return kvm_pit_channel_state(**{name: getattr(self, name) for name in _FIELDS})

    def set_state(self, state: kvm_pit_channel_state) -> None:
        """Take the registers as they are, whatever user space put there."""
        for name in _FIELDS:
            setattr(self, name, getattr(state, name))

    @property
    def clocks(self) -> int:
        """The loaded count in CLK pulses, at least 1."""
        return max(1, from_bcd(self.count) if self.bcd else self.count)

    def counting(self, ticks: int) -> int:
        """The 16 bits of the counting element after *ticks*. See "Mode Definitions", "Counter Latch Command"."""
        count = self.clocks
        if self.mode in (0, 1, 4, 5):
            # The counter wraps around from 0 to its highest value and goes on.
            value = count - ticks
        elif self.mode == 3:
            high = (count + 1) // 2
            phase = ticks % count
            # Odd counts are loaded less one; the half with OUT high is then one clock longer.
            value = (count & ~1) - 2 * (phase if phase < high else phase - high)
        else:
            value = count - ticks % count
        return to_bcd(value % 10000) if self.bcd else value & 0xFFFF

    def out(self, ticks: int) -> int:
        """The level of OUT after *ticks*, as KVM has it."""
        count = self.clocks
        match self.mode:
            case 1:
                return int(ticks < count)
            case 2:
                return int(ticks != 0 and ticks % count == 0)
            case 3:
                return int(ticks % count < (count + 1) // 2)
            case 4 | 5:
                return int(ticks == count)
            case _:
                return int(ticks >= count)

    def latch_count(self, ticks: int) -> None:
        """The counter latch command: a second one before the count was read is ignored."""
        if not self.count_latched:
            self.latched_count = self.counting(ticks)
            self.count_latched = self.rw_mode

    def latch_status(self, ticks: int) -> None:
        """The read-back command's status byte: OUT, RW, mode and BCD."""
        if not self.status_latched:
            self.status = (self.out(ticks) << 7 | self.rw_mode << 4 | self.mode << 1 | self.bcd) & 0xFF
            self.status_latched = 1

    def program(self, control: int) -> None:
        """A control word for this counter. Modes 6 and 7 are 2 and 3."""
        access, mode = control >> 4 & 3, control >> 1 & 7
        self.rw_mode = self.read_state = self.write_state = access
        self.mode = mode - 4 if mode > 5 else mode
        self.bcd = control & 1

    def write(self, value: int) -> int | None:
        """A byte of a count; the whole count when this was its last byte."""
        match self.write_state:
            case 2:
                return value << 8
            case 3:
                self.write_latch = value
                self.write_state = WORD1
                return None
            case 4:
                self.write_state = WORD0
                return self.write_latch | value << 8
            case _:
                return value

    def read(self, ticks: int) -> int:
        """The next byte: of the latched status, the latched count, or the counter itself."""
        if self.status_latched:
            self.status_latched = 0
            return self.status
        if self.count_latched:
            return self._read_latched()
        value = self.counting(ticks)
        match self.read_state:
            case 2:
                return value >> 8
            case 3:
                self.read_state = WORD1
                return value & 0xFF
            case 4:
                self.read_state = WORD0
                return value >> 8
            case _:
                return value & 0xFF

    def _read_latched(self) -> int:
        state, self.count_latched = self.count_latched, 0
        if state == MSB:
            return self.latched_count >> 8
        if state == WORD0:
            self.count_latched = MSB
        return self.latched_count & 0xFF


class Pit:
    """The chip. An IoDevice for its four ports; every entry takes the chip lock (that of *timers*)."""

    def __init__(self, timers: HrTimers, irqs: PitIrqs) -> None:
        self.lock = timers.lock
        self.flags = 0
        self.channels = tuple(Channel(int(index != 2)) for index in range(3))
        self._timers = timers
        self._clock = timers.clock
        self._irqs = irqs
        self._irq_source_id = irqs.request_irq_source_id()
        # Counter 0's timer: its period, and when it expires (or expired, if it was a single shot).
        self._timer: Timer | None = None
        self._period_ns = self._expires_ns = 0
        self._periodic = False
        self.pending = 0
        self._acknowledged = True
        self.reinject = False
        self.set_reinject(True)
        now = self._clock.now_ns()
        for channel in self.channels[1:]:
            channel.count_load_time = now

    def register(self, bus: KvmIoBus, speaker: bool = False) -> None:
        """Put the ports on the PIO bus, with *speaker* (KVM_PIT_SPEAKER_DUMMY) also 0x61."""
        bus.register(0x40, 4, self)
        if speaker:
            # As KVM's, which takes no access but those at 0x61; the keyboard controller's status is at 0x64.
            bus.register(0x61, 4, SpeakerPort(self), starts=1)

    def close(self) -> None:
        """Stop the timer and the notifiers."""
        with self.lock:
            self._stop()
            self.set_reinject(False)

    # ---- counters ------------------------------------------------------------------------------------

    def ticks(self, index: int) -> int:
        """CLK pulses since counter *index* was loaded or triggered."""
        now = self._clock.now_ns()
        if index:
            elapsed = now - self.channels[index].count_load_time
        elif self._period_ns:
            elapsed = self._period_ns - (self._expires_ns - now)
        else:
            elapsed = 0
        return max(0, elapsed) * KVM_PIT_FREQ // 1_000_000_000

    def set_gate(self, index: int, level: int) -> None:
        """Drive GATE: a rising edge starts modes 1, 2, 3 and 5 again. See "Gate Pin Operations Summary"."""
        channel = self.channels[index]
        if channel.mode in (1, 2, 3, 5) and level and not channel.gate:
            channel.count_load_time = self._clock.now_ns()
        channel.gate = level

    def _load(self, index: int, count: int) -> None:
        channel = self.channels[index]
        # 0 is the largest count: 65,536, or 10,000 in BCD.
        channel.count = count or 0x10000
        if index:
            channel.count_load_time = self._clock.now_ns()
        elif channel.mode in _ONE_SHOT:
            self._start(channel.clocks, periodic=False)
        elif channel.mode in _PERIODIC:
            self._start(channel.clocks, periodic=True)
        else:
            self._stop()

    # ---- counter 0's interrupt -----------------------------------------------------------------------

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start(self, clocks: int, periodic: bool) -> None:
        if self.flags & KVM_PIT_FLAGS_HPET_LEGACY:
            return
        self._stop()
        self._period_ns = clocks * 1_000_000_000 // KVM_PIT_FREQ
        if periodic:
            self._period_ns = max(self._period_ns, MIN_PERIOD_NS)
        self._periodic = periodic
        self._reset_reinject()
        self._expires_ns = self._clock.now_ns() + self._period_ns
        self._timer = self._timers.arm(self._expires_ns, self._expired)

    def _expired(self) -> None:
        self._timer = None
        count = 1
        if self._periodic:
            # When this thread was late, all that was missed is counted at once.
            count += max(0, self._clock.now_ns() - self._expires_ns) // self._period_ns
            self._expires_ns += count * self._period_ns
            self._timer = self._timers.arm(self._expires_ns, self._expired)
        if self.reinject:
            self.pending += count
        self._raise()

    def _raise(self) -> None:
        if self.reinject:
            if not self._acknowledged:
                return
            self._acknowledged = False
        self._irqs.set_irq(PIT_GSI, 1, self._irq_source_id)
        self._irqs.set_irq(PIT_GSI, 0, self._irq_source_id)
        self._irqs.nmi_watchdog_tick()

    def _acked(self) -> None:
        """The guest has acknowledged a tick: raise the next one, if any is left."""
        self._acknowledged = True
        if self.pending > 0:
            self.pending -= 1
            if self.pending > 0:
                self._raise()

    def _masked(self, is_masked: bool) -> None:
        if not is_masked:
            self._reset_reinject()

    def _reset_reinject(self) -> None:
        self.pending = 0
        self._acknowledged = True

    def set_reinject(self, reinject: bool) -> None:
        """KVM_REINJECT_CONTROL."""
        with self.lock:
            if reinject == self.reinject:
                return
            if reinject:
                self._reset_reinject()
                self._irqs.register_ack_notifier(PIT_GSI, self._acked)
                self._irqs.register_mask_notifier(PIT_GSI, self._masked)
            else:
                self._irqs.unregister_ack_notifier(PIT_GSI, self._acked)
                self._irqs.unregister_mask_notifier(PIT_GSI, self._masked)
            self.reinject = reinject

    # ---- ports, and user space -----------------------------------------------------------------------

    def read(self, address: int, size: int) -> int | None:
        """A port read: one byte, whatever the size. The control register reads as 0."""
        index = address & 3
        if index == 3:
            return 0
        with self.lock:
            return self.channels[index].read(self.ticks(index))

    def write(self, address: int, size: int, value: int) -> bool:
        """A port write: its lowest byte."""
        value &= 0xFF
        index = address & 3
        with self.lock:
            if index == 3:
                self._control(value)
            else:
                count = self.channels[index].write(value)
                if count is not None:
                    self._load(index, count)
        return True

    def _control(self, value: int) -> None:
        """See "Control Word Format", "Counter Latch Command", "Read-Back Command"."""
        index = value >> 6
        if index == 3:
            for number, channel in enumerate(self.channels):
                if value & 2 << number:
                    if not value & 0x20:
                        channel.latch_count(self.ticks(number))
                    if not value & 0x10:
                        channel.latch_status(self.ticks(number))
        elif value & 0x30:
            self.channels[index].program(value)
        else:
            self.channels[index].latch_count(self.ticks(index))

    def get_state(self) -> kvm_pit_state2:
        """KVM_GET_PIT2 (KVM_GET_PIT: its channels)."""
        with self.lock:
            state = kvm_pit_state2(flags=self.flags)
            for index, channel in enumerate(self.channels):
                state.channels[index] = channel.get_state()
            return state

    def set_state(self, state: kvm_pit_state | kvm_pit_state2) -> None:
        """KVM_SET_PIT2 or KVM_SET_PIT. Every counter starts anew from its count.

        When HPET legacy replacement begins, counter 0's timer ends; when it is over, it starts.
        """
        with self.lock:
            begins = False
            if isinstance(state, kvm_pit_state2):
                begins = bool(state.flags & ~self.flags & KVM_PIT_FLAGS_HPET_LEGACY)
                self.flags = state.flags
            for index, channel in enumerate(self.channels):
                channel.set_state(state.channels[index])
                self._load(index, channel.count)
            if begins:
                self._stop()

    # ---- port 0x61 -----------------------------------------------------------------------------------

    def read_speaker(self) -> int:
        """Counter 2's gate and output, the speaker's data bit, and the refresh bit: a half-period of 2^14 ns."""
        with self.lock:
            refresh = self._clock.now_ns() >> 14 & 1
            data = int(bool(self.flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON))
            gate = int(bool(self.channels[2].gate))
            return self.channels[2].out(self.ticks(2)) << 5 | refresh << 4 | data << 1 | gate

    def write_speaker(self, value: int) -> None:
        """Set counter 2's gate and the speaker's data bit."""
        with self.lock:
            self.flags &= ~KVM_PIT_FLAGS_SPEAKER_DATA_ON
            self.flags |= KVM_PIT_FLAGS_SPEAKER_DATA_ON if value & 2 else 0
            self.set_gate(2, value & 1)


class SpeakerPort:
    """Port 0x61 (not what lies behind it, which a wider access may start at)."""

    def __init__(self, pit: Pit) -> None:
        self._pit = pit

    def read(self, address: int, size: int) -> int | None:
        """A read at 0x61: one byte."""
        return self._pit.read_speaker() if address == 0x61 else None

    def write(self, address: int, size: int, value: int) -> bool:
        """A write at 0x61: its lowest byte."""
        if address != 0x61:
            return False
        self._pit.write_speaker(value)
        return True
