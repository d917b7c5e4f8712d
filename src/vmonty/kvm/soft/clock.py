"""kvmclock of a VM: KVM_GET_CLOCK, KVM_SET_CLOCK; and the vCPU's TSC frequency."""

from __future__ import annotations

import errno
import time

from vmonty.kvm.soft.files import KvmFile, answers
from vmonty.kvm.soft.modules import Module
from vmonty.kvm.soft.tsc import check_tsc_khz, host_tsc_khz, read_tsc
from vmonty.kvm.soft.user import Argument
from vmonty.kvm.uapi import Requests
from vmonty.kvm.uapi.flags import KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_CLOCK_TSC_STABLE
from vmonty.kvm.uapi.vm import kvm_clock_data


class ClockIoctls(KvmFile):
    """The VM's clock: nanoseconds since its creation, unless user space sets it."""

    created_vcpus: int
    module: Module

    def __init__(self) -> None:
        self._kvmclock_offset = -time.monotonic_ns()
        self.default_tsc_khz = host_tsc_khz()

    @answers(Requests.KVM_SET_TSC_KHZ)
    def set_tsc_khz(self, argument: Argument) -> None:
        """For vCPUs that are created from now on; 0 means the host's frequency."""
        if not self.module.ops.tsc_scaling:
            raise OSError(errno.ENOTTY, "this processor does not scale the TSC")
        khz = check_tsc_khz(argument.number & 0xFFFF_FFFF)
        if self.created_vcpus:
            raise OSError(errno.EINVAL, "there are vCPUs already")
        self.default_tsc_khz = khz or host_tsc_khz()

    @answers(Requests.KVM_GET_TSC_KHZ)
    def get_tsc_khz(self, argument: Argument) -> int:
        return self.default_tsc_khz

    def kvmclock_ns(self) -> int:
        """The clock now."""
        return time.monotonic_ns() + self._kvmclock_offset

    def clock_changed(self) -> None:
        """User space has set the clock: every vCPU's time page is to be written anew."""

    @answers(Requests.KVM_GET_CLOCK)
    def get_clock(self, argument: Argument) -> None:
        """kvm_vm_ioctl_get_clock(): the clock, with the host's time and TSC of the same moment."""
        argument.put(
            kvm_clock_data(
                clock=self.kvmclock_ns(),
                flags=KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC,
                realtime=time.time_ns(),
                host_tsc=read_tsc(),
            )
        )

    @answers(Requests.KVM_SET_CLOCK)
    def set_clock(self, argument: Argument) -> None:
        """kvm_vm_ioctl_set_clock(): with KVM_CLOCK_REALTIME, add the real time that went by since *realtime*."""
        data = argument.get(kvm_clock_data)
        if data.flags & ~(KVM_CLOCK_REALTIME | KVM_CLOCK_TSC_STABLE | KVM_CLOCK_HOST_TSC):
            raise OSError(errno.EINVAL, "unknown flags")
        clock = data.clock
        if data.flags & KVM_CLOCK_REALTIME:
            clock += max(time.time_ns() - data.realtime, 0)
        self._kvmclock_offset = clock - time.monotonic_ns()
        self.clock_changed()
