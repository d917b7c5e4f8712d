"""The guest's time-stamp counter: its offset and scale to the host's, and the ioctls for them.

Source: arch/x86/kvm/x86.c: kvm_set_tsc_khz(), kvm_arch_tsc_set_attr().
"""

from __future__ import annotations

import ctypes
import errno
import time

from vmonty.kvm.soft.files import answers
from vmonty.kvm.soft.tsc import check_tsc_khz, host_tsc_khz, moment, read_tsc
from vmonty.kvm.soft.user import Argument
from vmonty.kvm.soft.vcpu_state import VcpuState
from vmonty.kvm.uapi import Requests, flags
from vmonty.kvm.uapi.vm import kvm_device_attr

# The TSC multiplier's fixed point. SDM, "Time-Stamp Counter Multiplier".
TSC_FRACTION_BITS = 48
TSC_UNITY = 1 << TSC_FRACTION_BITS


class TscIoctls(VcpuState):
    """KVM_GET/SET_TSC_KHZ, the attribute KVM_VCPU_TSC_OFFSET, and what others ask of the counter."""

    def init_tsc(self) -> None:
        """The host's counter, as it is."""
        self._tsc_offset = 0
        self._tsc_ratio = TSC_UNITY
        self.tsc_khz = host_tsc_khz()

    def guest_tsc(self) -> int:
        """The guest's time-stamp counter now."""
        return self.scale_tsc(read_tsc())

    def scale_tsc(self, host_tsc: int) -> int:
        """The guest's time-stamp counter when the host's is *host_tsc*."""
        return (host_tsc * self._tsc_ratio >> TSC_FRACTION_BITS) + self._tsc_offset & 0xFFFF_FFFF_FFFF_FFFF

    def set_guest_tsc(self, value: int) -> None:
        """Set the guest's time-stamp counter by its offset to the host's."""
        now = read_tsc() * self._tsc_ratio >> TSC_FRACTION_BITS
        self._set_tsc_offset(value - now & 0xFFFF_FFFF_FFFF_FFFF)

    def synchronize_tsc(self, value: int) -> None:
        """kvm_synchronize_tsc(): user space sets it, or (0) the vCPU begins: with the offset that the others have.

        One that is set to about what the last was set to, by the time that has passed, is meant to agree with it.
        """
        now_ns, host_tsc = moment()
        offset = value - (host_tsc * self._tsc_ratio >> TSC_FRACTION_BITS) & 0xFFFF_FFFF_FFFF_FFFF
        with self.kvm.tsc_writes as last:
            offset = last.agree(self.tsc_khz, value, now_ns, offset)
        self._set_tsc_offset(offset)

    def _set_tsc_offset(self, offset: int) -> None:
        self._tsc_offset = offset
        self.vendor.set_tsc_offset(offset)
        self._tsc_changed()

    def can_use_hv_timer(self) -> bool:
        """kvm_can_use_hv_timer(): the processor counts at the rate of the guest's TSC."""
        return self.arch.hv_timer and self._tsc_ratio == TSC_UNITY

    def _tsc_changed(self) -> None:
        self.arch.set_tsc(self._tsc_offset, self._tsc_ratio != TSC_UNITY)
        if self.apic is not None:
            self.apic.tsc_changed()
        self.pvclock.update()

    def tsc_deadline_to_ns(self, deadline: int) -> int:
        """When, in the host's monotonic nanoseconds, the guest's TSC reaches *deadline*."""
        return time.monotonic_ns() + (deadline - self.guest_tsc()) * 1_000_000 // self.tsc_khz

    @answers(Requests.KVM_GET_TSC_KHZ)
    def get_tsc_khz(self, argument: Argument) -> int:
        return self.tsc_khz

    @answers(Requests.KVM_SET_TSC_KHZ)
    def set_tsc_khz(self, argument: Argument) -> None:
        """kvm_set_tsc_khz(): the guest's TSC runs at that frequency from now on; 0 means the host's."""
        self.set_tsc_frequency(check_tsc_khz(argument.number & 0xFFFF_FFFF))

    def set_tsc_frequency(self, khz: int) -> None:
        """Scale, unless it is the host's within the module's tolerance."""
        khz = khz or host_tsc_khz()
        module = self.kvm.module
        ratio = TSC_UNITY
        if abs(khz - host_tsc_khz()) * 1_000_000 > host_tsc_khz() * module.kvm.tsc_tolerance_ppm:
            if not module.ops.tsc_scaling:
                raise OSError(errno.EINVAL, "the guest's TSC runs at the host's frequency")
            ratio = (khz << TSC_FRACTION_BITS) // host_tsc_khz()
        self.tsc_khz, self._tsc_ratio = khz, ratio
        self.vendor.set_tsc_multiplier(self._tsc_ratio)
        self._tsc_changed()

    @staticmethod
    def _attribute(argument: Argument) -> Argument:
        """Where the value of KVM_VCPU_TSC_OFFSET is, which is the only attribute."""
        attribute = argument.get(kvm_device_attr)
        if attribute.group != flags.KVM_VCPU_TSC_CTRL or attribute.attr != flags.KVM_VCPU_TSC_OFFSET:
            raise OSError(errno.ENXIO, "no such attribute")
        return Argument(attribute.addr, 8)

    @answers(Requests.KVM_HAS_DEVICE_ATTR)
    def has_device_attr(self, argument: Argument) -> None:
        self._attribute(argument)

    @answers(Requests.KVM_GET_DEVICE_ATTR)
    def get_device_attr(self, argument: Argument) -> None:
        self._attribute(argument).put(ctypes.c_uint64(self._tsc_offset))

    @answers(Requests.KVM_SET_DEVICE_ATTR)
    def set_device_attr(self, argument: Argument) -> None:
        offset = int.from_bytes(self._attribute(argument).read(8), "little")
        self._set_tsc_offset(offset)
