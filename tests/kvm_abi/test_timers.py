"""The PIT and the local APIC's timer. Source: api.rst, KVM_CREATE_PIT2; SDM, "APIC Timer"."""

from __future__ import annotations

import errno

import pytest

from vmonty.kvm.api import CpuidEntry, Vm
from vmonty.kvm.uapi import Cap, Exit
from vmonty.kvm.uapi.flags import KVM_PIT_FLAGS_HPET_LEGACY, KVM_PIT_SPEAKER_DUMMY
from vmonty.testing.guests import Mode, TinyGuest

from .irq_guests import (
    APIC,
    APIC_LVTT,
    APIC_ON,
    APIC_TDCR,
    APIC_TMCCT,
    APIC_TMICT,
    PIC_REPORT,
    READY,
    TIMER_VECTOR,
    apic_guest,
    apic_write,
    handler,
    out_of,
    pic_guest,
)
from .refusals import refused

IA32_TSC_DEADLINE = 0x6E0
HALT = "sleep: hlt\n jmp sleep"


def load_halting(guest: TinyGuest, setup: str, cpuid: list[CpuidEntry] | None = None) -> None:
    """The timer must wake the guest from HLT: there is nothing else that could."""
    guest.load(Mode.LONG, f"{APIC_ON} {setup}\n sti\n {HALT}", {TIMER_VECTOR: handler(TIMER_VECTOR)}, cpuid)


class TestPit:
    def test_no_state_without_a_pit(self, vm: Vm) -> None:
        with refused(errno.ENXIO):
            vm.get_pit2()
        with refused(errno.ENXIO):
            vm.get_pit()

    def test_only_once(self, vm: Vm) -> None:
        vm.create_irqchip()
        vm.create_pit2()
        with refused(errno.EEXIST):
            vm.create_pit2()
        with refused(errno.EEXIST):
            vm.create_pit()

    def test_ticks(self, chipped: TinyGuest) -> None:
        """Channel 0 in mode 2 at 1 kHz interrupts again and again."""
        chipped.vm.create_pit2(KVM_PIT_SPEAKER_DUMMY)
        pic_guest(chipped)
        divisor = 1193
        program = "".join(
            f"mov al, {value:#x}\n out {port:#x}, al\n"
            for port, value in ((0x43, 0x34), (0x40, divisor & 0xFF), (0x40, divisor >> 8),
                                (0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0))
        )  # fmt: skip
        chipped.load(Mode.REAL, f"cli\n {program} sti\n {HALT}")
        assert [chipped.out() for _ in range(3)] == [(PIC_REPORT, 0x20)] * 3

    def test_old_request_ticks_too(self, vm: Vm) -> None:
        vm.create_irqchip()
        vm.create_pit()
        state = vm.get_pit()
        assert len(state.channels) == 3
        state.channels[2].count, state.channels[2].mode = 0x1234, 3
        vm.set_pit(state)
        again = vm.get_pit().channels[2]
        assert (again.count, again.mode) == (0x1234, 3)

    def test_state_round_trip(self, vm: Vm) -> None:
        vm.create_irqchip()
        vm.create_pit2()
        state = vm.get_pit2()
        for number, channel in enumerate(state.channels):
            channel.count, channel.mode, channel.rw_mode, channel.gate = 0x4000 + number, 2, 3, 1
        state.flags = KVM_PIT_FLAGS_HPET_LEGACY
        vm.set_pit2(state)
        again = vm.get_pit2()
        assert [(c.count, c.mode, c.rw_mode) for c in again.channels] == [(0x4000 + n, 2, 3) for n in range(3)]
        assert again.flags & KVM_PIT_FLAGS_HPET_LEGACY

    def test_speaker_port(self, chipped: TinyGuest) -> None:
        """With KVM_PIT_SPEAKER_DUMMY port 0x61 is KVM's; its bits 0 and 1 read back as written."""
        chipped.vm.create_pit2(KVM_PIT_SPEAKER_DUMMY)
        chipped.load(Mode.LONG, "mov al, 3\n out 0x61, al\n in al, 0x61\n out 0x90, al")
        port, value = chipped.out()
        assert (port, value & 3) == (0x90, 3)

    @pytest.mark.parametrize("port", [0x62, 0x63, 0x64])
    def test_ports_behind_the_speaker_are_user_spaces(self, chipped: TinyGuest, port: int) -> None:
        chipped.vm.create_pit2(KVM_PIT_SPEAKER_DUMMY)
        chipped.load(Mode.LONG, f"mov al, 3\n out {port:#x}, al\n in al, {port:#x}\n out 0x90, al")
        assert chipped.out() == (port, 3)
        assert chipped.run() is Exit.IO
        assert chipped.vcpu.kvm_run.u.io.port == port
        chipped.vcpu.io_data()[:] = b"\x5a"
        assert chipped.out() == (0x90, 0x5A)

    def test_speaker_port_without_the_flag(self, chipped: TinyGuest) -> None:
        chipped.vm.create_pit2()
        chipped.load(Mode.LONG, "mov al, 3\n out 0x61, al")
        assert chipped.out() == (0x61, 3)

    def test_counter_is_read_by_the_guest(self, chipped: TinyGuest) -> None:
        """Latch and read channel 0: it counts down from what was written."""
        chipped.vm.create_pit2(KVM_PIT_SPEAKER_DUMMY)
        source = "".join(
            f"mov al, {value:#x}\n out {port:#x}, al\n" for port, value in ((0x43, 0x34), (0x40, 0xFF), (0x40, 0xFF))
        )
        latch = "mov al, 0\n out 0x43, al\n"
        read = "in al, 0x40\n mov bl, al\n in al, 0x40\n mov ah, al\n mov al, bl\n out 0x90, ax"
        chipped.load(Mode.LONG, source + latch + read)
        port, value = chipped.out()
        assert (port, 0 < value <= 0xFFFF) == (0x90, True)

    def test_reinject_control(self, vm: Vm) -> None:
        vm.create_irqchip()
        with refused(errno.ENXIO):
            vm.reinject_control(False)
        vm.create_pit2()
        vm.reinject_control(False)
        vm.reinject_control(True)
        assert vm.get_pit2().channels[0].mode in (0, 0xFF, 2, 3)


class TestApicTimer:
    def test_one_shot(self, chipped: TinyGuest) -> None:
        setup = apic_write(APIC_LVTT, TIMER_VECTOR) + apic_write(APIC_TDCR, 0xB) + apic_write(APIC_TMICT, 10_000)
        load_halting(chipped, setup)
        assert out_of(chipped, 0x30) == TIMER_VECTOR

    def test_one_shot_fires_once(self, chipped: TinyGuest) -> None:
        setup = apic_write(APIC_LVTT, TIMER_VECTOR) + apic_write(APIC_TDCR, 0xB) + apic_write(APIC_TMICT, 1000)
        apic_guest(chipped, setup, TIMER_VECTOR)
        assert out_of(chipped, 0x30) == TIMER_VECTOR
        assert {chipped.out()[0] for _ in range(50)} == {0x10}

    def test_periodic(self, chipped: TinyGuest, cpuid: list[CpuidEntry]) -> None:
        """KVM takes the mode bits of the LVT entry only after CPUID was set."""
        periodic = 1 << 17
        setup = apic_write(APIC_LVTT, TIMER_VECTOR | periodic) + apic_write(APIC_TDCR, 0xB)
        load_halting(chipped, setup + apic_write(APIC_TMICT, 1_000_000), cpuid)
        assert [chipped.out() for _ in range(3)] == [(0x30, TIMER_VECTOR)] * 3

    def test_masked(self, chipped: TinyGuest) -> None:
        setup = apic_write(APIC_LVTT, TIMER_VECTOR | 1 << 16) + apic_write(APIC_TDCR, 0xB)
        apic_guest(chipped, setup + apic_write(APIC_TMICT, 100), TIMER_VECTOR)
        assert {chipped.out()[0] for _ in range(50)} == {0x10}

    def test_current_count_runs_down(self, chipped: TinyGuest) -> None:
        setup = apic_write(APIC_LVTT, 1 << 16) + apic_write(APIC_TDCR, 0xB) + apic_write(APIC_TMICT, 0xFFFFFFFF)
        read = f"mov ebx, {APIC + APIC_TMCCT:#x}\n mov eax, [rbx]\n out 0x90, eax\n"
        chipped.load(Mode.LONG, f"{APIC_ON} {setup} {read} {read} {READY}")
        (_, first), (_, second) = chipped.out(), chipped.out()
        assert 0 < second < first <= 0xFFFFFFFF

    @pytest.mark.needs(Cap.TSC_DEADLINE_TIMER)
    def test_tsc_deadline(self, chipped: TinyGuest, cpuid: list[CpuidEntry]) -> None:
        """A deadline that has passed fires at once (SDM, "TSC-Deadline Mode")."""
        with_deadline = [entry if entry.function != 1 else entry._replace(ecx=entry.ecx | 1 << 24) for entry in cpuid]
        arm = f"rdtsc\n add eax, 1000\n adc edx, 0\n mov ecx, {IA32_TSC_DEADLINE:#x}\n wrmsr\n"
        load_halting(chipped, apic_write(APIC_LVTT, TIMER_VECTOR | 2 << 17) + arm, with_deadline)
        assert chipped.out() == (0x30, TIMER_VECTOR)
        assert chipped.vcpu.get_msrs([IA32_TSC_DEADLINE]) == {IA32_TSC_DEADLINE: 0}, "disarmed when it fired"

    @pytest.mark.needs(Cap.X86_APIC_BUS_CYCLES_NS)
    def test_bus_frequency(self, configured: Vm) -> None:
        """KVM_CAP_X86_APIC_BUS_CYCLES_NS: with an irqchip, before any vCPU, and not 0."""
        with refused(errno.EINVAL):
            configured.enable_cap(Cap.X86_APIC_BUS_CYCLES_NS, 0)
        configured.create_irqchip()
        configured.enable_cap(Cap.X86_APIC_BUS_CYCLES_NS, 40)
        with configured.create_vcpu(), refused(errno.EINVAL):
            configured.enable_cap(Cap.X86_APIC_BUS_CYCLES_NS, 50)
