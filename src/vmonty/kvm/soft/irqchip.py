"""The VM's interrupt chips and in-kernel buses: the ioctls in front of them, and who answers an access.

Source: arch/x86/kvm/x86.c, kvm_arch_vm_ioctl(); virt/kvm/kvm_main.c.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from typing import TYPE_CHECKING

from vmonty.base import hostcall
from vmonty.cpu import core
from vmonty.kvm.soft.coalesced_mmio import CoalescedMmio
from vmonty.kvm.soft.eventfd import Doorbell, IoEventfds, Irqfds
from vmonty.kvm.soft.files import KvmFile, answers
from vmonty.kvm.soft.i8254 import Pit
from vmonty.kvm.soft.iodev import KvmIoBuses
from vmonty.kvm.soft.irq_comm import IrqComm
from vmonty.kvm.soft.memslots import Memslots
from vmonty.kvm.soft.timer import HrTimers
from vmonty.kvm.soft.user import Argument
from vmonty.kvm.uapi import Requests, irq
from vmonty.kvm.uapi.flags import (
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_MEM_READONLY,
    KVM_PIT_SPEAKER_DUMMY,
)
from vmonty.kvm.uapi.run import kvm_coalesced_mmio_zone

if TYPE_CHECKING:
    from vmonty.kvm.soft.vcpu_state import VcpuState


class IrqchipIoctls(KvmFile):
    """The part of struct kvm that has to do with interrupts and in-kernel devices."""

    memslots: Memslots
    created_vcpus: int

    def __init__(self) -> None:
        self.timers = HrTimers(threading.RLock())
        self.irqs = IrqComm(self.timers)
        self.buses = KvmIoBuses()
        self.buses.pio.registering = self.irqs.arch.note_ports
        self.buses.mmio.registered = self.irqs.arch.mmio_changed
        self.pit: Pit | None = None
        self.irqfds = Irqfds(self.irqs)
        self.ioeventfds = IoEventfds(self.buses, self._hang_doorbells)
        self.ring_fd = self.make_fd("kvm-coalesced", mmap.PAGESIZE)
        try:
            self.coalesced = CoalescedMmio(memoryview(mmap.mmap(self.ring_fd, mmap.PAGESIZE)), self.buses)
        except BaseException:
            os.close(self.ring_fd)
            raise

    def _hang_doorbells(self, bells: list[Doorbell]) -> None:
        """Memory hides what lies below it."""
        self.irqs.arch.set_doorbells([bell for bell in bells if self.memslots.find(bell.address) is None])

    @property
    def irqchip_in_kernel(self) -> bool:
        """irqchip_in_kernel()."""
        return self.irqs.in_kernel

    def destroy_irqchip(self) -> None:
        """kvm_arch_destroy_vm(), as far as threads and descriptors go."""
        self.irqfds.close()
        self.ioeventfds.close()
        if self.pit is not None:
            self.pit.close()
        self.timers.close()
        os.close(self.ring_fd)

    # ---- chips -----------------------------------------------------------------------------------------

    @answers(Requests.KVM_CREATE_IRQCHIP)
    def create_irqchip(self, argument: Argument) -> None:
        if self.irqs.in_kernel:
            raise OSError(errno.EEXIST, "there is an irqchip")
        if self.created_vcpus:
            raise OSError(errno.EINVAL, "there are vCPUs without local APIC")
        self.irqs.create_irqchip(self.buses)

    def _full_irqchip(self) -> None:
        if self.irqs.ioapic is None:
            raise OSError(errno.ENXIO, "there is no irqchip")

    @answers(Requests.KVM_GET_IRQCHIP)
    def get_irqchip(self, argument: Argument) -> None:
        state = argument.get(irq.kvm_irqchip)
        self._full_irqchip()
        pic, ioapic = self.irqs.pic, self.irqs.ioapic
        assert pic is not None
        assert ioapic is not None
        if state.chip_id == KVM_IRQCHIP_IOAPIC:
            state.chip.ioapic = ioapic.get_state()
        elif state.chip_id <= KVM_IRQCHIP_PIC_SLAVE:
            state.chip.pic = pic.get_state(state.chip_id)
        else:
            raise OSError(errno.EINVAL, "no such chip")
        argument.put(state)

    @answers(Requests.KVM_SET_IRQCHIP)
    def set_irqchip(self, argument: Argument) -> None:
        state = argument.get(irq.kvm_irqchip)
        self._full_irqchip()
        pic, ioapic = self.irqs.pic, self.irqs.ioapic
        assert pic is not None
        assert ioapic is not None
        if state.chip_id == KVM_IRQCHIP_IOAPIC:
            ioapic.set_state(state.chip.ioapic)
        elif state.chip_id <= KVM_IRQCHIP_PIC_SLAVE:
            pic.set_state(state.chip_id, state.chip.pic)
        else:
            raise OSError(errno.EINVAL, "no such chip")

    @answers(Requests.KVM_CREATE_PIT2)
    def create_pit2(self, argument: Argument) -> None:
        self._create_pit(argument.get(irq.kvm_pit_config).flags)

    @answers(Requests.KVM_CREATE_PIT)
    def create_pit(self, argument: Argument) -> None:
        self._create_pit(KVM_PIT_SPEAKER_DUMMY)

    def _create_pit(self, flags: int) -> None:
        if self.pit is not None:
            raise OSError(errno.EEXIST, "there is a PIT")
        if self.irqs.ioapic is None:
            raise OSError(errno.ENOENT, "there is no irqchip")
        self.pit = Pit(self.timers, self.irqs)
        self.pit.register(self.buses.pio, speaker=bool(flags & KVM_PIT_SPEAKER_DUMMY))

    def _has_pit(self) -> Pit:
        if self.pit is None:
            raise OSError(errno.ENXIO, "there is no PIT")
        return self.pit

    @answers(Requests.KVM_GET_PIT2)
    def get_pit2(self, argument: Argument) -> None:
        argument.put(self._has_pit().get_state())

    @answers(Requests.KVM_SET_PIT2)
    def set_pit2(self, argument: Argument) -> None:
        state = argument.get(irq.kvm_pit_state2)
        self._has_pit().set_state(state)

    @answers(Requests.KVM_GET_PIT)
    def get_pit(self, argument: Argument) -> None:
        argument.put(irq.kvm_pit_state(channels=self._has_pit().get_state().channels))

    @answers(Requests.KVM_SET_PIT)
    def set_pit(self, argument: Argument) -> None:
        state = argument.get(irq.kvm_pit_state)
        self._has_pit().set_state(state)

    @answers(Requests.KVM_REINJECT_CONTROL)
    def reinject_control(self, argument: Argument) -> None:
        control = argument.get(irq.kvm_reinject_control)
        self._has_pit().set_reinject(bool(control.pit_reinject))

    # ---- lines and messages ------------------------------------------------------------------------------

    @answers(Requests.KVM_IRQ_LINE)
    def irq_line(self, argument: Argument) -> None:
        self._line(argument)

    @answers(Requests.KVM_IRQ_LINE_STATUS)
    def irq_line_status(self, argument: Argument) -> None:
        line = self._line(argument)
        argument.put(line)

    def _line(self, argument: Argument) -> irq.kvm_irq_level:
        line = argument.get(irq.kvm_irq_level)
        if not self.irqs.in_kernel:
            raise OSError(errno.ENXIO, "there is no irqchip")
        line.u.status = self.irqs.set_irq(line.u.irq, line.level, line_status=True)
        return line

    @answers(Requests.KVM_SET_GSI_ROUTING)
    def set_gsi_routing(self, argument: Argument) -> None:
        head = argument.get(irq.kvm_irq_routing)
        if not self.irqs.in_kernel or head.nr > 4096 or head.flags:
            raise OSError(errno.EINVAL, "no irqchip, too many routes, or flags")
        self.irqs.set_routing(argument.entries(irq.kvm_irq_routing, irq.kvm_irq_routing_entry, head.nr))

    @answers(Requests.KVM_SIGNAL_MSI)
    def signal_msi(self, argument: Argument) -> int:
        return self.irqs.signal_msi(argument.get(irq.kvm_msi))

    @answers(Requests.KVM_IRQFD)
    def irqfd(self, argument: Argument) -> None:
        self.irqfds.irqfd(argument.get(irq.kvm_irqfd))

    @answers(Requests.KVM_IOEVENTFD)
    def ioeventfd(self, argument: Argument) -> None:
        self.ioeventfds.ioeventfd(argument.get(irq.kvm_ioeventfd))

    @answers(Requests.KVM_REGISTER_COALESCED_MMIO)
    def register_coalesced_mmio(self, argument: Argument) -> None:
        self.coalesced.register(argument.get(kvm_coalesced_mmio_zone))

    @answers(Requests.KVM_UNREGISTER_COALESCED_MMIO)
    def unregister_coalesced_mmio(self, argument: Argument) -> None:
        self.coalesced.unregister(argument.get(kvm_coalesced_mmio_zone))

    # ---- who answers an access ----------------------------------------------------------------------------

    def mmio_write(self, vcpu: VcpuState, gpa: int, data: bytes) -> bool:
        """vcpu_mmio_write(): the vCPU's own APIC first, then the bus; False: nobody."""
        value, size = int.from_bytes(data, "little"), len(data)
        if vcpu.apic is not None and vcpu.apic.mmio_write(gpa, size, value):
            return True
        return self.buses.mmio.write(gpa, size, value)

    def mmio_read(self, vcpu: VcpuState, gpa: int, size: int) -> bytes | None:
        """vcpu_mmio_read(); None: nobody."""
        value = vcpu.apic.mmio_read(gpa, size) if vcpu.apic is not None else None
        if value is None:
            value = self.buses.mmio.read(gpa, size)
        return None if value is None else (value & (1 << 8 * size) - 1).to_bytes(size, "little")

    def read_gpa(self, gpa: int, size: int) -> bytes | None:
        """kvm_read_guest(), within one page; None where no memory is."""
        slot = self.memslots.find(gpa)
        return None if slot is None else hostcall.read_memory(slot.hva(gpa), size)

    def write_gpa(self, gpa: int, data: bytes) -> bool:
        """kvm_write_guest(), within one page; False where no memory is, or it can only be read."""
        slot = self.memslots.find(gpa)
        if slot is None or slot.flags & KVM_MEM_READONLY:
            return False
        hostcall.write_memory(slot.hva(gpa), data)
        core.memory_written(slot.hva(gpa), len(data))
        # In the log that there is by now: one that began meanwhile must have the write.
        if (slot := self.memslots.find(gpa)) is not None:
            slot.mark_dirty(gpa >> 12)
        return True
