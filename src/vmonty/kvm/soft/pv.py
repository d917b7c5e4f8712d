"""What a guest that knows it is one may ask for: MSRs and hypercalls beyond kvmclock.

Steal time, PV EOI, polling control; PV IPI, PV unhalt, yield, clock pairing; asynchronous page faults are in async_pf.
Source: Documentation/virt/kvm/x86: msr.rst, hypercalls.rst, cpuid.rst.

    struct kvm_steal_time, 64 bytes, aligned:  0 steal, ns   8 version, odd while it changes   12 flags   16 preempted
"""

from __future__ import annotations

import os
import struct
import threading
import time
from typing import TYPE_CHECKING

from vmonty.kvm.soft.apicdef import REMOTE_READ, LapicIrq
from vmonty.kvm.soft.async_pf import AsyncPf
from vmonty.kvm.soft.stats import (
    DIRECTED_YIELD_ATTEMPTED,
    DIRECTED_YIELD_SUCCESSFUL,
    PREEMPTION_REPORTED,
)
from vmonty.kvm.soft.tsc import read_tsc
from vmonty.kvm.uapi import flags

if TYPE_CHECKING:
    from vmonty.kvm.soft.vcpu_state import VcpuState

ENABLED = 1
STEAL_VERSION, STEAL_PREEMPTED, VCPU_PREEMPTED = 8, 16, 1
# A page is written when there is something to tell, and not more often than this: Linux reads it once a tick.
STEAL_PERIOD_NS = 4_000_000
KEPT = (flags.MSR_KVM_STEAL_TIME, flags.MSR_KVM_PV_EOI_EN, flags.MSR_KVM_POLL_CONTROL)
MSRS = (*KEPT, flags.MSR_KVM_ASYNC_PF_EN, flags.MSR_KVM_ASYNC_PF_INT, flags.MSR_KVM_ASYNC_PF_ACK)
# guest_pv_has() of each, and of the clock's.
FEATURE_OF = {
    flags.MSR_KVM_STEAL_TIME: flags.KVM_FEATURE_STEAL_TIME,
    flags.MSR_KVM_PV_EOI_EN: flags.KVM_FEATURE_PV_EOI,
    flags.MSR_KVM_POLL_CONTROL: flags.KVM_FEATURE_POLL_CONTROL,
    flags.MSR_KVM_ASYNC_PF_EN: flags.KVM_FEATURE_ASYNC_PF,
    flags.MSR_KVM_ASYNC_PF_INT: flags.KVM_FEATURE_ASYNC_PF_INT,
    flags.MSR_KVM_ASYNC_PF_ACK: flags.KVM_FEATURE_ASYNC_PF_INT,
    flags.MSR_KVM_SYSTEM_TIME: flags.KVM_FEATURE_CLOCKSOURCE,
    flags.MSR_KVM_WALL_CLOCK: flags.KVM_FEATURE_CLOCKSOURCE,
    flags.MSR_KVM_SYSTEM_TIME_NEW: flags.KVM_FEATURE_CLOCKSOURCE2,
    flags.MSR_KVM_WALL_CLOCK_NEW: flags.KVM_FEATURE_CLOCKSOURCE2,
}
# What CPUID offers of it. The MSRs' features, then the hypercalls'.
FEATURES = sum(
    1 << feature
    for feature in (
        flags.KVM_FEATURE_STEAL_TIME, flags.KVM_FEATURE_PV_EOI, flags.KVM_FEATURE_POLL_CONTROL,
        flags.KVM_FEATURE_PV_UNHALT, flags.KVM_FEATURE_PV_SEND_IPI, flags.KVM_FEATURE_PV_SCHED_YIELD,
        flags.KVM_FEATURE_ASYNC_PF, flags.KVM_FEATURE_ASYNC_PF_INT,
    )
)  # fmt: skip
# What hypercalls answer, negated. asm/kvm_para.h.
KVM_EPERM, KVM_EFAULT, KVM_EINVAL, KVM_EOPNOTSUPP, KVM_ENOSYS = 1, 14, 22, 95, 1000
ICR_NOT_FOR_PV_IPI = 0x800 | 0xC0000  # logical destinations, shorthands
NSEC_PER_SEC = 1_000_000_000
CPUID_FEATURES = 0x4000_0001

_thread = threading.local()


class _Schedstat:
    """A thread's own file, closed when the thread's locals go."""

    def __init__(self) -> None:
        self.fd = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


def run_delay_ns() -> int:
    """How long the calling thread was ready to run and had no processor; 0 where the host does not tell."""
    try:
        if not hasattr(_thread, "schedstat"):
            _thread.schedstat = _Schedstat()
        return int(os.pread(_thread.schedstat.fd, 64, 0).split()[1])
    except (OSError, IndexError):
        return 0


class Paravirt:
    """The interface of one vCPU. Used on its thread, or while it does not run."""

    def __init__(self, vcpu: VcpuState) -> None:
        self._vcpu = vcpu
        self._msrs = dict.fromkeys(KEPT, 0) | {flags.MSR_KVM_POLL_CONTROL: 1}
        self.async_pf = AsyncPf(vcpu)
        self.enforced = False
        # Whether anything is to be done around a guest's run.
        self.active = False
        self._steal_ns = self._last_delay = self._next_steal_ns = 0
        self._preempted = False
        self.eoi_told = False

    def has(self, feature: int) -> bool:
        """guest_pv_has(): with KVM_CAP_ENFORCE_PV_FEATURE_CPUID only what the guest's CPUID says."""
        if not self.enforced:
            return True
        found = next((entry.eax for entry in self._vcpu.cpuid if entry.function == CPUID_FEATURES), 0)
        return bool(found >> feature & 1)

    # ---- MSRs ------------------------------------------------------------------------------------------------

    def refuses(self, index: int) -> bool:
        """Whether it is an MSR of a feature that the guest has not."""
        return self.enforced and index in FEATURE_OF and not self.has(FEATURE_OF[index])

    def read(self, index: int) -> int | None:
        """The MSR's value; None for others."""
        if index == flags.MSR_KVM_ASYNC_PF_EN:
            return self.async_pf.control
        if index == flags.MSR_KVM_ASYNC_PF_INT:
            return self.async_pf.vector
        return 0 if index == flags.MSR_KVM_ASYNC_PF_ACK else self._msrs.get(index)

    def reset(self) -> None:
        """kvm_vcpu_reset(), kvm_lapic_reset(): at INIT."""
        self._msrs[flags.MSR_KVM_STEAL_TIME] = self._msrs[flags.MSR_KVM_PV_EOI_EN] = 0
        self.active = self.eoi_told = False
        self.async_pf.reset()

    def write(self, index: int, value: int) -> bool:
        """Set it; False where WRMSR would fault."""
        if index == flags.MSR_KVM_STEAL_TIME:
            if value & flags.KVM_STEAL_RESERVED_MASK:
                return False
            self._last_delay, self._next_steal_ns = run_delay_ns(), 0
        elif index == flags.MSR_KVM_PV_EOI_EN:
            if value & 2 or self._vcpu.apic is None:
                return False
            self.eoi_told = False
        elif index == flags.MSR_KVM_POLL_CONTROL:
            if value & ~1:
                return False
        elif index == flags.MSR_KVM_ASYNC_PF_EN:
            return self.async_pf.write_control(value)
        elif index == flags.MSR_KVM_ASYNC_PF_INT:
            return self.async_pf.write_vector(value)
        elif index == flags.MSR_KVM_ASYNC_PF_ACK:
            return self.async_pf.acknowledge(value)
        self._msrs[index] = value
        in_use = self._msrs[flags.MSR_KVM_STEAL_TIME] | self._msrs[flags.MSR_KVM_PV_EOI_EN]
        self.active = bool(in_use & ENABLED) or self.eoi_told
        return True

    @property
    def may_poll(self) -> bool:
        """Whether the guest leaves polling before a halt to us."""
        return bool(self._msrs[flags.MSR_KVM_POLL_CONTROL] & 1)

    # ---- steal time ------------------------------------------------------------------------------------------

    def record_steal_time(self) -> None:
        """record_steal_time(): on the vCPU's thread, before it enters the guest."""
        control = self._msrs[flags.MSR_KVM_STEAL_TIME]
        if not control & ENABLED:
            return
        now = time.monotonic_ns()
        if now < self._next_steal_ns and not self._preempted:
            return
        self._next_steal_ns = now + STEAL_PERIOD_NS
        delay = run_delay_ns()
        self._steal_ns += max(delay - self._last_delay, 0)
        self._last_delay = delay
        self._preempted = False
        gpa = control & ~0x3F
        old = self._vcpu.kvm.read_gpa(gpa + STEAL_VERSION, 4)
        if old is None:
            return
        version = int.from_bytes(old, "little") | 1
        write = self._vcpu.kvm.write_gpa
        write(gpa + STEAL_VERSION, struct.pack("<I", version & 0xFFFF_FFFF))
        write(gpa, struct.pack("<Q", self._steal_ns))
        write(gpa + STEAL_PREEMPTED, b"\0")
        write(gpa + STEAL_VERSION, struct.pack("<I", version + 1 & 0xFFFF_FFFF))

    def set_preempted(self) -> None:
        """kvm_steal_time_set_preempted(): another vCPU has the processor now. Always between two instructions."""
        self._vcpu.stats.values[PREEMPTION_REPORTED] += 1
        control = self._msrs[flags.MSR_KVM_STEAL_TIME]
        if control & ENABLED:
            self._preempted = True
            self._vcpu.kvm.write_gpa((control & ~0x3F) + STEAL_PREEMPTED, bytes([VCPU_PREEMPTED]))

    # ---- PV EOI ----------------------------------------------------------------------------------------------

    @property
    def tells_eoi(self) -> bool:
        """Whether the guest may be told that it need not send an EOI. In x2APIC mode sending it costs less."""
        apic = self._vcpu.apic
        return bool(self._msrs[flags.MSR_KVM_PV_EOI_EN] & ENABLED) and apic is not None and not apic.x2apic_enabled

    def eoi_to_guest(self) -> None:
        """apic_sync_pv_eoi_to_guest(): the guest may end the interrupt in service by clearing a bit."""
        apic = self._vcpu.apic
        if self.tells_eoi and apic is not None and apic.pv_eoi_vector() is not None:
            self.eoi_told = self._vcpu.kvm.write_gpa(self._msrs[flags.MSR_KVM_PV_EOI_EN] & ~3, b"\1")

    def eoi_from_guest(self) -> None:
        """apic_sync_pv_eoi_from_guest(): if it has cleared the bit, that was its EOI."""
        if not self.eoi_told:
            return
        self.eoi_told = False
        gpa = self._msrs[flags.MSR_KVM_PV_EOI_EN] & ~3
        found = self._vcpu.kvm.read_gpa(gpa, 1)
        if found is None or self._vcpu.apic is None:
            return
        if found[0] & 1:
            self._vcpu.kvm.write_gpa(gpa, bytes([found[0] & ~1]))
        else:
            self._vcpu.apic.set_eoi()

    # ---- hypercalls ------------------------------------------------------------------------------------------

    def hypercall(self, number: int, arguments: list[int], is_long: bool) -> int:
        """kvm_emulate_hypercall(): the answer; -KVM_ENOSYS for what is not known."""
        a0, a1, a2, a3 = arguments
        if number == flags.KVM_HC_VAPIC_POLL_IRQ:
            return 0
        if number == flags.KVM_HC_KICK_CPU and self.has(flags.KVM_FEATURE_PV_UNHALT):
            self._deliver(LapicIrq(vector=0, delivery_mode=REMOTE_READ, dest_id=a1))
            self._yield_to(a1)
            return 0
        if number == flags.KVM_HC_SEND_IPI and self.has(flags.KVM_FEATURE_PV_SEND_IPI):
            return self._send_ipi(a0 | a1 << (64 if is_long else 32), a2, a3)
        if number == flags.KVM_HC_SCHED_YIELD and self.has(flags.KVM_FEATURE_PV_SCHED_YIELD):
            self._yield_to(a0)
            return 0
        if number == flags.KVM_HC_CLOCK_PAIRING:
            return self._clock_pairing(a0, a1)
        return -KVM_ENOSYS

    def _deliver(self, irq: LapicIrq) -> int:
        irqs = self._vcpu.kvm.irqs
        return max(irqs.deliver_to_apics(irq, self._vcpu.apic), 0) if irqs.in_kernel else 0

    def _send_ipi(self, bitmap: int, lowest: int, icr: int) -> int:
        """kvm_pv_send_ipi(): to the APIC IDs *lowest* + n for each bit n; how many took it."""
        if icr & ICR_NOT_FOR_PV_IPI:
            return -KVM_EINVAL
        count = 0
        while bitmap:
            number = (bitmap & -bitmap).bit_length() - 1
            bitmap &= bitmap - 1
            if lowest + number not in self._vcpu.kvm.vcpus:
                continue  # nor a broadcast, which such a number may mean elsewhere
            count += self._deliver(
                LapicIrq(
                    vector=icr & 0xFF, delivery_mode=icr >> 8 & 7, dest_id=lowest + number, level=icr >> 14 & 1,
                    level_triggered=bool(icr >> 15 & 1),
                )
            )  # fmt: skip
        return count

    def _yield_to(self, apic_id: int) -> None:
        """kvm_sched_yield(): the other vCPU first, if it is ready and has no processor."""
        self._vcpu.stats.values[DIRECTED_YIELD_ATTEMPTED] += 1
        other = self._vcpu.kvm.vcpus.get(apic_id)
        if other is not None and other is not self._vcpu and not other.arch.in_guest:
            self._vcpu.stats.values[DIRECTED_YIELD_SUCCESSFUL] += 1
            os.sched_yield()

    def _clock_pairing(self, gpa: int, kind: int) -> int:
        """kvm_pv_clock_pairing(): the host's real time and the guest's TSC of the same moment."""
        if kind:
            return -KVM_EOPNOTSUPP
        vcpu = self._vcpu
        host, now = read_tsc(), time.time_ns()
        pairing = struct.pack("<qqQI36x", now // NSEC_PER_SEC, now % NSEC_PER_SEC, vcpu.scale_tsc(host), 0)
        return 0 if vcpu.kvm.write_gpa(gpa, pairing) else -KVM_EFAULT
