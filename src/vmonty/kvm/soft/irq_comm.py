"""Interrupt routing: from GSIs to pins and messages, from messages to local APICs, and acknowledges back.

What KVM keeps in irq_comm.c, irq.c and irqchip.c. KVM_CREATE_IRQCHIP routes GSI n (0–15) to the PIC and to pin n of
the I/O APIC, GSI 16–23 to the I/O APIC only: the PIT's GSI 0 is pin 0 until user space (QEMU, kvmtool) reroutes it to
pin 2 with KVM_SET_GSI_ROUTING. A split irqchip has neither PIC nor I/O APIC here: messages only.

The chip lock is held in every entry; notifiers are called with it, and may drive lines.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vmonty.kvm.soft.apicdef import (
    ALL_BUT_SELF,
    FIXED,
    LOWEST,
    NO_SHORTHAND,
    SELF,
    X2APIC_BROADCAST,
    X2APIC_CLUSTER,
    XAPIC_BROADCAST,
    XAPIC_CLUSTER,
    XAPIC_FLAT,
    LapicIrq,
)  # fmt: skip
from vmonty.kvm.soft.i8259 import Pic
from vmonty.kvm.soft.ioapic import IoApic
from vmonty.kvm.soft.iodev import KvmIoBuses
from vmonty.kvm.soft.lapic import Lapic
from vmonty.kvm.soft.timer import HrTimers
from vmonty.kvm.soft.vcpu_arch import VmArch
from vmonty.kvm.uapi.flags import (
    KVM_IOAPIC_NUM_PINS,
    KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQ_ROUTING_MSI,
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_MSI_VALID_DEVID,
    KVM_NR_IRQCHIPS,
)  # fmt: skip
from vmonty.kvm.uapi.irq import kvm_irq_routing_entry, kvm_msi

__all__ = [
    "KVM_IRQFD_RESAMPLE_IRQ_SOURCE_ID",
    "KVM_MAX_IRQ_ROUTES",
    "KVM_USERSPACE_IRQ_SOURCE_ID",
    "IrqComm",
    "Route",
    "default_routing",
]

KVM_MAX_IRQ_ROUTES = 4096
KVM_USERSPACE_IRQ_SOURCE_ID = 0
KVM_IRQFD_RESAMPLE_IRQ_SOURCE_ID = 1
_PIC_PINS = 8


class Route(NamedTuple):
    """Where a GSI goes: a pin of a chip (a slave's counted from 8), or a message."""

    gsi: int
    type: int
    irqchip: int = 0
    pin: int = 0
    address: int = 0
    data: int = 0


def default_routing() -> list[kvm_irq_routing_entry]:
    """What KVM_CREATE_IRQCHIP installs."""
    entries = []
    for gsi in range(KVM_IOAPIC_NUM_PINS):
        pins = [(KVM_IRQCHIP_IOAPIC, gsi)]
        if gsi < 2 * _PIC_PINS:
            pins.append((KVM_IRQCHIP_PIC_MASTER if gsi < _PIC_PINS else KVM_IRQCHIP_PIC_SLAVE, gsi % _PIC_PINS))
        for irqchip, pin in pins:
            entry = kvm_irq_routing_entry(gsi=gsi, type=KVM_IRQ_ROUTING_IRQCHIP)
            entry.u.irqchip.irqchip, entry.u.irqchip.pin = irqchip, pin
            entries.append(entry)
    return entries


def _refuse(code: int) -> OSError:
    return OSError(code, os.strerror(code))


class IrqComm:
    """The interrupt wiring of one VM, and its chips once they are created."""

    def __init__(self, timers: HrTimers) -> None:
        self.timers = timers
        self.lock: threading.RLock = timers.lock
        self.pic: Pic | None = None
        self.ioapic: IoApic | None = None
        self.split = False
        # KVM_CAP_SPLIT_IRQCHIP's argument: the first GSIs, whose EOIs user space wants to see.
        self.reserved_ioapic_pins = 0
        # KVM_CAP_X2APIC_API, and the module parameter vector_hashing.
        self.x2apic_format = False
        self.x2apic_broadcast_quirk_disabled = False
        self.vector_hashing = True
        self.apics: list[Lapic] = []
        self.arch = VmArch()
        self._routes: dict[int, tuple[Route, ...]] = {}
        self._gsi_of: dict[tuple[int, int], int] = {}
        self._ack_notifiers: dict[int, list[Callable[[], None]]] = {}
        self._mask_notifiers: dict[int, list[Callable[[bool], None]]] = {}
        self._next_source_id = KVM_IRQFD_RESAMPLE_IRQ_SOURCE_ID + 1

    # ---- chips and APICs -----------------------------------------------------------------------------

    @property
    def in_kernel(self) -> bool:
        """Whether there is an irqchip, full or split."""
        return self.split or self.ioapic is not None

    def create_irqchip(self, buses: KvmIoBuses) -> None:
        """KVM_CREATE_IRQCHIP: PIC and I/O APIC on their buses, and the default routing. The caller checks EEXIST."""
        with self.lock:
            self.pic = Pic(self.lock, self._pic_output, self.notify_acked, self.notify_masked)
            self.ioapic = IoApic(self, self.timers)
            self.pic.register(buses.pio)
            self.ioapic.register(buses.mmio)
            self.set_routing(default_routing())

    def create_split_irqchip(self, reserved_ioapic_pins: int) -> None:
        """KVM_CAP_SPLIT_IRQCHIP: local APICs only, no routes."""
        with self.lock:
            self.split = True
            self.reserved_ioapic_pins = reserved_ioapic_pins
            self.arch.note_all_eois()
            self.set_routing([])

    def add_apic(self, apic: Lapic) -> None:
        """A vCPU is complete: messages reach it from now on."""
        with self.lock:
            apic.regs.publish()
            self.apics = [*self.apics, apic]
            self.apics_changed()

    def remove_apic(self, apic: Lapic) -> None:
        """A vCPU is gone."""
        with self.lock:
            self.apics = [other for other in self.apics if other is not apic]
            self.apics_changed()
            if self.ioapic is not None:
                self.ioapic.forget(apic)
            apic.close()

    def apics_changed(self) -> None:
        """kvm_recalculate_apic_map(): IPIs take the fast path while all APICs are in x2APIC mode."""
        self.arch.count_apics(len(self.apics), sum(apic.x2apic_enabled for apic in self.apics))

    def note_eoi_vector(self, vector: int) -> None:
        """The I/O APIC has an entry with *vector*: it hears of its EOIs."""
        self.arch.note_eoi_vector(vector)

    def _pic_output(self, level: bool) -> None:
        if level:
            for apic in self.apics:
                if apic.accept_pic_intr():
                    apic.owner.kick()
                    return

    def nmi_watchdog_tick(self) -> None:
        """The PIT ticks: local APICs that take LINT0 as NMI get one."""
        for apic in self.apics:
            apic.nmi_watchdog_tick()

    def request_irq_source_id(self) -> int:
        """An id for a new source of interrupts: several may drive one line."""
        with self.lock:
            self._next_source_id += 1
            return self._next_source_id - 1

    # ---- what a vCPU asks ----------------------------------------------------------------------------

    def has_extint(self, apic: Lapic) -> bool:
        """Whether the PIC has something for this vCPU. Takes no lock."""
        return self.pic is not None and self.pic.output and apic.accept_pic_intr()

    def has_interrupt(self, apic: Lapic) -> bool:
        """Whether an interrupt waits for this vCPU to take it. Takes no lock."""
        return self.has_extint(apic) or apic.has_interrupt() is not None

    def get_interrupt(self, apic: Lapic) -> int | None:
        """Acknowledge the vCPU's next interrupt, the PIC's first; its vector."""
        with self.lock:
            if self.pic is not None and self.has_extint(apic):
                return self.pic.read_irq()
            return apic.get_interrupt()

    # ---- routing -------------------------------------------------------------------------------------

    def set_routing(self, entries: Sequence[kvm_irq_routing_entry]) -> None:
        """KVM_SET_GSI_ROUTING: replace all routes, or change nothing. Raises OSError with EINVAL.

        Refused: a GSI or a number of entries beyond 4096; unknown types, flags, chips or pins; a GSI with two routes,
        unless they are pins of different chips.
        """
        if len(entries) > KVM_MAX_IRQ_ROUTES:
            raise _refuse(errno.EINVAL)
        routes: dict[int, tuple[Route, ...]] = {}
        gsi_of: dict[tuple[int, int], int] = {}
        for entry in entries:
            route = self._route(entry)
            others = routes.get(route.gsi, ())
            for other in others:
                if (
                    other.type != KVM_IRQ_ROUTING_IRQCHIP
                    or route.type != KVM_IRQ_ROUTING_IRQCHIP
                    or other.irqchip == route.irqchip
                ):
                    raise _refuse(errno.EINVAL)
            routes[route.gsi] = (*others, route)
            if route.type == KVM_IRQ_ROUTING_IRQCHIP:
                gsi_of[route.irqchip, route.pin] = route.gsi
        with self.lock:
            self._routes, self._gsi_of = routes, gsi_of

    def _route(self, entry: kvm_irq_routing_entry) -> Route:
        allowed = KVM_MSI_VALID_DEVID if entry.type == KVM_IRQ_ROUTING_MSI else 0
        if entry.gsi >= KVM_MAX_IRQ_ROUTES or entry.flags & ~allowed:
            raise _refuse(errno.EINVAL)
        if entry.type == KVM_IRQ_ROUTING_MSI:
            address = entry.u.msi.address_hi << 32 | entry.u.msi.address_lo
            if self._bad_msi(address):
                raise _refuse(errno.EINVAL)
            return Route(entry.gsi, entry.type, address=address, data=entry.u.msi.data)
        if entry.type != KVM_IRQ_ROUTING_IRQCHIP or self.split:
            raise _refuse(errno.EINVAL)
        irqchip, pin = entry.u.irqchip.irqchip, entry.u.irqchip.pin
        if irqchip >= KVM_NR_IRQCHIPS or pin >= (KVM_IOAPIC_NUM_PINS if irqchip == KVM_IRQCHIP_IOAPIC else _PIC_PINS):
            raise _refuse(errno.EINVAL)
        return Route(entry.gsi, entry.type, irqchip, pin + (_PIC_PINS if irqchip == KVM_IRQCHIP_PIC_SLAVE else 0))

    def routes(self, gsi: int) -> tuple[Route, ...]:
        """Where *gsi* goes."""
        return self._routes.get(gsi, ())

    def set_irq(
        self, gsi: int, level: int, irq_source_id: int = KVM_USERSPACE_IRQ_SOURCE_ID, line_status: bool = False
    ) -> int:
        """Drive *gsi* (KVM_IRQ_LINE). Return what KVM_IRQ_LINE_STATUS does.

        The sum over the routes that didn't refuse: 0 when coalesced; -1 when all are masked, or there are none.
        """
        with self.lock:
            result = -1
            for route in self._routes.get(gsi, ()):
                taken = self._drive(route, level, irq_source_id, line_status)
                if taken >= 0:
                    result = max(result, 0) + taken
            return result

    def _drive(self, route: Route, level: int, irq_source_id: int, line_status: bool) -> int:
        if route.type == KVM_IRQ_ROUTING_MSI:
            return self.set_msi(route.address, route.data) if level else -1
        if route.irqchip == KVM_IRQCHIP_IOAPIC:
            return -1 if self.ioapic is None else self.ioapic.set_irq(route.pin, irq_source_id, level, line_status)
        return -1 if self.pic is None else self.pic.set_irq(route.pin, irq_source_id, level)

    # ---- messages ------------------------------------------------------------------------------------

    def _bad_msi(self, address: int) -> bool:
        return self.x2apic_format and bool(address >> 32 & 0xFF)

    def msi_irq(self, address: int, data: int) -> LapicIrq:
        """The interrupt that a message means. SDM, "Message Address Register Format", "Message Data Register Format".

        With KVM_X2APIC_API_USE_32BIT_IDS the upper 24 bits of the destination are those of the address.
        """
        dest_id = address >> 12 & 0xFF
        if self.x2apic_format:
            dest_id |= address >> 32 & 0xFFFFFF00
        return LapicIrq(
            vector=data & 0xFF,
            delivery_mode=data >> 8 & 7,
            logical=bool(address >> 2 & 1),
            dest_id=dest_id,
            level_triggered=bool(data >> 15 & 1),
            msi_redir_hint=bool(address >> 3 & 1),
        )

    def set_msi(self, address: int, data: int) -> int:
        """Deliver a message; the number of APICs that took it, -1 when it had no destination or a bad address."""
        return -1 if self._bad_msi(address) else self.deliver_to_apics(self.msi_irq(address, data))

    def signal_msi(self, msi: kvm_msi) -> int:
        """KVM_SIGNAL_MSI: how many APICs took it.

        Raises OSError: EINVAL without irqchip, for unknown flags, or for an address that the 32-bit format doesn't
        have; EPERM when there is no destination.
        """
        address = msi.address_hi << 32 | msi.address_lo
        if not self.in_kernel or msi.flags & ~KVM_MSI_VALID_DEVID or self._bad_msi(address):
            raise _refuse(errno.EINVAL)
        result = self.set_msi(address, msi.data)
        if result < 0:
            raise _refuse(errno.EPERM)
        return result

    def deliver_to_apics(
        self, irq: LapicIrq, source: Lapic | None = None, taken: dict[Lapic, int] | None = None
    ) -> int:
        """Deliver *irq*, an IPI when it has a *source*; note in *taken* who took it, as which vector.

        Return how many APICs took it. Where KVM looks the destination up in its map of IDs, 0 says that nobody has
        it; where it has to ask every APIC (broadcasts, shorthands, logical IDs of several kinds), -1 does.
        """
        with self.lock:
            mode, choose = irq.delivery_mode, irq.lowest_priority
            if irq.shorthand == SELF:
                targets, mapped, choose = [] if source is None else [source], False, False
            elif irq.shorthand != NO_SHORTHAND or self._is_broadcast(irq, source) or not self.apics:
                targets, mapped = self._search(irq, source), False
                if choose and not irq.logical and irq.dest_id == XAPIC_BROADCAST:
                    # A physical broadcast can't be for one.
                    mode, choose = FIXED, irq.msi_redir_hint
            elif not irq.logical:
                # At most one: there is nothing to choose.
                targets, mapped, choose = [apic for apic in self._present() if apic.has_id(irq.dest_id)], True, False
            else:
                kinds = self._logical_kinds()
                mapped = kinds is not None
                targets = self._search(irq, source) if kinds is None else self._named(irq.dest_id, kinds)
            if choose and targets:
                targets = self._lowest(irq, targets)
            if not targets:
                return 0 if mapped else -1
            result = 0
            for apic in targets:
                accepted = apic.accept_irq(mode, irq.vector, irq.level, irq.level_triggered)
                result += accepted
                if accepted and taken is not None and mode in (FIXED, LOWEST) and irq.vector >= 16:
                    taken[apic] = irq.vector
            return result

    def _present(self) -> list[Lapic]:
        return [apic for apic in self.apics if apic.enabled]

    def _is_broadcast(self, irq: LapicIrq, source: Lapic | None) -> bool:
        """Devices mean all APICs by 0xFF, also those in x2APIC mode, unless that quirk is disabled."""
        if self.x2apic_broadcast_quirk_disabled:
            no_xapic = self._logical_kinds() == {X2APIC_CLUSTER}
            return irq.dest_id == X2APIC_BROADCAST or (irq.dest_id == XAPIC_BROADCAST and not no_xapic)
        wide = source is not None and source.x2apic_enabled
        return irq.dest_id == (X2APIC_BROADCAST if wide else XAPIC_BROADCAST)

    def _logical_kinds(self) -> set[int] | None:
        """The kind of all logical IDs, if it is one and each of them names one APIC: then KVM has a map of them.

        The empty set: nobody has a logical ID. None: there is no map.
        """
        kinds: set[int] = set()
        names = []
        for apic in self._present():
            if apic.sw_enabled and apic.logical_id:
                kind = apic.logical_kind
                kinds.add(XAPIC_CLUSTER if kind is None else kind)
                if kind != X2APIC_CLUSTER:
                    bits = apic.logical_id & (0xFF if kind == XAPIC_FLAT else 0xF)
                    if bits & (bits - 1):
                        return None
                    if bits:
                        names.append(apic.logical_id)
        return kinds if len(kinds) <= 1 and len(set(names)) == len(names) else None

    def _named(self, dest_id: int, kinds: set[int]) -> list[Lapic]:
        """Look a logical destination up in KVM's map: xAPICs are in it while they are software-enabled."""
        if X2APIC_CLUSTER in kinds:
            return [apic for apic in self._present() if apic.x2apic_enabled and apic.matches_logical(dest_id)]
        able = [apic for apic in self._present() if kinds and apic.sw_enabled and not apic.x2apic_enabled]
        return [apic for apic in able if apic.matches_logical(dest_id & 0xFF)]

    def _search(self, irq: LapicIrq, source: Lapic | None) -> list[Lapic]:
        """Ask every APIC."""
        if irq.shorthand != NO_SHORTHAND:
            return [apic for apic in self._present() if irq.shorthand != ALL_BUT_SELF or apic is not source]
        wide = irq.dest_id == XAPIC_BROADCAST and source is None and not self.x2apic_broadcast_quirk_disabled
        return [apic for apic in self._present() if wide or apic.matches(irq.dest_id, irq.logical)]

    def _lowest(self, irq: LapicIrq, targets: list[Lapic]) -> list[Lapic]:
        """One of *targets* that is software-enabled: by the vector, or the one that was chosen least often."""
        able = [apic for apic in targets if apic.sw_enabled]
        if not able:
            return []
        return [able[irq.vector % len(able)] if self.vector_hashing else min(able, key=lambda apic: apic.arb_prio)]

    # ---- acknowledges --------------------------------------------------------------------------------

    def eoi(self, apic: Lapic, vector: int, level_triggered: bool) -> None:
        """*apic* has ended *vector*: tell the I/O APIC, or with a split irqchip user space, if they care."""
        with self.lock:
            if self.split:
                if self.handles_vector(apic, vector):
                    apic.owner.ioapic_eoi(vector)
            elif self.ioapic is not None:
                self.ioapic.update_eoi(apic, vector, level_triggered)

    def handles_vector(self, apic: Lapic, vector: int) -> bool:
        """Whether someone wants to see *apic*'s EOI of *vector*."""
        with self.lock:
            if self.ioapic is not None:
                return self.ioapic.handles_vector(apic, vector)
            for gsi in range(self.reserved_ioapic_pins):
                for route in self._routes.get(gsi, ()):
                    irq = self.msi_irq(route.address, route.data)
                    if irq.vector == vector and irq.level_triggered:
                        return apic.matches(irq.dest_id, irq.logical) or apic.pending_eoi(vector)
            return False

    def register_ack_notifier(self, gsi: int, callback: Callable[[], None]) -> None:
        """Call *callback* whenever the guest has acknowledged *gsi* (EOI at the PIC or a local APIC)."""
        with self.lock:
            self._ack_notifiers.setdefault(gsi, []).append(callback)

    def unregister_ack_notifier(self, gsi: int, callback: Callable[[], None]) -> None:
        """No longer."""
        with self.lock:
            self._ack_notifiers.get(gsi, []).remove(callback)

    def register_mask_notifier(self, gsi: int, callback: Callable[[bool], None]) -> None:
        """Call *callback* whenever the guest masks (True) or unmasks a pin of *gsi*."""
        with self.lock:
            self._mask_notifiers.setdefault(gsi, []).append(callback)

    def unregister_mask_notifier(self, gsi: int, callback: Callable[[bool], None]) -> None:
        """No longer."""
        with self.lock:
            self._mask_notifiers.get(gsi, []).remove(callback)

    def notify_acked(self, irqchip: int, pin: int) -> None:
        """A pin was acknowledged."""
        gsi = self._gsi_of.get((irqchip, pin))
        if gsi is not None:
            for callback in tuple(self._ack_notifiers.get(gsi, ())):
                callback()

    def has_ack_notifier(self, irqchip: int, pin: int) -> bool:
        """Whether notify_acked() would reach anyone."""
        gsi = self._gsi_of.get((irqchip, pin))
        return gsi is not None and bool(self._ack_notifiers.get(gsi))

    def notify_masked(self, irqchip: int, pin: int, masked: bool) -> None:
        """A pin was masked or unmasked."""
        gsi = self._gsi_of.get((irqchip, pin))
        if gsi is not None:
            for callback in tuple(self._mask_notifiers.get(gsi, ())):
                callback(masked)
