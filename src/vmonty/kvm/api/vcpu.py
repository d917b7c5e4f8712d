"""A vCPU fd: its kvm_run page, running it, and its state."""

from __future__ import annotations

import ctypes
import errno
import mmap
import struct
from collections.abc import Iterable, Mapping
from threading import get_ident
from typing import Any

from vmonty.base.layout import Array, flexible
from vmonty.base.ram import Ram
from vmonty.kvm.api.device import Device
from vmonty.kvm.api.handle import Handle
from vmonty.kvm.api.lists import MAX_CPUID_ENTRIES, CpuidEntry, cpuid_entries, cpuid_table
from vmonty.kvm.api.provider import Provider, insight
from vmonty.kvm.api.runs import EXITS, KVM_RUN, Runs
from vmonty.kvm.api.stats import Stats
from vmonty.kvm.uapi import Exit, Requests, irq, vcpu
from vmonty.kvm.uapi.exits import KVM_EXIT_IO_IN
from vmonty.kvm.uapi.flags import KVM_COALESCED_MMIO_PAGE_OFFSET, KVM_DIRTY_LOG_PAGE_OFFSET
from vmonty.kvm.uapi.nested import kvm_nested_state
from vmonty.kvm.uapi.run import kvm_coalesced_mmio, kvm_coalesced_mmio_ring, kvm_dirty_gfn, kvm_run

# What no entry that KVM fills in has in its padding.
_UNWRITTEN = [0xFFFFFFFF] * 3
_INTERRUPTED = (-errno.EINTR, -errno.EAGAIN)
# The io member of kvm_run's union: from direction to data_offset.
_IO, _IO_AT = struct.Struct("<BBHIQ"), int(kvm_run.u.offset)
_MMIO, _MMIO_DATA_AT = struct.Struct("<Q8xI?"), _IO_AT + 8


class Vcpu(Handle):
    """A virtual CPU. One thread at a time runs it (others that try wait in KVM); any thread may kick or close it.

    ``kvm_run`` is the page shared with KVM (linux/kvm.h, struct kvm_run); ``page`` the whole mapping as bytes.
    """

    def __init__(self, provider: Provider, fd: int, vcpu_id: int, mmap_size: int, memory: list[Ram]) -> None:
        super().__init__(provider, fd)
        self.id = vcpu_id
        self._memory = memory
        try:
            self.page = provider.mmap(fd, mmap_size)
        except BaseException:
            self.close()
            raise
        self.kvm_run = kvm_run.from_buffer(self.page)
        self._runner = 0
        self._kicked = False

    # ---- running -------------------------------------------------------------------------------------

    def run(self) -> Exit | int:
        """KVM_RUN until the guest needs user space; return the exit reason (an int if it is none we know).

        Exit.INTR comes back when a signal, a kick or ``immediate_exit`` ended it (EINTR), or KVM asks to be
        called again (EAGAIN); with ``immediate_exit`` a pending port or MMIO access is completed first.
        Raises KvmError for anything else, HandleClosed when the vCPU was closed before or meanwhile.
        """
        self._begin_runs(get_ident())
        try:
            if result := self.provider.ioctl(self._fd, KVM_RUN, 0):
                return self._interrupted(result)
            reason = self.kvm_run.exit_reason
            return EXITS.get(reason, reason)
        finally:
            self._end_runs()

    def runs(self) -> Runs:
        """``with vcpu.runs() as run``: run() does what this object's does, several times on this thread, for less."""
        return Runs(self)

    def _begin_runs(self, thread: int) -> None:
        """From now on *thread* is the one to kick. Raises HandleClosed."""
        with self._idle:
            self.fileno()
            self._users += 1
            self._runner = thread

    def _end_runs(self) -> None:
        """Nobody runs it any more."""
        with self._idle:
            self._runner = 0
            self._users -= 1
            last = self._closing and self._users == 0
        if last:
            self._release()

    def _interrupted(self, result: int) -> Exit:
        """What KVM_RUN means that gave *result*, minus errno. Raises KvmError, HandleClosed."""
        self.fileno()
        if result not in _INTERRUPTED:
            raise self.error(-result, "KVM_RUN")
        with self._idle:
            # A kick that came after another exit is for the next run.
            if self._kicked:
                self._kicked = False
                self.kvm_run.immediate_exit = 0
        return Exit.INTR

    def kick(self) -> None:
        """Make run() return Exit.INTR soon: the one in progress, or the next one. From any thread."""
        with self._idle:
            self._kicked = True
            self.kvm_run.immediate_exit = 1
            if self._runner:
                self.provider.kick(self._runner)

    def complete_io(self) -> None:
        """Let KVM finish a port or MMIO access that an exit reported, without running the guest further.

        State may be read or written only after that (api.rst, KVM_RUN: "operation is complete").
        """
        self.kvm_run.immediate_exit = 1
        try:
            result = self.try_ioctl(Requests.KVM_RUN, 0)
        finally:
            with self._idle:
                self.kvm_run.immediate_exit = int(self._kicked)
        if result < 0 and result != -errno.EINTR:
            raise self.error(-result, "KVM_RUN")

    def close(self) -> None:
        """Close the vCPU; a run() in progress is kicked out and raises HandleClosed."""
        super().close()
        if self._users:
            self.kick()

    def io_access(self) -> tuple[bool, int, int, memoryview]:
        """The Exit.IO at once: whether it is an IN, the size of each access, the port, and the bytes as io_data()."""
        direction, size, port, count, offset = _IO.unpack_from(self.page, _IO_AT)
        return direction == KVM_EXIT_IO_IN, size, port, self.page[offset : offset + size * count]

    def mmio_access(self) -> tuple[bool, int, memoryview]:
        """The Exit.MMIO at once: whether it is a write, the guest-physical address, and the bytes as in io_access()."""
        address, size, writes = _MMIO.unpack_from(self.page, _IO_AT)
        return writes, address, self.page[_MMIO_DATA_AT : _MMIO_DATA_AT + min(size, 8)]

    def io_data(self) -> memoryview:
        """The bytes of an Exit.IO: size * count of them, to read (out) or fill in (in)."""
        io = self.kvm_run.u.io
        return self.page[io.data_offset : io.data_offset + io.size * io.count]

    def coalesced_mmio_ring(self) -> tuple[kvm_coalesced_mmio_ring, Array[kvm_coalesced_mmio]]:
        """The ring of coalesced MMIO, its header and its slots (KVM_CAP_COALESCED_MMIO gives its page)."""
        at = KVM_COALESCED_MMIO_PAGE_OFFSET * mmap.PAGESIZE
        count = (mmap.PAGESIZE - ctypes.sizeof(kvm_coalesced_mmio_ring)) // ctypes.sizeof(kvm_coalesced_mmio)
        ring: Any = flexible(kvm_coalesced_mmio_ring, count).from_buffer(self.page, at)
        return ring, ring.coalesced_mmio

    def drain_coalesced_mmio(self) -> list[tuple[int, bytes, bool]]:
        """Take everything out of the ring: (address, data, is a port) in the order of the writes."""
        ring, slots = self.coalesced_mmio_ring()
        taken = []
        while ring.first != ring.last:
            slot = slots[ring.first]
            taken.append((slot.phys_addr, bytes(slot.data[: slot.len]), bool(slot.u.pio)))
            ring.first = (ring.first + 1) % len(slots)
        return taken

    def dirty_ring(self, size: int) -> Array[kvm_dirty_gfn]:
        """Map the dirty ring of *size* bytes (as given to KVM_CAP_DIRTY_LOG_RING) of this vCPU."""
        view = self.provider.mmap(self.fileno(), size, KVM_DIRTY_LOG_PAGE_OFFSET * mmap.PAGESIZE)
        return (kvm_dirty_gfn * (size // ctypes.sizeof(kvm_dirty_gfn))).from_buffer(view)

    # ---- insight ---------------------------------------------------------------------------------------

    def dump_vmcs(self) -> dict[str, int]:
        """The VMCS (or VMCB) by field name. Raises KvmUnsupported on a KVM that cannot show it."""
        dump: dict[str, int] = insight(self.provider, "dump_control_block")(self.fileno())
        return dump

    dump_vmcb = dump_vmcs

    def walk(self, gva: int) -> Any:
        """Every step of *gva* → guest-physical → host-virtual → host-physical, with the entries read.

        The result has gva, gpa, hva, hpa (None from where it ends) and steps. Raises KvmUnsupported as dump_vmcs().
        """
        return insight(self.provider, "translate")(self.fileno(), gva)

    # ---- registers -----------------------------------------------------------------------------------

    def get_regs(self) -> vcpu.kvm_regs:
        """KVM_GET_REGS: general registers, rip, rflags."""
        return self.get(Requests.KVM_GET_REGS, vcpu.kvm_regs)

    def set_regs(self, regs: vcpu.kvm_regs) -> None:
        """KVM_SET_REGS; it also drops a pending exception."""
        self.ioctl(Requests.KVM_SET_REGS, regs)

    def get_sregs(self) -> vcpu.kvm_sregs:
        """KVM_GET_SREGS: segments, tables, control registers, EFER, APIC base."""
        return self.get(Requests.KVM_GET_SREGS, vcpu.kvm_sregs)

    def set_sregs(self, sregs: vcpu.kvm_sregs) -> None:
        """KVM_SET_SREGS. Raises KvmError with EINVAL for a state that no processor can have."""
        self.ioctl(Requests.KVM_SET_SREGS, sregs)

    def get_sregs2(self) -> vcpu.kvm_sregs2:
        """KVM_GET_SREGS2 (KVM_CAP_SREGS2): as above, with the PDPTEs instead of the interrupt bitmap."""
        return self.get(Requests.KVM_GET_SREGS2, vcpu.kvm_sregs2)

    def set_sregs2(self, sregs: vcpu.kvm_sregs2) -> None:
        """KVM_SET_SREGS2."""
        self.ioctl(Requests.KVM_SET_SREGS2, sregs)

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """KVM_GET_MSRS: index → value; it stops at the first MSR that KVM refuses."""
        wanted = list(indices)
        table: Any = flexible(vcpu.kvm_msrs, len(wanted))(nmsrs=len(wanted))
        for entry, index in zip(table.entries, wanted, strict=True):
            entry.index = index
        count = self.ioctl(Requests.KVM_GET_MSRS, table)
        return {entry.index: entry.data for entry in table.entries[:count]}

    def set_msrs(self, values: Mapping[int, int]) -> int:
        """KVM_SET_MSRS in the mapping's order; return how many were taken: fewer when KVM refused one."""
        table: Any = flexible(vcpu.kvm_msrs, len(values))(nmsrs=len(values))
        for entry, (index, data) in zip(table.entries, values.items(), strict=True):
            entry.index, entry.data = index, data
        return self.ioctl(Requests.KVM_SET_MSRS, table)

    def get_fpu(self) -> vcpu.kvm_fpu:
        """KVM_GET_FPU: x87 and SSE state."""
        return self.get(Requests.KVM_GET_FPU, vcpu.kvm_fpu)

    def set_fpu(self, fpu: vcpu.kvm_fpu) -> None:
        """KVM_SET_FPU."""
        self.ioctl(Requests.KVM_SET_FPU, fpu)

    def get_xsave(self) -> vcpu.kvm_xsave:
        """KVM_GET_XSAVE: the XSAVE area's first 4 KiB."""
        return self.get(Requests.KVM_GET_XSAVE, vcpu.kvm_xsave)

    def set_xsave(self, xsave: vcpu.kvm_xsave) -> None:
        """KVM_SET_XSAVE: as much as KVM_CAP_XSAVE2 says is read, so *xsave* may be a longer one."""
        self.ioctl(Requests.KVM_SET_XSAVE, xsave)

    def get_xsave2(self, size: int) -> bytearray:
        """KVM_GET_XSAVE2: the whole XSAVE area, *size* bytes as KVM_CAP_XSAVE2 on the VM tells."""
        area = bytearray(max(size, 4096))
        self.ioctl(Requests.KVM_GET_XSAVE2, area)
        return area

    def get_xcrs(self) -> dict[int, int]:
        """KVM_GET_XCRS: extended control registers, number → value."""
        table = self.get(Requests.KVM_GET_XCRS, vcpu.kvm_xcrs)
        return {entry.xcr: entry.value for entry in table.xcrs[: table.nr_xcrs]}

    def set_xcrs(self, values: Mapping[int, int]) -> None:
        """KVM_SET_XCRS. Raises KvmError with EINVAL for a value that the processor would refuse."""
        table = vcpu.kvm_xcrs(nr_xcrs=len(values))
        for slot, (number, value) in zip(table.xcrs, values.items(), strict=False):
            slot.xcr, slot.value = number, value
        self.ioctl(Requests.KVM_SET_XCRS, table)

    def get_debugregs(self) -> vcpu.kvm_debugregs:
        """KVM_GET_DEBUGREGS: DR0–DR3, DR6, DR7."""
        return self.get(Requests.KVM_GET_DEBUGREGS, vcpu.kvm_debugregs)

    def set_debugregs(self, registers: vcpu.kvm_debugregs) -> None:
        """KVM_SET_DEBUGREGS."""
        self.ioctl(Requests.KVM_SET_DEBUGREGS, registers)

    # ---- CPUID, TSC, machine check ---------------------------------------------------------------------

    def set_cpuid2(self, entries: Iterable[CpuidEntry]) -> None:
        """KVM_SET_CPUID2: what the guest's CPUID answers. KvmError: E2BIG above 256 leaves, EINVAL after a run."""
        self.ioctl(Requests.KVM_SET_CPUID2, cpuid_table(entries))

    def set_cpuid(self, entries: Iterable[CpuidEntry]) -> None:
        """KVM_SET_CPUID: the old request without sub-leaves."""
        rows = list(entries)
        table: Any = flexible(vcpu.kvm_cpuid, len(rows))(nent=len(rows))
        for slot, row in zip(table.entries, rows, strict=True):
            slot.function, slot.eax, slot.ebx, slot.ecx, slot.edx = (
                row.function,
                row.eax,
                row.ebx,
                row.ecx,
                row.edx,
            )
        self.ioctl(Requests.KVM_SET_CPUID, table)

    def get_cpuid2(self, room: int = MAX_CPUID_ENTRIES) -> list[CpuidEntry]:
        """KVM_GET_CPUID2. Raises KvmError with E2BIG when there are more than *room* leaves."""
        table: Any = flexible(vcpu.kvm_cpuid2, room)(nent=room)
        # Linux before 6.2 does not tell how many leaves it has written: a mark shows those that it has not.
        for entry in table.entries:
            entry.padding[:] = _UNWRITTEN
        self.ioctl(Requests.KVM_GET_CPUID2, table)
        written = [entry for entry in table.entries[: table.nent] if list(entry.padding) != _UNWRITTEN]
        return cpuid_entries(written)

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ: the guest's TSC frequency in kHz."""
        return self.ioctl(Requests.KVM_GET_TSC_KHZ)

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ; 0 means the host's. Raises KvmError with EINVAL where the host cannot scale."""
        self.ioctl(Requests.KVM_SET_TSC_KHZ, khz)

    def setup_mce(self, mcg_cap: int) -> None:
        """KVM_X86_SETUP_MCE: IA32_MCG_CAP: bank count and features."""
        self.ioctl(Requests.KVM_X86_SETUP_MCE, ctypes.c_uint64(mcg_cap))

    def set_mce(self, error: vcpu.kvm_x86_mce) -> None:
        """KVM_X86_SET_MCE: report a machine check to the guest."""
        self.ioctl(Requests.KVM_X86_SET_MCE, error)

    # ---- interrupts and events -------------------------------------------------------------------------

    def interrupt(self, vector: int) -> None:
        """KVM_INTERRUPT: queue an external interrupt, without an in-kernel irqchip (else ENXIO)."""
        self.ioctl(Requests.KVM_INTERRUPT, vcpu.kvm_interrupt(irq=vector))

    def nmi(self) -> None:
        """KVM_NMI: queue an NMI."""
        self.ioctl(Requests.KVM_NMI)

    def smi(self) -> None:
        """KVM_SMI: queue an SMI (KVM_CAP_X86_SMM)."""
        self.ioctl(Requests.KVM_SMI)

    def get_lapic(self) -> irq.kvm_lapic_state:
        """KVM_GET_LAPIC: the 1 KiB register page. Needs an in-kernel local APIC (EINVAL)."""
        return self.get(Requests.KVM_GET_LAPIC, irq.kvm_lapic_state)

    def set_lapic(self, state: irq.kvm_lapic_state) -> None:
        """KVM_SET_LAPIC."""
        self.ioctl(Requests.KVM_SET_LAPIC, state)

    def get_mp_state(self) -> int:
        """KVM_GET_MP_STATE: KVM_MP_STATE_*."""
        return self.get(Requests.KVM_GET_MP_STATE, vcpu.kvm_mp_state).mp_state

    def set_mp_state(self, state: int) -> None:
        """KVM_SET_MP_STATE."""
        self.ioctl(Requests.KVM_SET_MP_STATE, vcpu.kvm_mp_state(mp_state=state))

    def get_vcpu_events(self) -> vcpu.kvm_vcpu_events:
        """KVM_GET_VCPU_EVENTS: exceptions, interrupts, NMIs and SMIs in flight."""
        return self.get(Requests.KVM_GET_VCPU_EVENTS, vcpu.kvm_vcpu_events)

    def set_vcpu_events(self, events: vcpu.kvm_vcpu_events) -> None:
        """KVM_SET_VCPU_EVENTS."""
        self.ioctl(Requests.KVM_SET_VCPU_EVENTS, events)

    def tpr_access_reporting(self, enabled: bool) -> None:
        """KVM_TPR_ACCESS_REPORTING: exit with Exit.TPR_ACCESS on accesses to the TPR (KVM_CAP_VAPIC)."""
        self.ioctl(Requests.KVM_TPR_ACCESS_REPORTING, vcpu.kvm_tpr_access_ctl(enabled=enabled))

    def set_vapic_addr(self, address: int) -> None:
        """KVM_SET_VAPIC_ADDR: where the guest keeps its virtual APIC state; 0 switches it off."""
        self.ioctl(Requests.KVM_SET_VAPIC_ADDR, irq.kvm_vapic_addr(vapic_addr=address))

    def set_signal_mask(self, signals: Iterable[int] | None) -> None:
        """KVM_SET_SIGNAL_MASK: the signals that are blocked during KVM_RUN; None restores the thread's own mask."""
        if signals is None:
            self.ioctl(Requests.KVM_SET_SIGNAL_MASK, 0)
            return
        mask = sum(1 << (number - 1) for number in set(signals))
        request: Any = flexible(vcpu.kvm_signal_mask, 8)(len=8)
        request.sigset[:] = list(mask.to_bytes(8, "little"))
        self.ioctl(Requests.KVM_SET_SIGNAL_MASK, request)

    # ---- debug, translate, the rest --------------------------------------------------------------------

    def set_guest_debug(self, control: int, debugreg: Mapping[int, int] | None = None) -> None:
        """KVM_SET_GUEST_DEBUG: KVM_GUESTDBG_* and, for hardware breakpoints, debug registers by number."""
        request = vcpu.kvm_guest_debug(control=control)
        for number, value in (debugreg or {}).items():
            request.arch.debugreg[number] = value
        self.ioctl(Requests.KVM_SET_GUEST_DEBUG, request)

    def translate(self, linear_address: int) -> vcpu.kvm_translation:
        """KVM_TRANSLATE: guest-virtual → guest-physical by the vCPU's page tables; ``valid`` says if mapped."""
        request = vcpu.kvm_translation(linear_address=linear_address)
        self.ioctl(Requests.KVM_TRANSLATE, request)
        return request

    def kvmclock_ctrl(self) -> None:
        """KVM_KVMCLOCK_CTRL: tell the guest that it was paused. Raises KvmError with EINVAL without kvmclock."""
        self.ioctl(Requests.KVM_KVMCLOCK_CTRL)

    def get_nested_state(self, size: int) -> bytearray:
        """KVM_GET_NESTED_STATE: *size* as KVM_CAP_NESTED_STATE tells; a kvm_nested_state and its data."""
        area = bytearray(max(size, ctypes.sizeof(kvm_nested_state)))
        kvm_nested_state.from_buffer(area).size = len(area)
        self.ioctl(Requests.KVM_GET_NESTED_STATE, area)
        return area

    def set_nested_state(self, state: bytearray) -> None:
        """KVM_SET_NESTED_STATE."""
        self.ioctl(Requests.KVM_SET_NESTED_STATE, state)

    def get_one_reg(self, register: int) -> int:
        """KVM_GET_ONE_REG: a 64-bit register by KVM_REG_* id (KVM_CAP_ONE_REG)."""
        value = ctypes.c_uint64()
        self.ioctl(Requests.KVM_GET_ONE_REG, vcpu.kvm_one_reg(id=register, addr=ctypes.addressof(value)))
        return value.value

    def set_one_reg(self, register: int, value: int) -> None:
        """KVM_SET_ONE_REG."""
        cell = ctypes.c_uint64(value)
        self.ioctl(Requests.KVM_SET_ONE_REG, vcpu.kvm_one_reg(id=register, addr=ctypes.addressof(cell)))

    def get_device_attr(self, group: int, attr: int) -> int:
        """KVM_GET_DEVICE_ATTR on the vCPU, such as KVM_VCPU_TSC_OFFSET."""
        return Device.read_attr(self, group, attr)

    def set_device_attr(self, group: int, attr: int, value: int) -> None:
        """KVM_SET_DEVICE_ATTR on the vCPU."""
        Device.write_attr(self, group, attr, value)

    def has_device_attr(self, group: int, attr: int) -> bool:
        """KVM_HAS_DEVICE_ATTR on the vCPU."""
        return Device.knows_attr(self, group, attr)

    def stats(self) -> Stats:
        """KVM_GET_STATS_FD: the vCPU's counters (KVM_CAP_BINARY_STATS_FD)."""
        return Stats(self.ioctl(Requests.KVM_GET_STATS_FD))
