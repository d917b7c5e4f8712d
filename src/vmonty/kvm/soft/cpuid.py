"""What CPUID may offer a guest here: all that the processor has, less what this KVM does not hand on."""

from __future__ import annotations

from functools import cache

from vmonty.cpu import models
from vmonty.kvm.uapi.flags import (
    KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
    KVM_FEATURE_CLOCKSOURCE2,
    KVM_FEATURE_CLOCKSOURCE_STABLE_BIT,
    KVM_FEATURE_NOP_IO_DELAY,
)
from vmonty.kvm.uapi.vcpu import kvm_cpuid_entry2

KVM_MAX_CPUID_ENTRIES = 256
KVM_CPUID_SIGNATURE = 0x4000_0000
KVM_SIGNATURE = b"KVMKVMKVM\0\0\0"

# kvmclock by the new MSRs, with a stable TSC; port 0x80 needs no delay.
FEATURES = 1 << KVM_FEATURE_CLOCKSOURCE2 | 1 << KVM_FEATURE_CLOCKSOURCE_STABLE_BIT | 1 << KVM_FEATURE_NOP_IO_DELAY

# Nested virtualization is not offered yet; MONITOR and MWAIT would exit all the time; the processor restores only the
# standard form of XSAVE areas.
OFFERED = "max,-vmx,-svm,-monitor,-xsavec"


@cache
def _rows() -> tuple[models.Row, ...]:
    ebx, ecx, edx = (int.from_bytes(KVM_SIGNATURE[at : at + 4], "little") for at in (0, 4, 8))
    return (
        *models.cpuid_rows(models.parse(OFFERED)),
        (KVM_CPUID_SIGNATURE, None, KVM_CPUID_SIGNATURE + 1, ebx, ecx, edx),
        (KVM_CPUID_SIGNATURE + 1, None, FEATURES, 0, 0, 0),
    )


def supported() -> list[kvm_cpuid_entry2]:
    """KVM_GET_SUPPORTED_CPUID, in the order of the leaves."""
    return [
        kvm_cpuid_entry2(
            function=leaf, index=subleaf or 0, flags=0 if subleaf is None else KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax=eax, ebx=ebx, ecx=ecx, edx=edx,
        )
        for leaf, subleaf, eax, ebx, ecx, edx in sorted(_rows(), key=lambda row: (row[0], row[1] or 0))
    ]  # fmt: skip
