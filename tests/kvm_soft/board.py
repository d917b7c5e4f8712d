"""A board of in-kernel chips on a virtual clock, with vCPUs that only write down what happens to them."""

from __future__ import annotations

from dataclasses import dataclass, field

from vmonty.kvm.soft.i8259 import Pic
from vmonty.kvm.soft.ioapic import IoApic
from vmonty.kvm.soft.iodev import KvmIoBuses
from vmonty.kvm.soft.irq_comm import IrqComm
from vmonty.kvm.soft.lapic import Lapic
from vmonty.kvm.soft.timer import HrTimers, VirtualTimers
from vmonty.kvm.soft.vcpu_arch import VcpuArch
from vmonty.kvm.uapi.irq import kvm_irq_routing_entry

APIC_BASE = 0xFEE00000
SVR_ON = 0x1FF


@dataclass
class FakeVcpu:
    """An ApicOwner. Its TSC runs at 2 GHz with the virtual clock."""

    vcpu_id: int
    timers: HrTimers
    kicks: int = 0
    events: list[object] = field(default_factory=list)
    arch: VcpuArch | None = None

    def request_event(self) -> None:
        self.kicks += 1

    def kick(self) -> None:
        self.kicks += 1

    def inject_nmi(self) -> None:
        self.events.append("nmi")

    def pv_unhalt(self) -> None:
        self.events.append("unhalt")

    def ioapic_eoi(self, vector: int) -> None:
        self.events.append(("eoi", vector))

    def init_received(self) -> None:
        self.events.append("init")

    def sipi_received(self, vector: int) -> None:
        self.events.append(("sipi", vector))

    def guest_tsc(self) -> int:
        return self.timers.clock.now_ns() * 2

    def tsc_deadline_to_ns(self, tsc: int) -> int:
        return -(-tsc // 2)


class Board:
    """*vcpus* local APICs (software-enabled with *on*), and a full irqchip unless *split* says how many pins."""

    def __init__(self, vcpus: int = 1, split: int | None = None, on: bool = True) -> None:
        self.timers = VirtualTimers()
        self.buses = KvmIoBuses()
        self.irqs = IrqComm(self.timers)
        if split is None:
            self.irqs.create_irqchip(self.buses)
        else:
            self.irqs.create_split_irqchip(split)
        self.vcpus = [FakeVcpu(number, self.timers) for number in range(vcpus)]
        self.apics = [Lapic(vcpu, self.irqs, self.timers, bsp=vcpu.vcpu_id == 0) for vcpu in self.vcpus]
        for apic in self.apics:
            apic.configure(x2apic=True, tsc_deadline=True, phys_bits=46)
            self.irqs.add_apic(apic)
            if on:
                write(apic, 0xF0, SVR_ON)

    @property
    def pic(self) -> Pic:
        assert self.irqs.pic is not None
        return self.irqs.pic

    @property
    def ioapic(self) -> IoApic:
        assert self.irqs.ioapic is not None
        return self.irqs.ioapic

    def redirect(self, pin: int, entry: int) -> None:
        """Write a redirection entry as a guest does: the upper half first."""
        for register, half in ((0x11 + 2 * pin, entry >> 32), (0x10 + 2 * pin, entry & 0xFFFFFFFF)):
            self.buses.mmio.write(0xFEC00000, 4, register)
            self.buses.mmio.write(0xFEC00010, 4, half)

    def entry(self, pin: int) -> int:
        """Read a redirection entry as a guest does."""
        halves = []
        for register in (0x10 + 2 * pin, 0x11 + 2 * pin):
            self.buses.mmio.write(0xFEC00000, 4, register)
            halves.append(self.buses.mmio.read(0xFEC00010, 4) or 0)
        return halves[0] | halves[1] << 32


def write(apic: Lapic, offset: int, value: int) -> None:
    """A guest's 32-bit write to an xAPIC register."""
    assert apic.mmio_write(APIC_BASE + offset, 4, value)


def read(apic: Lapic, offset: int) -> int:
    """A guest's 32-bit read of an xAPIC register."""
    value = apic.mmio_read(APIC_BASE + offset, 4)
    assert value is not None
    return value


def to_x2apic(apic: Lapic) -> None:
    """Switch to x2APIC mode, as a guest does."""
    assert apic.set_base(apic.apic_base | 1 << 10)


def pin_route(gsi: int, irqchip: int, pin: int) -> kvm_irq_routing_entry:
    """A route to a pin of KVM_IRQCHIP_PIC_MASTER (0), _SLAVE (1) or _IOAPIC (2)."""
    entry = kvm_irq_routing_entry(gsi=gsi, type=1)
    entry.u.irqchip.irqchip, entry.u.irqchip.pin = irqchip, pin
    return entry


def msi_route(gsi: int, address: int, data: int) -> kvm_irq_routing_entry:
    """A route to a message."""
    entry = kvm_irq_routing_entry(gsi=gsi, type=2)
    entry.u.msi.address_lo, entry.u.msi.address_hi, entry.u.msi.data = address & 0xFFFFFFFF, address >> 32, data
    return entry
