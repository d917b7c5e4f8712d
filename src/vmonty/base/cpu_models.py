"""CPU models: names and feature flags as QEMU has them, turned into CPUID answers.

What can be had is for the caller to say: the software processor asks its host and its translator, a machine asks
its KVM. Sources: SDM, "CPUID—CPU Identification"; APM, "Function 8000_0001h".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from vmonty.base.errors import UsageError

# Feature → (leaf, subleaf, register, bit). Names are QEMU's; aliases below.
_WORDS: dict[tuple[int, int, str], str] = {
    (1, 0, "edx"): (
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 - clflush - - - mmx fxsr sse sse2 "
        "- - - - -"
    ),
    (1, 0, "ecx"): (
        "sse3 pclmulqdq - monitor - vmx - - - ssse3 - - fma cx16 - - - pcid - sse4.1 sse4.2 x2apic movbe popcnt "
        "tsc-deadline aes xsave - avx f16c rdrand hypervisor"
    ),
    (7, 0, "ebx"): (
        "fsgsbase - - bmi1 - avx2 - smep bmi2 erms invpcid - - - - - - - rdseed adx smap - - clflushopt clwb - - - - "
        "sha-ni - -"
    ),
    (7, 0, "ecx"): "- - umip - - - - - - - - - - - - - la57 - - - - - rdpid - - - - - - - - -",
    (7, 0, "edx"): "- - - - fsrm - - - - - - - - - - - - - - - - - - - - - - - - arch-capabilities - -",
    (0xD, 1, "eax"): "xsaveopt xsavec xgetbv1 xsaves - - - - - - - - - - - - - - - - - - - - - - - - - - - -",
    (0x80000001, 0, "edx"): "- - - - - - - - - - - syscall - - - - - - - - nx - - - - fxsr-opt pdpe1gb rdtscp - lm - -",
    (
        0x80000001,
        0,
        "ecx",
    ): "lahf-lm - svm - cr8legacy abm - - 3dnowprefetch - - - - - - - - - - - - - - - - - - - - - - -",
    (0x80000007, 0, "edx"): "- - - - - - - - invtsc - - - - - - - - - - - - - - - - - - - - - - -",
    (6, 0, "eax"): "- - arat - - - - - - - - - - - - - - - - - - - - - - - - - - - - -",
}
FEATURES: dict[str, tuple[int, int, str, int]] = {
    name: (*word, bit) for word, names in _WORDS.items() for bit, name in enumerate(names.split()) if name != "-"
}
ALIASES = {
    "pni": "sse3", "sse4-1": "sse4.1", "sse4_1": "sse4.1", "sse4-2": "sse4.2", "sse4_2": "sse4.2", "lahf_lm": "lahf-lm",
    "fxsr_opt": "fxsr-opt", "ffxsr": "fxsr-opt", "sha_ni": "sha-ni", "sha": "sha-ni", "tsc_deadline": "tsc-deadline",
    "tsc_deadline_timer": "tsc-deadline", "cr8_legacy": "cr8legacy", "i64": "lm", "xd": "nx", "lzcnt": "abm",
}  # fmt: skip

# Names that exist in QEMU but that we never offer.
NEVER = frozenset(
    [
        "avx512f",
        "avx512dq",
        "avx512cd",
        "avx512bw",
        "avx512vl",
        "avx512ifma",
        "avx512vbmi",
        "avx512_vnni",
        "avx512-vnni",
        "mpx",
        "hle",
        "rtm",
        "pku",
        "ospke",
        "sgx",
        "intel-pt",
        "cet-ss",
        "cet-ibt",
        "amx-tile",
        "amx-int8",
        "amx-bf16",
        "3dnow",
        "3dnowext",
        "xop",
        "fma4",
        "tbm",
        "sse4a",
        "misalignsse",
        "osvw",
        "spec-ctrl",
        "stibp",
        "ssbd",
        "md-clear",
        "ibpb",
        "vaes",
        "vpclmulqdq",
        "gfni",
        "mwaitx",
        "clzero",
        "xsaveerptr",
        "perfctr-core",
        "topoext",
        "wbnoinvd",
        "ds",
        "ss",
        "ht",
        "tm",
        "pbe",
        "acpi",
        "dtes64",
        "ds-cpl",
        "smx",
        "est",
        "tm2",
        "cid",
        "xtpr",
        "pdcm",
        "dca",
        "f16",
    ]
)


_BASE64 = (
    "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 syscall nx lm "
    "sse3 cx16 hypervisor lahf-lm x2apic"
)
_NEHALEM = f"{_BASE64} ssse3 sse4.1 sse4.2 popcnt"
_WESTMERE = f"{_NEHALEM} aes pclmulqdq arat"
_SANDY = f"{_WESTMERE} avx xsave xsaveopt tsc-deadline rdtscp"
_IVY = f"{_SANDY} f16c rdrand fsgsbase smep erms"
_HASWELL = f"{_IVY} fma movbe bmi1 bmi2 avx2 invpcid pcid abm"
_BROADWELL = f"{_HASWELL} rdseed adx smap 3dnowprefetch"
_SKYLAKE = f"{_BROADWELL} clflushopt xsavec xgetbv1 umip pdpe1gb"
_OPTERON = f"{_BASE64} popcnt abm rdtscp cr8legacy fxsr-opt"
_EPYC = (
    f"{_BASE64} ssse3 sse4.1 sse4.2 popcnt aes pclmulqdq avx avx2 fma f16c bmi1 bmi2 movbe rdrand rdseed adx smap smep "
    "fsgsbase clflushopt sha-ni xsave xsaveopt xsavec xgetbv1 rdtscp pdpe1gb fxsr-opt cr8legacy abm 3dnowprefetch arat"
)
_MAXIMUM = " ".join(FEATURES)


class Model(NamedTuple):
    """One row of the catalogue: vendor string, family/model/stepping, features, highest leaves, brand string."""

    name: str
    vendor: str
    family: int
    model: int
    stepping: int
    features: frozenset[str]
    level: int
    brand: str


def _model(
    name: str, vendor: str, family: int, model: int, stepping: int, features: str, level: int, brand: str
) -> Model:
    return Model(name, vendor, family, model, stepping, frozenset(features.split()), level, brand)


_INTEL, _AMD = "GenuineIntel", "AuthenticAMD"
MODELS: dict[str, Model] = {
    m.name: m
    for m in (
        _model("qemu64", _AMD, 15, 107, 1, f"{_BASE64} svm", 0xD, "QEMU Virtual CPU version 2.5+"),
        _model("kvm64", _INTEL, 15, 6, 1, _BASE64, 0xD, "Common KVM processor"),
        _model("Nehalem", _INTEL, 6, 26, 3, _NEHALEM, 0xB, "Intel Core i7 9xx (Nehalem Class Core i7)"),
        _model("Westmere", _INTEL, 6, 44, 1, _WESTMERE, 0xB, "Westmere E56xx/L56xx/X56xx (Nehalem-C)"),
        _model("SandyBridge", _INTEL, 6, 42, 1, _SANDY, 0xD, "Intel Xeon E312xx (Sandy Bridge)"),
        _model("IvyBridge", _INTEL, 6, 58, 9, _IVY, 0xD, "Intel Xeon E3-12xx v2 (Ivy Bridge)"),
        _model("Haswell", _INTEL, 6, 60, 4, _HASWELL, 0xD, "Intel Core Processor (Haswell, no TSX)"),
        _model("Broadwell", _INTEL, 6, 61, 2, _BROADWELL, 0xD, "Intel Core Processor (Broadwell, no TSX)"),
        _model("Skylake-Client", _INTEL, 6, 94, 3, _SKYLAKE, 0xD, "Intel Core Processor (Skylake, no TSX)"),
        _model("Skylake-Server", _INTEL, 6, 85, 4, f"{_SKYLAKE} clwb", 0xD, "Intel Xeon Processor (Skylake, no TSX)"),
        _model("Opteron_G3", _AMD, 16, 2, 3, f"{_OPTERON} svm", 5, "AMD Opteron 23xx (Gen 3 Class Opteron)"),
        _model("EPYC", _AMD, 23, 1, 2, f"{_EPYC} svm", 0xD, "AMD EPYC Processor"),
        _model("max", _INTEL, 6, 94, 3, _MAXIMUM, 0xD, "vmonty virtual CPU"),
        _model("host", _INTEL, 6, 94, 3, _MAXIMUM, 0xD, "vmonty virtual CPU"),
    )
}

# Features that are meaningless without others.
NEEDS = {
    "avx": ("xsave",), "avx2": ("avx",), "fma": ("avx",), "f16c": ("avx",), "xsaveopt": ("xsave",),
    "xsavec": ("xsave",), "xsaves": ("xsavec",),
    "xgetbv1": ("xsave",), "lm": ("pae",), "syscall": ("lm",), "pcid": ("lm",), "pdpe1gb": ("lm",), "la57": ("lm",),
    "ssse3": ("sse3",), "sse4.1": ("ssse3",), "sse4.2": ("sse4.1",), "sse2": ("sse",), "sse3": ("sse2",),
    "bmi1": ("avx",), "bmi2": ("avx",),
}  # fmt: skip


class Configuration(NamedTuple):
    """A model with its flags applied."""

    model: Model
    features: frozenset[str]
    missing: frozenset[str] = frozenset()  # of the model's own features: not to be had here


def canonical_name(flag: str) -> str:
    """QEMU's name of a flag. Raises UsageError for one that nobody knows."""
    name = ALIASES.get(flag, flag)
    if name in FEATURES or name in NEVER:
        return name
    name = ALIASES.get(flag.replace("_", "-"), flag.replace("_", "-"))
    if name in FEATURES or name in NEVER:
        return name
    raise UsageError(f"unknown CPU feature {flag!r}; those that exist: vmonty run --cpu help")


def parse(text: str, available: Callable[[str], bool]) -> Configuration:
    """Parse ``MODEL[,+flag][,-flag][,flag=on|off]``; *available* says which features can be had.

    Raises UsageError for an unknown model or flag, and for a flag that was asked for and can't be had.
    """
    name, *flags = text.split(",")
    if name not in MODELS:
        raise UsageError(f"unknown CPU model {name!r}; there are: {', '.join(sorted(MODELS))}")
    model = MODELS[name]
    wanted = set(model.features)
    asked: set[str] = set()
    for flag in filter(None, flags):
        if flag[0] in "+-":
            feature, on = canonical_name(flag[1:]), flag[0] == "+"
        else:
            feature, _, value = flag.partition("=")
            if value not in ("", "on", "off"):
                raise UsageError(f"CPU feature {feature!r} is 'on' or 'off', not {value!r}")
            feature, on = canonical_name(feature), value != "off"
        (wanted.add if on else wanted.discard)(feature)
        (asked.add if on else asked.discard)(feature)
    for feature in sorted(asked):
        if feature in NEVER or not available(feature):
            raise UsageError(f"the CPU feature {feature!r} can't be had here: remove it from the model's flags")
    if asked & {"vmx"} and asked & {"svm"}:
        raise UsageError("a processor has VMX or SVM, not both")
    if "vmx" in wanted and "svm" in wanted:
        wanted.discard("svm" if model.vendor == _INTEL else "vmx")
    offered = {feature for feature in wanted if available(feature)}
    while gone := {f for f in offered if any(need not in offered for need in NEEDS.get(f, ()))}:
        offered -= gone
    return Configuration(model, frozenset(offered), frozenset(wanted - offered))


# ---- CPUID ---------------------------------------------------------------------------------------------------------

Row = tuple[int, int | None, int, int, int, int]  # leaf, subleaf (None: any), EAX, EBX, ECX, EDX

PHYSICAL_BITS, LINEAR_BITS, LINEAR_BITS_5_LEVEL = 46, 48, 57
XSAVE_LEGACY, XSAVE_AVX_OFFSET, XSAVE_AVX_SIZE = 576, 576, 256


def _words(text: bytes) -> list[int]:
    return [int.from_bytes(text[at : at + 4], "little") for at in range(0, len(text), 4)]


def _signature(model: Model) -> int:
    family, extended = min(model.family, 15), max(model.family - 15, 0)
    return model.stepping | (model.model & 15) << 4 | family << 8 | (model.model >> 4) << 16 | extended << 20


def cpuid_rows(configuration: Configuration, apic_id: int = 0, threads: int = 1) -> list[Row]:
    """The CPUID table of one processor of a package of *threads* single-threaded cores."""
    model, features = configuration.model, configuration.features
    registers: dict[tuple[int, int], dict[str, int]] = {}
    for feature in features:
        leaf, subleaf, register, bit = FEATURES[feature]
        registers.setdefault((leaf, subleaf), {}).setdefault(register, 0)
        registers[leaf, subleaf][register] |= 1 << bit

    def bits(leaf: int, subleaf: int, register: str) -> int:
        return registers.get((leaf, subleaf), {}).get(register, 0)

    vendor = _words(model.vendor.encode())
    brand = _words(model.brand.encode().ljust(48, b"\0")[:48])
    signature = _signature(model)
    shift = (threads - 1).bit_length()
    amd = model.vendor == _AMD
    several = 1 << 28 if threads > 1 else 0
    avx = "avx" in features
    size = XSAVE_AVX_OFFSET + XSAVE_AVX_SIZE if avx else XSAVE_LEGACY
    edx_low = bits(1, 0, "edx")
    linear = LINEAR_BITS_5_LEVEL if "la57" in features else LINEAR_BITS
    rows: list[Row] = [
        (0, None, model.level, vendor[0], vendor[2], vendor[1]),
        (1, None, signature, apic_id << 24 | threads << 16 | 8 << 8, bits(1, 0, "ecx"), edx_low | several),
    ]
    if not amd:
        rows.append((2, None, 0x00FEFF01, 0, 0, 0xF0))
        share = (1 << shift) - 1 << 26
        rows += [  # L1d 32K, L1i 32K, L2 256K, L3 8M. SDM, "Deterministic Cache Parameters"
            (4, 0, share | 0x0121, 7 << 22 | 63, 63, 0),
            (4, 1, share | 0x0122, 7 << 22 | 63, 63, 0),
            (4, 2, share | 0x0143, 7 << 22 | 63, 511, 0),
            (4, 3, share | (1 << shift) - 1 << 14 | 0x0163, 15 << 22 | 63, 8191, 4),
        ]
    if "monitor" in features:
        rows.append((5, None, 64, 64, 3, 0))
    rows.append((6, None, bits(6, 0, "eax"), 0, 0, 0))
    rows.append((7, 0, 0, bits(7, 0, "ebx"), bits(7, 0, "ecx"), bits(7, 0, "edx")))
    rows += [(0xB, 0, 0, 1, 0x100, apic_id), (0xB, 1, shift, threads, 0x201, apic_id)]
    if "xsave" in features:
        rows += [
            (0xD, 0, 7 if avx else 3, size, size, 0),
            (0xD, 1, bits(0xD, 1, "eax"), size if features & {"xsavec", "xsaves"} else 0, 0, 0),
        ]
        if avx:
            rows.append((0xD, 2, XSAVE_AVX_SIZE, XSAVE_AVX_OFFSET, 0, 0))
    edx_high = bits(0x80000001, 0, "edx")
    if (
        amd
    ):  # AMD repeats the common bits. APM, "Function 8000_0001h—Extended Processor and Processor Feature Identifiers"
        edx_high |= edx_low & 0x0183F3FF
    top = 0x8000000A if "svm" in features else 0x80000008
    rows += [
        (0x80000000, None, top, vendor[0] if amd else 0, vendor[2] if amd else 0, vendor[1] if amd else 0),
        (0x80000001, None, signature if amd else 0, 0, bits(0x80000001, 0, "ecx"), edx_high),
        *((0x80000002 + n, None, *brand[4 * n : 4 * n + 4]) for n in range(3)),  # type: ignore[list-item]
        (0x80000006, None, 0, 0, 256 << 16 | 6 << 12 | 64, 0),
        (0x80000007, None, 0, 0, 0, bits(0x80000007, 0, "edx")),
        (0x80000008, None, linear << 8 | PHYSICAL_BITS, 0, threads - 1 if amd else 0, 0),
    ]
    if "svm" in features:  # NPT, nRIP save, decode assists, flush by ASID, 16 ASIDs
        rows.append((0x8000000A, None, 1, 16, 0, 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7))
    return rows


def features_of(registers: Callable[[int, int], Sequence[int] | None]) -> frozenset[str]:
    """The features that CPUID answers show; *registers* gives EAX, EBX, ECX, EDX of a leaf and subleaf, or None."""
    found = set()
    for name, (leaf, subleaf, register, bit) in FEATURES.items():
        answer = registers(leaf, subleaf)
        if answer is not None and answer[("eax", "ebx", "ecx", "edx").index(register)] >> bit & 1:
            found.add(name)
    return frozenset(found)
