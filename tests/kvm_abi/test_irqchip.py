"""The PIC pair and the I/O APIC in KVM, and the interrupt lines. Source: api.rst, KVM_CREATE_IRQCHIP, KVM_IRQ_LINE."""

from __future__ import annotations

import errno

import pytest

from vmonty.base.ram import Ram
from vmonty.kvm.api import Vm
from vmonty.kvm.uapi import Cap, Exit, Requests, irq
from vmonty.kvm.uapi.flags import (
    KVM_IOAPIC_NUM_PINS,
    KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQ_ROUTING_MSI,
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
)
from vmonty.testing.guests import TinyGuest

from .irq_guests import (
    APIC,
    EOI_LEVEL,
    GSI,
    IPI_VECTOR,
    LINE_VECTOR,
    PIC_READY,
    PIC_REPORT,
    apic_guest,
    interrupted,
    ioapic_guest,
    pic_guest,
)
from .refusals import refused


def route_to_chip(gsi: int, chip: int, pin: int) -> irq.kvm_irq_routing_entry:
    entry = irq.kvm_irq_routing_entry(gsi=gsi, type=KVM_IRQ_ROUTING_IRQCHIP)
    entry.u.irqchip.irqchip, entry.u.irqchip.pin = chip, pin
    return entry


def route_to_message(gsi: int, vector: int) -> irq.kvm_irq_routing_entry:
    entry = irq.kvm_irq_routing_entry(gsi=gsi, type=KVM_IRQ_ROUTING_MSI)
    entry.u.msi.address_lo, entry.u.msi.data = APIC, vector
    return entry


def test_second_irqchip(vm: Vm) -> None:
    vm.create_irqchip()
    with refused(errno.EEXIST):
        vm.create_irqchip()


def test_irqchip_after_a_vcpu(configured: Vm) -> None:
    with configured.create_vcpu(), refused(errno.EINVAL):
        configured.create_irqchip()


def test_lines_without_irqchip(vm: Vm) -> None:
    with refused(errno.ENXIO):
        vm.irq_line(GSI, 1)
    with refused(errno.ENXIO):
        vm.irq_line_status(GSI, 1)
    with refused(errno.ENXIO):
        vm.get_irqchip(KVM_IRQCHIP_IOAPIC)


@pytest.mark.parametrize(("line", "vector"), [(1, 0x21), (10, 0x2A)], ids=["master", "slave"])
def test_pic(chipped: TinyGuest, line: int, vector: int) -> None:
    pic_guest(chipped)
    assert chipped.out()[0] == PIC_READY
    chipped.vm.irq_line(line, 1)
    assert chipped.out() == (PIC_REPORT, vector)
    assert chipped.out()[0] == PIC_READY, "an edge: the line is still up"
    chipped.vm.irq_line(line, 0)
    assert chipped.out()[0] == PIC_READY
    chipped.vm.irq_line(line, 1)
    assert chipped.out() == (PIC_REPORT, vector)


def test_pic_masks(chipped: TinyGuest) -> None:
    pic_guest(chipped, mask=1 << 1)
    assert chipped.out()[0] == PIC_READY
    chipped.vm.irq_line(1, 1)
    assert chipped.out()[0] == PIC_READY
    state = chipped.vm.get_irqchip(KVM_IRQCHIP_PIC_MASTER).chip.pic
    assert (state.irq_base, state.imr, state.irr & 2) == (0x20, 2, 2)


def test_pic_ports_do_not_exit(chipped: TinyGuest) -> None:
    """Port 0x21 reads back the mask that user space set."""
    pic_guest(chipped)
    assert chipped.out()[0] == PIC_READY
    slave = chipped.vm.get_irqchip(KVM_IRQCHIP_PIC_SLAVE)
    assert slave.chip.pic.irq_base == 0x28
    assert slave.chip_id == KVM_IRQCHIP_PIC_SLAVE


def test_ioapic_edge(chipped: TinyGuest) -> None:
    ioapic_guest(chipped)
    assert chipped.out()[0] == 0x10
    chipped.vm.irq_line(GSI, 1)
    assert interrupted(chipped) == LINE_VECTOR
    assert chipped.out()[0] == 0x10
    chipped.vm.irq_line(GSI, 0)
    chipped.vm.irq_line(GSI, 1)
    assert interrupted(chipped) == LINE_VECTOR


@pytest.mark.known_gap("apic-isr")
def test_ioapic_level(chipped: TinyGuest) -> None:
    """A level that stays up interrupts again after each EOI; remote IRR is set meanwhile."""
    ioapic_guest(chipped, level=True)
    assert chipped.out()[0] == 0x10
    chipped.vm.irq_line(GSI, 1)
    assert interrupted(chipped) == LINE_VECTOR
    assert chipped.vm.get_irqchip(KVM_IRQCHIP_IOAPIC).chip.ioapic.redirtbl[GSI].fields.remote_irr == 1
    assert chipped.out()[0] == EOI_LEVEL
    assert interrupted(chipped) == LINE_VECTOR
    chipped.vm.irq_line(GSI, 0)
    assert chipped.out()[0] == EOI_LEVEL
    assert chipped.out()[0] == 0x10
    assert chipped.vm.get_irqchip(KVM_IRQCHIP_IOAPIC).chip.ioapic.redirtbl[GSI].fields.remote_irr == 0


def test_ioapic_mask(chipped: TinyGuest) -> None:
    ioapic_guest(chipped, masked=True)
    assert chipped.out()[0] == 0x10
    chipped.vm.irq_line(GSI, 1)
    assert chipped.out()[0] == 0x10
    entry = chipped.vm.get_irqchip(KVM_IRQCHIP_IOAPIC).chip.ioapic.redirtbl[GSI].fields
    assert (entry.vector, entry.mask, entry.trig_mode) == (LINE_VECTOR, 1, 0)


def test_irq_line_status(chipped: TinyGuest) -> None:
    """1: one CPU took it; 0: coalesced with an edge that is pending; -1: masked."""
    ioapic_guest(chipped)
    assert chipped.out()[0] == 0x10
    assert chipped.vm.irq_line_status(GSI, 1) == 1
    assert chipped.vm.irq_line_status(GSI, 1) == 0, "the line was up already"
    assert interrupted(chipped) == LINE_VECTOR
    assert chipped.vm.irq_line_status(GSI + 1, 1) == -1, "no interrupt is routed to a CPU: its entry is masked"


@pytest.mark.parametrize("chip", [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE], ids=["master", "slave"])
def test_pic_state_round_trip(vm: Vm, chip: int) -> None:
    vm.create_irqchip()
    state = vm.get_irqchip(chip)
    state.chip.pic.imr, state.chip.pic.irq_base, state.chip.pic.elcr = 0x5A, 0x68, 0x20
    vm.set_irqchip(state)
    again = vm.get_irqchip(chip).chip.pic
    assert (again.imr, again.irq_base, again.elcr) == (0x5A, 0x68, 0x20)


def test_ioapic_state_round_trip(vm: Vm) -> None:
    vm.create_irqchip()
    state = vm.get_irqchip(KVM_IRQCHIP_IOAPIC)
    assert state.chip.ioapic.base_address == 0xFEC00000
    assert {entry.fields.mask for entry in state.chip.ioapic.redirtbl} == {1}
    for pin, entry in enumerate(state.chip.ioapic.redirtbl):
        entry.bits = 0x30 + pin | pin << 56
    state.chip.ioapic.ioregsel = 0x12
    vm.set_irqchip(state)
    again = vm.get_irqchip(KVM_IRQCHIP_IOAPIC).chip.ioapic
    assert [entry.bits for entry in again.redirtbl] == [0x30 + pin | pin << 56 for pin in range(KVM_IOAPIC_NUM_PINS)]
    assert again.ioregsel == 0x12


def test_unknown_chip(vm: Vm) -> None:
    vm.create_irqchip()
    with refused(errno.EINVAL):
        vm.get_irqchip(9)
    with refused(errno.EINVAL):
        vm.set_irqchip(irq.kvm_irqchip(chip_id=9))


def test_signal_msi(chipped: TinyGuest) -> None:
    apic_guest(chipped, "", IPI_VECTOR)
    assert chipped.out()[0] == 0x10
    assert chipped.vm.signal_msi(APIC, IPI_VECTOR) == 1
    assert interrupted(chipped) == IPI_VECTOR


def test_msi_to_nobody(chipped: TinyGuest) -> None:
    """No local APIC has that ID."""
    apic_guest(chipped, "", IPI_VECTOR)
    assert chipped.out()[0] == 0x10
    message = irq.kvm_msi(address_lo=APIC | 9 << 12, data=IPI_VECTOR)
    assert chipped.vm.try_ioctl(Requests.KVM_SIGNAL_MSI, message) in (0, -errno.EPERM), "EPERM is the kernel's plain -1"
    assert chipped.out()[0] == 0x10


def test_msi_without_irqchip(vm: Vm) -> None:
    with refused(errno.EINVAL, errno.ENXIO):
        vm.signal_msi(APIC, IPI_VECTOR)


def test_msi_flags(chipped: TinyGuest) -> None:
    """A device ID is accepted and means nothing on x86; an unknown flag is refused."""
    apic_guest(chipped, "", IPI_VECTOR)
    assert chipped.out()[0] == 0x10
    assert chipped.vm.signal_msi(APIC, IPI_VECTOR, devid=1) == 1
    with refused(errno.EINVAL):
        chipped.vm.ioctl(Requests.KVM_SIGNAL_MSI, irq.kvm_msi(address_lo=APIC, data=IPI_VECTOR, flags=1 << 31))


def test_gsi_routed_to_a_message(chipped: TinyGuest) -> None:
    """The whole table is replaced: GSI 40 becomes an MSI, GSI 10 leads nowhere."""
    ioapic_guest(chipped)
    apic_guest(chipped, "", IPI_VECTOR, LINE_VECTOR)
    assert chipped.out()[0] == 0x10
    chipped.vm.set_gsi_routing([route_to_message(40, IPI_VECTOR)])
    chipped.vm.irq_line(40, 1)
    assert interrupted(chipped) == IPI_VECTOR
    chipped.vm.irq_line(GSI, 1)
    assert chipped.out()[0] == 0x10


def test_gsi_routed_to_another_pin(chipped: TinyGuest) -> None:
    ioapic_guest(chipped)
    assert chipped.out()[0] == 0x10
    chipped.vm.set_gsi_routing([route_to_chip(33, KVM_IRQCHIP_IOAPIC, GSI)])
    chipped.vm.irq_line(33, 1)
    assert interrupted(chipped) == LINE_VECTOR


BAD_ROUTES = [
    ("unknown-type", irq.kvm_irq_routing_entry(gsi=1, type=77)),
    ("unknown-chip", route_to_chip(1, 9, 0)),
    ("unknown-pin", route_to_chip(1, KVM_IRQCHIP_IOAPIC, KVM_IOAPIC_NUM_PINS)),
    ("unknown-flag", irq.kvm_irq_routing_entry(gsi=1, type=KVM_IRQ_ROUTING_IRQCHIP, flags=1 << 31)),
    ("gsi-too-high", route_to_message(1 << 20, 0x50)),
]


@pytest.mark.parametrize("entry", [row[1] for row in BAD_ROUTES], ids=[row[0] for row in BAD_ROUTES])
def test_bad_route(vm: Vm, entry: irq.kvm_irq_routing_entry) -> None:
    vm.create_irqchip()
    with refused(errno.EINVAL):
        vm.set_gsi_routing([entry])


def test_one_gsi_with_two_messages(vm: Vm) -> None:
    """An MSI route must be its GSI's only one."""
    vm.create_irqchip()
    with refused(errno.EINVAL):
        vm.set_gsi_routing([route_to_message(5, 0x50), route_to_message(5, 0x51)])


@pytest.mark.needs(Cap.SPLIT_IRQCHIP)
class TestSplitIrqchip:
    """KVM_CAP_SPLIT_IRQCHIP: local APICs in KVM, the PIC and I/O APIC in user space."""

    def test_message_and_eoi_exit(self, configured: Vm, ram: Ram) -> None:
        """A level-triggered vector routed by GSI 0..23 reports its EOI with Exit.IOAPIC_EOI."""
        configured.enable_cap(Cap.SPLIT_IRQCHIP, 24)
        with configured.create_vcpu() as vcpu:
            guest = apic_guest(TinyGuest(configured, vcpu, ram), "", LINE_VECTOR)
            entry = route_to_message(GSI, LINE_VECTOR | 1 << 15 | 1 << 14)
            configured.set_gsi_routing([entry])
            assert guest.out()[0] == 0x10
            configured.irq_line(GSI, 1)
            assert interrupted(guest) == LINE_VECTOR
            assert guest.run() is Exit.IOAPIC_EOI
            assert vcpu.kvm_run.u.eoi.vector == LINE_VECTOR
            assert guest.out()[0] == 0x10

    def test_pic_ports_exit(self, configured: Vm, ram: Ram) -> None:
        configured.enable_cap(Cap.SPLIT_IRQCHIP, 24)
        with configured.create_vcpu() as vcpu:
            guest = pic_guest(TinyGuest(configured, vcpu, ram))
            assert guest.out() == (0x20, 0x11)

    def test_no_pic_state(self, configured: Vm) -> None:
        configured.enable_cap(Cap.SPLIT_IRQCHIP, 24)
        with refused(errno.ENXIO):
            configured.get_irqchip(KVM_IRQCHIP_IOAPIC)

    def test_not_after_the_full_one(self, configured: Vm) -> None:
        configured.create_irqchip()
        with refused(errno.EEXIST):
            configured.enable_cap(Cap.SPLIT_IRQCHIP, 24)
