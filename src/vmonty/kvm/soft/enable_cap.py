"""KVM_ENABLE_CAP on a VM: behaviour that user space has to ask for.

Source: virt/kvm/kvm_main.c, kvm_vm_ioctl_enable_cap_generic(); arch/x86/kvm/x86.c, kvm_vm_ioctl_enable_cap().
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from vmonty.kvm.soft.caps import (
    DISABLED_EXITS_VALID,
    EXIT_HYPERCALL_VALID,
    KVM_MAX_VCPU_IDS,
    MAX_NR_RESERVED_IOAPIC_PINS,
    QUIRKS_VALID,
    X2APIC_API_VALID,
)
from vmonty.kvm.soft.dirty_ring import check_size
from vmonty.kvm.soft.files import KvmFile, answers
from vmonty.kvm.soft.user import Argument
from vmonty.kvm.uapi import Cap, Requests, flags
from vmonty.kvm.uapi.vm import kvm_enable_cap

if TYPE_CHECKING:
    from vmonty.kvm.soft.irq_comm import IrqComm
    from vmonty.kvm.soft.lapic import Lapic
    from vmonty.kvm.soft.x86 import VcpuX86

# The highest count of the APIC's timer times the highest divisor: a period of it must be a 64-bit number.
LONGEST_BUS_CYCLES = 0xFFFF_FFFF * 128


class CapIoctls(KvmFile):
    """What has been asked for, and the ioctl."""

    lock: threading.RLock
    created_vcpus: int
    boot_vcpu_id: int
    irqs: IrqComm
    vcpus: Mapping[int, VcpuX86]

    def __init__(self) -> None:
        self.user_space_msr_mask = 0
        self.manual_dirty_log_protect = 0
        self.dirty_ring_size = 0
        self.exception_payload_enabled = False
        self.hypercall_exit_enabled = 0
        self.disabled_quirks = 0
        self.disabled_exits = 0
        self.max_halt_poll_ns: int | None = None
        self.max_vcpu_ids = 0
        self.exit_on_emulation_error = False
        self.triple_fault_event = False
        self.apic_bus_cycle_ns = 1
        self._enablers: dict[int, Callable[[int], None]] = {
            Cap.X86_USER_SPACE_MSR: self._user_space_msr,
            Cap.MANUAL_DIRTY_LOG_PROTECT2: self._manual_dirty_log_protect,
            Cap.DIRTY_LOG_RING: self._dirty_log_ring,
            Cap.DIRTY_LOG_RING_ACQ_REL: self._dirty_log_ring,
            Cap.EXCEPTION_PAYLOAD: self._exception_payload,
            Cap.EXIT_HYPERCALL: self._exit_hypercall,
            Cap.SPLIT_IRQCHIP: self._split_irqchip,
            Cap.X2APIC_API: self._x2apic_api,
            Cap.DISABLE_QUIRKS: lambda argument: self._disable_quirks(argument & QUIRKS_VALID),
            Cap.DISABLE_QUIRKS2: self._disable_quirks,
            Cap.X86_DISABLE_EXITS: self._disable_exits,
            Cap.EXIT_ON_EMULATION_FAILURE: self._exit_on_emulation_failure,
            Cap.X86_TRIPLE_FAULT_EVENT: self._triple_fault_event,
            Cap.HALT_POLL: self._halt_poll,
            Cap.MAX_VCPU_ID: self._max_vcpu_id,
            Cap.X86_APIC_BUS_CYCLES_NS: self._apic_bus_cycles_ns,
        }

    @answers(Requests.KVM_ENABLE_CAP)
    def enable_cap(self, argument: Argument) -> None:
        request = argument.get(kvm_enable_cap)
        enable = self._enablers.get(request.cap)
        if request.flags or enable is None:
            raise OSError(errno.EINVAL, "flags, or no capability that can be enabled")
        with self.lock:
            enable(request.args[0])

    @staticmethod
    def _check(argument: int, known: int) -> None:
        if argument & ~known:
            raise OSError(errno.EINVAL, "the capability's argument has unknown bits")

    def _user_space_msr(self, argument: int) -> None:
        self._check(argument, flags.KVM_MSR_EXIT_REASON_VALID_MASK)
        self.user_space_msr_mask = argument

    def _manual_dirty_log_protect(self, argument: int) -> None:
        enable, all_set = flags.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, flags.KVM_DIRTY_LOG_INITIALLY_SET
        self._check(argument, enable | all_set if argument & enable else enable)
        self.manual_dirty_log_protect = argument

    def _dirty_log_ring(self, argument: int) -> None:
        check_size(argument)
        if self.dirty_ring_size:
            raise OSError(errno.EINVAL, "the VM has dirty rings")
        self._before_vcpus()
        self.dirty_ring_size = argument

    def _exception_payload(self, argument: int) -> None:
        self.exception_payload_enabled = bool(argument)

    def _exit_hypercall(self, argument: int) -> None:
        self._check(argument, EXIT_HYPERCALL_VALID)
        self.hypercall_exit_enabled = argument

    def _before_vcpus(self) -> None:
        if self.created_vcpus:
            raise OSError(errno.EINVAL, "there are vCPUs already")

    def _split_irqchip(self, argument: int) -> None:
        if argument > MAX_NR_RESERVED_IOAPIC_PINS:
            raise OSError(errno.EINVAL, "an I/O APIC with too many pins")
        if self.irqs.in_kernel:
            raise OSError(errno.EEXIST, "there is an irqchip")
        self._before_vcpus()
        self.irqs.create_split_irqchip(argument)

    def _x2apic_api(self, argument: int) -> None:
        self._check(argument, X2APIC_API_VALID)
        self.irqs.x2apic_format |= bool(argument & flags.KVM_X2APIC_API_USE_32BIT_IDS)
        self.irqs.x2apic_broadcast_quirk_disabled |= bool(argument & flags.KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK)

    def _disable_quirks(self, argument: int) -> None:
        self._check(argument, QUIRKS_VALID)
        self.disabled_quirks |= argument
        for vcpu in list(self.vcpus.values()):
            if vcpu.apic is not None:
                self.configure_quirks(vcpu.apic)

    def configure_quirks(self, apic: Lapic) -> None:
        """Tell *apic* which quirks it has."""
        apic.quirk_lint0_reenabled = not self.disabled_quirks & flags.KVM_X86_QUIRK_LINT0_REENABLED
        apic.quirk_mmio_hole = not self.disabled_quirks & flags.KVM_X86_QUIRK_LAPIC_MMIO_HOLE

    def _disable_exits(self, argument: int) -> None:
        """PAUSE never exits here."""
        self._check(argument, DISABLED_EXITS_VALID)
        self._before_vcpus()
        self.disabled_exits |= argument

    def _halt_poll(self, argument: int) -> None:
        """The longest time in nanoseconds that a halt polls before it sleeps."""
        self._check(argument, 0xFFFF_FFFF)
        self.max_halt_poll_ns = argument

    def _exit_on_emulation_failure(self, argument: int) -> None:
        self._check(argument, 1)
        self.exit_on_emulation_error = bool(argument)

    def _triple_fault_event(self, argument: int) -> None:
        self.triple_fault_event = bool(argument)

    def _max_vcpu_id(self, argument: int) -> None:
        if argument > KVM_MAX_VCPU_IDS or self.boot_vcpu_id > argument:
            raise OSError(errno.EINVAL, "too high, or below the boot processor's id")
        if self.max_vcpu_ids not in (0, argument):
            raise OSError(errno.EINVAL, "the limit can be lowered once")
        self.max_vcpu_ids = argument

    def _apic_bus_cycles_ns(self, argument: int) -> None:
        if not argument or argument * LONGEST_BUS_CYCLES >> 64:
            raise OSError(errno.EINVAL, "not a length that a cycle can have")
        if not self.irqs.in_kernel:
            raise OSError(errno.ENXIO, "there is no irqchip")
        self._before_vcpus()
        self.apic_bus_cycle_ns = argument
