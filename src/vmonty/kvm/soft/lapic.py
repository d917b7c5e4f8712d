"""The local APIC of a vCPU: xAPIC (MMIO) and x2APIC (MSRs), as KVM's in-kernel lapic.

Behaviour is that of Linux's KVM, and of the SDM's chapter "Advanced Programmable Interrupt Controller (APIC)", whose
section titles are cited. Choices that KVM has made, and we keep:

- The bus runs at 1 GHz: a count of the timer is a nanosecond times the divisor. Periods are at least 200 µs.
- An access that is not a 32-bit one at a multiple of 16 is ignored (write); reads may lie inside the 32 bits.
- Where x2APIC is concerned: only the ICR, ESR, SELF IPI and registers without write access refuse values (#GP);
  other reserved bits are dropped. The x2APIC ID is the vCPU's id and can't be changed.
- Delivery to a software-disabled APIC drops fixed interrupts; NMI, INIT and SIPI get through.
- Switching the APIC off keeps its registers.

Where KVM does nothing at all we follow the SDM: vectors below 16 never become pending, and are reported in the ESR
and through LVT error ("Error Handling"); accesses to reserved registers as well.

The registers are in C (lapic_regs), where fastpath.py handles what is frequent: EOI, TPR, IPIs, the deadline. All
entries here take the VM's chip lock, except what a vCPU asks and acknowledges before each entry. The owner is called
with the lock held.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from vmonty.kvm.soft.apicdef import (
    APIC_BASE_MSR,
    APIC_DEFAULT_PHYS_BASE,
    APICBASE_BSP,
    APICBASE_ENABLE,
    APICBASE_EXTD,
    ARBPRI,
    DFR,
    DIRECTED_EOI_SVR,
    DIRECTED_EOI_VERSION,
    EOI,
    ESR,
    ESR_ILLEGAL_REGISTER,
    ESR_RECEIVE_ILLEGAL,
    ESR_SEND_ILLEGAL,
    EXTINT,
    FIXED,
    ICR,
    ICR2,
    ICR_BUSY,
    ID,
    INIT,
    LAPIC_MMIO_LENGTH,
    LDR,
    LOWEST,
    LVR,
    LVT0,
    LVT_BITS,
    LVT_CMCI,
    LVT_ERROR,
    LVT_MASKED,
    LVT_PMC,
    LVTT,
    NMI,
    PERIODIC,
    PPR,
    READABLE,
    REMOTE_READ,
    SELF,
    SELF_IPI,
    STARTUP,
    SVR,
    SVR_ENABLED,
    TDCR,
    TMCCT,
    TMICT,
    TPR,
    TSC_DEADLINE,
    X2APIC_BROADCAST,
    X2APIC_CLUSTER,
    X2APIC_ICR_RESERVED,
    XAPIC_BROADCAST,
    XAPIC_CLUSTER,
    XAPIC_FLAT,
    XAPIC_ONLY,
    LapicIrq,
)  # fmt: skip
from vmonty.kvm.soft.lapic_regs import LapicRegs
from vmonty.kvm.soft.lapic_timer import ApicTimer
from vmonty.kvm.soft.timer import HrTimers
from vmonty.kvm.soft.vcpu_arch import VcpuArch, VmArch
from vmonty.kvm.uapi.irq import kvm_lapic_state

_M32, _M64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


class ApicOwner(Protocol):
    """The vCPU. All but the last three are called with the chip lock held, from any thread, and must not block."""

    @property
    def vcpu_id(self) -> int:
        """The id, and so the x2APIC ID."""
        ...

    @property
    def arch(self) -> VcpuArch | None:
        """The vCPU's compiled part, which uses the registers, too; None: there is none."""
        ...

    def request_event(self) -> None:
        """KVM_REQ_EVENT: a fixed interrupt became pending. As a kick, but all there is to look at is the IRR."""
        ...

    def kick(self) -> None:
        """Something became pending: leave the guest, or wake from HLT, and look."""
        ...

    def inject_nmi(self) -> None:
        """An NMI has come in; a kick follows."""
        ...

    def pv_unhalt(self) -> None:
        """Another vCPU ends this one's halt (KVM_HC_KICK_CPU); a kick follows."""
        ...

    def ioapic_eoi(self, vector: int) -> None:
        """Split irqchip: user space's I/O APIC must see this EOI (KVM_EXIT_IOAPIC_EOI)."""
        ...

    def guest_tsc(self) -> int:
        """The guest's time-stamp counter now."""
        ...

    def tsc_deadline_to_ns(self, tsc: int) -> int:
        """The time of the chips' clock at which the guest's TSC will be *tsc*."""
        ...

    def init_received(self) -> None:
        """On the vCPU's thread, in accept_events(): reset as INIT does (the caller's reset calls Lapic.reset)."""
        ...

    def sipi_received(self, vector: int) -> None:
        """On the vCPU's thread, in accept_events(): start at page *vector*, if waiting for it."""
        ...


class ApicBus(Protocol):
    """What connects APICs with each other and the I/O APIC (irq_comm.IrqComm)."""

    x2apic_format: bool
    arch: VmArch

    def apics_changed(self) -> None:
        """An APIC has changed its mode."""
        ...

    def deliver_to_apics(self, irq: LapicIrq, source: Lapic | None = None) -> int:
        """Deliver a message; the number of APICs that took it, -1 when it had no destination."""
        ...

    def eoi(self, apic: Lapic, vector: int, level_triggered: bool) -> None:
        """*apic* has ended *vector*."""
        ...

    def handles_vector(self, apic: Lapic, vector: int) -> bool:
        """Whether someone wants to see *apic*'s EOI of *vector*."""
        ...


class Lapic:
    """One local APIC. Reset it once its owner is complete; ``configure`` it whenever the vCPU's CPUID is set."""

    def __init__(self, owner: ApicOwner, bus: ApicBus, timers: HrTimers, bsp: bool = False) -> None:
        self.owner = owner
        self.bus = bus
        self.lock: threading.RLock = timers.lock
        self.bsp = bsp
        self.regs = LapicRegs(owner.vcpu_id, bus.arch, owner.arch)
        self.regs.apic_base = APIC_DEFAULT_PHYS_BASE | APICBASE_ENABLE | (APICBASE_BSP if bsp else 0)
        # What CPUID and capabilities say: configure().
        self._x2apic_allowed = self._directed_eoi = self._cmci = False
        self._phys_bits = 36
        self._timer_modes = PERIODIC
        self._readable = READABLE
        # KVM_CAP_DISABLE_QUIRKS2.
        self.quirk_lint0_reenabled = True
        self.quirk_mmio_hole = True
        # KVM_TPR_ACCESS_REPORTING: told of accesses to the TPR by MMIO, with True for a write.
        self.report_tpr_access: Callable[[bool], None] | None = None
        # INIT and SIPI that wait for the vCPU's thread.
        self.init_pending = self.sipi_pending = False
        self.sipi_vector = 0
        self.arb_prio = 0
        self._esr = 0
        self.timer = ApicTimer(timers, owner, self.regs, lambda: self.local_deliver(LVTT))
        self.regs[ID] = self._xapic_id()
        self.reset(init_event=False)

    def configure(
        self, *, x2apic: bool, tsc_deadline: bool, phys_bits: int, directed_eoi: bool = False, cmci: bool = False
    ) -> None:
        """Follow the vCPU's CPUID and MCG_CAP: what may be switched on, and what the version register says.

        *directed_eoi* is for VMs whose I/O APIC has an EOI register (in KVM: split irqchip).
        """
        with self.lock:
            self._x2apic_allowed, self._directed_eoi, self._cmci = x2apic, directed_eoi, cmci
            self._phys_bits = phys_bits
            self._timer_modes = PERIODIC | TSC_DEADLINE if tsc_deadline else PERIODIC
            self._set_version()

    def reset(self, init_event: bool) -> None:
        """The state after power-up, or after INIT, which keeps the base MSR. SDM, "Local APIC State"."""
        with self.lock:
            if not init_event:
                self.regs.apic_base = APIC_DEFAULT_PHYS_BASE | APICBASE_ENABLE | (APICBASE_BSP if self.bsp else 0)
                self.regs[ID] = self._xapic_id()
                self.init_pending = self.sipi_pending = False
            self.timer.reset()
            self._set_version()
            for lvt in LVT_BITS:
                self.regs[lvt] = LVT_MASKED
            if not self._cmci:
                self.regs[LVT_CMCI] = 0
            self._update_timer_mode()
            if self.bsp and self.quirk_lint0_reenabled:
                self.regs[LVT0] = EXTINT << 8
            self.regs[DFR] = _M32
            self.regs[SVR] = 0xFF
            for register in (TPR, ESR, ICR, ICR2, TDCR, PPR):
                self.regs[register] = 0
            if not self.x2apic_enabled:
                self.regs[LDR] = 0
            self._esr = self.regs.icr64 = 0
            self.regs.irr = self.regs.isr = self.regs.tmr = 0
            self.arb_prio = 0
            self.bus.apics_changed()

    def close(self) -> None:
        """Stop the timer."""
        with self.lock:
            self.timer.stop()

    # ---- modes and addresses -------------------------------------------------------------------------

    @property
    def apic_base(self) -> int:
        """IA32_APIC_BASE."""
        return self.regs.apic_base

    @property
    def irr(self) -> int:
        """What is pending, a bit for each vector."""
        return self.regs.irr

    @property
    def isr(self) -> int:
        """What is in service."""
        return self.regs.isr

    @property
    def tmr(self) -> int:
        """What came level-triggered."""
        return self.regs.tmr

    @property
    def enabled(self) -> bool:
        """Whether the base MSR has it on."""
        return bool(self.apic_base & APICBASE_ENABLE)

    @property
    def x2apic_enabled(self) -> bool:
        """Whether it is on, in x2APIC mode."""
        both = APICBASE_ENABLE | APICBASE_EXTD
        return self.apic_base & both == both

    @property
    def sw_enabled(self) -> bool:
        """The spurious vector register's enable bit."""
        return bool(self.regs[SVR] & SVR_ENABLED)

    @property
    def base_address(self) -> int:
        """Where the register page is."""
        return self.apic_base & ~0xFFF

    def _xapic_id(self) -> int:
        return self.owner.vcpu_id << 24 & _M32

    def _x2apic_ldr(self) -> int:
        # SDM, "Deriving Logical x2APIC ID from the Local x2APIC ID".
        return (self.owner.vcpu_id >> 4 << 16 | 1 << (self.owner.vcpu_id & 0xF)) & _M32

    def set_base(self, value: int, host_initiated: bool = False) -> bool:
        """IA32_APIC_BASE; False: #GP (EINVAL for user space). SDM, "x2APIC State Transitions".

        User space may make any transition; nobody may set reserved bits, or EXTD without EN.
        """
        allowed = (1 << self._phys_bits) - 1 & ~0x2FF
        if not self._x2apic_allowed:
            allowed &= ~APICBASE_EXTD
        mode = value & (APICBASE_ENABLE | APICBASE_EXTD)
        if value & ~allowed or mode == APICBASE_EXTD:
            return False
        with self.lock:
            old = self.apic_base & (APICBASE_ENABLE | APICBASE_EXTD)
            if not host_initiated:
                if self.x2apic_enabled and mode == APICBASE_ENABLE:
                    return False
                if not old and mode & APICBASE_EXTD:
                    return False
            self.regs.apic_base = value
            if mode and not old & APICBASE_ENABLE:
                self.regs[ID] = self._xapic_id()
            if mode & APICBASE_EXTD and not old & APICBASE_EXTD:
                self.regs[ID] = self.owner.vcpu_id & _M32
                self.regs[LDR] = self._x2apic_ldr()
            self.bus.apics_changed()
            return True

    @property
    def logical_kind(self) -> int | None:
        """What its logical ID means: X2APIC_CLUSTER, or as the DFR says; None for a DFR that means nothing."""
        if self.x2apic_enabled:
            return X2APIC_CLUSTER
        return {0xF: XAPIC_FLAT, 0: XAPIC_CLUSTER}.get(self.regs[DFR] >> 28)

    @property
    def logical_id(self) -> int:
        """The logical destination register: the upper 8 bits, in x2APIC mode all 32."""
        ldr = self.regs[LDR]
        return ldr if self.x2apic_enabled else ldr >> 24

    def has_id(self, dest_id: int) -> bool:
        """Whether this is its physical ID. One that needs more than 8 bits is reached in xAPIC mode, too."""
        if self.x2apic_enabled or dest_id > 0xFF:
            return dest_id == self.owner.vcpu_id
        return dest_id == self.regs[ID] >> 24

    def matches(self, dest_id: int, logical: bool) -> bool:
        """Whether a message to *dest_id* is for this APIC. SDM, "Determining IPI Destination"."""
        if dest_id == (X2APIC_BROADCAST if self.x2apic_enabled else XAPIC_BROADCAST):
            return True
        return self.matches_logical(dest_id) if logical else self.has_id(dest_id)

    def matches_logical(self, dest_id: int) -> bool:
        """Whether the logical ID is one of those in *dest_id*."""
        mine = self.logical_id
        kind = self.logical_kind
        if kind == X2APIC_CLUSTER:
            return mine >> 16 == dest_id >> 16 and bool(mine & dest_id & 0xFFFF)
        if kind == XAPIC_FLAT:
            return bool(mine & dest_id)
        return kind == XAPIC_CLUSTER and mine >> 4 == dest_id >> 4 and bool(mine & dest_id & 0xF)

    # ---- interrupts in -------------------------------------------------------------------------------

    def accept_irq(self, delivery_mode: int, vector: int, level: int = 1, level_triggered: bool = False) -> int:
        """Take a message that is for this APIC; 1 when it was accepted, 0 when it was dropped."""
        with self.lock:
            if delivery_mode in (FIXED, LOWEST):
                return self._accept_fixed(delivery_mode, vector, level, level_triggered)
            if delivery_mode == NMI:
                self.owner.inject_nmi()
            elif delivery_mode == INIT:
                # SDM, "Interrupt Command Register (ICR)": the level de-assert has no effect.
                if level_triggered and not level:
                    return 0
                self.init_pending, self.sipi_pending = True, False
            elif delivery_mode == STARTUP:
                self.sipi_pending, self.sipi_vector = True, vector
            elif delivery_mode == REMOTE_READ:
                self.owner.pv_unhalt()
            else:
                # No SMM; ExtINT reaches a processor by the PIC's own line only.
                return 0
            self.owner.kick()
            return 1

    def _accept_fixed(self, delivery_mode: int, vector: int, level: int, level_triggered: bool) -> int:
        if delivery_mode == LOWEST:
            self.arb_prio += 1
        if (level_triggered and not level) or not (self.enabled and self.sw_enabled):
            return 0
        if vector < 16:
            self._error(ESR_RECEIVE_ILLEGAL)
            return 1
        self.regs.set_irr(vector, level_triggered)
        self.owner.request_event()
        return 1

    def local_deliver(self, lvt: int) -> int:
        """Raise a local source (LVTT, LVT0, LVT1, LVT_PMC, LVT_THERMAL, …); 1 when accepted, 0 when masked."""
        with self.lock:
            entry = self.regs[lvt]
            if not self.enabled or entry & LVT_MASKED:
                return 0
            result = self.accept_irq(entry >> 8 & 7, entry & 0xFF, 1, bool(entry >> 15 & 1))
            if result and lvt == LVT_PMC:
                # SDM, "Local Vector Table": a performance interrupt masks its entry.
                self.regs[lvt] |= LVT_MASKED
            return result

    def nmi_watchdog_tick(self) -> None:
        """The PIT's output at LINT0: an NMI if that is what LVT0 says."""
        if self.regs[LVT0] >> 8 & 7 == NMI:
            self.local_deliver(LVT0)

    def _error(self, bit: int) -> None:
        """Note an error; the first since the ESR was written raises LVT error. SDM, "Error Handling"."""
        first = not self._esr
        self._esr |= bit
        if first:
            self.local_deliver(LVT_ERROR)

    # ---- interrupts out ------------------------------------------------------------------------------

    @property
    def ppr(self) -> int:
        """The processor priority. SDM, "Task and Processor Priorities"."""
        return self.regs.ppr

    def has_interrupt(self) -> int | None:
        """The vector that can be delivered now, or None. Takes no lock."""
        vector = self.regs.has_interrupt()
        return None if vector < 0 else vector

    def get_interrupt(self) -> int | None:
        """Acknowledge what has_interrupt() says: it is in service now. On the vCPU's thread."""
        vector = self.regs.get_interrupt()
        return None if vector < 0 else vector

    def set_eoi(self) -> int | None:
        """EOI: end the highest vector in service, and tell the I/O APIC. Return the vector, if there was one."""
        with self.lock:
            vector = self.regs.set_eoi()
            if vector < 0:
                return None
            self.bus.eoi(self, vector, self.regs.is_level_triggered(vector))
            return vector

    def pv_eoi_vector(self) -> int | None:
        """PV EOI: the vector in service whose EOI the guest may skip telling, or None: someone waits for it."""
        with self.lock:
            vector = self.regs.highest_isr
            if vector < 0 or self.irr:
                return None
            return None if self.bus.handles_vector(self, vector) else vector

    def pending_eoi(self, vector: int) -> bool:
        """Whether *vector* is pending or in service."""
        return self.regs.is_pending(vector)

    @property
    def suppresses_eoi_broadcast(self) -> bool:
        """The spurious vector register's bit for directed EOI."""
        return bool(self.regs[SVR] & DIRECTED_EOI_SVR)

    def accept_pic_intr(self) -> bool:
        """Whether the PIC's INTR reaches the processor: APIC off, or LINT0 unmasked as ExtINT. Takes no lock."""
        lvt0 = self.regs[LVT0]
        return not self.enabled or (not lvt0 & LVT_MASKED and lvt0 >> 8 & 7 == EXTINT)

    def accept_events(self, allowed: bool = True) -> None:
        """On the vCPU's thread: carry out INIT and SIPI. Not *allowed* (VMX root, SMM): a SIPI is lost, INIT waits."""
        if not (self.init_pending or self.sipi_pending):
            return
        with self.lock:
            if not allowed:
                self.sipi_pending = False
                return
            init, self.init_pending = self.init_pending, False
        if init:
            self.owner.init_received()
        with self.lock:
            sipi, self.sipi_pending = self.sipi_pending, False
            vector = self.sipi_vector
        if sipi:
            self.owner.sipi_received(vector)

    # ---- CR8 and TPR ---------------------------------------------------------------------------------

    def get_cr8(self) -> int:
        """The task priority class."""
        return self.regs[TPR] >> 4 & 0xF

    def set_cr8(self, value: int) -> None:
        """Set the task priority class; the lower four bits of the TPR become 0. SDM, "Interaction of TPR and CR8"."""
        with self.lock:
            self.regs[TPR] = (value & 0xF) << 4

    def vapic_word(self) -> int:
        """What the guest finds at its vapic address: TPR, the class in service, and the highest vector pending."""
        in_service = (self.isr.bit_length() - 1) & 0xF0 if self.isr else 0
        pending = self.irr.bit_length() - 1 if self.irr else 0
        return self.regs[TPR] & 0xFF | in_service << 8 | pending << 24

    def set_tpr(self, value: int) -> None:
        """Set all eight bits of the task priority."""
        with self.lock:
            self.regs[TPR] = value & 0xFF

    # ---- registers -----------------------------------------------------------------------------------

    def _set_version(self) -> None:
        version = 0x60014 if self._cmci else 0x50014
        if self._directed_eoi:
            version |= DIRECTED_EOI_VERSION
        self.regs[LVR] = version
        self._readable = READABLE | {LVT_CMCI} if self._cmci else READABLE

    def register(self, offset: int) -> int:
        """The register at *offset* (a multiple of 16), as a guest reads it."""
        if offset == ARBPRI:
            return 0
        if offset == PPR:
            return self.ppr
        if offset == TMCCT:
            return self.timer.current_count()
        if offset == TMICT:
            return self.timer.initial_count
        if offset == ICR and self.x2apic_enabled:
            return self.regs.icr64 & _M32
        return self.regs[offset]

    def _write_register(self, offset: int, value: int) -> bool:
        """Write 32 bits; False when there is no such register, or x2APIC refuses the value."""
        x2apic = self.x2apic_enabled
        regs = self.regs
        if offset == TPR:
            regs[TPR] = value & 0xFF
        elif offset == EOI:
            self.set_eoi()
        elif offset in (ID, LDR, DFR, ICR2):
            if x2apic:
                return False
            regs[offset] = value | 0x0FFFFFFF if offset == DFR else value & 0xFF000000
        elif offset == SVR:
            self._write_svr(value)
        elif offset == ESR:
            if x2apic and value:
                return False
            regs[ESR], self._esr = self._esr, 0
        elif offset == ICR:
            regs[ICR] = value & ~ICR_BUSY
            self._send_ipi(value & ~ICR_BUSY, regs[ICR2] >> 24)
        elif offset == SELF_IPI:
            if not x2apic or value & ~0xFF:
                return False
            self._send_ipi(SELF << 18 | value, 0)
        elif offset == TMICT:
            self.timer.set_initial_count(value)
        elif offset == TDCR:
            regs[TDCR] = value & 0xB
            self.timer.set_divide_configuration(value)
        else:
            return self._write_lvt(offset, value)
        return True

    def _write_svr(self, value: int) -> None:
        self.regs[SVR] = value & (0x3FF | (DIRECTED_EOI_SVR if self._directed_eoi else 0))
        if not value & SVR_ENABLED:
            # SDM, "Local APIC State After It Has Been Software Disabled": the mask bits of all LVTs are set.
            for lvt in LVT_BITS:
                if lvt in self._readable:
                    self.regs[lvt] |= LVT_MASKED

    def _write_lvt(self, offset: int, value: int) -> bool:
        writable = LVT_BITS.get(offset)
        if writable is None or offset not in self._readable:
            return False
        if not self.sw_enabled:
            value |= LVT_MASKED
        if offset == LVTT:
            writable |= self._timer_modes
        self.regs[offset] = value & writable
        if offset == LVTT:
            self._update_timer_mode()
        return True

    def _send_ipi(self, low: int, dest_id: int) -> None:
        """SDM, "Interrupt Command Register (ICR)"."""
        mode, vector = low >> 8 & 7, low & 0xFF
        if mode in (FIXED, LOWEST) and vector < 16:
            self._error(ESR_RECEIVE_ILLEGAL if low >> 18 & 3 == SELF else ESR_SEND_ILLEGAL)
            return
        irq = LapicIrq(
            vector=vector,
            delivery_mode=mode,
            logical=bool(low >> 11 & 1),
            dest_id=dest_id,
            level=low >> 14 & 1,
            level_triggered=bool(low >> 15 & 1),
            shorthand=low >> 18 & 3,
        )
        self.bus.deliver_to_apics(irq, self)

    # ---- MMIO and MSRs -------------------------------------------------------------------------------

    def _hidden(self) -> bool:
        return not self.enabled or self.x2apic_enabled

    def mmio_read(self, address: int, size: int) -> int | None:
        """A read at a guest-physical address; None when it is not for this APIC.

        When the page is not there (APIC off, or x2APIC) it reads as ones, unless that quirk is disabled.
        """
        offset = address - self.base_address
        if not 0 <= offset < LAPIC_MMIO_LENGTH:
            return None
        if self._hidden():
            return (1 << 8 * size) - 1 if self.quirk_mmio_hole else None
        shift = offset & 0xF
        if shift + size > 4:
            return 0
        with self.lock:
            register = offset & ~0xF
            if register not in self._readable:
                self._error(ESR_ILLEGAL_REGISTER)
                return 0
            if register == TPR and self.report_tpr_access is not None:
                self.report_tpr_access(False)
            return self.register(register) >> 8 * shift & (1 << 8 * size) - 1

    def mmio_write(self, address: int, size: int, value: int) -> bool:
        """A write at a guest-physical address; False when it is not for this APIC."""
        offset = address - self.base_address
        if not 0 <= offset < LAPIC_MMIO_LENGTH:
            return False
        if self._hidden():
            return self.quirk_mmio_hole
        if size == 4 and not offset & 0xF:
            with self.lock:
                if offset == TPR and self.report_tpr_access is not None:
                    self.report_tpr_access(True)
                if not self._write_register(offset, value & _M32):
                    self._error(ESR_ILLEGAL_REGISTER)
        return True

    def read_msr(self, msr: int) -> int | None:
        """RDMSR of 0x800–0x8FF; None: #GP. SDM, "x2APIC Register Address Space"."""
        offset = (msr - APIC_BASE_MSR) << 4
        if not self.x2apic_enabled or offset in XAPIC_ONLY or offset not in self._readable:
            return None
        with self.lock:
            return self.regs.icr64 if offset == ICR else self.register(offset)

    def write_msr(self, msr: int, value: int) -> bool:
        """WRMSR of 0x800–0x8FF; False: #GP."""
        if not self.x2apic_enabled:
            return False
        offset = (msr - APIC_BASE_MSR) << 4
        with self.lock:
            if offset == ICR:
                if value & X2APIC_ICR_RESERVED:
                    return False
                self.regs.icr64 = value & _M64 & ~ICR_BUSY
                self._send_ipi(self.regs.icr64 & _M32, self.regs.icr64 >> 32)
                return True
            return not value >> 32 and self._write_register(offset, value)

    # ---- the timer, IA32_TSC_DEADLINE ----------------------------------------------------------------

    def _update_timer_mode(self) -> None:
        self.timer.set_mode(self.regs[LVTT] & self._timer_modes)

    def get_tsc_deadline(self) -> int:
        """IA32_TSC_DEADLINE: 0 in other modes, and once it has fired."""
        return self.timer.tsc_deadline if self.enabled and self.timer.mode == TSC_DEADLINE else 0

    def set_tsc_deadline(self, value: int) -> None:
        """Arm the timer for a value of the guest's TSC; 0 disarms it. Without effect in other modes."""
        with self.lock:
            if self.enabled and self.timer.mode == TSC_DEADLINE:
                self.timer.set_tsc_deadline(value & _M64)

    def block(self, blocked: bool) -> None:
        """The vCPU waits for an event, or has ended that: who watches the deadline?"""
        if self.timer.can_use_hv_timer():
            (self.timer.switch_to_sw_timer if blocked else self.timer.switch_to_hv_timer)()

    def tsc_changed(self) -> None:
        """The guest's TSC has jumped, or runs at another speed: the deadline is another moment."""
        with self.lock:
            if self.timer.mode == TSC_DEADLINE:
                self.timer.look_at_deadline()

    # ---- state ---------------------------------------------------------------------------------------

    def get_state(self) -> kvm_lapic_state:
        """KVM_GET_LAPIC. In x2APIC mode the ID is in bits 31–24 unless KVM_X2APIC_API_USE_32BIT_IDS is on."""
        with self.lock:
            page = bytearray(1024)
            for offset in range(0, 0x400, 0x10):
                page[offset : offset + 4] = self.register(offset).to_bytes(4, "little")
            page[ARBPRI : ARBPRI + 4] = self.regs[ARBPRI].to_bytes(4, "little")
            if self.x2apic_enabled:
                page[ICR : ICR + 8] = self.regs.icr64.to_bytes(8, "little")
                page[ICR2 : ICR2 + 4] = (self.regs.icr64 >> 32).to_bytes(4, "little")
                if not self.bus.x2apic_format:
                    page[ID : ID + 4] = self._xapic_id().to_bytes(4, "little")
            return kvm_lapic_state.from_buffer_copy(page)

    def set_state(self, state: kvm_lapic_state) -> bool:
        """KVM_SET_LAPIC; False (EINVAL): an x2APIC ID that is not the vCPU's. Registers are taken as they are."""
        page = bytes(state)
        words = [int.from_bytes(page[offset : offset + 4], "little") for offset in range(0, 0x400, 0x10)]
        with self.lock:
            if self.x2apic_enabled:
                if self.bus.x2apic_format and words[ID >> 4] != self.owner.vcpu_id:
                    return False
                words[ID >> 4] = self.owner.vcpu_id
                words[LDR >> 4] = self._x2apic_ldr()
                self.regs.icr64 = words[ICR >> 4] | words[ICR2 >> 4] << 32
            for number, word in enumerate(words):
                self.regs[number << 4] = word
            self._set_version()
            self._esr = 0
            self._update_timer_mode()
            self.timer.restart(words[TDCR >> 4], words[TMICT >> 4], words[TMCCT >> 4])
            self.arb_prio = 0
            self.owner.kick()
            return True
