"""CPU models within what a KVM supports."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vmonty import kvm
from vmonty.base.cpu_models import FEATURES, MODELS
from vmonty.base.errors import UsageError
from vmonty.kvm.api import CpuidEntry, System
from vmonty.vmm import cpu


@pytest.fixture(scope="module")
def soft() -> Iterator[System]:
    with kvm.open("soft") as system:
        yield system


def features(table: list[CpuidEntry]) -> set[str]:
    found = set()
    for name, (leaf, subleaf, register, bit) in FEATURES.items():
        for entry in table:
            if entry.function == leaf and entry.index == subleaf and getattr(entry, register) >> bit & 1:
                found.add(name)
    return found


def test_a_models_features_are_its_own_as_far_as_this_kvm_has_them(soft: System) -> None:
    supported = features(cpu.table_maker(soft, "host", 1)(0))
    for name in MODELS.keys() - set(cpu.WHOLE):
        offered = features(cpu.table_maker(soft, name, 1)(0))
        assert offered <= MODELS[name].features & supported | {"tsc-deadline"}, name
        assert {"lm", "sse2", "apic", "hypervisor"} <= offered


def test_flags(soft: System) -> None:
    assert "pcid" not in features(cpu.table_maker(soft, "max,-pcid", 1)(0))
    assert "smep" in features(cpu.table_maker(soft, "Nehalem,+smep", 1)(0))
    assert "smep" not in features(cpu.table_maker(soft, "Nehalem", 1)(0))


def test_a_flag_that_this_kvm_lacks(soft: System) -> None:
    with pytest.raises(UsageError, match="'avx512f' can't be had"):
        cpu.table_maker(soft, "max,+avx512f", 1)


@pytest.mark.parametrize("model", ["host", "Haswell"])
def test_each_processor_has_its_own_id(soft: System, model: str) -> None:
    table = cpu.table_maker(soft, model, 4)
    for index in range(4):
        leaf_1 = next(entry for entry in table(index) if entry.function == 1)
        assert leaf_1.ebx >> 24 == index
        assert {entry.edx for entry in table(index) if entry.function == 0xB} == {index}


def test_the_paravirtual_leaves_stay(soft: System) -> None:
    leaves = {entry.function for entry in cpu.table_maker(soft, "kvm64", 1)(0)}
    assert {0x4000_0000, 0x4000_0001} <= leaves


def test_the_list() -> None:
    assert all(name in cpu.models() for name in MODELS)


def address_bits(table: list[CpuidEntry]) -> int:
    return next(entry.eax & 0xFF for entry in table if entry.function == 0x8000_0008)


def test_how_far_it_can_address(soft: System) -> None:
    assert address_bits(cpu.table_maker(soft, "max", 1)(0)) == 40
    assert address_bits(cpu.table_maker(soft, "Haswell", 1)(0)) == 40
    assert address_bits(cpu.table_maker(soft, "max,phys-bits=36", 1)(0)) == 36
    assert address_bits(cpu.table_maker(soft, "max,host-phys-bits=on", 1)(0)) == 46
    assert address_bits(cpu.table_maker(soft, "max,phys-bits=52", 1)(0)) == 46, "no more than this KVM has"
    assert address_bits(cpu.table_maker(soft, "max", 1, 3 << 40)(0)) == 42, "RAM above 1 TiB must be within reach"
    with pytest.raises(UsageError, match="addresses need 42"):
        cpu.table_maker(soft, "max,phys-bits=36", 1, 3 << 40)


@pytest.mark.parametrize("text", ["phys-bits=", "phys-bits=31", "phys-bits=53", "phys-bits=x", "phys-bits"])
def test_address_bits_that_no_processor_has(text: str) -> None:
    with pytest.raises(UsageError, match="from 32 to 52"):
        cpu.check(f"max,{text}")
