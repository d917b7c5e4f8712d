"""The local APIC's deadline by the VMX-preemption timer (kvm_lapic_expired_hv_timer()), and without it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vmonty.cpu.vmcs import Field
from vmonty.kvm.soft.kvm_main import Kvm
from vmonty.kvm.soft.provider import SoftKvm
from vmonty.kvm.soft.vmx.exits import VmxExits
from vmonty.testing.guests import DATA, Mode, TinyGuest

from .conftest import with_irqchip
from .test_fastpath import APIC_ON, DEADLINE_MODE, VECTOR, noted

WRMSR, PREEMPTION_TIMER = 32, 52
EOI = "mov ecx, 0x80b\n xor eax, eax\n xor edx, edx\n wrmsr\n"
TICK = f"push rax\n push rcx\n push rdx\n lock inc dword [abs {DATA}]\n {EOI} pop rdx\n pop rcx\n pop rax\n iretq"
COUNT = 50


def deadline(ticks: int) -> str:
    """IA32_TSC_DEADLINE: *ticks* from now."""
    return f"""
        rdtsc
        shl rdx, 32
        or rax, rdx
        mov rcx, {ticks}
        add rax, rcx
        mov rdx, rax
        shr rdx, 32
        mov ecx, 0x6e0
        wrmsr
    """


def awaited(ticks: int, wait: str) -> str:
    """COUNT deadlines, one after the other, and *wait* until each has come; then OUT."""
    return f"""
        {APIC_ON} {DEADLINE_MODE}
        xor ebx, ebx
    next:
        {deadline(ticks)}
    again:
        cli
        cmp [abs {DATA}], ebx
        jne came
        sti
        {wait}
        jmp again
    came:
        sti
        inc ebx
        cmp ebx, {COUNT}
        jb next
        out 0x10, al
    """


@pytest.fixture(params=[True, False], ids=["hv-timer", "host-timer"])
def by_processor(request: pytest.FixtureRequest) -> bool:
    chosen: bool = request.param
    return chosen


@pytest.fixture
def guest(by_processor: bool) -> Iterator[TinyGuest]:
    with with_irqchip("kvm_intel", preemption_timer=by_processor) as made:
        yield made


@pytest.mark.parametrize("wait", ["pause", "hlt", "out 0x20, al"], ids=["running", "halted", "exiting"])
@pytest.mark.parametrize("ticks", [100, 200_000, 5_000_000])
def test_each_deadline_comes_once(guest: TinyGuest, wait: str, ticks: int) -> None:
    guest.load(Mode.LONG, awaited(ticks, wait), {VECTOR: TICK})
    while (port := guest.out()[0]) != 0x10:
        assert port == 0x20
    assert guest.ram.read_u32(DATA) == COUNT


def test_the_host_has_no_timer_of_a_guest_that_runs(guest: TinyGuest, by_processor: bool) -> None:
    """kvm_lapic_switch_to_sw_timer() is for one that blocks; it comes out with the deadline."""
    guest.load(
        Mode.LONG,
        f"{APIC_ON} {DEADLINE_MODE} {deadline(1 << 50)} out 0x10, al\n"
        f"{deadline(5_000_000)} out 0x11, al\n sti\n hlt\n out 0x12, al",
        {VECTOR: TICK},
    )
    provider = guest.vm.provider
    assert isinstance(provider, SoftKvm)
    file = provider._files[guest.vm.fileno()]
    assert isinstance(file, Kvm)
    timers = file.timers
    assert guest.out()[0] == 0x10
    assert len(timers) == (not by_processor)
    assert guest.out()[0] == 0x11
    assert not (by_processor and len(timers))
    assert guest.out()[0] == 0x12
    assert guest.ram.read_u32(DATA) == 1
    assert len(timers) == 0


def test_an_earlier_deadline_needs_no_python(
    guest: TinyGuest, by_processor: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does its end: such exits are the processor's and the run loop's alone."""
    seen: list[object] = []
    guest.load(
        Mode.LONG,
        f"{APIC_ON} {DEADLINE_MODE} out 0x10, al\n sti\n {deadline(1 << 40)} {deadline(1 << 39)} {deadline(100_000)}"
        f"again: cmp dword [abs {DATA}], 1\n jne again\n out 0x11, al",
        {VECTOR: TICK},
    )
    assert guest.out()[0] == 0x10
    for reason in (WRMSR, PREEMPTION_TIMER):
        monkeypatch.setitem(VmxExits.HANDLERS, reason, noted(VmxExits.HANDLERS[reason], seen))
    assert guest.out()[0] == 0x11
    assert (seen == []) == by_processor


def test_somebody_watches(guest: TinyGuest, by_processor: bool) -> None:
    """A tracer sees the timer's exits, which then come to Python."""
    reasons: list[int] = []
    guest.vm.trace(lambda record: reasons.append(record.reason))
    guest.load(Mode.LONG, awaited(2_000_000, "pause"), {VECTOR: TICK})
    assert guest.out()[0] == 0x10
    assert guest.ram.read_u32(DATA) == COUNT
    assert (PREEMPTION_TIMER in reasons) == by_processor


def test_a_scaled_tsc_has_the_hosts_timer(guest: TinyGuest) -> None:
    """The processor counts at its own rate."""
    guest.vcpu.set_tsc_khz(guest.vcpu.get_tsc_khz() // 2)
    guest.load(Mode.LONG, awaited(100_000, "pause"), {VECTOR: TICK})
    assert guest.out()[0] == 0x10
    assert guest.ram.read_u32(DATA) == COUNT


def test_moved_and_disarmed(guest: TinyGuest) -> None:
    """Later, earlier, never: only the last word counts. The guest waits long enough for any of the others."""
    guest.load(
        Mode.LONG,
        f"""{APIC_ON} {DEADLINE_MODE} sti
        {deadline(3_000_000)} {deadline(1_000_000)}
        xor eax, eax
        xor edx, edx
        wrmsr
        rdtsc
        mov esi, eax
    spin:
        rdtsc
        sub eax, esi
        cmp eax, 6000000
        jb spin
        out 0x10, al
        {deadline(1 << 38)} {deadline(1_000_000)} {deadline(2_000_000)}
    again:
        cmp dword [abs {DATA}], 1
        jne again
        out 0x11, al""",
        {VECTOR: TICK},
    )
    assert guest.out()[0] == 0x10
    assert guest.ram.read_u32(DATA) == 0
    assert guest.out()[0] == 0x11


def test_the_timer_is_off_outside(guest: TinyGuest) -> None:
    """The emulator may enter: no timer may run out there."""
    guest.load(Mode.LONG, f"{APIC_ON} {DEADLINE_MODE} {deadline(1 << 40)} out 0x10, al\n hlt")
    assert guest.out()[0] == 0x10
    assert not guest.vcpu.dump_vmcs()[Field.PIN_BASED_VM_EXEC_CONTROL.name] & 1 << 6
