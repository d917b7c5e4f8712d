"""Interrupts from user space, without an in-kernel irqchip. Source: api.rst, KVM_INTERRUPT, KVM_NMI."""

from __future__ import annotations

import errno

import pytest

from vmonty.kvm.uapi import Cap, Exit
from vmonty.kvm.uapi.flags import KVM_VCPUEVENT_VALID_PAYLOAD, KVM_VCPUEVENT_VALID_TRIPLE_FAULT
from vmonty.testing.guests import CODE, RFLAGS, RFLAGS_IF, Mode, TinyGuest, describe

from .irq_guests import out_of
from .refusals import refused

VECTOR = 0x41
RETURN = {Mode.REAL: "iret", Mode.PROTECTED: "iretd", Mode.LONG: "iretq", Mode.USER: "iretq"}
KERNEL_MODES = [Mode.REAL, Mode.PROTECTED, Mode.LONG]
LOOP = "again: out 0x10, al\n jmp again"


def handler(mode: Mode, value: int = VECTOR) -> str:
    """Report *value* on port 0x20 and go on."""
    register = "rax" if mode.long else "ax"
    return f"push {register}\n mov al, {value}\n out 0x20, al\n pop {register}\n {RETURN[mode]}"


def enable_interrupts(guest: TinyGuest) -> None:
    regs = guest.vcpu.get_regs()
    regs.rflags |= RFLAGS_IF
    guest.vcpu.set_regs(regs)


IRET_MODES = [
    pytest.param(mode, id=mode.value, marks=[pytest.mark.known_gap("iret-protected")] * (mode is Mode.PROTECTED))
    for mode in Mode
]


@pytest.mark.parametrize("mode", IRET_MODES)
def test_interrupt_is_delivered(guest: TinyGuest, mode: Mode) -> None:
    """The handler runs, and the interrupted program goes on."""
    guest.load(mode, f"nop\n {LOOP}", handlers={VECTOR: handler(mode)})
    enable_interrupts(guest)
    guest.vcpu.interrupt(VECTOR)
    assert guest.out() == (0x20, VECTOR)
    assert guest.out()[0] == 0x10


def test_interrupt_of_port_io_loop(guest: TinyGuest) -> None:
    """Between two exits, when ready_for_interrupt_injection says so."""
    guest.load(Mode.LONG, LOOP, handlers={VECTOR: handler(Mode.LONG)})
    enable_interrupts(guest)
    assert guest.out()[0] == 0x10
    assert guest.vcpu.kvm_run.if_flag == 1
    assert guest.vcpu.kvm_run.ready_for_interrupt_injection == 1
    guest.vcpu.interrupt(VECTOR)
    assert guest.out() == (0x20, VECTOR)
    assert guest.vcpu.kvm_run.if_flag == 0, "an interrupt gate clears IF"
    assert guest.out()[0] == 0x10


def test_interrupt_wakes_from_hlt(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, "sti\n hlt\n out 0x10, al", handlers={VECTOR: handler(Mode.LONG)})
    assert guest.run() is Exit.HLT
    guest.vcpu.interrupt(VECTOR)
    assert guest.out() == (0x20, VECTOR)
    assert guest.out()[0] == 0x10


@pytest.mark.known_gap("irq-window")
def test_window_opens_with_sti(guest: TinyGuest) -> None:
    """request_interrupt_window: the run ends as soon as an interrupt could be delivered, not before."""
    guest.load(Mode.LONG, "cli\n out 0x10, al\n sti\n nop\n nop\n out 0x11, al", handlers={VECTOR: handler(Mode.LONG)})
    guest.vcpu.kvm_run.request_interrupt_window = 1
    assert guest.out()[0] == 0x10
    assert guest.vcpu.kvm_run.ready_for_interrupt_injection == 0
    assert guest.vcpu.kvm_run.if_flag == 0
    reason = guest.run()
    assert reason is Exit.IRQ_WINDOW_OPEN, describe(guest.vcpu, reason)
    assert guest.vcpu.kvm_run.ready_for_interrupt_injection == 1
    assert guest.vcpu.kvm_run.if_flag == 1
    guest.vcpu.kvm_run.request_interrupt_window = 0
    guest.vcpu.interrupt(VECTOR)
    assert guest.out() == (0x20, VECTOR)
    assert guest.out()[0] == 0x11


@pytest.mark.parametrize(
    "mode",
    [
        *(pytest.param(mode, id=mode.value, marks=pytest.mark.known_gap("irq-window")) for mode in KERNEL_MODES),
        pytest.param(Mode.USER, id=Mode.USER.value),
    ],
)
def test_window_that_is_open_already(guest: TinyGuest, mode: Mode) -> None:
    guest.load(mode, f"nop\n {LOOP}")
    enable_interrupts(guest)
    guest.vcpu.kvm_run.request_interrupt_window = 1
    assert guest.run() is Exit.IRQ_WINDOW_OPEN


@pytest.mark.parametrize("vector", [0, 0x20, 0xFF])
def test_vectors(guest: TinyGuest, vector: int) -> None:
    guest.load(Mode.LONG, f"nop\n {LOOP}", handlers={vector: handler(Mode.LONG, 7)})
    enable_interrupts(guest)
    guest.vcpu.interrupt(vector)
    assert guest.out() == (0x20, 7)


def test_vector_out_of_range(guest: TinyGuest) -> None:
    with refused(errno.EINVAL):
        guest.vcpu.interrupt(256)


def test_second_interrupt_in_flight(guest: TinyGuest) -> None:
    guest.vcpu.interrupt(VECTOR)
    events = guest.vcpu.get_vcpu_events()
    assert (events.interrupt.injected, events.interrupt.nr) == (1, VECTOR)


def test_interrupt_with_irqchip_is_refused(chipped: TinyGuest) -> None:
    with refused(errno.ENXIO):
        chipped.vcpu.interrupt(VECTOR)


@pytest.mark.parametrize("mode", IRET_MODES[:3])
def test_nmi_is_delivered_though_if_is_clear(guest: TinyGuest, mode: Mode) -> None:
    guest.load(mode, f"nop\n {LOOP}", handlers={2: handler(mode, 2)})
    guest.vcpu.nmi()
    assert guest.out() == (0x20, 2)
    assert guest.out()[0] == 0x10


def test_nmis_wait_for_iret(guest: TinyGuest) -> None:
    """A second NMI stays pending until the first one's handler returns."""
    guest.load(Mode.LONG, f"nop\n {LOOP}", handlers={2: "out 0x21, al\n out 0x22, al\n iretq"})
    guest.vcpu.nmi()
    assert guest.out()[0] == 0x21
    guest.vcpu.nmi()
    assert guest.out()[0] == 0x22, "the handler was not interrupted by the second NMI"
    out_of(guest, 0x21)
    assert guest.out()[0] == 0x22
    assert guest.out()[0] == 0x10


def test_one_nmi_waits_behind_the_one_in_progress(guest: TinyGuest) -> None:
    """process_nmi(): however many come while the handler runs."""
    guest.load(Mode.LONG, f"nop\n {LOOP}", handlers={2: "out 0x21, al\n iretq"})
    guest.vcpu.nmi()
    assert guest.out()[0] == 0x21
    for _ in range(3):
        guest.vcpu.nmi()
    out_of(guest, 0x21)
    assert [guest.out()[0] for _ in range(3)] == [0x10] * 3


def test_nmi_wakes_from_hlt(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, "hlt\n out 0x10, al", handlers={2: handler(Mode.LONG, 2)})
    assert guest.run() is Exit.HLT
    guest.vcpu.nmi()
    assert guest.out() == (0x20, 2)
    assert guest.out()[0] == 0x10


def test_exception_by_vcpu_events(guest: TinyGuest) -> None:
    """An exception with an error code, injected by KVM_SET_VCPU_EVENTS."""
    guest.load(Mode.LONG, LOOP, handlers={13: "pop rax\n out 0x20, eax"})
    events = guest.vcpu.get_vcpu_events()
    events.exception.injected, events.exception.nr = 1, 13
    events.exception.has_error_code, events.exception.error_code = 1, 0x4321
    guest.vcpu.set_vcpu_events(events)
    assert guest.out() == (0x20, 0x4321)


@pytest.mark.needs(Cap.X86_TRIPLE_FAULT_EVENT)
def test_triple_fault_by_vcpu_events(guest: TinyGuest) -> None:
    """Not told of before it is enabled; then it moves with the vCPU, and ends the run."""
    guest.load(Mode.LONG, LOOP)
    events = guest.vcpu.get_vcpu_events()
    assert not events.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT
    events.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT
    events.triple_fault.pending = 1
    with refused(errno.EINVAL):
        guest.vcpu.set_vcpu_events(events)
    guest.vm.enable_cap(Cap.X86_TRIPLE_FAULT_EVENT, 1)
    assert guest.out()[0] == 0x10
    guest.vcpu.complete_io()
    guest.vcpu.set_vcpu_events(events)
    events = guest.vcpu.get_vcpu_events()
    assert events.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT
    assert events.triple_fault.pending
    assert guest.run() is Exit.SHUTDOWN
    assert not guest.vcpu.get_vcpu_events().triple_fault.pending


def test_nmi_by_vcpu_events(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, f"nop\n {LOOP}", handlers={2: handler(Mode.LONG, 2)})
    events = guest.vcpu.get_vcpu_events()
    events.flags = 1  # KVM_VCPUEVENT_VALID_NMI_PENDING
    events.nmi.pending = 1
    guest.vcpu.set_vcpu_events(events)
    assert guest.out() == (0x20, 2)


def test_masked_nmi_by_vcpu_events(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, f"nop\n {LOOP}", handlers={2: handler(Mode.LONG, 2)})
    events = guest.vcpu.get_vcpu_events()
    events.flags = 1
    events.nmi.pending, events.nmi.masked = 1, 1
    guest.vcpu.set_vcpu_events(events)
    assert guest.out()[0] == 0x10
    assert guest.out()[0] == 0x10
    assert guest.vcpu.get_vcpu_events().nmi.masked == 1


def test_wrong_vcpu_events(guest: TinyGuest) -> None:
    events = guest.vcpu.get_vcpu_events()
    events.flags = 1 << 31
    with refused(errno.EINVAL):
        guest.vcpu.set_vcpu_events(events)
    events = guest.vcpu.get_vcpu_events()
    events.exception.injected, events.exception.nr = 1, 2
    with refused(errno.EINVAL):
        guest.vcpu.set_vcpu_events(events)


@pytest.mark.needs(Cap.EXCEPTION_PAYLOAD)
def test_set_regs_drops_a_pending_exception(guest: TinyGuest) -> None:
    guest.vm.enable_cap(Cap.EXCEPTION_PAYLOAD, 1)
    guest.load(Mode.LONG, LOOP, handlers={6: "out 0x20, al"})
    events = guest.vcpu.get_vcpu_events()
    events.flags = KVM_VCPUEVENT_VALID_PAYLOAD
    events.exception.pending, events.exception.nr = 1, 6
    guest.vcpu.set_vcpu_events(events)
    assert guest.vcpu.get_vcpu_events().exception.pending == 1
    regs = guest.vcpu.get_regs()
    regs.rip, regs.rflags = CODE, RFLAGS
    guest.vcpu.set_regs(regs)
    assert guest.out()[0] == 0x10


@pytest.mark.known_gap("int-n-cpl3")
def test_software_interrupt_from_cpl3(guest: TinyGuest) -> None:
    guest.load(Mode.USER, f"int {VECTOR}\n {LOOP}", handlers={VECTOR: handler(Mode.USER)})
    assert guest.out() == (0x20, VECTOR)
    assert guest.out()[0] == 0x10


@pytest.mark.known_gap("irq-window")
@pytest.mark.known_gap("sti-shadow")
def test_sti_delays_by_one_instruction(guest: TinyGuest) -> None:
    """The interrupt shadow of STI: the instruction behind it still runs (SDM, STI)."""
    source = "cli\n out 0x10, al\n xor eax, eax\n sti\n mov al, 1\n nop\n out 0x11, al"
    guest.load(Mode.LONG, source, handlers={VECTOR: "out 0x20, al\n iretq"})
    guest.vcpu.kvm_run.request_interrupt_window = 1
    assert guest.out()[0] == 0x10
    assert guest.run() is Exit.IRQ_WINDOW_OPEN
    guest.vcpu.interrupt(VECTOR)
    guest.vcpu.kvm_run.request_interrupt_window = 0
    assert guest.out() == (0x20, 1)
