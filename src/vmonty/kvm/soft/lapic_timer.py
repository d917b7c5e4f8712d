"""The local APIC's timer: one-shot, periodic, and TSC-deadline. SDM, "APIC Timer".

The bus runs at 1 GHz unless told otherwise, as in KVM: a count is a nanosecond times the divisor. Methods
are called with the chip lock held. Counting goes on, and interrupts are lost, while LVTT is masked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from vmonty.kvm.soft.apicdef import MIN_PERIOD_NS, ONE_SHOT, PERIODIC, TSC_DEADLINE
from vmonty.kvm.soft.lapic_regs import LapicRegs
from vmonty.kvm.soft.timer import HrTimers, Timer

__all__ = ["ApicTimer", "GuestTsc"]


class GuestTsc(Protocol):
    """The vCPU's time-stamp counter."""

    def guest_tsc(self) -> int:
        """Its value now."""
        ...

    def tsc_deadline_to_ns(self, tsc: int) -> int:
        """The time of the timers' clock at which it will be *tsc*."""
        ...


class ApicTimer:
    """Counts down; *fire* is called, under the chip lock, whenever it reaches zero."""

    def __init__(self, timers: HrTimers, tsc: GuestTsc, regs: LapicRegs, fire: Callable[[], object]) -> None:
        self._timers = timers
        self._clock = timers.clock
        self._tsc = tsc
        self._regs = regs
        self._fire = fire
        self._timer: Timer | None = None
        self.mode = ONE_SHOT
        # kvm_can_use_hv_timer(): the processor watches the deadline while the guest runs. While the vCPU is blocked
        # the host's timer does.
        self.can_use_hv_timer: Callable[[], bool] = lambda: False
        self._blocked = False
        # KVM_CAP_X86_APIC_BUS_CYCLES_NS.
        self.bus_cycle_ns = 1
        self.reset()

    def reset(self) -> None:
        """Stop, and forget all but the mode (which follows LVTT)."""
        self.stop()
        self.divisor = 2
        self.initial_count = 0
        # One period, and the end of the present one. They stay, at its end, for the current count to be 0.
        self._period_ns = self._target_ns = 0
        self._regs.tsc_deadline = 0

    @property
    def tsc_deadline(self) -> int:
        """IA32_TSC_DEADLINE."""
        return self._regs.tsc_deadline

    def stop(self) -> None:
        """Cancel what is armed."""
        self._regs.armed_tsc = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def set_mode(self, mode: int) -> None:
        """LVTT's mode. Changing to or from TSC-deadline disarms; else counting goes on. SDM, "TSC-Deadline Mode"."""
        if (mode == TSC_DEADLINE) != (self.mode == TSC_DEADLINE):
            self.stop()
            self.initial_count = self._period_ns = self._regs.tsc_deadline = 0
        self.mode = mode
        self._regs.deadline_mode = mode == TSC_DEADLINE
        self._limit_period()

    def set_initial_count(self, count: int) -> None:
        """TMICT: start a period; 0 stops. Ignored in TSC-deadline mode."""
        if self.mode != TSC_DEADLINE:
            self.initial_count = count
            self._start()

    def set_divide_configuration(self, tdcr: int) -> None:
        """TDCR: what is left of a running period stretches with the divisor."""
        old, self.divisor = self.divisor, self._decode(tdcr)
        if self.divisor != old and self._period_ns:
            now = self._clock.now_ns()
            left = max(0, self._target_ns - now) * self.divisor // old
            self._set_period()
            if self._timer is not None:
                self._arm(now + left)

    def set_tsc_deadline(self, tsc: int) -> None:
        """IA32_TSC_DEADLINE, in its mode: fire when the guest's TSC is *tsc*, at once if it was; 0 disarms."""
        self.stop()
        self._regs.tsc_deadline = tsc
        self.look_at_deadline()

    def look_at_deadline(self) -> None:
        """Fire if it has come, else arm the host's timer for it: also when the guest's TSC has jumped.

        A guest that moves it to a later time does not come here (fastpath.py): then the host's timer is early.
        """
        self.stop()
        if self._regs.take_deadline(self._tsc.guest_tsc()):
            self._fire()
        elif (deadline := self._regs.tsc_deadline) and (self._blocked or not self.can_use_hv_timer()):
            self._arm(self._tsc.tsc_deadline_to_ns(deadline))
            self._regs.armed_tsc = deadline

    def switch_to_sw_timer(self) -> None:
        """kvm_lapic_switch_to_sw_timer(): the vCPU blocks. Called without the chip lock."""
        self._blocked = True
        deadline = self._regs.tsc_deadline
        # The host's timer looks who is blocked after it has taken itself off: so one of both sees the other.
        if deadline and not 0 < self._regs.armed_tsc <= deadline:
            with self._timers.lock:
                self.look_at_deadline()

    def switch_to_hv_timer(self) -> None:
        """kvm_lapic_switch_to_hv_timer(): it goes on. What is armed will find nothing to do."""
        self._blocked = False

    def current_count(self) -> int:
        """TMCCT; 0 in TSC-deadline mode."""
        if self.mode == TSC_DEADLINE or not self._period_ns or not self.initial_count:
            return 0
        left = max(0, self._target_ns - self._clock.now_ns())
        # A period that was stretched shows its initial count longer.
        return min(left // (self.divisor * self.bus_cycle_ns), self.initial_count)

    def restart(self, tdcr: int, initial_count: int, current_count: int) -> None:
        """Go on from saved registers (the mode is set). A deadline stays.

        A current count of 0 in one-shot mode is an end that comes now.
        """
        self.stop()
        self.divisor = self._decode(tdcr)
        if self.mode == TSC_DEADLINE:
            self.initial_count = initial_count
            self.set_tsc_deadline(self.tsc_deadline)
            return
        self.initial_count = initial_count
        left = current_count * self.divisor * self.bus_cycle_ns
        self._start(None if self.mode == PERIODIC and not left else left)

    @staticmethod
    def _decode(tdcr: int) -> int:
        """SDM, "Divide Configuration Register": bits 3, 1 and 0 choose 2, 4 … 128, and 1."""
        return 1 << (((tdcr & 3 | tdcr >> 1 & 4) + 1) & 7)

    def _set_period(self) -> None:
        self._period_ns = self.initial_count * self.divisor * self.bus_cycle_ns
        self._limit_period()

    def _limit_period(self) -> None:
        if self.mode == PERIODIC and self._period_ns:
            self._period_ns = max(self._period_ns, MIN_PERIOD_NS)

    def _start(self, left_ns: int | None = None) -> None:
        """Begin a period, of which *left_ns* are left."""
        self.stop()
        self._set_period()
        if self._period_ns:
            left = self._period_ns if left_ns is None else min(left_ns, self._period_ns)
            self._arm(self._clock.now_ns() + left)

    def _arm(self, target_ns: int) -> None:
        self.stop()
        self._target_ns = target_ns
        self._timer = self._timers.arm(target_ns, self._expired)

    def _expired(self) -> None:
        self._timer = None
        if self.mode == TSC_DEADLINE:
            self.look_at_deadline()
            return
        if self.mode == PERIODIC and self._period_ns:
            # Periods that passed unseen would have raised what is pending already.
            missed = max(0, self._clock.now_ns() - self._target_ns) // self._period_ns
            self._arm(self._target_ns + (missed + 1) * self._period_ns)
        self._fire()
