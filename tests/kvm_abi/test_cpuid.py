"""CPUID of a vCPU. Source: api.rst, KVM_SET_CPUID2."""

from __future__ import annotations

import errno

import pytest

from vmonty.kvm.api import CpuidEntry, Vcpu
from vmonty.kvm.uapi.flags import KVM_CPUID_FLAG_SIGNIFCANT_INDEX
from vmonty.testing.guests import DATA, Mode, TinyGuest

from .refusals import refused

OURS = [
    CpuidEntry(0, 0, 0, 0xD, 0x6E6F6D76, 0x20207974, 0x20202020),
    CpuidEntry(4, 0, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, 0x11, 0x12, 0x13, 0x14),
    CpuidEntry(4, 1, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, 0x21, 0x22, 0x23, 0x24),
    CpuidEntry(0x80000000, 0, 0, 0x80000008, 0, 0, 0),
    CpuidEntry(0x80000002, 0, 0, 0x31323334, 2, 3, 4),
]
ASK = "".join(f"mov [abs {DATA + 4 * index}], {name}\n" for index, name in enumerate(("eax", "ebx", "ecx", "edx")))


def ask(guest: TinyGuest, mode: Mode, function: int, index: int) -> tuple[int, ...]:
    guest.load(mode, f"mov eax, {function:#x}\n mov ecx, {index}\n cpuid\n {ASK} out 0x10, al")
    assert guest.out()[0] == 0x10
    return tuple(guest.ram.read_u32(DATA + 4 * index) for index in range(4))


@pytest.mark.parametrize("entry", OURS, ids=lambda entry: f"{entry.function:#x}.{entry.index}")
@pytest.mark.parametrize("mode", [Mode.LONG, Mode.USER], ids=lambda mode: mode.value)
def test_guest_sees_what_was_set(guest: TinyGuest, mode: Mode, entry: CpuidEntry) -> None:
    guest.vcpu.set_cpuid2(OURS)
    assert ask(guest, mode, entry.function, entry.index) == (entry.eax, entry.ebx, entry.ecx, entry.edx)


def test_absent_leaf_is_zero(guest: TinyGuest) -> None:
    guest.vcpu.set_cpuid2(OURS)
    assert ask(guest, Mode.LONG, 4, 9) == (0, 0, 0, 0)


def test_round_trip(vcpu: Vcpu) -> None:
    assert vcpu.get_cpuid2() == []
    vcpu.set_cpuid2(OURS)
    assert vcpu.get_cpuid2() == OURS


def test_supported_can_be_set(vcpu: Vcpu, cpuid: list[CpuidEntry]) -> None:
    vcpu.set_cpuid2(cpuid)
    got = {(entry.function, entry.index) for entry in vcpu.get_cpuid2()}
    assert got == {(entry.function, entry.index) for entry in cpuid}


def test_no_room(vcpu: Vcpu) -> None:
    vcpu.set_cpuid2(OURS)
    with refused(errno.E2BIG):
        vcpu.get_cpuid2(room=len(OURS) - 1)
    assert vcpu.get_cpuid2(room=len(OURS)) == OURS


def test_too_many_leaves(vcpu: Vcpu) -> None:
    with refused(errno.E2BIG):
        vcpu.set_cpuid2([CpuidEntry(0x40000000 + number, 0, 0, 0, 0, 0, 0) for number in range(300)])


def test_old_request(guest: TinyGuest) -> None:
    """KVM_SET_CPUID has no sub-leaves."""
    flat = [entry for entry in OURS if entry.function != 4]
    guest.vcpu.set_cpuid(flat)
    assert guest.vcpu.get_cpuid2() == flat
    assert ask(guest, Mode.LONG, 0, 0)[1] == 0x6E6F6D76


def test_change_after_a_run(guest: TinyGuest) -> None:
    """Refused since Linux 5.16, unless it is the same."""
    guest.vcpu.set_cpuid2(OURS)
    guest.load(Mode.LONG, "out 0x10, al")
    guest.out()
    guest.vcpu.set_cpuid2(OURS)
    other = [*OURS, CpuidEntry(2, 0, 0, 1, 2, 3, 4)]
    with refused(errno.EINVAL):
        guest.vcpu.set_cpuid2(other)
    assert guest.vcpu.get_cpuid2() == OURS
