"""A VM fd: memory, interrupt chips, routing, clock, dirty logs, and the source of vCPUs."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from typing import Any

from vmonty.base import hostcall
from vmonty.base.errors import GuestMemoryError
from vmonty.base.layout import flexible
from vmonty.base.ram import Ram
from vmonty.kvm.api.device import Device
from vmonty.kvm.api.handle import Handle
from vmonty.kvm.api.port_window import PortCell, PortWindow
from vmonty.kvm.api.provider import Provider, insight
from vmonty.kvm.api.stats import Stats
from vmonty.kvm.api.vcpu import Vcpu
from vmonty.kvm.uapi import Requests, irq, vm
from vmonty.kvm.uapi.run import kvm_coalesced_mmio_zone
from vmonty.kvm.uapi.vm import kvm_pmu_event_filter


class Vm(Handle):
    """A virtual machine. It lives until its last handle (this, its vCPUs, its devices) is closed.

    RAM that has been given to a slot is kept mapped as long as this object or one of its vCPUs exists, so that
    a guest can never reach memory of this process that took the place of its own.
    """

    def __init__(self, provider: Provider, fd: int, vcpu_mmap_size: int) -> None:
        super().__init__(provider, fd)
        self._vcpu_mmap_size = vcpu_mmap_size
        # Shared with every Vcpu; entries are only ever added, because a vCPU may still be running on an old one.
        self._memory: list[Ram] = []

    def create_vcpu(self, vcpu_id: int = 0) -> Vcpu:
        """KVM_CREATE_VCPU: a vCPU in its reset state, with *vcpu_id* as APIC ID.

        Raises KvmError: EEXIST for an id in use, EINVAL above KVM_CAP_MAX_VCPU_ID or after KVM_CAP_MAX_VCPUS.
        """
        fd = self.ioctl(Requests.KVM_CREATE_VCPU, vcpu_id)
        return Vcpu(self.provider, fd, vcpu_id, self._vcpu_mmap_size, self._memory)

    def create_device(self, kind: int, test: bool = False) -> Device | None:
        """KVM_CREATE_DEVICE: a device of type KVM_DEV_TYPE_*; with *test* only ask (None comes back).

        Raises KvmError with ENODEV when the type is unknown.
        """
        request = vm.kvm_create_device(type=kind, flags=1 if test else 0)
        self.ioctl(Requests.KVM_CREATE_DEVICE, request)
        return None if test else Device(self.provider, request.fd)

    # ---- memory ------------------------------------------------------------------------------------

    def set_user_memory_region(
        self,
        slot: int,
        guest_phys_addr: int,
        ram: Ram | None,
        offset: int = 0,
        size: int | None = None,
        flags: int = 0,
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION: put *size* bytes of *ram* from *offset* at *guest_phys_addr*.

        *ram* None (or size 0) deletes the slot. The same slot with another address moves it. *flags* are
        KVM_MEM_LOG_DIRTY_PAGES and KVM_MEM_READONLY. Raises KvmError: EINVAL for unaligned or bad arguments,
        EEXIST where another slot lies; GuestMemoryError when the range is not inside *ram*.
        """
        length, address = self._range(ram, offset, size)
        self.ioctl(
            Requests.KVM_SET_USER_MEMORY_REGION,
            vm.kvm_userspace_memory_region(
                slot=slot,
                flags=flags,
                guest_phys_addr=guest_phys_addr,
                memory_size=length,
                userspace_addr=address,
            ),
        )

    def set_user_memory_region2(
        self, slot: int, guest_phys_addr: int, ram: Ram | None, offset: int = 0, size: int | None = None,
        flags: int = 0, guest_memfd: int = 0, guest_memfd_offset: int = 0,
    ) -> None:  # fmt: skip
        """KVM_SET_USER_MEMORY_REGION2 (KVM_CAP_USER_MEMORY2): as above, with a guest_memfd for private memory."""
        length, address = self._range(ram, offset, size)
        self.ioctl(
            Requests.KVM_SET_USER_MEMORY_REGION2,
            vm.kvm_userspace_memory_region2(
                slot=slot, flags=flags, guest_phys_addr=guest_phys_addr, memory_size=length, userspace_addr=address,
                guest_memfd=guest_memfd, guest_memfd_offset=guest_memfd_offset,
            ),
        )  # fmt: skip

    def _range(self, ram: Ram | None, offset: int, size: int | None) -> tuple[int, int]:
        if ram is None or size == 0:
            return 0, 0
        length = ram.size - offset if size is None else size
        if offset < 0 or length < 0 or offset + length > ram.size:
            raise GuestMemoryError(offset, length, repr(ram))
        if ram not in self._memory:
            self._memory.append(ram)
        return length, ram.address + offset

    def get_dirty_log(self, slot: int, pages: int) -> bytes:
        """KVM_GET_DIRTY_LOG: a bit per page of *slot* (of *pages* pages), set if written since the last call.

        Raises KvmError with ENOENT when the slot does not log.
        """
        bitmap = bytearray((pages + 63) // 64 * 8)
        request = vm.kvm_dirty_log(slot=slot)
        request.u.dirty_bitmap = hostcall.address_of(bitmap)
        self.ioctl(Requests.KVM_GET_DIRTY_LOG, request)
        return bytes(bitmap)

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, bitmap: bytes) -> None:
        """KVM_CLEAR_DIRTY_LOG: with KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, protect again the pages whose bits are set."""
        cells = bytearray(bitmap)
        request = vm.kvm_clear_dirty_log(slot=slot, num_pages=num_pages, first_page=first_page)
        request.u.dirty_bitmap = hostcall.address_of(cells)
        self.ioctl(Requests.KVM_CLEAR_DIRTY_LOG, request)

    def reset_dirty_rings(self) -> int:
        """KVM_RESET_DIRTY_RINGS: take back what user space has harvested; return the number of pages reset."""
        return self.ioctl(Requests.KVM_RESET_DIRTY_RINGS)

    def create_guest_memfd(self, size: int, flags: int = 0) -> int:
        """KVM_CREATE_GUEST_MEMFD: an fd of memory that only the guest maps. The caller closes it."""
        return self.ioctl(Requests.KVM_CREATE_GUEST_MEMFD, vm.kvm_create_guest_memfd(size=size, flags=flags))

    def set_memory_attributes(self, address: int, size: int, attributes: int) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES: make guest-physical pages private or shared."""
        self.ioctl(
            Requests.KVM_SET_MEMORY_ATTRIBUTES,
            vm.kvm_memory_attributes(address=address, size=size, attributes=attributes),
        )

    def set_tss_addr(self, address: int) -> None:
        """KVM_SET_TSS_ADDR: three pages below 4 GiB that KVM may use for real mode (kvm-intel needs them)."""
        self.ioctl(Requests.KVM_SET_TSS_ADDR, address)

    def set_identity_map_addr(self, address: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR: one page that KVM may use; before any vCPU is made (else EINVAL)."""
        self.ioctl(Requests.KVM_SET_IDENTITY_MAP_ADDR, ctypes.c_uint64(address))

    def set_nr_mmu_pages(self, pages: int) -> None:
        """KVM_SET_NR_MMU_PAGES: limit of shadow page-table pages; at least 64 (KVM_MIN_ALLOC_MMU_PAGES)."""
        self.ioctl(Requests.KVM_SET_NR_MMU_PAGES, pages)

    def get_nr_mmu_pages(self) -> int:
        """KVM_GET_NR_MMU_PAGES."""
        return self.ioctl(Requests.KVM_GET_NR_MMU_PAGES)

    # ---- interrupts ----------------------------------------------------------------------------------

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP: PIC pair, I/O APIC, and a local APIC in every vCPU made from now on.

        Raises KvmError: EEXIST the second time, EINVAL after a vCPU was made.
        """
        self.ioctl(Requests.KVM_CREATE_IRQCHIP)

    def get_irqchip(self, chip_id: int) -> irq.kvm_irqchip:
        """KVM_GET_IRQCHIP: the state of KVM_IRQCHIP_PIC_MASTER, _PIC_SLAVE or _IOAPIC."""
        state = irq.kvm_irqchip(chip_id=chip_id)
        self.ioctl(Requests.KVM_GET_IRQCHIP, state)
        return state

    def set_irqchip(self, state: irq.kvm_irqchip) -> None:
        """KVM_SET_IRQCHIP."""
        self.ioctl(Requests.KVM_SET_IRQCHIP, state)

    def create_pit2(self, flags: int = 0) -> None:
        """KVM_CREATE_PIT2: an i8254; KVM_PIT_SPEAKER_DUMMY adds port 0x61. Needs the irqchip (ENOENT)."""
        self.ioctl(Requests.KVM_CREATE_PIT2, irq.kvm_pit_config(flags=flags))

    def create_pit(self) -> None:
        """KVM_CREATE_PIT: the old request, a PIT without flags."""
        self.ioctl(Requests.KVM_CREATE_PIT)

    def get_pit2(self) -> irq.kvm_pit_state2:
        """KVM_GET_PIT2."""
        return self.get(Requests.KVM_GET_PIT2, irq.kvm_pit_state2)

    def set_pit2(self, state: irq.kvm_pit_state2) -> None:
        """KVM_SET_PIT2."""
        self.ioctl(Requests.KVM_SET_PIT2, state)

    def get_pit(self) -> irq.kvm_pit_state:
        """KVM_GET_PIT."""
        return self.get(Requests.KVM_GET_PIT, irq.kvm_pit_state)

    def set_pit(self, state: irq.kvm_pit_state) -> None:
        """KVM_SET_PIT."""
        self.ioctl(Requests.KVM_SET_PIT, state)

    def reinject_control(self, reinject: bool) -> None:
        """KVM_REINJECT_CONTROL: whether PIT ticks that the guest missed are made up for."""
        # The number says "no argument", yet the kernel reads a struct.
        self.ioctl(Requests.KVM_REINJECT_CONTROL, irq.kvm_reinject_control(pit_reinject=reinject))

    def irq_line(self, gsi: int, level: int) -> None:
        """KVM_IRQ_LINE: raise (1) or lower (0) an interrupt line."""
        request = irq.kvm_irq_level(level=level)
        request.u.irq = gsi
        self.ioctl(Requests.KVM_IRQ_LINE, request)

    def irq_line_status(self, gsi: int, level: int) -> int:
        """KVM_IRQ_LINE_STATUS: as irq_line; return how many CPUs took it, 0 if coalesced, -1 if masked."""
        request = irq.kvm_irq_level(level=level)
        request.u.irq = gsi
        self.ioctl(Requests.KVM_IRQ_LINE_STATUS, request)
        return request.u.status

    def set_gsi_routing(self, entries: Sequence[irq.kvm_irq_routing_entry]) -> None:
        """KVM_SET_GSI_ROUTING: replace the whole routing table. Raises KvmError with EINVAL for a bad entry."""
        table: Any = flexible(irq.kvm_irq_routing, len(entries))(nr=len(entries))
        table.entries[:] = list(entries)
        self.ioctl(Requests.KVM_SET_GSI_ROUTING, table)

    def signal_msi(self, address: int, data: int, devid: int | None = None) -> int:
        """KVM_SIGNAL_MSI: deliver one message; return how many CPUs took it (0: blocked by the guest)."""
        request = irq.kvm_msi(address_lo=address & 0xFFFFFFFF, address_hi=address >> 32, data=data)
        if devid is not None:
            request.flags, request.devid = 1, devid
        return self.ioctl(Requests.KVM_SIGNAL_MSI, request)

    def irqfd(self, eventfd: int, gsi: int, resamplefd: int | None = None, deassign: bool = False) -> None:
        """KVM_IRQFD: each write to *eventfd* raises *gsi*; with *resamplefd* level-triggered, told of the EOI.

        Raises KvmError: EBUSY for an eventfd already in use, EBADF or EINVAL for what is no eventfd.
        """
        flags = (1 if deassign else 0) | (2 if resamplefd is not None else 0)
        request = irq.kvm_irqfd(fd=eventfd, gsi=gsi, flags=flags, resamplefd=resamplefd or 0)
        self.ioctl(Requests.KVM_IRQFD, request)

    def signal(self, eventfd: int) -> None:
        """Write to an *eventfd* that ``irqfd`` has, by the same number.

        The kernel raises the interrupt in the writer's context. So does a KVM in software by this, and only by this:
        a plain write to the eventfd has to wake a thread of its first.
        """
        direct = getattr(self.provider, "signal_irqfd", None)
        if direct is None or not direct(self.fileno(), eventfd):
            os.eventfd_write(eventfd, 1)

    def port_window(self, first: int) -> PortWindow | None:
        """Registers at ports *first* to *first* + 7 that KVM answers for itself, as far as user space tells it how.

        None where it cannot: on hardware, and when the VM has one already. There every access is an exit.
        """
        make = getattr(self.provider, "port_window", None)
        return None if make is None else make(self.fileno(), first)

    def port_cell(self, port: int, size: int, value: int, mask: int) -> PortCell | None:
        """A port of *size* bytes (1, 2, 4) that holds *value*, so that plain accesses of that size need no exit.

        Reads give it; a write that changes no bits but those in *mask* is stored, unless there are none. Everything
        else is an exit, as all is when this returns None: on hardware, and when the VM has four of them already.
        """
        make = getattr(self.provider, "port_cell", None)
        return None if make is None else make(self.fileno(), port, size, value, mask)

    def ioeventfd(
        self, eventfd: int, address: int, size: int, datamatch: int | None = None, pio: bool = False,
        deassign: bool = False, at_once: Callable[[], bool] | None = None,
    ) -> None:  # fmt: skip
        """KVM_IOEVENTFD: a guest write of *size* bytes (0: any) at *address* signals *eventfd* without an exit.

        With *datamatch* only that value does. A KVM in software first calls *at_once* on the vCPU's thread, inside of
        KVM_RUN, and signals when that returns False; it may use the VM, but not wait for a vCPU. Raises KvmError:
        EEXIST on a collision, ENOENT when there is nothing to deassign, EINVAL for a bad size.
        """
        flags = (0 if datamatch is None else 1) | (2 if pio else 0) | (4 if deassign else 0)
        self.ioctl(
            Requests.KVM_IOEVENTFD,
            irq.kvm_ioeventfd(datamatch=datamatch or 0, addr=address, len=size, fd=eventfd, flags=flags),
        )
        direct = getattr(self.provider, "ring_at_once", None)
        if at_once is not None and direct is not None:
            direct(self.fileno(), eventfd, at_once)

    def register_coalesced_mmio(self, address: int, size: int, pio: bool = False) -> None:
        """KVM_REGISTER_COALESCED_MMIO: collect writes to this range in the ring next to kvm_run."""
        self.ioctl(Requests.KVM_REGISTER_COALESCED_MMIO, self._zone(address, size, pio))

    def unregister_coalesced_mmio(self, address: int, size: int, pio: bool = False) -> None:
        """KVM_UNREGISTER_COALESCED_MMIO."""
        self.ioctl(Requests.KVM_UNREGISTER_COALESCED_MMIO, self._zone(address, size, pio))

    @staticmethod
    def _zone(address: int, size: int, pio: bool) -> kvm_coalesced_mmio_zone:
        zone = kvm_coalesced_mmio_zone(addr=address, size=size)
        zone.u.pio = pio
        return zone

    def set_boot_cpu_id(self, vcpu_id: int) -> None:
        """KVM_SET_BOOT_CPU_ID: which vCPU starts; before any is made (else EBUSY)."""
        self.ioctl(Requests.KVM_SET_BOOT_CPU_ID, vcpu_id)

    # ---- clock, filters, the rest --------------------------------------------------------------------

    def get_clock(self) -> vm.kvm_clock_data:
        """KVM_GET_CLOCK: kvmclock in nanoseconds, with KVM_CLOCK_* flags."""
        return self.get(Requests.KVM_GET_CLOCK, vm.kvm_clock_data)

    def set_clock(self, clock: int, flags: int = 0) -> None:
        """KVM_SET_CLOCK: set kvmclock to *clock* nanoseconds."""
        self.ioctl(Requests.KVM_SET_CLOCK, vm.kvm_clock_data(clock=clock, flags=flags))

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ on the VM (KVM_CAP_VM_TSC_CONTROL): the default for vCPUs made later."""
        self.ioctl(Requests.KVM_SET_TSC_KHZ, khz)

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ on the VM (KVM_CAP_VM_TSC_CONTROL)."""
        return self.ioctl(Requests.KVM_GET_TSC_KHZ)

    def set_msr_filter(self, ranges: Sequence[vm.kvm_msr_filter_range], default_deny: bool = False) -> None:
        """KVM_X86_SET_MSR_FILTER: up to 16 ranges with a bit per MSR (1 allows); no ranges switch it off."""
        request = vm.kvm_msr_filter(flags=1 if default_deny else 0)
        for slot, entry in enumerate(ranges):
            request.ranges[slot] = entry
        self.ioctl(Requests.KVM_X86_SET_MSR_FILTER, request)

    def set_pmu_event_filter(self, events: Sequence[int], action: int = 1, fixed: int = 0, flags: int = 0) -> None:
        """KVM_SET_PMU_EVENT_FILTER: allow (0) or deny (1) *events*; *fixed* is the fixed counters' bitmap."""
        table: Any = flexible(kvm_pmu_event_filter, len(events))(
            action=action, nevents=len(events), fixed_counter_bitmap=fixed, flags=flags
        )
        table.events[:] = list(events)
        self.ioctl(Requests.KVM_SET_PMU_EVENT_FILTER, table)

    def memory_encrypt_op(self, argument: int) -> int:
        """KVM_MEMORY_ENCRYPT_OP: a SEV or TDX command at this address (0: ask whether there is SEV)."""
        return self.ioctl(Requests.KVM_MEMORY_ENCRYPT_OP, argument)

    def translate(self, gva: int, vcpu: Vcpu) -> Any:
        """As Vcpu.walk(): how *vcpu* of this VM comes from *gva* to memory."""
        return vcpu.walk(gva)

    def trace(self, tracer: Callable[[Any], None] | None) -> None:
        """Have *tracer* called with each exit (vcpu, entered_ns, left_ns, reason, name, qualification, rip); None: off.

        It is called on the vCPU's thread. Raises KvmUnsupported on a KVM that cannot tell.
        """
        insight(self.provider, "trace")(self.fileno(), tracer)

    def stats(self) -> Stats:
        """KVM_GET_STATS_FD: the VM's counters (KVM_CAP_BINARY_STATS_FD)."""
        return Stats(self.ioctl(Requests.KVM_GET_STATS_FD))
