"""Model-specific registers of a vCPU, as KVM_GET_MSRS, KVM_SET_MSRS and exits see them."""

from __future__ import annotations

import ctypes
import errno

from vmonty.kvm.soft.arch_capabilities import capabilities
from vmonty.kvm.soft.files import answers
from vmonty.kvm.soft.msr_filter import READ, WRITE, FilteredMsrError, UnknownMsrError
from vmonty.kvm.soft.pv import MSRS as PV_MSRS
from vmonty.kvm.soft.pvclock import MSR_SYSTEM_TIME_NEW, MSR_WALL_CLOCK_NEW, SYSTEM_TIME_MSRS, WALL_CLOCK_MSRS
from vmonty.kvm.soft.user import Argument
from vmonty.kvm.soft.vcpu_state import VcpuState
from vmonty.kvm.uapi import Requests
from vmonty.kvm.uapi.vcpu import kvm_msr_entry, kvm_msrs

MSR_IA32_TSC, MSR_IA32_APICBASE, MSR_IA32_TSC_ADJUST = 0x10, 0x1B, 0x3B
MSR_IA32_TSC_DEADLINE = 0x6E0
MSR_SYSENTER_CS, MSR_SYSENTER_ESP, MSR_SYSENTER_EIP = 0x174, 0x175, 0x176
MSR_MISC_ENABLE, MSR_PAT, MSR_MTRR_CAP = 0x1A0, 0x277, 0xFE
MSR_EFER, MSR_STAR, MSR_LSTAR, MSR_CSTAR, MSR_FMASK = (0xC000_0080 + index for index in range(5))
MSR_FS_BASE, MSR_GS_BASE, MSR_KERNEL_GS_BASE, MSR_TSC_AUX = (0xC000_0100 + index for index in range(4))
MSR_MCG_CAP, MSR_MCG_STATUS = 0x179, 0x17A
MSR_UCODE_REV, MSR_ARCH_CAPABILITIES = 0x8B, 0x10A
UCODE_REV = 1 << 32
CR0_PG, EFER_LME = 1 << 31, 1 << 8
X2APIC_FIRST, X2APIC_LAST = 0x800, 0x8FF

# KVM_GET_MSRS takes at most this many at a time: MAX_IO_MSRS of arch/x86/kvm/x86.c.
MAX_IO_MSRS = 256

MSRS_TO_SAVE: tuple[int, ...] = (
    MSR_SYSENTER_CS, MSR_SYSENTER_ESP, MSR_SYSENTER_EIP, MSR_STAR, MSR_LSTAR, MSR_CSTAR, MSR_FMASK,
    MSR_KERNEL_GS_BASE, MSR_IA32_TSC, MSR_IA32_TSC_ADJUST, MSR_IA32_TSC_DEADLINE, MSR_MISC_ENABLE, MSR_PAT,
    MSR_TSC_AUX, MSR_MCG_STATUS, MSR_WALL_CLOCK_NEW, MSR_SYSTEM_TIME_NEW, *PV_MSRS,
)  # fmt: skip

# Registers that are only kept: what they start with.
STORED: dict[int, int] = {
    MSR_MISC_ENABLE: 1, MSR_MCG_STATUS: 0, MSR_IA32_TSC_ADJUST: 0, MSR_UCODE_REV: UCODE_REV,
    0x2FF: 0, 0x140: 0,
    **{0x200 + index: 0 for index in range(16)},  # variable MTRRs
    **dict.fromkeys((592, 600, 601, *range(616, 624)), 0),  # fixed MTRRs
}  # fmt: skip
READ_ONLY: dict[int, int] = {
    MSR_MTRR_CAP: 0x508, MSR_MCG_CAP: 0, 0x17: 0, 0xCE: 0, MSR_ARCH_CAPABILITIES: capabilities(), 0x198: 0,
}  # fmt: skip
# Performance counters of old processors (P6, K7) without a PMU: they read as 0, and what is written is dropped.
DROPPED = frozenset((0xC1, 0xC2, 0x186, 0x187, *range(0xC001_0000, 0xC001_0008)))

# KVM_GET_MSRS on the system file: what a vCPU starts with.
FEATURE_MSRS: dict[int, int] = {MSR_UCODE_REV: UCODE_REV, MSR_ARCH_CAPABILITIES: READ_ONLY[MSR_ARCH_CAPABILITIES]}


class MsrIoctls(VcpuState):
    """KVM_GET_MSRS and KVM_SET_MSRS of a vCPU."""

    def read_guest_msr(self, index: int) -> int:
        """kvm_get_msr_with_filter(): as get_msr, for the guest."""
        chosen = self.kvm.msr_filter
        if chosen is not None and not chosen.allows(index, READ):
            raise FilteredMsrError(index)
        if self.pv.refuses(index):
            raise OSError(errno.EPERM, "the guest's CPUID does not have the feature")
        return self.get_msr(index)

    def write_guest_msr(self, index: int, value: int) -> None:
        """kvm_set_msr_with_filter(): as set_msr, for the guest."""
        chosen = self.kvm.msr_filter
        if chosen is not None and not chosen.allows(index, WRITE):
            raise FilteredMsrError(index)
        self.set_msr(index, value)

    def get_msr(self, index: int) -> int:
        """The value of an MSR. Raises OSError with EPERM where RDMSR would fault."""
        if index == MSR_IA32_TSC:
            return self.guest_tsc()
        if index == MSR_IA32_APICBASE:
            return self.get_apic_base()
        if index in SYSTEM_TIME_MSRS:
            return self.pvclock.system_time_msr
        if self.apic is not None:
            if X2APIC_FIRST <= index <= X2APIC_LAST:
                value = self.apic.read_msr(index)
                if value is None:
                    raise OSError(errno.EPERM, "#GP")
                return value
            if index == MSR_IA32_TSC_DEADLINE:
                return self.apic.get_tsc_deadline()
        if (held := self.vendor.get_msr(index)) is not None:
            return held
        if (held := self.pv.read(index)) is not None:
            return held
        if index in WALL_CLOCK_MSRS:
            return self.stored_msrs.get(MSR_WALL_CLOCK_NEW, 0)
        if index in self.stored_msrs:
            return self.stored_msrs[index]
        if index in READ_ONLY:
            return READ_ONLY[index]
        if index in DROPPED:
            return 0
        raise UnknownMsrError(index)

    def set_msr(self, index: int, value: int, host: bool = False) -> None:
        """Write an MSR. Raises OSError with EPERM where WRMSR would fault. *host*: KVM_SET_MSRS."""
        if self.pv.refuses(index):
            if host and not value:
                return
            raise OSError(errno.EPERM, "the guest's CPUID does not have the feature")
        if index == MSR_IA32_TSC:
            if host:
                self.synchronize_tsc(value)
            else:
                self.set_guest_tsc(value)
        elif index == MSR_IA32_APICBASE:
            self.set_apic_base(value, host)
        elif index == MSR_EFER and not host and not self._efer_valid(value):
            raise OSError(errno.EPERM, "bits that CPUID does not show, or EFER.LME under paging")
        elif index in SYSTEM_TIME_MSRS:
            self.pvclock.set_system_time(value)
        elif index in WALL_CLOCK_MSRS:
            self.stored_msrs[MSR_WALL_CLOCK_NEW] = value
            if not host:
                self.pvclock.write_wall_clock(value)
        elif self.apic is not None and X2APIC_FIRST <= index <= X2APIC_LAST:
            if not self.apic.write_msr(index, value):
                raise OSError(errno.EPERM, "#GP")
        elif self.apic is not None and index == MSR_IA32_TSC_DEADLINE:
            self.apic.set_tsc_deadline(value)
        elif self.vendor.set_msr(index, value):
            return
        elif index in PV_MSRS:
            if not self.pv.write(index, value):
                raise OSError(errno.EPERM, "#GP")
        elif index == MSR_UCODE_REV and not host:
            pass  # what the guest does before it asks for the revision
        elif index in DROPPED:
            pass
        elif index == MSR_MCG_CAP and not host:
            raise OSError(errno.EPERM, "a read-only MSR")
        elif index in self.stored_msrs:
            self.stored_msrs[index] = value
        elif not (host and READ_ONLY.get(index) == value):
            if index in READ_ONLY or self.vendor.get_msr(index) is not None:
                raise OSError(errno.EPERM, "a read-only MSR, or not a value that it takes")
            raise UnknownMsrError(index)

    def _efer_valid(self, value: int) -> bool:
        """set_efer(): what a guest may write."""
        paging = self.vendor.get_control("cr0") & CR0_PG
        return not value & ~self.efer_valid and not (paging and (value ^ self.vendor.get_control("efer")) & EFER_LME)

    def _entries(self, argument: Argument) -> list[kvm_msr_entry]:
        count = argument.get(kvm_msrs).nmsrs
        if count >= MAX_IO_MSRS:
            raise OSError(errno.E2BIG, "too many MSRs at a time")
        return argument.entries(kvm_msrs, kvm_msr_entry, count)

    @answers(Requests.KVM_GET_MSRS)
    def get_msrs(self, argument: Argument) -> int:
        entries = self._entries(argument)
        done = 0
        for entry in entries:
            try:
                # kvm_do_msr_access(): what user space is told to save reads as 0 where the guest does not have it.
                entry.data = 0 if self.pv.refuses(entry.index) else self.get_msr(entry.index)
            except OSError:
                break
            done += 1
        argument.write(b"".join(bytes(entry) for entry in entries), ctypes.sizeof(kvm_msrs))
        return done

    @answers(Requests.KVM_SET_MSRS)
    def set_msrs(self, argument: Argument) -> int:
        for done, entry in enumerate(entries := self._entries(argument)):
            try:
                self.set_msr(entry.index, entry.data, host=True)
            except OSError:
                return done
        return len(entries)
