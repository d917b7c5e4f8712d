"""KVM_X86_SET_MSR_FILTER: which MSRs a guest may read and write; and why an access to one failed.

Source: arch/x86/kvm/x86.c, kvm_vm_ioctl_set_msr_filter(), kvm_msr_allowed(), kvm_msr_reason().
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from vmonty.kvm.soft.user import Argument
from vmonty.kvm.uapi import flags
from vmonty.kvm.uapi.vm import kvm_msr_filter, kvm_msr_filter_range

X2APIC_MSRS = range(0x800, 0x900)
READ, WRITE = flags.KVM_MSR_FILTER_READ, flags.KVM_MSR_FILTER_WRITE


class UnknownMsrError(OSError):
    """There is no such MSR."""

    def __init__(self, index: int) -> None:
        super().__init__(errno.EPERM, f"unknown MSR {index:#x}")


class FilteredMsrError(OSError):
    """User space denies the guest this MSR."""

    def __init__(self, index: int) -> None:
        super().__init__(errno.EPERM, f"MSR {index:#x} is filtered")


def reason(error: OSError) -> int:
    """kvm_msr_reason(): the KVM_MSR_EXIT_REASON_* of a failed access."""
    if isinstance(error, UnknownMsrError):
        return flags.KVM_MSR_EXIT_REASON_UNKNOWN
    if isinstance(error, FilteredMsrError):
        return flags.KVM_MSR_EXIT_REASON_FILTER
    return flags.KVM_MSR_EXIT_REASON_INVAL


class Range(NamedTuple):
    """MSRs *base* to *base* + *nmsrs* - 1; *access* is READ, WRITE or both; a bit of *allowed* for each of them."""

    base: int
    nmsrs: int
    access: int
    allowed: int


class MsrFilter(NamedTuple):
    """What user space has set. It is replaced, never changed."""

    default_allow: bool
    ranges: tuple[Range, ...]

    def allows(self, index: int, access: int) -> bool:
        """Whether the guest may READ or WRITE MSR *index*. Those of the x2APIC are never filtered."""
        if index in X2APIC_MSRS:
            return True
        for entry in self.ranges:
            if entry.access & access and 0 <= index - entry.base < entry.nmsrs:
                return bool(entry.allowed >> index - entry.base & 1)
        return self.default_allow


def from_user(request: kvm_msr_filter) -> MsrFilter:
    """The filter that *request* describes. Raises OSError: EINVAL, EFAULT."""
    if request.flags & ~flags.KVM_MSR_FILTER_VALID_MASK:
        raise OSError(errno.EINVAL, "unknown flags of the filter")
    ranges = tuple(_range(entry) for entry in request.ranges if entry.nmsrs)
    default_allow = not request.flags & flags.KVM_MSR_FILTER_DEFAULT_DENY
    if not ranges and not default_allow:
        raise OSError(errno.EINVAL, "a filter without ranges would deny all MSRs")
    return MsrFilter(default_allow, ranges)


def _range(entry: kvm_msr_filter_range) -> Range:
    size = (entry.nmsrs + 63) // 64 * 8
    if (
        entry.flags & ~flags.KVM_MSR_FILTER_RANGE_VALID_MASK
        or not entry.flags
        or size > flags.KVM_MSR_FILTER_MAX_BITMAP_SIZE
    ):
        raise OSError(errno.EINVAL, "unknown or no flags of a range, or too many MSRs in it")
    bitmap = Argument(entry.bitmap, 0).read(size)
    return Range(entry.base, entry.nmsrs, entry.flags, int.from_bytes(bitmap, "little"))
