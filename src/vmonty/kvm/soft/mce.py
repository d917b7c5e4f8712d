"""Machine-check banks of a vCPU: KVM_X86_SETUP_MCE, KVM_X86_SET_MCE. Source: SDM, "Machine-Check Architecture"."""

from __future__ import annotations

import ctypes
import errno

from vmonty.kvm.soft.files import answers
from vmonty.kvm.soft.user import Argument
from vmonty.kvm.soft.vcpu_state import VcpuState
from vmonty.kvm.uapi import Requests
from vmonty.kvm.uapi.vcpu import kvm_x86_mce

MCG_CTL_P, MCG_SER_P = 1 << 8, 1 << 24
MCE_CAP_SUPPORTED = MCG_CTL_P | MCG_SER_P
MAX_BANKS = 32

MSR_MCG_CAP, MSR_MCG_STATUS, MSR_MCG_CTL, MSR_MC0_CTL = 0x179, 0x17A, 0x17B, 0x400
STATUS_VALID, STATUS_OVERFLOW, STATUS_UNCORRECTED = 1 << 63, 1 << 62, 1 << 61
MCG_STATUS_IN_PROGRESS = 1 << 2
CR4_MCE = 1 << 6
MC_VECTOR = 18
ALL_ONES = 0xFFFF_FFFF_FFFF_FFFF


class McIoctls(VcpuState):
    """The ioctls; the registers are among the stored MSRs, four to a bank: CTL, STATUS, ADDR, MISC."""

    @answers(Requests.KVM_X86_SETUP_MCE)
    def setup_mce(self, argument: Argument) -> None:
        """kvm_vcpu_ioctl_x86_setup_mce()."""
        capability = int.from_bytes(argument.read(ctypes.sizeof(ctypes.c_uint64)), "little")
        banks = capability & 0xFF
        if not banks or banks > MAX_BANKS or capability & ~(MCE_CAP_SUPPORTED | 0xFF | 0xFF << 16):
            raise OSError(errno.EINVAL, "not a capability that is supported")
        self.stored_msrs[MSR_MCG_CAP] = capability
        if capability & MCG_CTL_P:
            self.stored_msrs[MSR_MCG_CTL] = ALL_ONES
        for bank in range(banks):
            base = MSR_MC0_CTL + 4 * bank
            self.stored_msrs.update({base: ALL_ONES, base + 1: 0, base + 2: 0, base + 3: 0})

    @answers(Requests.KVM_X86_SET_MCE)
    def set_mce(self, argument: Argument) -> None:
        """kvm_vcpu_ioctl_x86_set_mce(): a bank's registers, and #MC for an uncorrected error."""
        error = argument.get(kvm_x86_mce)
        if error.bank >= self.stored_msrs.get(MSR_MCG_CAP, 0) & 0xFF or not error.status & STATUS_VALID:
            raise OSError(errno.EINVAL, "no such bank, or nothing to report")
        base = MSR_MC0_CTL + 4 * error.bank
        if self.stored_msrs[base] != ALL_ONES:
            return
        status = error.status
        if status & STATUS_UNCORRECTED:
            in_progress = self.stored_msrs[MSR_MCG_STATUS] & MCG_STATUS_IN_PROGRESS
            if in_progress or not self.vendor.get_control("cr4") & CR4_MCE:
                self.triple_fault_pending = True
                return
            self.stored_msrs[MSR_MCG_STATUS] = error.mcg_status
            self.queue_exception(MC_VECTOR)
        elif self.stored_msrs[base + 1] & STATUS_VALID:
            self.stored_msrs[base + 1] |= STATUS_OVERFLOW
            return
        if self.stored_msrs[base + 1] & STATUS_VALID:
            status |= STATUS_OVERFLOW
        self.stored_msrs.update({base + 1: status, base + 2: error.addr, base + 3: error.misc})
