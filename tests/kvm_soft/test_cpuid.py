"""CPUID of a guest under KVM in software: it decides which instructions there are, as far as user space set it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vmonty import kvm
from vmonty.base.ram import Ram
from vmonty.kvm.api import CpuidEntry, System
from vmonty.kvm.soft import cpuid
from vmonty.testing.guests import RAM_SIZE, Mode, TinyGuest

POPCNT = "mov ecx, 0xF1\n popcnt eax, ecx\n out 0x10, al"
UD_HANDLER = {6: "mov al, 0xEE\n out 0x10, al"}
LEAF_1_POPCNT = 1 << 23


@pytest.fixture
def system() -> Iterator[System]:
    with System(kvm.provider("soft")) as opened:
        yield opened


@pytest.fixture
def guest(system: System) -> Iterator[TinyGuest]:
    ram = Ram(RAM_SIZE)
    vm = system.create_vm()
    vm.set_user_memory_region(0, 0, ram)
    made = TinyGuest(vm, vm.create_vcpu(0), ram)
    yield made
    made.close()


def without_popcnt(entries: list[CpuidEntry]) -> list[CpuidEntry]:
    return [e._replace(ecx=e.ecx & ~LEAF_1_POPCNT) if e.function == 1 else e for e in entries]


def test_an_instruction_that_cpuid_hides_is_ud(system: System, guest: TinyGuest) -> None:
    guest.load(Mode.LONG, POPCNT, UD_HANDLER, without_popcnt(system.supported_cpuid()))
    assert guest.out() == (0x10, 0xEE)


def test_what_is_supported_executes(system: System, guest: TinyGuest) -> None:
    guest.load(Mode.LONG, POPCNT, UD_HANDLER, system.supported_cpuid())
    assert guest.out() == (0x10, 5)


def test_without_cpuid_every_instruction_is_there(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, POPCNT, UD_HANDLER)
    assert guest.out() == (0x10, 5)


def test_a_leaf_that_says_nothing_of_features_hides_nothing(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, POPCNT, UD_HANDLER, [CpuidEntry(0, 0, 0, 0xD, 1, 2, 3)])
    assert guest.out() == (0x10, 5)


def test_ranges_are_decided_by_their_feature_leaves(system: System) -> None:
    everything = cpuid.instructions(cpuid.supported())
    assert everything == cpuid.instructions([])
    basic = cpuid.instructions([entry for entry in cpuid.supported() if entry.function in (0, 1)])
    assert {"syscall", "lm"} <= basic  # of the extended range, of which nothing was said
    assert not {"bmi2", "avx2", "fsgsbase"} & basic  # leaf 7 is not there: its bits are zero
