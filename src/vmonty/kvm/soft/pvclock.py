"""kvmclock: time by the guest's TSC and a page that it shares with KVM.

Source: Documentation/virt/kvm/x86/msr.rst, MSR_KVM_SYSTEM_TIME_NEW and MSR_KVM_WALL_CLOCK_NEW.

    struct pvclock_vcpu_time_info               struct pvclock_wall_clock
    0  version (odd while it changes)           0  version
    8  tsc_timestamp                            4  seconds   of the moment at which system time was 0
    16 system_time, ns at that timestamp        8  nanoseconds
    24 tsc_to_system_mul  28 tsc_shift  29 flags
"""

from __future__ import annotations

import struct
import time
from typing import TYPE_CHECKING

from vmonty.kvm.soft.tsc import time_scale

if TYPE_CHECKING:
    from vmonty.kvm.soft.x86 import VcpuX86

MSR_WALL_CLOCK, MSR_SYSTEM_TIME = 0x11, 0x12
MSR_WALL_CLOCK_NEW, MSR_SYSTEM_TIME_NEW = 0x4B56_4D00, 0x4B56_4D01
SYSTEM_TIME_MSRS = (MSR_SYSTEM_TIME, MSR_SYSTEM_TIME_NEW)
WALL_CLOCK_MSRS = (MSR_WALL_CLOCK, MSR_WALL_CLOCK_NEW)
ENABLED, TSC_STABLE, GUEST_STOPPED = 1, 1, 2
NSEC_PER_SEC = 1_000_000_000


class PvClock:
    """The time page of one vCPU."""

    def __init__(self, vcpu: VcpuX86) -> None:
        self._vcpu = vcpu
        self.system_time_msr = 0
        self._version = 0
        self._stopped = False

    @property
    def enabled(self) -> bool:
        """Whether the guest has asked for it."""
        return bool(self.system_time_msr & ENABLED)

    def set_system_time(self, value: int) -> None:
        """A write of the MSR: the page's address, bit 0 to enable."""
        self.system_time_msr = value
        self.update()

    def mark_stopped(self) -> bool:
        """KVM_KVMCLOCK_CTRL: tell the guest's watchdogs that it was paused; False when it has no clock."""
        if not self.enabled:
            return False
        self._stopped = True
        self.update()
        return True

    def update(self) -> None:
        """kvm_guest_time_update(): write the page anew; a page that is not there is not written."""
        if not self.enabled:
            return
        mul, shift = time_scale(self._vcpu.tsc_khz)
        flags = TSC_STABLE | (GUEST_STOPPED if self._stopped else 0)
        self._stopped = False
        kvm = self._vcpu.kvm
        clock, begin = kvm.master
        tsc = self._vcpu.scale_tsc(begin)
        page = struct.pack("<IIQQIbB2x", self._version + 1 & 0xFFFF_FFFF, 0, tsc, clock, mul, shift, flags)
        gpa = self.system_time_msr & ~ENABLED
        if self._vcpu.kvm.write_gpa(gpa, page):
            self._version = self._version + 2 & 0xFFFF_FFFF
            self._vcpu.kvm.write_gpa(gpa, struct.pack("<I", self._version))

    def write_wall_clock(self, gpa: int) -> None:
        """kvm_write_wall_clock(): the real time at which system time was 0."""
        old = self._vcpu.kvm.read_gpa(gpa, 4)
        if old is None:
            return
        version = (int.from_bytes(old, "little") | 1) + 1 & 0xFFFF_FFFF
        boot = time.time_ns() - self._vcpu.kvm.kvmclock_ns()
        seconds = boot // NSEC_PER_SEC & 0xFFFF_FFFF  # user space may have set the clock to anything
        self._vcpu.kvm.write_gpa(gpa, struct.pack("<III", version, seconds, boot % NSEC_PER_SEC))
