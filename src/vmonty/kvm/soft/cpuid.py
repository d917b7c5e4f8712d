"""What CPUID may offer a guest here: all that the processor has, less what this KVM does not hand on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

from vmonty.cpu import models
from vmonty.kvm.soft import pv
from vmonty.kvm.uapi.flags import (
    KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
    KVM_FEATURE_CLOCKSOURCE2,
    KVM_FEATURE_CLOCKSOURCE_STABLE_BIT,
    KVM_FEATURE_NOP_IO_DELAY,
)
from vmonty.kvm.uapi.vcpu import kvm_cpuid_entry2

KVM_MAX_CPUID_ENTRIES = 256
BASIC_FEATURES, EXTENDED_FEATURES = 1, 0x8000_0001
KVM_CPUID_SIGNATURE = 0x4000_0000
KVM_SIGNATURE = b"KVMKVMKVM\0\0\0"

# kvmclock by the new MSRs, with a stable TSC; port 0x80 needs no delay; and what pv.py has.
FEATURES = (
    pv.FEATURES
    | 1 << KVM_FEATURE_CLOCKSOURCE2
    | 1 << KVM_FEATURE_CLOCKSOURCE_STABLE_BIT
    | 1 << KVM_FEATURE_NOP_IO_DELAY
)

# Nested virtualization is not offered yet, nor XSAVES, which has controls and an MSR of its own; MONITOR and MWAIT
# would exit all the time.
OFFERED = "max,-vmx,-svm,-monitor,-xsaves"

# What the control registers of a guest may hold, which follows.
CR0_VALID = 0xE005_003F
CR4_VALID = models.cr4_bits(models.parse(OFFERED).features)
EFER_VALID = 0xD01
XCR0_VALID = models.xcr0_bits(models.parse(OFFERED))
PHYSICAL_BITS, LINEAR_BITS = models.PHYSICAL_BITS, models.LINEAR_BITS_5_LEVEL
PAT_RESET = 0x0007_0406_0007_0406


# Shadow page tables follow guests of four levels only.
SHADOWED = f"{OFFERED},-la57"
CR4_LA57 = models.cr4_only(["la57"])


@cache
def _rows(offered: str) -> tuple[models.Row, ...]:
    ebx, ecx, edx = (int.from_bytes(KVM_SIGNATURE[at : at + 4], "little") for at in (0, 4, 8))
    return (
        *models.cpuid_rows(models.parse(offered)),
        (KVM_CPUID_SIGNATURE, None, KVM_CPUID_SIGNATURE + 1, ebx, ecx, edx),
        (KVM_CPUID_SIGNATURE + 1, None, FEATURES, 0, 0, 0),
    )


# Instructions that KVM itself lets through or refuses, whatever the guest's CPUID says (KVM_X86_QUIRK_MWAIT_NEVER_UD).
_KVM_DECIDES = frozenset(["monitor"])


def instructions(entries: Sequence[kvm_cpuid_entry2]) -> frozenset[str]:
    """The features whose instructions a guest with these CPUID answers may execute; the others raise #UD.

    Where the leaf of the basic features (1) or of the extended ones (0x80000001) was not set, nothing of its range
    was decided, and the processor's own features stay: KVM runs a vCPU whose CPUID was never set, too.
    """
    table = {(entry.function, entry.index if entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX else None): entry
             for entry in entries}  # fmt: skip
    own = models.parse(OFFERED).features
    said = models.features_of(partial(_registers, table))
    decided = {leaf >> 31 for leaf in (BASIC_FEATURES, EXTENDED_FEATURES) if (leaf, None) in table}
    undecided = {name for name in own if models.FEATURES[name][0] >> 31 not in decided}
    return own & said | undecided | _KVM_DECIDES


# What __cr4_reserved_bits(), __kvm_valid_efer() look at; other bits a guest may set whatever its CPUID says.
_CR4_FEATURES = ("xsave", "smep", "smap", "fsgsbase", "umip", "pcid", "la57")
_EFER_FEATURES = {"nx": 0x800, "lm": 0x500}


def control_bits(entries: Sequence[kvm_cpuid_entry2]) -> tuple[int, int, int]:
    """The bits of CR4, EFER and XCR0 that a guest with these CPUID answers may set."""
    features = instructions(entries)
    off = [name for name in _CR4_FEATURES if name not in features]
    efer = sum(bits for name, bits in _EFER_FEATURES.items() if name not in features)
    return CR4_VALID & ~models.cr4_only(off), EFER_VALID & ~efer, XCR0_VALID & (7 if "avx" in features else 3)


def _registers(
    table: dict[tuple[int, int | None], kvm_cpuid_entry2], leaf: int, subleaf: int
) -> tuple[int, int, int, int] | None:
    entry = table.get((leaf, subleaf)) or table.get((leaf, None))
    return None if entry is None else (entry.eax, entry.ebx, entry.ecx, entry.edx)


def supported(two_dimensional: bool = True) -> list[kvm_cpuid_entry2]:
    """KVM_GET_SUPPORTED_CPUID, in the order of the leaves; *two_dimensional*: the processor walks guests' tables."""
    rows = _rows(OFFERED if two_dimensional else SHADOWED)
    return [
        kvm_cpuid_entry2(
            function=leaf, index=subleaf or 0, flags=0 if subleaf is None else KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax=eax, ebx=ebx, ecx=ecx, edx=edx,
        )
        for leaf, subleaf, eax, ebx, ecx, edx in sorted(rows, key=lambda row: (row[0], row[1] or 0))
    ]  # fmt: skip
