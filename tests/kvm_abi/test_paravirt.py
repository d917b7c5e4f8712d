"""The paravirtual interface beyond kvmclock. Source: Documentation/virt/kvm/x86: msr.rst, hypercalls.rst, cpuid.rst."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from vmonty.base.ram import Ram
from vmonty.kvm.api import CpuidEntry, Vcpu, Vm
from vmonty.kvm.uapi import Cap, flags
from vmonty.kvm.uapi.para import kvm_steal_time
from vmonty.testing.guests import DATA, USER_STACK, Mode, TinyGuest, load

from .irq_guests import APIC_ON, EOI, IPI_VECTOR, READY, REPORT, apic_guest, interrupted
from .runner import Runner

Start = Callable[[Vcpu], Runner]
FEATURES_LEAF = 0x40000001
TSC_SHIFT_TOLERANCE = 0.2


@pytest.fixture
def has(cpuid: list[CpuidEntry]) -> Callable[[int], None]:
    """Skips the test on a KVM without a feature."""
    offered = next((entry.eax for entry in cpuid if entry.function == FEATURES_LEAF), 0)

    def need(feature: int) -> None:
        if not offered >> feature & 1:
            pytest.skip(f"this KVM does not offer paravirtual feature {feature}")

    return need


@pytest.mark.needs(Cap.TSC_CONTROL)
def test_the_guests_tsc_runs_at_the_chosen_frequency(guest: TinyGuest) -> None:
    host = guest.vcpu.get_tsc_khz()
    guest.load(
        Mode.LONG, f"again: rdtsc\n mov [abs {DATA}], eax\n mov [abs {DATA + 4}], edx\n out 0x10, al\n jmp again"
    )
    for divisor in (1, 4):
        guest.vcpu.set_tsc_khz(host // divisor)
        guest.out()
        first, begin = guest.ram.read_u64(DATA), time.monotonic_ns()
        while time.monotonic_ns() - begin < 50_000_000:
            pass
        guest.out()
        ticks, seconds = guest.ram.read_u64(DATA) - first, (time.monotonic_ns() - begin) / 1e9
        assert ticks / seconds == pytest.approx(1000 * host / divisor, rel=TSC_SHIFT_TOLERANCE)
    assert guest.vcpu.get_tsc_khz() == host // 4


@pytest.mark.parametrize("bad", [2, 0x20])
def test_steal_time_msr_has_reserved_bits(vcpu: Vcpu, has: Callable[[int], None], bad: int) -> None:
    has(flags.KVM_FEATURE_STEAL_TIME)
    assert vcpu.set_msrs({flags.MSR_KVM_STEAL_TIME: DATA | bad}) == 0


def test_steal_time_is_told_and_never_goes_back(guest: TinyGuest, has: Callable[[int], None]) -> None:
    has(flags.KVM_FEATURE_STEAL_TIME)
    assert guest.vcpu.set_msrs({flags.MSR_KVM_STEAL_TIME: DATA | 1}) == 1
    guest.load(Mode.LONG, READY)
    before = 0
    for _ in range(50):
        guest.out()
        told = kvm_steal_time.from_buffer_copy(guest.ram.read(DATA, 64))
        assert told.version % 2 == 0
        assert told.steal >= before
        before = told.steal
    assert told.version > 0
    assert told.preempted == 0


def test_eoi_by_clearing_a_bit(chipped: TinyGuest, has: Callable[[int], None]) -> None:
    """The handler's EOI costs no exit where it finds the bit set; KVM is free not to set it. Ours does."""
    has(flags.KVM_FEATURE_PV_EOI)
    code = f"""
        push rax
        push rbx
        xor eax, eax
        btr dword [abs {DATA}], 0
        setc al
        jc told
        {EOI}
    told:
        out {REPORT:#x}, al
        pop rbx
        pop rax
        iretq
    """
    chipped.load(Mode.LONG, f"{APIC_ON} sti\n {READY}", handlers={IPI_VECTOR: code})
    assert chipped.vcpu.set_msrs({flags.MSR_KVM_PV_EOI_EN: DATA | 1}) == 1
    chipped.out()
    told = []
    for _ in range(3):
        chipped.vm.signal_msi(0xFEE00000, IPI_VECTOR)
        told.append(interrupted(chipped))
    if chipped.vm.provider.name == "soft":
        assert told[0] == 1  # an interrupt that waited for a window comes by the fast path, which tells nothing
    chipped.out()
    in_service = chipped.vcpu.get_lapic().regs
    assert not any(bytes(in_service)[0x100:0x180])


HYPERCALL = """
    mov eax, {number}
    mov rbx, {a0}
    mov rcx, {a1}
    mov rdx, {a2}
    mov rsi, {a3}
    {instruction}
    mov [abs {answer}], rax
"""


@pytest.fixture
def instruction(cpuid: list[CpuidEntry]) -> str:
    """This processor's hypercall instruction."""
    vendor = next(entry for entry in cpuid if entry.function == 0)
    return "vmmcall" if vendor.ecx == int.from_bytes(b"cAMD", "little") else "vmcall"


def hypercall(instruction: str, number: int, *arguments: int) -> str:
    """The call, whose answer goes to DATA."""
    a0, a1, a2, a3 = (*arguments, 0, 0, 0, 0)[:4]
    return HYPERCALL.format(number=number, a0=a0, a1=a1, a2=a2, a3=a3, instruction=instruction, answer=DATA)


@pytest.mark.known_gap("hypercall")
def test_ipis_by_hypercall(chipped: TinyGuest, instruction: str, has: Callable[[int], None]) -> None:
    """To those of the bitmap that there are; the answer is how many."""
    has(flags.KVM_FEATURE_PV_SEND_IPI)
    call = hypercall(instruction, flags.KVM_HC_SEND_IPI, 0b101, 0, 0, IPI_VECTOR)
    apic_guest(chipped, call, IPI_VECTOR)
    assert interrupted(chipped) == IPI_VECTOR
    assert chipped.ram.read_u64(DATA) == 1


@pytest.mark.known_gap("hypercall")
@pytest.mark.parametrize("icr", [IPI_VECTOR | 0x800, IPI_VECTOR | 0x40000], ids=["logical", "shorthand"])
def test_ipis_that_no_hypercall_sends(
    chipped: TinyGuest, instruction: str, has: Callable[[int], None], icr: int
) -> None:
    has(flags.KVM_FEATURE_PV_SEND_IPI)
    chipped.load(Mode.LONG, hypercall(instruction, flags.KVM_HC_SEND_IPI, 1, 0, 0, icr) + READY)
    chipped.out()
    assert chipped.ram.read_u64(DATA) == (1 << 64) - 22


@pytest.mark.known_gap("hypercall")
@pytest.mark.parametrize("kick_first", [False, True], ids=["halted", "about-to-halt"])
@pytest.mark.known_gap("pv-kick")
def test_kick_ends_a_halt_with_interrupts_off(
    configured: Vm, ram: Ram, instruction: str, has: Callable[[int], None], runner: Start, kick_first: bool
) -> None:
    has(flags.KVM_FEATURE_PV_UNHALT)
    configured.create_irqchip()
    with configured.create_vcpu(0) as first, configured.create_vcpu(1) as second:
        guest = TinyGuest(configured, first, ram)
        guest.load(Mode.LONG, f"out 0x11, al\n {hypercall(instruction, flags.KVM_HC_KICK_CPU, 0, 1)} {READY}")
        load(second, ram, Mode.LONG, "cli\n out 0x12, al\n hlt\n mov al, 7\n out 0x13, al\n" + READY, code=0x9000,
             stack=USER_STACK)  # fmt: skip
        second.set_mp_state(flags.KVM_MP_STATE_RUNNABLE)
        if kick_first:
            assert TinyGuest(configured, second, ram).out()[0] == 0x12
            guest.out()
            guest.out()
        thread = runner(second)
        if not kick_first:
            assert thread.next() == (0x12, 0)
            guest.out()
            guest.out()
        assert thread.next() == (0x13, 7)
        second.kick()


@pytest.mark.known_gap("hypercall")
def test_clock_pairing(guest: TinyGuest, instruction: str) -> None:
    """KVM_HC_CLOCK_PAIRING: the host's real time; or the answer that it cannot."""
    where = DATA + 64
    guest.load(Mode.LONG, hypercall(instruction, flags.KVM_HC_CLOCK_PAIRING, where, 0) + READY)
    before = time.time_ns()
    guest.out()
    answer = guest.ram.read_u64(DATA)
    if answer:
        assert answer in ((1 << 64) - 95, (1 << 64) - 1000)
    else:
        told = guest.ram.read_u64(where) * 1_000_000_000 + guest.ram.read_u64(where + 8)
        assert before - 1_000_000 <= told <= time.time_ns() + 1_000_000


def test_halts_may_be_left_to_the_guest(vcpu: Vcpu, has: Callable[[int], None]) -> None:
    has(flags.KVM_FEATURE_POLL_CONTROL)
    assert vcpu.get_msrs([flags.MSR_KVM_POLL_CONTROL]) == {flags.MSR_KVM_POLL_CONTROL: 1}
    assert vcpu.set_msrs({flags.MSR_KVM_POLL_CONTROL: 0}) == 1
    assert vcpu.set_msrs({flags.MSR_KVM_POLL_CONTROL: 2}) == 0
