"""CPU models on this processor: offered with what the host underneath and our translator have.

Copied vector instructions run on the host's processor, so that what it lacks cannot be had. Models and flags are
those of ``vmonty.base.cpu_models``.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache

from vmonty.base import cpu_models
from vmonty.base.cpu_models import (
    FEATURES,
    LINEAR_BITS_5_LEVEL,
    MODELS,
    NEEDS,
    NEVER,
    PHYSICAL_BITS,
    Configuration,
    Row,
    cpuid_rows,
    features_of,
)
from vmonty.cpu import opcodes
from vmonty.cpu.core import Cpu
from vmonty.cpu.cpuid import set_features, set_table
from vmonty.cpu.hostcpu import host_flags

__all__ = [
    "FEATURES", "LINEAR_BITS_5_LEVEL", "MODELS", "NEVER", "PHYSICAL_BITS", "Configuration", "Row", "available",
    "cpuid_rows", "features_of", "host_flags", "install", "parse",
]  # fmt: skip

# Executed natively by the translated code: the host must have them. (/proc/cpuinfo's name when it differs.)
_HOST_NAMES = {
    "sse3": "pni", "sse4.1": "sse4_1", "sse4.2": "sse4_2", "sha-ni": "sha_ni", "lahf-lm": "lahf_lm",
    "xsaves": "xsavec",  # done by the other
}  # fmt: skip
_NATIVE = [
    "sse3",
    "ssse3",
    "sse4.1",
    "sse4.2",
    "pclmulqdq",
    "aes",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "bmi1",
    "bmi2",
    "adx",
    "movbe",
    "popcnt",
    "abm",
    "sha-ni",
    "rdrand",
    "rdseed",
    "cx16",
    "clflushopt",
    "clwb",
    "xsaveopt",
    "xsavec",
    "xsaves",
]


def available(feature: str) -> bool:
    """Can this feature be offered here?"""
    if feature in _NATIVE and _HOST_NAMES.get(feature, feature) not in host_flags():
        return False
    return all(available(need) for need in NEEDS.get(feature, ()))


def parse(text: str) -> Configuration:
    """Parse ``MODEL[,+flag][,-flag][,flag=on|off]`` for this processor.

    Raises UsageError for an unknown model or flag, and for a flag that was asked for and can't be had.
    """
    return _parse(text, host_flags())


@cache
def _parse(text: str, _underneath: frozenset[str]) -> Configuration:
    # What is available follows from the flags of the processor underneath.
    return cpu_models.parse(text, available)


_CR4 = {
    "vme": 3, "tsc": 4, "de": 8, "pse": 0x10, "pae": 0x20, "mce": 0x40, "pge": 0x80, "fxsr": 0x200, "sse": 0x400,
    "umip": 0x800, "la57": 0x1000, "fsgsbase": 0x10000, "pcid": 0x20000, "xsave": 0x40000, "smep": 0x100000,
    "smap": 0x200000,
}  # fmt: skip


# Model-specific registers that come with one of several features, in the order of cpuid.pxd's MSRS_*. SDM,
# "Model-Specific Registers (MSRs)", column "Comment"; APM, "MSR Cross-Reference".
MSR_GROUPS: tuple[tuple[str, ...], ...] = (
    ("tsc",), ("tsc-adjust",), ("apic",), ("spec-ctrl",), ("arch-capabilities",), ("sep",), ("mce",), ("pat",),
    ("mtrr",), ("tsc-deadline",), ("nx", "lm", "syscall", "svm"), ("syscall",), ("lm",), ("rdtscp", "rdpid"), ("osvw",),
)  # fmt: skip


def cr4_bits(features: Collection[str]) -> int:
    """The CR4 bits that the features allow (PCE always)."""
    return 0x100 | cr4_only(features)


def cr4_only(features: Collection[str]) -> int:
    """The CR4 bits that these features bring."""
    return sum(bit for feature, bit in _CR4.items() if feature in features)


def msr_bits(features: Collection[str]) -> int:
    """The groups of model-specific registers that the features bring."""
    return sum(1 << group for group, names in enumerate(MSR_GROUPS) if not frozenset(names).isdisjoint(features))


def efer_bits(configuration: Configuration) -> int:
    """The EFER bits that the features allow."""
    bits = {"syscall": 1, "lm": 0x500, "nx": 0x800, "svm": 0x1000, "fxsr-opt": 0x4000}
    return sum(bit for feature, bit in bits.items() if feature in configuration.features)


def xcr0_bits(configuration: Configuration) -> int:
    """The XCR0 bits that the features allow."""
    if "xsave" not in configuration.features:
        return 1
    return 7 if "avx" in configuration.features else 3


# Instructions whose absence other means tell: CR4.VMXE, EFER.SVME, CR0.EM.
_UNGATED = frozenset(["", "vmx", "svm", "fpu"])
# PREFETCHW is a hint, and no more, on every 64-bit processor. APM, "PREFETCHx".
_IMPLIED = {"3dnowprefetch": "lm"}
_WORD_BITS, _FEATURE_WORDS = 64, 8


def feature_words(features: Collection[str]) -> list[int]:
    """The bits of ``opcodes.FEATURES`` that a processor with these features has; see ``cpuid.set_features``."""
    words = [0] * _FEATURE_WORDS
    for number, name in enumerate(opcodes.FEATURES):
        if name in _UNGATED or name in features or _IMPLIED.get(name) in features:
            words[number // _WORD_BITS] |= 1 << number % _WORD_BITS
    return words


def install(cpu: Cpu, configuration: Configuration, apic_id: int = 0, threads: int = 1) -> None:
    """Give a processor the CPUID answers, instructions and register bits of a configuration."""
    set_table(
        cpu.state_address, cpuid_rows(configuration, apic_id, threads), cr4_bits(configuration.features),
        efer_bits(configuration), xcr0_bits(configuration), msr_bits(configuration.features),
    )  # fmt: skip
    set_features(cpu.state_address, feature_words(configuration.features))
