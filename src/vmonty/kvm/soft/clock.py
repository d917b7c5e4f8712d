"""kvmclock of a VM: KVM_GET_CLOCK, KVM_SET_CLOCK; and the vCPU's TSC frequency."""

from __future__ import annotations

import errno
import threading
import time

from vmonty.kvm.soft.files import KvmFile, answers
from vmonty.kvm.soft.modules import Module
from vmonty.kvm.soft.tsc import check_tsc_khz, clock_ns, host_tsc_khz, moment, read_tsc
from vmonty.kvm.soft.user import Argument
from vmonty.kvm.uapi import Requests
from vmonty.kvm.uapi.flags import KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_CLOCK_TSC_STABLE
from vmonty.kvm.uapi.vm import kvm_clock_data


class TscWrites:
    """What the TSCs of a VM were set to last, and the offset that they agree on; locked as a context manager."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._khz = self._value = self._ns = self._offset = 0
        self._user_set = False

    def __enter__(self) -> TscWrites:
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def agree(self, khz: int, value: int, now_ns: int, offset: int) -> int:
        """The offset for a TSC that is set to *value*: the last one's, if that is what is meant, or *offset*.

        0 is a vCPU that begins; only what user space has set is something that its next value may agree with.
        """
        expected = self._value + (now_ns - self._ns) * khz // 1_000_000
        agrees = value == 0 or (self._user_set and abs(value - expected) < khz * 1000)
        if khz != self._khz or not agrees:
            self._offset = offset
        self._khz, self._value, self._ns = khz, value, now_ns
        self._user_set = self._user_set or value != 0
        return self._offset


class ClockIoctls(KvmFile):
    """The VM's clock: nanoseconds since its creation, unless user space sets it."""

    created_vcpus: int
    module: Module
    # Its nanoseconds, and the host's TSC then: read and replaced together.
    master: tuple[int, int]

    def __init__(self) -> None:
        self.default_tsc_khz = host_tsc_khz()
        self.tsc_writes = TscWrites()
        self._set_clock(0, read_tsc())

    def _set_clock(self, clock: int, host_tsc: int) -> None:
        """pvclock_update_vm_gtod_copy(): from here on all vCPUs' time pages count, or their clocks would differ."""
        self.master = clock & 0xFFFF_FFFF_FFFF_FFFF, host_tsc

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

    def kvmclock_ns(self, host_tsc: int | None = None) -> int:
        """The clock now, or when the host's TSC was *host_tsc*; it runs by that, as guests read it."""
        clock, begin = self.master
        return clock + clock_ns((read_tsc() if host_tsc is None else host_tsc) - begin)

    def clock_changed(self) -> None:
        """User space has set the clock: every vCPU's time page is to be written anew."""

    @answers(Requests.KVM_GET_CLOCK)
    def get_clock(self, argument: Argument) -> None:
        """kvm_vm_ioctl_get_clock(): the clock, with the host's time and TSC of the same moment."""
        realtime, host_tsc = moment(time.time_ns)
        argument.put(
            kvm_clock_data(
                clock=self.kvmclock_ns(host_tsc),
                flags=KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC,
                realtime=realtime,
                host_tsc=host_tsc,
            )
        )

    @answers(Requests.KVM_SET_CLOCK)
    def set_clock(self, argument: Argument) -> None:
        """kvm_vm_ioctl_set_clock(): with KVM_CLOCK_REALTIME, add the real time that went by since *realtime*."""
        data = argument.get(kvm_clock_data)
        if data.flags & ~(KVM_CLOCK_REALTIME | KVM_CLOCK_TSC_STABLE | KVM_CLOCK_HOST_TSC):
            raise OSError(errno.EINVAL, "unknown flags")
        clock = data.clock
        realtime, host_tsc = moment(time.time_ns)
        if data.flags & KVM_CLOCK_REALTIME:
            clock += max(realtime - data.realtime, 0)
        self._set_clock(clock, host_tsc)
        self.clock_changed()
