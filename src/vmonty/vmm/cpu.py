"""What a machine's processors say by CPUID: a model by name with flags, within what the machine's KVM supports."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vmonty.base import cpu_models
from vmonty.base.cpu_models import FEATURES, MODELS
from vmonty.base.errors import UsageError
from vmonty.kvm.api import CpuidEntry, System
from vmonty.kvm.uapi.flags import KVM_CPUID_FLAG_SIGNIFCANT_INDEX

# All that this KVM supports, as it says it: the two names mean the same here.
WHOLE = ("host", "max")
DEFAULT = "max"
PARAVIRTUAL, PARAVIRTUAL_END = 0x4000_0000, 0x4001_0000
# KVM leaves these to user space (api.rst, KVM_GET_SUPPORTED_CPUID).
BY_USER_SPACE = frozenset(("hypervisor", "tsc-deadline"))


LEAF_FEATURES, LEAF_TOPOLOGY, LEAF_TOPOLOGY_V2, LEAF_ADDRESSES = 1, 0xB, 0x1F, 0x8000_0008
FEATURE_TSC_DEADLINE, FEATURE_HYPERVISOR = 1 << 24, 1 << 31


def cpuid_for(supported: Sequence[CpuidEntry], index: int) -> list[CpuidEntry]:
    """What KVM supports, with this vCPU's APIC ID, the hypervisor bit and the TSC deadline timer.

    KVM leaves the last two to user space (api.rst, KVM_GET_SUPPORTED_CPUID); without them a guest
    may wait for ever while it calibrates its timers.
    """
    entries = []
    for entry in supported:
        if entry.function == LEAF_FEATURES:
            entry = entry._replace(
                ebx=entry.ebx & 0x00FF_FFFF | index << 24,
                ecx=entry.ecx | FEATURE_HYPERVISOR | FEATURE_TSC_DEADLINE,
            )
        elif entry.function in (LEAF_TOPOLOGY, LEAF_TOPOLOGY_V2):
            entry = entry._replace(edx=index)
        entries.append(entry)
    return entries


# Physical address bits: as many as QEMU gives, where they suffice. UEFI firmware maps all that the processor can
# address, and some of it (OVMF's 4 MB build) in pages of 2 MiB: of 46 bits that would be 256 MiB of tables.
USUAL_BITS, LEAST_BITS, MOST_BITS = 40, 32, 52
PHYS_BITS, HOST_PHYS_BITS = "phys-bits", "host-phys-bits"


def check(text: str) -> None:
    """Raise UsageError for a model or a flag that nobody knows."""
    cpu_models.parse(_address_bits(text)[0], lambda feature: True)


def _address_bits(text: str) -> tuple[str, int | None]:
    """*text* without ``phys-bits=N`` and ``host-phys-bits``, and their number; None when it is not given."""
    kept, bits = [], None
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name == HOST_PHYS_BITS and value in ("", "on", "off"):
            bits = None if value == "off" else MOST_BITS
        elif name == PHYS_BITS:
            if not value.isdecimal() or not LEAST_BITS <= int(value) <= MOST_BITS:
                raise UsageError(f"CPU property phys-bits is a number from {LEAST_BITS} to {MOST_BITS}, not {value!r}")
            bits = int(value)
        else:
            kept.append(part)
    return ",".join(kept), bits


def _supported(entries: Sequence[CpuidEntry]) -> frozenset[str]:
    table = {
        (entry.function, entry.index if entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX else 0): entry
        for entry in entries
    }

    def registers(leaf: int, subleaf: int) -> tuple[int, int, int, int] | None:
        entry = table.get((leaf, subleaf))
        return None if entry is None else (entry.eax, entry.ebx, entry.ecx, entry.edx)

    return cpu_models.features_of(registers) | BY_USER_SPACE


def table_maker(system: System, text: str, cpus: int, top: int = 0) -> Callable[[int], list[CpuidEntry]]:
    """A function that gives vCPU *n* its CPUID table.

    *text* is ``MODEL[,+flag][,-flag][,phys-bits=N][,host-phys-bits]``. A model's own features that this KVM lacks are
    left out, as the software CPU and QEMU do. Addresses have 40 bits, or as many as *top*, the highest address in use,
    needs. Raises UsageError for an unknown model or flag, and for a flag asked for that this KVM lacks.
    """
    text, bits = _address_bits(text)
    make = _plain_table_maker(system, text, cpus)
    wanted = max(USUAL_BITS, top.bit_length()) if bits is None else bits

    def table(index: int) -> list[CpuidEntry]:
        return [_with_bits(entry, wanted) for entry in make(index)]

    if bits is not None and top.bit_length() > bits:
        raise UsageError(f"CPU property phys-bits={bits}: this machine's addresses need {top.bit_length()}")
    return table


def _with_bits(entry: CpuidEntry, wanted: int) -> CpuidEntry:
    if entry.function != LEAF_ADDRESSES:
        return entry
    return entry._replace(eax=entry.eax & ~0xFF | min(entry.eax & 0xFF, wanted))


def _plain_table_maker(system: System, text: str, cpus: int) -> Callable[[int], list[CpuidEntry]]:
    supported = system.supported_cpuid()
    features = _supported(supported)
    configuration = cpu_models.parse(text, features.__contains__)
    name = text.partition(",")[0]
    if name in WHOLE:
        off = features - configuration.features
        return lambda index: [_without(entry, off) for entry in cpuid_for(supported, index)]
    paravirtual = [entry for entry in supported if PARAVIRTUAL <= entry.function < PARAVIRTUAL_END]

    def table(index: int) -> list[CpuidEntry]:
        rows = cpu_models.cpuid_rows(configuration, index, cpus)
        return sorted([_entry(row) for row in rows] + paravirtual, key=lambda entry: (entry.function, entry.index))

    return table


def _entry(row: cpu_models.Row) -> CpuidEntry:
    leaf, subleaf, *registers = row
    flags = 0 if subleaf is None else KVM_CPUID_FLAG_SIGNIFCANT_INDEX
    return CpuidEntry(leaf, subleaf or 0, flags, *registers)


def _without(entry: CpuidEntry, off: frozenset[str]) -> CpuidEntry:
    for feature in off:
        leaf, subleaf, register, bit = FEATURES[feature]
        indexed = bool(entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX)
        if entry.function == leaf and (not indexed or entry.index == subleaf):
            entry = entry._replace(**{register: getattr(entry, register) & ~(1 << bit)})
    return entry


def models() -> str:
    """A list for people: the models, and the flags."""
    width = max(map(len, MODELS))
    rows = [f"{name:<{width}}  {model.brand}" for name, model in MODELS.items()]
    return "\n".join([*rows, "", "Flags: " + " ".join(sorted(FEATURES))])
