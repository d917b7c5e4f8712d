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
@pytest.mark.parametrize(
    "mode",
    [
        pytest.param(Mode.LONG, id=Mode.LONG.value),
        pytest.param(Mode.USER, id=Mode.USER.value, marks=pytest.mark.known_gap("cpuid-cpl3")),
    ],
)
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


# Feature → leaf, register, bit; and what a guest without it must not do.
FEATURES = {
    "xsave": (1, "ecx", 26, "mov rax, cr4\n bts rax, 18\n mov cr4, rax"),
    "pcid": (1, "ecx", 17, "mov rax, cr4\n bts rax, 17\n mov cr4, rax"),
    "fsgsbase": (7, "ebx", 0, "mov rax, cr4\n bts rax, 16\n mov cr4, rax"),
    "smep": (7, "ebx", 7, "mov rax, cr4\n bts rax, 20\n mov cr4, rax"),
    "smap": (7, "ebx", 20, "mov rax, cr4\n bts rax, 21\n mov cr4, rax"),
    "umip": (7, "ecx", 2, "mov rax, cr4\n bts rax, 11\n mov cr4, rax"),
    "nx": (0x80000001, "edx", 20, "mov ecx, 0xC0000080\n rdmsr\n bts eax, 11\n wrmsr"),
    "avx": (
        1, "ecx", 28,
        "mov rax, cr4\n bts rax, 18\n mov cr4, rax\n xor ecx, ecx\n xor edx, edx\n mov eax, 7\n xsetbv",
    ),
}  # fmt: skip
RESULTS = {13: "out 0x11, al"}


GAPS = {"umip": "cpuid-umip", "avx": "xsetbv-exit"}


def without(cpuid: list[CpuidEntry], *features: tuple[int, str, int]) -> list[CpuidEntry]:
    """CPUID without some features."""
    left = cpuid
    for leaf, register, bit in features:
        left = [
            entry._replace(**{register: getattr(entry, register) & ~(1 << bit)}) if entry.function == leaf else entry
            for entry in left
        ]
    return left


@pytest.mark.parametrize(
    "feature",
    [pytest.param(name, marks=pytest.mark.known_gap(GAPS[name]) if name in GAPS else ()) for name in FEATURES],
)
def test_control_bits_follow_their_features(guest: TinyGuest, cpuid: list[CpuidEntry], feature: str) -> None:
    """kvm_set_cr4(), set_efer(), __kvm_set_xcr(): #GP for what CPUID does not show."""
    leaf, register, bit, source = FEATURES[feature]
    if not any(entry.function == leaf and getattr(entry, register) >> bit & 1 for entry in cpuid):
        pytest.skip(f"this KVM offers guests no {feature}")
    if feature == "avx":  # the components of XCR0 are what leaf 0xD says
        cpuid = [e._replace(eax=e.eax & 3) if (e.function, e.index) == (0xD, 0) else e for e in cpuid]
    guest.load(Mode.LONG, f"{source}\n out 0x10, al", RESULTS, without(cpuid, (leaf, register, bit)))
    assert guest.out()[0] == 0x11


@pytest.mark.parametrize("feature", FEATURES)
def test_control_bits_of_features_that_are_there(guest: TinyGuest, cpuid: list[CpuidEntry], feature: str) -> None:
    leaf, register, bit, source = FEATURES[feature]
    if feature == "smep" or not any(e.function == leaf and getattr(e, register) >> bit & 1 for e in cpuid):
        pytest.skip(f"this KVM offers guests no {feature}, or the guest's code is a user's")
    guest.load(Mode.LONG, f"{source}\n out 0x10, al", RESULTS, cpuid)
    assert guest.out()[0] == 0x10


@pytest.mark.known_gap("speculation-msrs")
@pytest.mark.parametrize(("index", "access"), [(0x48, "rdmsr"), (0x48, "wrmsr"), (0x49, "wrmsr")])
def test_msrs_of_features_that_are_off(guest: TinyGuest, cpuid: list[CpuidEntry], index: int, access: str) -> None:
    """IA32_SPEC_CTRL and IA32_PRED_CMD: guest_has_spec_ctrl_msr(), guest_has_pred_cmd_msr()."""
    off = without(
        cpuid, (7, "edx", 26), (7, "edx", 27), (7, "edx", 31),
        *((0x80000008, "ebx", bit) for bit in (12, 14, 15, 24, 28)), *((0x80000021, "eax", bit) for bit in (27, 28)),
    )  # fmt: skip
    source = f"mov ecx, {index}\n xor eax, eax\n xor edx, edx\n {access}\n out 0x10, al"
    guest.load(Mode.LONG, source, RESULTS, off)
    assert guest.out()[0] == 0x11


def test_apic_bit_follows_the_apic_base(chipped: TinyGuest, cpuid: list[CpuidEntry]) -> None:
    """SDM, "Local APIC Status and Location": IA32_APIC_BASE.EN clear clears CPUID's bit."""
    toggle = "mov ecx, 0x1B\n rdmsr\n xor eax, 0x800\n wrmsr"
    look = "mov eax, 1\n cpuid\n shr edx, 9\n and edx, 1\n mov eax, edx\n out 0x10, eax"
    chipped.load(Mode.LONG, f"{look}\n {toggle}\n {look}\n {toggle}\n {look}", RESULTS, cpuid)
    assert chipped.outs(3) == [1, 0, 1]


def test_efer_lme_is_fixed_under_paging(guest: TinyGuest, cpuid: list[CpuidEntry]) -> None:
    """SDM, "Initializing IA-32e Mode": EFER.LME may not change while CR0.PG is set."""
    guest.load(
        Mode.LONG, "mov ecx, 0xC0000080\n rdmsr\n btr eax, 8\n wrmsr\n rdmsr\n bt eax, 8\n out 0x10, al", RESULTS, cpuid
    )
    assert guest.out()[0] == 0x11
