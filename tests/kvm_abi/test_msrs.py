"""MSRs: lists, round trips, exits to user space, filters. Source: api.rst, KVM_GET_MSRS, KVM_CAP_X86_USER_SPACE_MSR."""

from __future__ import annotations

import ctypes
import errno

import pytest

from vmonty.kvm.api import CpuidEntry, System, Vcpu
from vmonty.kvm.uapi import Cap, Exit
from vmonty.kvm.uapi.flags import (
    KVM_MSR_EXIT_REASON_FILTER,
    KVM_MSR_EXIT_REASON_INVAL,
    KVM_MSR_EXIT_REASON_UNKNOWN,
    KVM_MSR_FILTER_READ,
    KVM_MSR_FILTER_WRITE,
)
from vmonty.kvm.uapi.vm import kvm_msr_filter_range
from vmonty.testing.guests import Mode, TinyGuest, describe

from .known_gaps import platform
from .refusals import refused

UNKNOWN = 0x4B000001  # between the ranges that processors and KVM use
TSC = 0x10
ROUND_TRIPS = [
    ("sysenter-cs", 0x174, 0x1230),
    # Processors of AMD keep 32 bits of these two.
    ("sysenter-esp", 0x175, 0x7FFF0000),
    ("sysenter-eip", 0x176, 0x7FFF1000),
    ("star", 0xC0000081, 0x0023001000000000),
    ("lstar", 0xC0000082, 0x7FFFFFFF2000),
    ("cstar", 0xC0000083, 0x7FFFFFFF3000),
    ("fmask", 0xC0000084, 0x47700),
    ("fs-base", 0xC0000100, 0x7FFFFFFF4000),
    ("gs-base", 0xC0000101, 0x7FFFFFFF5000),
    ("kernel-gs-base", 0xC0000102, 0x7FFFFFFF6000),
    ("pat", 0x277, 0x0007010600070106),
    ("misc-enable", 0x1A0, 0x1),
    ("mtrr-def-type", 0x2FF, 0xC06),
    ("mtrr-fixed-4k", 0x268, 0x0606060606060606),
]


@pytest.mark.parametrize(("index", "value"), [row[1:] for row in ROUND_TRIPS], ids=[row[0] for row in ROUND_TRIPS])
def test_round_trip(vcpu: Vcpu, cpuid: list[CpuidEntry], index: int, value: int) -> None:
    vcpu.set_cpuid2(cpuid)
    assert vcpu.set_msrs({index: value}) == 1
    assert vcpu.get_msrs([index]) == {index: value}


def test_every_listed_msr_can_be_read(vcpu: Vcpu, system: System, cpuid: list[CpuidEntry]) -> None:
    """KVM_GET_MSR_INDEX_LIST names the MSRs that user space saves: with all of CPUID each can be read."""
    vcpu.set_cpuid2(cpuid)
    listed = system.msr_index_list()
    readable = [index for index in listed if index in vcpu.get_msrs([index])]
    # Those of features that the processor lacks may be listed and refused.
    assert len(readable) >= 10
    assert {0x174, 0x175, 0x176, 0xC0000081, 0xC0000082} <= set(readable)
    assert vcpu.get_msrs(readable).keys() == set(readable)


def test_get_stops_at_an_unknown_msr(vcpu: Vcpu) -> None:
    assert vcpu.get_msrs([0x174, UNKNOWN, 0x175]).keys() == {0x174}


def test_set_stops_at_an_unknown_msr(vcpu: Vcpu) -> None:
    assert vcpu.set_msrs({0x174: 8, UNKNOWN: 1, 0x175: 0x5000}) == 1
    assert vcpu.get_msrs([0x174, 0x175]) == {0x174: 8, 0x175: 0}


def test_too_many_msrs(vcpu: Vcpu) -> None:
    """At most 255 in one call (MAX_IO_MSRS)."""
    with refused(errno.E2BIG):
        vcpu.get_msrs([0x174] * 300)


def test_non_canonical_address(vcpu: Vcpu) -> None:
    """Refused in KERNEL_GS_BASE, as WRMSR would."""
    assert vcpu.set_msrs({0xC0000102: 1 << 60}) == 0


def test_guest_reads_what_user_space_set(guest: TinyGuest) -> None:
    guest.vcpu.set_msrs({0x176: 0x12345678})
    guest.load(
        Mode.LONG, "mov ecx, 0x176\n rdmsr\n out 0x10, eax\n mov eax, 0x99\n xor edx, edx\n wrmsr\n out 0x11, al"
    )
    assert guest.out() == (0x10, 0x12345678)
    assert guest.out()[0] == 0x11
    assert guest.vcpu.get_msrs([0x176]) == {0x176: 0x99}


def test_unknown_msr_in_the_guest_is_a_fault(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, f"mov ecx, {UNKNOWN:#x}\n rdmsr\n out 0x10, al", handlers={13: "mov al, 13\n out 0x20, al"})
    assert guest.out() == (0x20, 13)


FAULT = {13: "mov al, 13\n out 0x20, al"}


@pytest.mark.parametrize("index", [0xC1, 0x187, 0xC0010000, 0xC0010007])
def test_old_performance_counters_without_a_pmu(guest: TinyGuest, index: int) -> None:
    """kvm_set_msr_common(): what a guest without a PMU writes to the counters of a P6 or K7 is dropped."""
    guest.load(
        Mode.LONG, f"mov ecx, {index:#x}\n xor eax, eax\n xor edx, edx\n wrmsr\n rdmsr\n out 0x10, al", handlers=FAULT
    )
    assert guest.out() == (0x10, 0)


DEBUGCTL, LBR, BTF = 0x1D9, 1, 2
RESERVED_DEBUGCTL = [1 << 4, 1 << 16, 1 << 63]
WRITE_DEBUGCTL = f"""
    mov ecx, {DEBUGCTL:#x}
    mov eax, {{low:#x}}
    mov edx, {{high:#x}}
    wrmsr
    mov eax, -1
    mov edx, -1
    rdmsr
    out 0x10, eax
    mov eax, edx
    out 0x11, eax
"""


def has_amd_debugctl(provider_name: str) -> bool:
    """svm_set_msr() drops every value on a processor without LBR virtualization; vmx_set_msr() looks at it."""
    return platform(provider_name).startswith(("kvm_amd", "soft-svm"))


class TestDebugctl:
    """IA32_DEBUGCTL: no KVM lets a guest step on branches, and there are no branch records to be had here."""

    @pytest.mark.parametrize("value", [0, BTF, LBR, BTF | LBR])
    def test_user_space_sets_what_is_dropped(self, vcpu: Vcpu, value: int) -> None:
        assert vcpu.get_msrs([DEBUGCTL]) == {DEBUGCTL: 0}
        assert vcpu.set_msrs({DEBUGCTL: value}) == 1
        assert vcpu.get_msrs([DEBUGCTL]) == {DEBUGCTL: 0}

    @pytest.mark.known_gap("debugctl-reserved")
    @pytest.mark.parametrize("value", RESERVED_DEBUGCTL, ids=hex)
    def test_user_space_sets_reserved_bits(self, vcpu: Vcpu, provider_name: str, value: int) -> None:
        assert vcpu.set_msrs({DEBUGCTL: value}) == int(has_amd_debugctl(provider_name))
        assert vcpu.get_msrs([DEBUGCTL]) == {DEBUGCTL: 0}

    @pytest.mark.parametrize("value", [0, BTF, LBR, BTF | LBR])
    def test_guest_sets_what_is_dropped(self, guest: TinyGuest, value: int) -> None:
        guest.load(Mode.LONG, WRITE_DEBUGCTL.format(low=value, high=0), FAULT)
        assert [guest.out(), guest.out()] == [(0x10, 0), (0x11, 0)]

    @pytest.mark.known_gap("debugctl-reserved")
    @pytest.mark.parametrize("value", RESERVED_DEBUGCTL, ids=hex)
    def test_guest_sets_reserved_bits(self, guest: TinyGuest, provider_name: str, value: int) -> None:
        guest.load(Mode.LONG, WRITE_DEBUGCTL.format(low=value & 0xFFFFFFFF, high=value >> 32), FAULT)
        assert guest.out() == ((0x10, 0) if has_amd_debugctl(provider_name) else (0x20, 13))

    def test_guest_steps_instructions_not_branches(self, guest: TinyGuest) -> None:
        """TF traps behind the next instruction, whatever BTF was set to."""
        arm = f"mov ecx, {DEBUGCTL:#x}\n mov eax, {BTF}\n xor edx, edx\n wrmsr\n pushfq\n or dword [rsp], 0x100\n popfq"
        guest.load(
            Mode.LONG, f"{arm}\n nop\n nop\n jmp over\n over: out 0x10, al", {1: "mov rax, [rsp]\n out 0x20, eax"}
        )
        port, rip = guest.out()
        assert port == 0x20
        assert guest.ram.read(rip - 1, 3)[:2] == b"\x90\x90"


def test_machine_check_capability_is_there(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, "mov ecx, 0x179\n rdmsr\n mov al, 1\n out 0x10, al", handlers=FAULT)
    assert guest.out() == (0x10, 1)


READ = f"mov ecx, {UNKNOWN:#x}\n rdmsr\n out 0x10, eax\n mov eax, edx\n out 0x11, eax"
WRITE = f"mov ecx, {UNKNOWN:#x}\n mov eax, 0x55667788\n mov edx, 0x11223344\n wrmsr\n out 0x10, al"


def expect_msr(guest: TinyGuest, exit_reason: Exit, index: int, why: int) -> None:
    reason = guest.run()
    assert reason is exit_reason, describe(guest.vcpu, reason)
    msr = guest.vcpu.kvm_run.u.msr
    assert (msr.index, msr.reason) == (index, why)


@pytest.mark.needs(Cap.X86_USER_SPACE_MSR)
class TestUserSpaceMsr:
    def test_read_unknown(self, guest: TinyGuest) -> None:
        guest.vm.enable_cap(Cap.X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_UNKNOWN)
        guest.load(Mode.LONG, READ, FAULT)
        expect_msr(guest, Exit.X86_RDMSR, UNKNOWN, KVM_MSR_EXIT_REASON_UNKNOWN)
        guest.vcpu.kvm_run.u.msr.data, guest.vcpu.kvm_run.u.msr.error = 0xAABBCCDD00112233, 0
        assert guest.out() == (0x10, 0x00112233)
        assert guest.out() == (0x11, 0xAABBCCDD)

    def test_write_unknown(self, guest: TinyGuest) -> None:
        guest.vm.enable_cap(Cap.X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_UNKNOWN)
        guest.load(Mode.LONG, WRITE, FAULT)
        expect_msr(guest, Exit.X86_WRMSR, UNKNOWN, KVM_MSR_EXIT_REASON_UNKNOWN)
        assert guest.vcpu.kvm_run.u.msr.data == 0x1122334455667788
        guest.vcpu.kvm_run.u.msr.error = 0
        assert guest.out()[0] == 0x10

    @pytest.mark.parametrize("source", [READ, WRITE], ids=["read", "write"])
    def test_error_is_a_fault(self, guest: TinyGuest, source: str) -> None:
        """kvm_run.msr.error makes the guest's instruction #GP."""
        guest.vm.enable_cap(Cap.X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_UNKNOWN)
        guest.load(Mode.LONG, source, FAULT)
        assert guest.run() in (Exit.X86_RDMSR, Exit.X86_WRMSR)
        guest.vcpu.kvm_run.u.msr.error = 1
        assert guest.out() == (0x20, 13)

    def test_invalid_value(self, guest: TinyGuest) -> None:
        """KVM_MSR_EXIT_REASON_INVAL: a known MSR, a value that it cannot have (a reserved bit of EFER)."""
        guest.vm.enable_cap(Cap.X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_INVAL)
        guest.load(Mode.LONG, "mov ecx, 0xc0000080\n rdmsr\n bts eax, 9\n wrmsr\n out 0x10, al", FAULT)
        expect_msr(guest, Exit.X86_WRMSR, 0xC0000080, KVM_MSR_EXIT_REASON_INVAL)
        guest.vcpu.kvm_run.u.msr.error = 0
        assert guest.out()[0] == 0x10

    def test_unknown_reason(self, guest: TinyGuest) -> None:
        with refused(errno.EINVAL):
            guest.vm.enable_cap(Cap.X86_USER_SPACE_MSR, 1 << 30)


def filter_range(flags: int, base: int, bits: bytes) -> tuple[kvm_msr_filter_range, object]:
    """A range with one bit for each of its MSRs, and the bitmap that must outlive the request."""
    bitmap = ctypes.create_string_buffer(bits, len(bits))
    return kvm_msr_filter_range(flags=flags, nmsrs=len(bits) * 8, base=base, bitmap=ctypes.addressof(bitmap)), bitmap


@pytest.mark.needs(Cap.X86_MSR_FILTER)
class TestFilter:
    """KVM_X86_SET_MSR_FILTER: which MSRs a guest may touch."""

    SYSENTER = "mov ecx, 0x176\n rdmsr\n out 0x10, al\n wrmsr\n out 0x11, al"

    @pytest.mark.parametrize(
        ("flags", "answers"),
        [
            (KVM_MSR_FILTER_READ, [0x20]),
            (KVM_MSR_FILTER_WRITE, [0x10, 0x20]),
            (KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE, [0x20]),
        ],
        ids=["read", "write", "both"],
    )
    def test_denied_is_a_fault(self, guest: TinyGuest, flags: int, answers: list[int]) -> None:
        denied, _bitmap = filter_range(flags, 0x176, b"\0")
        guest.vm.set_msr_filter([denied])
        guest.load(Mode.LONG, self.SYSENTER, FAULT)
        assert [guest.out()[0] for _ in answers] == answers

    def test_allowed(self, guest: TinyGuest) -> None:
        allowed, _bitmap = filter_range(KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE, 0x170, b"\xff")
        guest.vm.set_msr_filter([allowed], default_deny=True)
        guest.load(Mode.LONG, self.SYSENTER + "\n mov ecx, 0x277\n rdmsr\n out 0x12, al", FAULT)
        assert [guest.out()[0] for _ in range(3)] == [0x10, 0x11, 0x20]

    def test_switched_off(self, guest: TinyGuest) -> None:
        denied, _bitmap = filter_range(KVM_MSR_FILTER_READ, 0x176, b"\0")
        guest.vm.set_msr_filter([denied])
        guest.vm.set_msr_filter([])
        guest.load(Mode.LONG, self.SYSENTER, FAULT)
        assert guest.out()[0] == 0x10

    def test_user_space_is_not_filtered(self, guest: TinyGuest) -> None:
        denied, _bitmap = filter_range(KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE, 0x176, b"\0")
        guest.vm.set_msr_filter([denied])
        assert guest.vcpu.set_msrs({0x176: 0x77}) == 1
        assert guest.vcpu.get_msrs([0x176]) == {0x176: 0x77}

    def test_exit_for_filtered(self, guest: TinyGuest) -> None:
        guest.vm.enable_cap(Cap.X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER)
        denied, _bitmap = filter_range(KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE, 0x176, b"\0")
        guest.vm.set_msr_filter([denied])
        guest.load(Mode.LONG, self.SYSENTER, FAULT)
        expect_msr(guest, Exit.X86_RDMSR, 0x176, KVM_MSR_EXIT_REASON_FILTER)
        guest.vcpu.kvm_run.u.msr.data = 0x42
        assert guest.out() == (0x10, 0x42)
        expect_msr(guest, Exit.X86_WRMSR, 0x176, KVM_MSR_EXIT_REASON_FILTER)
        assert guest.out()[0] == 0x11

    def test_unknown_range_flag(self, guest: TinyGuest) -> None:
        wrong, _bitmap = filter_range(1 << 20, 0x176, b"\0")
        with refused(errno.EINVAL):
            guest.vm.set_msr_filter([wrong])

    def test_deny_all_needs_a_range(self, guest: TinyGuest) -> None:
        """Without any range "deny by default" would deny everything: refused."""
        with refused(errno.EINVAL):
            guest.vm.set_msr_filter([], default_deny=True)
