"""The 82093AA I/O APIC, as KVM's in-kernel one: 24 pins, a redirection entry each.

Registers are reached through IOREGSEL (offset 0x00) and IOWIN (0x10) of the page at 0xFEC00000; section titles are
those of the 82093AA data sheet. As in KVM: version 0x11, so there is no EOI register; unless ``eoi_register`` is set,
for VMs whose local APICs may suppress the broadcast of EOIs: then it is version 0x20, with an EOI register at 0x40.
Interrupts that a source raises are remembered in ``irr`` while it holds the line; a masked edge is delivered by
nobody, a masked level when it is unmasked.

The real-time clock's pin is special: user space wants to know whether a tick of it was lost (KVM_IRQ_LINE_STATUS), so
it is tracked until all vCPUs that took it have ended it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from vmonty.kvm.soft.apicdef import LapicIrq
from vmonty.kvm.soft.iodev import KvmIoBus
from vmonty.kvm.soft.timer import HrTimers
from vmonty.kvm.uapi.flags import KVM_IOAPIC_NUM_PINS, KVM_IRQCHIP_IOAPIC
from vmonty.kvm.uapi.irq import kvm_ioapic_state

if TYPE_CHECKING:
    from vmonty.kvm.soft.lapic import Lapic

__all__ = ["IOAPIC_DEFAULT_BASE_ADDRESS", "RTC_GSI", "IoApic", "IoApicHost"]

IOAPIC_DEFAULT_BASE_ADDRESS = 0xFEC00000
IOAPIC_MEM_LENGTH = 0x100
RTC_GSI = 8

IOREGSEL, IOWIN, IOEOI = 0x00, 0x10, 0x40
_REG_ID, _REG_VERSION, _REG_ARB, _REG_TABLE = 0, 1, 2, 0x10

# A redirection entry:
#   63    56 55                                17 16   15   14   13   12   11   10  8 7     0
#  ┌────────┬───────────────────────────────────┬────┬────┬────┬────┬────┬────┬──────┬───────┐
#  │ dest   │ reserved                          │mask│trig│RIRR│pol │stat│log.│ mode │vector │
#  └────────┴───────────────────────────────────┴────┴────┴────┴────┴────┴────┴──────┴───────┘
LOGICAL, STATUS, REMOTE_IRR, LEVEL, MASKED = 1 << 11, 1 << 12, 1 << 14, 1 << 15, 1 << 16
_READ_ONLY = STATUS | REMOTE_IRR

# A guest that never serves a level interrupt is not to keep the host busy: after so many EOIs in a row that meet the
# line still high, the next delivery waits for 10 ms.
SUCCESSIVE_IRQ_MAX_COUNT = 10000
_STORM_DELAY_NS = 10_000_000


class IoApicHost(Protocol):
    """What the chip needs of its VM (irq_comm.IrqComm)."""

    @property
    def apics(self) -> list[Lapic]:
        """All local APICs."""
        ...

    def deliver_to_apics(
        self, irq: LapicIrq, source: Lapic | None = None, taken: dict[Lapic, int] | None = None
    ) -> int:
        """Deliver a message; note in *taken* who took it, as which vector."""
        ...

    def note_eoi_vector(self, vector: int) -> None:
        """An entry has *vector*: from now on its EOIs are to be told."""
        ...

    def notify_acked(self, irqchip: int, pin: int) -> None:
        """Pin *pin* was acknowledged."""
        ...

    def notify_masked(self, irqchip: int, pin: int, masked: bool) -> None:
        """Pin *pin* was masked or unmasked."""
        ...

    def has_ack_notifier(self, irqchip: int, pin: int) -> bool:
        """Whether someone waits for acknowledges of *pin*."""
        ...


class IoApic:
    """The chip. An IoDevice; every entry takes the chip lock (that of *timers*)."""

    def __init__(self, host: IoApicHost, timers: HrTimers) -> None:
        self.lock = timers.lock
        self._host = host
        self._timers = timers
        self.eoi_register = False
        self.base_address = IOAPIC_DEFAULT_BASE_ADDRESS
        self.ioregsel = self.id = 0
        # Lines that are up, and of the edge-triggered ones those that have been delivered.
        self.irr = self._irr_delivered = 0
        self.redirtbl = [MASKED] * KVM_IOAPIC_NUM_PINS
        self._sources = [0] * KVM_IOAPIC_NUM_PINS
        self._successive_eois = [0] * KVM_IOAPIC_NUM_PINS
        # Local APICs that have yet to end the RTC's interrupt, and its vector there.
        self._rtc_pending: dict[Lapic, int] = {}

    def register(self, bus: KvmIoBus) -> None:
        """Put the registers on the MMIO bus."""
        bus.register(self.base_address, IOAPIC_MEM_LENGTH, self)

    # ---- lines ---------------------------------------------------------------------------------------

    def set_irq(self, pin: int, irq_source_id: int, level: int, line_status: bool = False) -> int:
        """Let source *irq_source_id* drive *pin*; the line is up while any source holds it.

        Return the number of local APICs that took it, 0 when it was coalesced, -1 when masked or without destination.
        """
        with self.lock:
            bit = 1 << irq_source_id
            self._sources[pin] = self._sources[pin] | bit if level else self._sources[pin] & ~bit
            return self._set_line(pin, bool(self._sources[pin]), line_status)

    def clear_source(self, irq_source_id: int) -> None:
        """Forget that *irq_source_id* holds any line; the lines move with their next change."""
        with self.lock:
            self._sources = [sources & ~(1 << irq_source_id) for sources in self._sources]

    def _set_line(self, pin: int, level: bool, line_status: bool) -> int:
        bit = 1 << pin
        if not level:
            self.irr &= ~bit
            return 1
        if pin == RTC_GSI and line_status and self._rtc_pending:
            return 0
        was_up = self.irr & bit
        self.irr |= bit
        if not self.redirtbl[pin] & LEVEL:
            self._irr_delivered &= ~bit
            if was_up:
                return 0
        return self._service(pin, line_status)

    def _service(self, pin: int, line_status: bool = False) -> int:
        """Deliver *pin*'s interrupt, unless it is masked, or a level one that waits for its EOI."""
        entry = self.redirtbl[pin]
        level_triggered = bool(entry & LEVEL)
        if entry & MASKED or (level_triggered and entry & REMOTE_IRR):
            return -1
        irq = LapicIrq(
            vector=entry & 0xFF,
            delivery_mode=entry >> 8 & 7,
            logical=bool(entry & LOGICAL),
            dest_id=entry >> 56,
            level_triggered=level_triggered,
        )
        if not level_triggered:
            self._irr_delivered |= 1 << pin
        if pin == RTC_GSI and line_status:
            self._rtc_pending.clear()
            result = self._host.deliver_to_apics(irq, taken=self._rtc_pending)
        else:
            result = self._host.deliver_to_apics(irq)
        if result and level_triggered:
            self.redirtbl[pin] |= REMOTE_IRR
        return result

    # ---- ends of interrupts --------------------------------------------------------------------------

    def handles_vector(self, apic: Lapic, vector: int) -> bool:
        """Whether *apic*'s EOI of *vector* matters here."""
        if self._rtc_pending.get(apic) == vector:
            return True
        return any(
            entry & 0xFF == vector
            and (entry & LEVEL or pin == RTC_GSI or self._host.has_ack_notifier(KVM_IRQCHIP_IOAPIC, pin))
            and (apic.matches(entry >> 56, bool(entry & LOGICAL)) or apic.pending_eoi(vector))
            for pin, entry in enumerate(self.redirtbl)
        )

    def update_eoi(self, apic: Lapic, vector: int, level_triggered: bool) -> None:
        """*apic* has ended *vector*, which it took as level- or edge-triggered."""
        with self.lock:
            if self._rtc_pending.get(apic) == vector:
                del self._rtc_pending[apic]
            for pin in range(KVM_IOAPIC_NUM_PINS):
                if self.redirtbl[pin] & 0xFF == vector:
                    # Whoever is told may lower the line, before we look at it again.
                    self._host.notify_acked(KVM_IRQCHIP_IOAPIC, pin)
                    if level_triggered and not apic.suppresses_eoi_broadcast:
                        self._end(pin)

    def _end(self, pin: int) -> None:
        self.redirtbl[pin] &= ~REMOTE_IRR
        if self.redirtbl[pin] & MASKED or not self.irr >> pin & 1:
            self._successive_eois[pin] = 0
            return
        self._successive_eois[pin] += 1
        if self._successive_eois[pin] < SUCCESSIVE_IRQ_MAX_COUNT:
            self._service(pin)
            return
        self._successive_eois[pin] = 0
        self._timers.arm(self._timers.clock.now_ns() + _STORM_DELAY_NS, self._inject_waiting)

    def _inject_waiting(self) -> None:
        for pin, entry in enumerate(self.redirtbl):
            if entry & LEVEL and not entry & REMOTE_IRR and self.irr >> pin & 1:
                self._service(pin)

    # ---- registers -----------------------------------------------------------------------------------

    def _read_window(self) -> int:
        if self.ioregsel == _REG_VERSION:
            return (KVM_IOAPIC_NUM_PINS - 1) << 16 | (0x20 if self.eoi_register else 0x11)
        if self.ioregsel in (_REG_ID, _REG_ARB):
            return (self.id & 0xF) << 24
        pin = (self.ioregsel - _REG_TABLE) >> 1
        if not 0 <= pin < KVM_IOAPIC_NUM_PINS:
            return 0xFFFFFFFF
        return self.redirtbl[pin] >> (32 if self.ioregsel & 1 else 0) & 0xFFFFFFFF

    def _write_window(self, value: int) -> None:
        if self.ioregsel == _REG_ID:
            self.id = value >> 24 & 0xF
        pin = (self.ioregsel - _REG_TABLE) >> 1
        if not 0 <= pin < KVM_IOAPIC_NUM_PINS:
            return
        old = self.redirtbl[pin]
        if self.ioregsel & 1:
            entry = old & 0xFFFFFFFF | value << 32
        else:
            entry = old & ~0xFFFFFFFF | value & ~_READ_ONLY | old & _READ_ONLY
        if not entry & LEVEL:
            # Guests make an entry edge-triggered for a moment to get rid of its remote IRR.
            entry &= ~REMOTE_IRR
        self._host.note_eoi_vector(entry & 0xFF)
        self.redirtbl[pin] = entry
        if (old ^ entry) & MASKED:
            self._host.notify_masked(KVM_IRQCHIP_IOAPIC, pin, bool(entry & MASKED))
        if entry & LEVEL and not entry & (MASKED | REMOTE_IRR) and self.irr >> pin & 1:
            # The device may have gone quiet while the pin was masked: a resampling irqfd finds out.
            self._host.notify_acked(KVM_IRQCHIP_IOAPIC, pin)
            if self.irr >> pin & 1:
                self._service(pin)

    def _write_eoi(self, vector: int) -> None:
        for pin, entry in enumerate(self.redirtbl):
            if entry & LEVEL and entry & 0xFF == vector:
                self._host.notify_acked(KVM_IRQCHIP_IOAPIC, pin)
                self._end(pin)

    def _offset(self, address: int) -> int | None:
        offset = address - self.base_address
        return offset if 0 <= offset < IOAPIC_MEM_LENGTH else None

    def read(self, address: int, size: int) -> int | None:
        """An MMIO read. Registers are 32 bits wide; what is no register reads as 0."""
        offset = self._offset(address)
        if offset is None:
            return None
        with self.lock:
            if offset == IOREGSEL:
                return self.ioregsel
            return self._read_window() if offset == IOWIN else 0

    def write(self, address: int, size: int, value: int) -> bool:
        """An MMIO write of 1, 2, 4 or 8 bytes, of which the lowest 32 bits count."""
        offset = self._offset(address)
        if offset is None:
            return False
        if size not in (1, 2, 4, 8):
            return True
        value &= 0xFFFFFFFF
        with self.lock:
            if offset == IOREGSEL:
                self.ioregsel = value & 0xFF
            elif offset == IOWIN:
                self._write_window(value)
            elif offset == IOEOI and self.eoi_register:
                self._write_eoi(value & 0xFF)
        return True

    # ---- user space ----------------------------------------------------------------------------------

    def get_state(self) -> kvm_ioapic_state:
        """KVM_GET_IRQCHIP: lines that are up, without edges that have been delivered."""
        with self.lock:
            state = kvm_ioapic_state(
                base_address=self.base_address, ioregsel=self.ioregsel, id=self.id, irr=self.irr & ~self._irr_delivered
            )
            for pin, entry in enumerate(self.redirtbl):
                state.redirtbl[pin].bits = entry
            return state

    def set_state(self, state: kvm_ioapic_state) -> None:
        """KVM_SET_IRQCHIP: take the registers, and raise the lines that were up."""
        with self.lock:
            self.base_address, self.ioregsel, self.id = state.base_address, state.ioregsel, state.id
            self.redirtbl = [state.redirtbl[pin].bits for pin in range(KVM_IOAPIC_NUM_PINS)]
            for entry in self.redirtbl:
                self._host.note_eoi_vector(entry & 0xFF)
            self.irr = self._irr_delivered = 0
            self._rtc_pending.clear()
            for pin in range(KVM_IOAPIC_NUM_PINS):
                if state.irr >> pin & 1:
                    self._set_line(pin, True, line_status=True)
            self._rtc_pending.clear()
            for apic in self._host.apics:
                self.restore_rtc_tracking(apic)

    def restore_rtc_tracking(self, apic: Lapic) -> None:
        """After *apic*'s state was set: does it still have to end the RTC's interrupt?"""
        with self.lock:
            entry = self.redirtbl[RTC_GSI]
            vector = entry & 0xFF
            if not apic.matches(entry >> 56, bool(entry & LOGICAL)):
                return
            if apic.pending_eoi(vector):
                self._rtc_pending[apic] = vector
            else:
                self._rtc_pending.pop(apic, None)

    def forget(self, apic: Lapic) -> None:
        """*apic* is gone."""
        with self.lock:
            self._rtc_pending.pop(apic, None)
