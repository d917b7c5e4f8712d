"""CPU models against invariants; CPUID as the processor answers it. SDM, "CPUID—CPU Identification"."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmonty.base.errors import UsageError
from vmonty.cpu import inspection, models
from vmonty.cpu.core import Cpu
from vmonty.cpu.cpuid import set_table
from vmonty.cpu.models import FEATURES, MODELS, NEVER, available, cpuid_rows, parse


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model_names_known_features(name: str) -> None:
    assert MODELS[name].features <= set(FEATURES)
    assert not MODELS[name].features & NEVER


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model_is_consistent(name: str) -> None:
    configuration = parse(name)
    assert configuration.features <= {f for f in FEATURES if available(f)}
    assert {"fpu", "msr", "pae", "cx8", "apic", "cmov", "fxsr", "sse2", "lm", "syscall", "nx"} <= configuration.features
    assert not {"vmx", "svm"} <= configuration.features
    rows = {(leaf, sub): registers for leaf, sub, *registers in cpuid_rows(configuration)}
    basic, extended = rows[0, None][0], rows[0x80000000, None][0]
    for leaf, _ in rows:
        assert leaf <= (extended if leaf >> 31 else max(basic, 0xD))
    for feature in FEATURES:
        leaf, sub, register, bit = FEATURES[feature]
        found = rows.get((leaf, sub), rows.get((leaf, None), [0, 0, 0, 0]))
        value = found[("eax", "ebx", "ecx", "edx").index(register)]
        assert bool(value >> bit & 1) == (feature in configuration.features) or leaf == 0x80000001


def test_flags() -> None:
    assert "pcid" not in parse("Haswell,-pcid").features
    assert "erms" in parse("SandyBridge,+erms,+smep").features
    assert "smep" not in parse("SandyBridge,smep=off").features
    assert "sse4.2" in parse("qemu64,+sse4_2,+ssse3,+sse4.1").features
    assert "avx2" not in parse("Haswell,-avx").features  # nothing without what it needs


@pytest.mark.parametrize(
    "text", ["i486", "qemu64,+nonsense", "max,+avx512f", "Skylake-Client,+hle", "max,smep=maybe", ""]
)
def test_refusals(text: str) -> None:
    with pytest.raises(UsageError):
        parse(text)


@given(st.sampled_from(sorted(MODELS)), st.integers(1, 64), st.data())
def test_topology_is_deterministic(name: str, threads: int, data: st.DataObject) -> None:
    apic_id = data.draw(st.integers(0, threads - 1))
    rows = cpuid_rows(parse(name), apic_id, threads)
    assert rows == cpuid_rows(parse(name), apic_id, threads)
    table = {(leaf, sub): registers for leaf, sub, *registers in rows}
    assert table[1, None][1] >> 24 == apic_id
    assert table[0xB, 1][1] == threads
    assert (1 << table[0xB, 1][0]) >= threads
    assert len(rows) <= 64


def test_xsave_sizes() -> None:
    """SDM, "Processor Extended State Enumeration Main Leaf"."""
    rows = {(leaf, sub): registers for leaf, sub, *registers in cpuid_rows(parse("Nehalem,+xsave"))}
    assert rows[0xD, 0][:3] == [3, 576, 576]
    if available("avx"):
        rows = {(leaf, sub): registers for leaf, sub, *registers in cpuid_rows(parse("SandyBridge"))}
        assert rows[0xD, 0][:3] == [7, 832, 832]
        assert rows[0xD, 2][:2] == [256, 576]


def test_the_processor_answers_from_its_table() -> None:
    cpu = Cpu(1 << 20)
    configuration = parse("SandyBridge")
    models.install(cpu, configuration)
    eax, ebx, ecx, edx = inspection.cpuid(cpu, 0)
    assert (eax, ebx.to_bytes(4, "little") + edx.to_bytes(4, "little") + ecx.to_bytes(4, "little")) == (
        0xD,
        b"GenuineIntel",
    )
    assert inspection.cpuid(cpu, 0x80000002)[0].to_bytes(4, "little") == b"Inte"
    assert not inspection.cpuid(cpu, 1)[2] >> 27 & 1
    inspection.put(cpu, "cr4", 1 << 18)
    assert inspection.cpuid(cpu, 1)[2] >> 27 & 1  # OSXSAVE follows CR4
    assert inspection.cpuid(cpu, 0x20) == inspection.cpuid(cpu, 0xD)  # beyond the highest: the highest basic leaf
    with pytest.raises(ValueError, match="at most"):
        set_table(cpu.state_address, [(0, None, 0, 0, 0, 0)] * 65, 0, 0, 0, 0)
