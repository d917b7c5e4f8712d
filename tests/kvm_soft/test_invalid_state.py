"""kvm_intel: events for a guest whose state VM entry refuses. Source: vmx.c, handle_invalid_guest_state()."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from vmonty import kvm
from vmonty.base.ram import Ram
from vmonty.kvm.soft import modules
from vmonty.kvm.uapi import Exit, flags
from vmonty.testing.guests import RAM_SIZE, Mode, TinyGuest

IDENTITY_MAP, TSS = 0xFEFF_C000, 0xFEFF_D000
VECTOR = 0x50
EMULATING = ["kvm_intel ept=0", "kvm_intel unrestricted_guest=0"]
# SS is what the processor takes behind the load.
PROGRAM = "out 0x10, al\n nop\n nop\n mov ax, 0x10\n mov ss, ax\n nop\n nop\n out 0x11, al\n hlt"
HANDLERS = {vector: f"mov ax, ss\n out {port:#x}, ax\n iret" for vector, port in ((2, 0x20), (VECTOR, 0x21))}
HANDLERS[6] = "mov al, 6\n out 0x22, al\n hlt"


@contextmanager
def refused_state(parameters: str) -> Iterator[TinyGuest]:
    """A guest in protected mode that has the other privilege level in SS than in CS, and interrupts on."""
    name, given = modules.parse(parameters)
    with modules.only(name, **given), kvm.open("soft") as system, system.create_vm() as vm:
        vm.set_identity_map_addr(IDENTITY_MAP)
        vm.set_tss_addr(TSS)
        ram = Ram(RAM_SIZE)
        vm.set_user_memory_region(0, 0, ram)
        with vm.create_vcpu() as vcpu:
            guest = TinyGuest(vm, vcpu, ram)
            guest.load(Mode.PROTECTED, PROGRAM, HANDLERS)
            set_ss(guest, 0x13)
            regs = vcpu.get_regs()
            regs.rflags |= 0x200
            vcpu.set_regs(regs)
            yield guest


def set_ss(guest: TinyGuest, selector: int) -> None:
    sregs = guest.vcpu.get_sregs()
    sregs.ss.selector = selector
    guest.vcpu.set_sregs(sregs)


def interrupt(guest: TinyGuest) -> None:
    guest.vcpu.interrupt(VECTOR)


def nmi(guest: TinyGuest) -> None:
    guest.vcpu.nmi()


def nmi_in_flight(guest: TinyGuest) -> None:
    events = guest.vcpu.get_vcpu_events()
    events.nmi.injected = 1
    guest.vcpu.set_vcpu_events(events)


def both(guest: TinyGuest) -> None:
    interrupt(guest)
    nmi(guest)


def undefined(guest: TinyGuest) -> None:
    events = guest.vcpu.get_vcpu_events()
    events.exception.injected, events.exception.nr = 1, 6
    guest.vcpu.set_vcpu_events(events)


def without_tss(guest: TinyGuest) -> None:
    """A state that the processor takes in no mode."""
    sregs = guest.vcpu.get_sregs()
    sregs.tr.s = 1
    guest.vcpu.set_sregs(sregs)


@pytest.mark.parametrize(
    ("queue", "ports"),
    [(interrupt, {0x21}), (nmi, {0x20}), (nmi_in_flight, {0x20}), (both, {0x20, 0x21})],
    ids=["irq", "nmi", "nmi-in-flight", "irq-and-nmi"],
)
@pytest.mark.parametrize("parameters", EMULATING)
def test_an_event_waits_for_the_entry(parameters: str, queue: Callable[[TinyGuest], None], ports: set[int]) -> None:
    with refused_state(parameters) as guest:
        queue(guest)
        assert guest.out()[0] == 0x10
        guest.vcpu.complete_io()
        events = guest.vcpu.get_vcpu_events()
        assert events.interrupt.injected or events.nmi.injected
        seen = [guest.out() for _ in ports]
        assert {port for port, _ in seen} == ports
        assert {stack for _, stack in seen} == {0x10}
        assert guest.out()[0] == 0x11
        assert guest.run() is Exit.HLT
        events = guest.vcpu.get_vcpu_events()
        assert (events.interrupt.injected, events.nmi.injected, events.nmi.pending) == (0, 0, 0)


@pytest.mark.parametrize("parameters", EMULATING)
def test_an_exception_is_user_spaces_affair(parameters: str) -> None:
    with refused_state(parameters) as guest:
        undefined(guest)
        assert guest.run() is Exit.INTERNAL_ERROR
        assert guest.vcpu.kvm_run.u.internal.suberror == flags.KVM_INTERNAL_ERROR_EMULATION
        events = guest.vcpu.get_vcpu_events()
        assert (events.exception.injected, events.exception.nr) == (1, 6)
        set_ss(guest, 0x10)
        assert guest.out() == (0x22, 6)


@pytest.mark.parametrize("parameters", EMULATING)
def test_what_the_emulator_does_not_take_either(parameters: str) -> None:
    with refused_state(parameters) as guest:
        without_tss(guest)
        interrupt(guest)
        assert guest.run() is Exit.INTERNAL_ERROR
        assert guest.vcpu.kvm_run.u.internal.suberror == flags.KVM_INTERNAL_ERROR_EMULATION
        assert guest.vcpu.get_vcpu_events().interrupt.injected


@pytest.mark.parametrize("queue", [interrupt, nmi, undefined])
def test_a_failed_entry_leaves_the_event(queue: Callable[[TinyGuest], None]) -> None:
    """With unrestricted guest nothing is emulated."""
    with refused_state("kvm_intel") as guest:
        without_tss(guest)
        queue(guest)
        assert guest.run() is Exit.FAIL_ENTRY
        events = guest.vcpu.get_vcpu_events()
        left = events.interrupt.injected, events.nmi.injected, events.exception.injected
        assert left == (int(queue is interrupt), int(queue is nmi), int(queue is undefined))
