"""Asynchronous page faults: a guest does something else while the host fetches a page.

Source: Documentation/virt/kvm/x86: msr.rst, MSR_KVM_ASYNC_PF_EN, _INT, _ACK; cpuid.rst.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from vmonty.base.ram import PAGE_SIZE, Ram
from vmonty.kvm.api import CpuidEntry, Vcpu, Vm
from vmonty.kvm.uapi import Cap, Exit, flags
from vmonty.testing.guests import CODE, DATA, Mode, TinyGuest

from .async_guests import (
    ACK,
    AS_INT,
    AWAY,
    BROADCAST,
    DONE,
    ELSEWHERE,
    EN,
    ENABLED,
    HANDLERS,
    INT,
    MEANWHILE,
    ON,
    PAGES,
    READY_VECTOR,
    REASON,
    SAVED,
    SEND_ALWAYS,
    TIMES,
    TOKEN,
    TOLD_ABSENT,
    TOLD_READY,
    TOUCH,
    VALUE,
    begin,
    enable,
    program,
    told,
    until,
    wrmsr,
)
from .irq_guests import APIC_ICR, APIC_ICR2, APIC_ON, EOI, IPI_VECTOR, REPORT, apic_write
from .missing_memory import MissingMemory, missing_slot
from .runner import Runner

Start = Callable[[Vcpu], Runner]
FEATURES_LEAF = 0x40000001


@pytest.fixture(autouse=True)
def offered(cpuid: list[CpuidEntry]) -> None:
    features = next((entry.eax for entry in cpuid if entry.function == FEATURES_LEAF), 0)
    if not features >> flags.KVM_FEATURE_ASYNC_PF_INT & features >> flags.KVM_FEATURE_ASYNC_PF & 1:
        pytest.skip("this KVM offers no asynchronous page faults")


# ---- MSRs --------------------------------------------------------------------------------------------------------


def takes(vcpu: Vcpu, index: int, value: int) -> bool:
    return vcpu.set_msrs({index: value}) == 1


@pytest.mark.parametrize(
    ("index", "value", "taken"),
    [
        (EN, 0, True), (EN, ON, True), (EN, DATA | ENABLED, True), (EN, ON | SEND_ALWAYS, True), (EN, DATA, True),
        (EN, ON | 0x10, False), (EN, ON | 0x20, False), (EN, ON | 1 << 40, False), (EN, 1 << 40, True),
        (INT, 0, True), (INT, 0xFF, True), (INT, 0x100, False), (INT, 1 << 63, False),
        (ACK, 0, True), (ACK, 1, True), (ACK, 2, True),
    ],
)  # fmt: skip
def test_what_the_msrs_take(chipped: TinyGuest, index: int, value: int, taken: bool) -> None:
    assert takes(chipped.vcpu, index, value) is taken
    if taken:
        assert chipped.vcpu.get_msrs([index]) == {index: 0 if index == ACK else value}


def test_msrs_without_a_local_apic(vcpu: Vcpu) -> None:
    assert takes(vcpu, EN, 0)
    assert not takes(vcpu, EN, ON)
    assert not takes(vcpu, INT, READY_VECTOR)
    assert vcpu.get_msrs([EN, INT, ACK]) == {EN: 0, INT: 0, ACK: 0}


def without(cpuid: list[CpuidEntry], *features: int) -> list[CpuidEntry]:
    mask = ~sum(1 << feature for feature in features)
    return [leaf._replace(eax=leaf.eax & mask) if leaf.function == FEATURES_LEAF else leaf for leaf in cpuid]


FEATURE_OF = [
    (EN, flags.KVM_FEATURE_ASYNC_PF), (INT, flags.KVM_FEATURE_ASYNC_PF_INT), (ACK, flags.KVM_FEATURE_ASYNC_PF_INT),
    (flags.MSR_KVM_STEAL_TIME, flags.KVM_FEATURE_STEAL_TIME), (flags.MSR_KVM_PV_EOI_EN, flags.KVM_FEATURE_PV_EOI),
    (flags.MSR_KVM_POLL_CONTROL, flags.KVM_FEATURE_POLL_CONTROL),
    (flags.MSR_KVM_SYSTEM_TIME_NEW, flags.KVM_FEATURE_CLOCKSOURCE2),
    (flags.MSR_KVM_WALL_CLOCK_NEW, flags.KVM_FEATURE_CLOCKSOURCE2),
    (flags.MSR_KVM_SYSTEM_TIME, flags.KVM_FEATURE_CLOCKSOURCE),
]  # fmt: skip


@pytest.mark.needs(Cap.ENFORCE_PV_FEATURE_CPUID)
@pytest.mark.parametrize(("index", "feature"), FEATURE_OF)
def test_msrs_of_features_that_the_guest_has_not(
    chipped: TinyGuest, cpuid: list[CpuidEntry], index: int, feature: int
) -> None:
    """For user space, too; but since Linux 6.14 they read as 0, which may be written."""
    chipped.vcpu.enable_cap(Cap.ENFORCE_PV_FEATURE_CPUID, 1)
    chipped.load(
        Mode.LONG,
        f"mov ecx, {index:#x}\n rdmsr\n out 0x10, al\n mov ecx, {index:#x}\n xor eax, eax\n xor edx, edx\n wrmsr\n"
        f"out 0x10, al\n",
        {13: "out 0x1d, al\n add rsp, 8\n add qword [rsp], 2\n iretq"},
        without(cpuid, feature),
    )
    assert not takes(chipped.vcpu, index, 1)
    assert chipped.vcpu.get_msrs([index]) in ({}, {index: 0})
    assert [chipped.out()[0] for _ in range(4)] == [0x1D, 0x10, 0x1D, 0x10]


@pytest.mark.needs(Cap.ENFORCE_PV_FEATURE_CPUID)
def test_without_interrupts_it_cannot_be_turned_on(chipped: TinyGuest, cpuid: list[CpuidEntry]) -> None:
    vcpu = chipped.vcpu
    vcpu.enable_cap(Cap.ENFORCE_PV_FEATURE_CPUID, 1)
    vcpu.set_cpuid2(without(cpuid, flags.KVM_FEATURE_ASYNC_PF_INT))
    assert takes(vcpu, EN, DATA | ENABLED)
    assert not takes(vcpu, EN, ON)


@pytest.fixture
def pair(configured: Vm, ram: Ram) -> Iterator[tuple[TinyGuest, TinyGuest]]:
    """Two vCPUs with local APICs; the second waits for INIT and SIPI."""
    configured.create_irqchip()
    with configured.create_vcpu(0) as first, configured.create_vcpu(1) as second:
        yield TinyGuest(configured, first, ram), TinyGuest(configured, second, ram)


def test_init_turns_them_off(pair: tuple[TinyGuest, TinyGuest], runner: Start) -> None:
    first, second = pair
    set_before = {INT: READY_VECTOR, EN: ON, flags.MSR_KVM_STEAL_TIME: DATA + 0x40 | 1}
    assert second.vcpu.set_msrs(set_before) == 3
    first.ram.write(0x6000, bytes.fromhex("b007 e613 f4"))  # mov al, 7; out 0x13, al; hlt
    ipis = "".join(apic_write(APIC_ICR2, 1 << 24) + apic_write(APIC_ICR, command) for command in (0x4500, 0x4606))
    thread = runner(second.vcpu)
    first.load(Mode.LONG, f"{APIC_ON} {ipis} {DONE}")
    assert first.out()[0] == 0x10
    while (said := thread.next()) is Exit.INTR:  # EAGAIN: it has just been started
        thread = runner(second.vcpu)
    assert said == (0x13, 7)
    second.vcpu.kick()
    thread.end()
    assert second.vcpu.get_msrs(list(set_before)) == dict.fromkeys(set_before, 0)


# ---- guests -----------------------------------------------------------------------------------------------------


@pytest.fixture
def away(chipped: TinyGuest) -> Iterator[MissingMemory]:
    with missing_slot(chipped.vm, 1, AWAY, PAGES) as memory:
        yield memory


def test_who_waits_is_woken_when_it_is_turned_on(chipped: TinyGuest) -> None:
    """What was waited for on another host is lost: a broadcast, which is acknowledged as any."""
    again = f"{told(1)} {wrmsr(EN, ON)} {told(2)} {wrmsr(EN, ON)} {told(3)}"
    chipped.load(Mode.LONG, program(f"{enable(ON)} sti\n {again} {DONE}"), HANDLERS)
    assert [until(chipped, TOLD_READY) for _ in range(3)] == [BROADCAST] * 3
    until(chipped, 0x10)


def test_no_second_one_before_the_first_is_acknowledged(chipped: TinyGuest) -> None:
    hold = f"inc dword [abs {TIMES}]\n mov eax, [abs {TOKEN}]\n out {TOLD_READY:#x}, eax\n push rbx\n {EOI}"
    hold += " pop rbx\n iretq"
    chipped.load(
        Mode.LONG,
        f"{enable(ON)} sti\n {told(1)} {wrmsr(EN, ON)} out 0x10, al\n mov dword [abs {TOKEN}], 0\n out 0x10, al\n"
        f"{wrmsr(ACK, 1)} {told(2)} {DONE}",
        {READY_VECTOR: hold},
    )
    assert until(chipped, TOLD_READY) == BROADCAST
    until(chipped, 0x10)
    assert chipped.out()[0] == 0x10
    assert until(chipped, TOLD_READY) == BROADCAST
    assert chipped.ram.read_u32(TOKEN) == BROADCAST


@pytest.mark.parametrize("value", [0, DATA | ENABLED, DATA | AS_INT], ids=["off", "no-interrupt", "not-enabled"])
def test_nobody_is_told_while_it_is_off(chipped: TinyGuest, value: int) -> None:
    chipped.load(Mode.LONG, program(f"{enable(value)} sti\n nop\n {DONE}"), HANDLERS)
    assert [chipped.out()[0] for _ in range(3)] == [0x10] * 3
    assert chipped.ram.read_u64(REASON) == 0


@pytest.mark.known_gap("async-pf")
@pytest.mark.parametrize(
    "access",
    [f"mov eax, [abs {AWAY}]", f"xor eax, eax\n lock xadd [abs {AWAY}], eax\n mov eax, [abs {AWAY}]"],
    ids=["read", "locked"],
)
def test_something_else_is_done_while_a_page_is_away(chipped: TinyGuest, away: MissingMemory, access: str) -> None:
    begin(chipped, f"{access}\n out {VALUE:#x}, eax\n {DONE}", ON | SEND_ALWAYS)
    token = until(chipped, TOLD_ABSENT)
    assert token & 0xFFF == chipped.vcpu.id
    assert token >> 12
    assert away.wanted() == 0
    assert [chipped.out()[0] for _ in range(20)] == [MEANWHILE] * 20
    away.give(0, 0x600D)
    assert until(chipped, TOLD_READY) == token
    assert chipped.out() == (VALUE, 0x600D)


@pytest.mark.known_gap("async-pf")
def test_code_that_is_away(chipped: TinyGuest, away: MissingMemory) -> None:
    begin(chipped, f"mov eax, {AWAY}\n call rax\n out {VALUE:#x}, eax\n {DONE}", ON | SEND_ALWAYS)
    token = until(chipped, TOLD_ABSENT)
    assert away.wanted() == 0
    assert chipped.out()[0] == MEANWHILE
    away.give(0, int.from_bytes(bytes.fromhex("b8 2a000000 c3"), "little"))  # mov eax, 42; ret
    assert until(chipped, TOLD_READY) == token
    assert chipped.out() == (VALUE, 42)


@pytest.mark.known_gap("async-pf")
def test_two_pages_come_in_the_other_order(chipped: TinyGuest, away: MissingMemory) -> None:
    """What runs meanwhile misses a page, too. Nobody goes on here: tokens are all that is looked at."""
    second = f"mov qword [abs {SAVED}], 0\n mov eax, [abs {AWAY + PAGE_SIZE}]\n"
    begin(chipped, TOUCH, ON | SEND_ALWAYS, f"cmp byte [abs {SAVED + 8}], 0\n jne elsewhere\n"
          f"mov byte [abs {SAVED + 8}], 1\n {second} {ELSEWHERE}")  # fmt: skip
    tokens = [until(chipped, TOLD_ABSENT)]
    assert away.wanted() == 0
    tokens.append(until(chipped, TOLD_ABSENT))
    assert away.wanted() == 1
    assert tokens[0] != tokens[1]
    chipped.ram.write_u64(SAVED, 0)
    away.give(1, 1)
    assert until(chipped, TOLD_READY) == tokens[1]
    away.give(0, 2)
    assert until(chipped, TOLD_READY) == tokens[0]


@pytest.mark.known_gap("async-pf")
def test_interrupts_come_while_a_page_is_away(chipped: TinyGuest, away: MissingMemory, runner: Start) -> None:
    """In CPL 0 without KVM_ASYNC_PF_SEND_ALWAYS the vCPU waits as if halted."""
    begin(chipped, f"{TOUCH} {DONE}")
    thread = runner(chipped.vcpu)
    assert away.wanted() == 0
    for _ in range(2):
        chipped.vm.signal_msi(0xFEE00000, IPI_VECTOR)
        assert thread.next() == (REPORT, IPI_VECTOR)
    assert chipped.vcpu.kvm_run.exit_reason == Exit.IO
    away.give(0, 0x600D)
    assert thread.next() == (VALUE, 0x600D)


@pytest.mark.known_gap("async-pf")
def test_interrupts_wait_where_the_guest_does_not_take_them(
    chipped: TinyGuest, away: MissingMemory, runner: Start
) -> None:
    begin(chipped, f"cli\n {TOUCH} sti\n {DONE}", ON | SEND_ALWAYS)
    thread = runner(chipped.vcpu)
    assert away.wanted() == 0
    chipped.vm.signal_msi(0xFEE00000, IPI_VECTOR)
    away.give(0, 0x600D)
    assert thread.next() == (VALUE, 0x600D)
    while (said := thread.next()) != (REPORT, IPI_VECTOR):
        assert said == (0x10, 0x0D)


@pytest.mark.known_gap("async-pf")
def test_user_space_gets_its_thread_back(chipped: TinyGuest, away: MissingMemory, runner: Start) -> None:
    begin(chipped, f"{TOUCH} {DONE}")
    thread = runner(chipped.vcpu)
    assert away.wanted() == 0
    chipped.vcpu.kick()
    assert thread.next() is Exit.INTR
    thread.join()
    assert chipped.vcpu.get_mp_state() == flags.KVM_MP_STATE_RUNNABLE
    away.give(0, 0x600D)
    assert chipped.out() == (VALUE, 0x600D)


@pytest.mark.known_gap("int-n-cpl3")
def test_in_cpl3_without_send_always(chipped: TinyGuest, away: MissingMemory) -> None:
    chipped.load(
        Mode.USER,
        program(f"int 0x80\n sti\n {told(1)} {TOUCH} {DONE}\n kernel: {enable(ON)} iretq\n times 0x400-($-$$) nop\n"
                f"jmp kernel"),
        HANDLERS | {0x80: f"jmp {CODE + 0x400:#x}"},
    )  # fmt: skip
    assert until(chipped, TOLD_READY) == BROADCAST
    token = until(chipped, TOLD_ABSENT)
    assert away.wanted() == 0
    assert chipped.out()[0] == MEANWHILE
    away.give(0, 0x600D)
    assert until(chipped, TOLD_READY) == token
    assert chipped.out() == (VALUE, 0x600D)
