"""KVM_SET_PMU_EVENT_FILTER: which events a guest may count.

Guests have no counters here, as with Linux's kvm.enable_pmu=0: a filter is checked and kept, and holds trivially.
Source: arch/x86/kvm/pmu.c, kvm_vm_ioctl_set_pmu_event_filter().
"""

from __future__ import annotations

import ctypes
import errno
from typing import NamedTuple

from vmonty.kvm.soft.user import Argument
from vmonty.kvm.uapi import flags
from vmonty.kvm.uapi.vm import kvm_pmu_event_filter

MAX_EVENTS = 300
# Event select, unit mask to match, its mask, and "exclude". api.rst, KVM_PMU_EVENT_FLAG_MASKED_EVENTS.
MASKED_EVENT = 0xFF | 0xF << 32 | 0xFF << 8 | 0xFF << 56 | 1 << 55


class PmuFilter(NamedTuple):
    """Allow or deny *events*, and the fixed counters whose bits are set."""

    action: int
    fixed_counters: int
    flags: int
    events: tuple[int, ...]

    @classmethod
    def from_user(cls, argument: Argument) -> PmuFilter:
        """Raises OSError: EINVAL, E2BIG, EFAULT."""
        head = argument.get(kvm_pmu_event_filter)
        if head.action > flags.KVM_PMU_EVENT_DENY or head.flags & ~flags.KVM_PMU_EVENT_FLAGS_VALID_MASK:
            raise OSError(errno.EINVAL, "unknown action or flags")
        if head.nevents > MAX_EVENTS:
            raise OSError(errno.E2BIG, "too many events")
        entries = argument.read(8 * head.nevents, ctypes.sizeof(kvm_pmu_event_filter))
        events = tuple(memoryview(entries).cast("Q"))
        if head.flags & flags.KVM_PMU_EVENT_FLAG_MASKED_EVENTS and any(event & ~MASKED_EVENT for event in events):
            raise OSError(errno.EINVAL, "an event with unknown bits")
        return cls(head.action, head.fixed_counter_bitmap, head.flags, events)
