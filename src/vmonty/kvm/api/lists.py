"""Arguments of variable length: a count followed by entries."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from vmonty.base.layout import flexible
from vmonty.kvm.api.handle import Handle
from vmonty.kvm.uapi import Ioctl
from vmonty.kvm.uapi.vcpu import kvm_cpuid2, kvm_cpuid_entry2
from vmonty.kvm.uapi.vm import kvm_msr_list

# What KVM accepts at most for CPUID: KVM_MAX_CPUID_ENTRIES of arch/x86/include/asm/kvm_host.h.
MAX_CPUID_ENTRIES = 256


class CpuidEntry(NamedTuple):
    """One leaf of CPUID as KVM takes it; *flags* are KVM_CPUID_FLAG_*."""

    function: int
    index: int  # type: ignore[assignment]  # KVM's name, which tuples have for a method
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


def msr_indices(handle: Handle, request: Ioctl) -> list[int]:
    """Run one of the two MSR list requests: first with no room, to learn the count (E2BIG), then with it."""
    probe = kvm_msr_list(nmsrs=0)
    result = handle.try_ioctl(request, probe)
    if result < 0 and result != -errno.E2BIG:
        raise handle.error(-result, request.name)
    full: Any = flexible(kvm_msr_list, probe.nmsrs)(nmsrs=probe.nmsrs)
    handle.ioctl(request, full)
    return list(full.indices[: full.nmsrs])


def get_cpuid(handle: Handle, request: Ioctl) -> list[CpuidEntry]:
    """Run a request of the system file that fills a kvm_cpuid2 and tells how many entries it has."""
    table: Any = flexible(kvm_cpuid2, MAX_CPUID_ENTRIES)(nent=MAX_CPUID_ENTRIES)
    handle.ioctl(request, table)
    return cpuid_entries(table.entries[: table.nent])


def cpuid_entries(entries: Iterable[kvm_cpuid_entry2]) -> list[CpuidEntry]:
    """Python's own copies of *entries*."""
    return [
        CpuidEntry(entry.function, entry.index, entry.flags, entry.eax, entry.ebx, entry.ecx, entry.edx)
        for entry in entries
    ]


def cpuid_table(entries: Iterable[CpuidEntry]) -> Any:
    """A kvm_cpuid2 that holds *entries*."""
    rows: Sequence[CpuidEntry] = list(entries)
    table: Any = flexible(kvm_cpuid2, len(rows))(nent=len(rows))
    for slot, row in zip(table.entries, rows, strict=True):
        slot.function, slot.index, slot.flags = row.function, row.index, row.flags
        slot.eax, slot.ebx, slot.ecx, slot.edx = row.eax, row.ebx, row.ecx, row.edx
    return table


__all__ = ["MAX_CPUID_ENTRIES", "CpuidEntry", "cpuid_entries", "cpuid_table", "get_cpuid", "msr_indices"]
