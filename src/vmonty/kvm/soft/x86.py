"""The architecture's part of a vCPU: the run loop, event injection, halting, completion of accesses.

Source: arch/x86/kvm/x86.c: kvm_arch_vcpu_ioctl_run(), vcpu_run(), vcpu_enter_guest(), vcpu_block().
"""

from __future__ import annotations

import ctypes
import errno
import signal
import struct
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from vmonty.kvm.soft import cpuid, pcpu
from vmonty.kvm.soft.caps import GUEST_DEBUG_VALID
from vmonty.kvm.soft.dirty_ring import DirtyRing
from vmonty.kvm.soft.events import EventIoctls
from vmonty.kvm.soft.files import answers
from vmonty.kvm.soft.insight import ExitRecord, Tracer
from vmonty.kvm.soft.lapic import Lapic
from vmonty.kvm.soft.mce import McIoctls
from vmonty.kvm.soft.msr_table import StoredMsrs
from vmonty.kvm.soft.msrs import STORED, MsrIoctls
from vmonty.kvm.soft.pvclock import PvClock
from vmonty.kvm.soft.regs import RegisterIoctls
from vmonty.kvm.soft.signals import MASK_POLL_NS, pending_through
from vmonty.kvm.soft.stats import (
    BLOCKING,
    EXITS,
    HALT_EXITS,
    IRQ_INJECTIONS,
    NMI_INJECTIONS,
    REQUEST_IRQ_EXITS,
    SIGNAL_EXITS,
    TLB_FLUSH,
)
from vmonty.kvm.soft.timer import Timer
from vmonty.kvm.soft.user import Argument
from vmonty.kvm.soft.user_exits import MMIO_DATA, PIO_DATA_OFFSET, UserExits, run_offset
from vmonty.kvm.soft.vcpu_tsc import TscIoctls
from vmonty.kvm.uapi import Cap, Exit, Requests, flags
from vmonty.kvm.uapi.irq import kvm_vapic_addr
from vmonty.kvm.uapi.vcpu import (
    kvm_cpuid,
    kvm_cpuid2,
    kvm_cpuid_entry,
    kvm_cpuid_entry2,
    kvm_guest_debug,
    kvm_signal_mask,
    kvm_tpr_access_ctl,
    kvm_translation,
)
from vmonty.kvm.uapi.vm import kvm_enable_cap, kvm_pre_fault_memory

if TYPE_CHECKING:
    from vmonty.kvm.soft.kvm_main import Kvm

T = TypeVar("T")
SUPPORTED_CPUID = cpuid.supported
RFLAGS_IF = 0x200
SIGSET_SIZE = 8
SYNC_FIELDS = flags.KVM_SYNC_X86_VALID_FIELDS
APIC_BASE_DEFAULT, APIC_BASE_BSP = 0xFEE0_0900 & ~0x100, 0x100
# struct kvm_run: what post_kvm_run_save() writes; kvm_valid_regs and kvm_dirty_regs.
RUN_SAVED, RUN_SAVED_AT = struct.Struct("<BB2xQQ"), run_offset("ready_for_interrupt_injection")
SYNC_REGS, SYNC_REGS_AT = struct.Struct("<QQ"), run_offset("kvm_valid_regs")
IMMEDIATE_EXIT_AT = run_offset("immediate_exit")
GP_VECTOR = 13
DR6_ACTIVE_LOW, DR6_BS = 0xFFFF_0FF0, 1 << 14


class VcpuX86(RegisterIoctls, MsrIoctls, EventIoctls, McIoctls, TscIoctls, UserExits):
    """A vCPU of whichever vendor module is loaded."""

    def __init__(self, kvm: Kvm, vcpu_id: int) -> None:
        super().__init__(kvm, vcpu_id)
        self.stored_msrs = StoredMsrs(STORED)
        self.arch.set_msrs(self.stored_msrs)
        self.need_resched = False
        self.dirty_ring: DirtyRing | None = None
        self.vendor = kvm.module.ops.vcpu_create(self)
        self._leave_out_la57()
        self.init_tsc()
        self._cr8 = 0
        self.pending_ioapic_eoi: list[int] = []
        # KVM_TPR_ACCESS_REPORTING: rip and whether a write, of an access that user space must see.
        self._tpr_access: tuple[int, bool] | None = None
        self._vapic_addr = 0
        self.has_run = False
        self.signal_mask: frozenset[int] | None = None
        self.mask_poll = False
        self.pvclock = PvClock(self)
        self.clock_update_requested = False
        self.msr_filter_requested = kvm.msr_filter is not None
        is_bsp = vcpu_id == kvm.boot_vcpu_id
        self._apic_base = APIC_BASE_DEFAULT | (APIC_BASE_BSP if is_bsp else 0)
        try:
            if kvm.irqchip_in_kernel:
                self._create_apic(is_bsp)
            self.vcpu_load(brief=True)
            try:
                if self.apic is not None:
                    self.vendor.lapic_created(self.apic.regs.page)
                self.set_tsc_frequency(kvm.default_tsc_khz)
                self.synchronize_tsc(0)
            finally:
                self.vcpu_put()
        except BaseException:
            self.destroy()
            raise

    def _create_apic(self, is_bsp: bool) -> None:
        """kvm_create_lapic(). Nobody else finds it before the vCPU is complete."""
        kvm = self.kvm
        self.apic = Lapic(self, kvm.irqs, kvm.timers, bsp=is_bsp)
        self.apic.timer.can_use_hv_timer = self.can_use_hv_timer
        self.apic.timer.bus_cycle_ns = kvm.apic_bus_cycle_ns
        if kvm.disabled_quirks:
            kvm.configure_quirks(self.apic)
            self.apic.reset(init_event=False)
        self.mp_state = flags.KVM_MP_STATE_RUNNABLE if is_bsp else flags.KVM_MP_STATE_UNINITIALIZED

    # ---- scheduling ------------------------------------------------------------------------------------------

    def vcpu_load(self, brief: bool = False) -> None:
        """On a physical processor from here to vcpu_put(): the vCPU's registers can be used."""
        pcpu.POOL.sched_in(self.vendor, brief)

    def vcpu_put(self) -> None:
        """Off it, though it may keep the registers."""
        pcpu.POOL.sched_out(self.vendor)

    def preempt(self) -> None:
        """Another vCPU waits for the processor, or it goes down: out of guest mode, and off it."""
        self.need_resched = True
        self.vendor.kick()

    def _resched(self) -> None:
        """The preempt notifiers kvm_sched_out() and kvm_sched_in()."""
        self.need_resched = False
        self.pv.set_preempted()
        self.vcpu_put()
        self.vcpu_load()

    def _sleep(self) -> None:
        """schedule(): wait for a wake-up, without a processor."""
        self.vcpu_put()
        try:
            self.arch.wait()
        finally:
            self.vcpu_load()

    def destroy(self) -> None:
        """kvm_arch_vcpu_destroy()."""
        if self.apic is not None:
            self.kvm.irqs.remove_apic(self.apic)
        self.vendor.destroy()
        self.stats.close()

    @answers(Requests.KVM_GET_STATS_FD)
    def get_stats_fd(self, argument: Argument) -> int:
        fd = self.stats.open()
        self.arch.set_counters(self.stats.values)
        return fd

    # ---- what the local APIC asks of its owner -------------------------------------------------------

    def inject_nmi(self) -> None:
        """kvm_inject_nmi()."""
        self.arch.inject_nmi()
        self.kick()

    # ---- APIC base and task priority ------------------------------------------------------------------

    def get_apic_base(self) -> int:
        """IA32_APIC_BASE."""
        return self.apic.apic_base if self.apic is not None else self._apic_base

    def set_apic_base(self, value: int, host: bool = True) -> None:
        """Set IA32_APIC_BASE."""
        if self.apic is not None and not self.apic.set_base(value, host_initiated=host):
            raise OSError(errno.EINVAL, "not a value that the APIC base takes")
        self._apic_base = value

    def get_cr8(self) -> int:
        """The task priority."""
        return self.apic.get_cr8() if self.apic is not None else self._cr8

    def set_cr8(self, value: int) -> None:
        """Set the task priority."""
        if self.apic is not None:
            self.apic.set_cr8(value)
        self._cr8 = self.arch.cr8 = value & 15

    # ---- CPUID ----------------------------------------------------------------------------------------

    @answers(Requests.KVM_SET_CPUID2)
    def set_cpuid2(self, argument: Argument) -> None:
        count = argument.get(kvm_cpuid2).nent
        if count > cpuid.KVM_MAX_CPUID_ENTRIES:
            raise OSError(errno.E2BIG, "too many leaves")
        self._take_cpuid(argument.entries(kvm_cpuid2, kvm_cpuid_entry2, count))

    @answers(Requests.KVM_SET_CPUID)
    def set_cpuid(self, argument: Argument) -> None:
        """kvm_vcpu_ioctl_set_cpuid(): leaves without sub-leaves."""
        count = argument.get(kvm_cpuid).nent
        if count > cpuid.KVM_MAX_CPUID_ENTRIES:
            raise OSError(errno.E2BIG, "too many leaves")
        self._take_cpuid(
            [
                kvm_cpuid_entry2(function=old.function, eax=old.eax, ebx=old.ebx, ecx=old.ecx, edx=old.edx)
                for old in argument.entries(kvm_cpuid, kvm_cpuid_entry, count)
            ]
        )

    def _leave_out_la57(self) -> None:
        """Shadow page tables have four levels."""
        if self.vendor.shadow is not None:
            self.cr4_valid &= ~cpuid.CR4_LA57

    def _take_cpuid(self, entries: list[kvm_cpuid_entry2]) -> None:
        """kvm_set_cpuid(): after the first run only what is there already."""
        if self.has_run and [bytes(entry) for entry in entries] != [bytes(entry) for entry in self.cpuid]:
            raise OSError(errno.EINVAL, "CPUID is fixed once the vCPU has run")
        self.cpuid = entries
        self.arch.set_cpuid(
            [(leaf.function, leaf.index, leaf.flags, leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) for leaf in entries]
        )
        self.cr4_valid, self.efer_valid, self.xcr0_valid = cpuid.control_bits(entries)
        self._leave_out_la57()
        self.vendor.set_cpuid(self.cpuid)
        if self.apic is not None:
            features = next((entry.ecx for entry in self.cpuid if entry.function == 1), 0)
            sizes = next((entry.eax for entry in self.cpuid if entry.function == 0x8000_0008), 36)
            self.apic.configure(
                x2apic=bool(features >> 21 & 1),
                tsc_deadline=bool(features >> 24 & 1),
                phys_bits=sizes & 0xFF,
                directed_eoi=self.kvm.irqs.split and bool(features >> 21 & 1),
            )

    @answers(Requests.KVM_GET_CPUID2)
    def get_cpuid2(self, argument: Argument) -> None:
        if argument.get(kvm_cpuid2).nent < len(self.cpuid):
            raise OSError(errno.E2BIG, "there are more leaves")
        argument.put(kvm_cpuid2(nent=len(self.cpuid)))
        argument.write(b"".join(bytes(entry) for entry in self.cpuid), ctypes.sizeof(kvm_cpuid2))

    @answers(Requests.KVM_SET_GUEST_DEBUG)
    def set_guest_debug(self, argument: Argument) -> None:
        """kvm_arch_vcpu_ioctl_set_guest_debug()."""
        request = argument.get(kvm_guest_debug)
        control = request.control
        if control & ~GUEST_DEBUG_VALID:
            raise OSError(errno.EINVAL, "unknown flags")
        if control & (flags.KVM_GUESTDBG_INJECT_DB | flags.KVM_GUESTDBG_INJECT_BP):
            if self.exception is not None:
                raise OSError(errno.EBUSY, "another exception waits to be delivered")
            self.queue_exception(flags.DB_VECTOR if control & flags.KVM_GUESTDBG_INJECT_DB else flags.BP_VECTOR)
        self.guest_debug = control if control & flags.KVM_GUESTDBG_ENABLE else 0
        self.step_done = False
        self.vendor.host_had_control(wrote=True)  # breakpoints are written into the code
        own = self.guest_debug & flags.KVM_GUESTDBG_USE_HW_BP
        self.vendor.update_guest_debug([*request.arch.debugreg] if own else None)

    def debug_exit(self, vector: int, dr6: int, dr7: int) -> bool:
        """KVM_EXIT_DEBUG: user space's debugger sees this #DB or #BP."""
        self.step_done = False
        self.run.exit_reason = Exit.DEBUG
        arch = self.run.u.debug.arch
        arch.exception, arch.dr6, arch.dr7 = vector, dr6, dr7
        arch.pc = self.vendor.get_rip() + self.vendor.get_segment("cs").base
        return False

    @answers(Requests.KVM_TPR_ACCESS_REPORTING)
    def tpr_access_reporting(self, argument: Argument) -> None:
        """vcpu_ioctl_tpr_access_reporting()."""
        control = argument.get(kvm_tpr_access_ctl)
        if control.flags:
            raise OSError(errno.EINVAL, "unknown flags")
        if self.apic is not None:
            self.apic.report_tpr_access = self._note_tpr_access if control.enabled else None
        argument.put(control)

    def _note_tpr_access(self, is_write: bool) -> None:
        self._tpr_access = self.vendor.get_rip(), is_write

    @answers(Requests.KVM_SET_VAPIC_ADDR)
    def set_vapic_addr(self, argument: Argument) -> None:
        """kvm_lapic_set_vapic_addr(): the word there follows the APIC, and its low byte sets the TPR."""
        if self.apic is None:
            raise OSError(errno.EINVAL, "there is no local APIC in the kernel")
        address = argument.get(kvm_vapic_addr).vapic_addr
        if address and self.kvm.read_gpa(address, 4) is None:
            raise OSError(errno.EINVAL, "there is no memory at the address")
        self._vapic_addr = address

    def _sync_to_vapic(self) -> None:
        if self.apic is not None and self.apic.enabled:
            self.kvm.write_gpa(self._vapic_addr, self.apic.vapic_word().to_bytes(4, "little"))

    def _sync_from_vapic(self) -> None:
        word = self.kvm.read_gpa(self._vapic_addr, 4)
        if self.apic is not None and word is not None:
            self.apic.set_tpr(word[0])

    @answers(Requests.KVM_SET_SIGNAL_MASK)
    def set_signal_mask(self, argument: Argument) -> None:
        """kvm_vcpu_ioctl_set_sigmask(): no argument takes the mask back."""
        if not argument.given:
            self.signal_mask = None
            return
        if argument.get(kvm_signal_mask).len != SIGSET_SIZE:
            raise OSError(errno.EINVAL, "a signal set has eight bytes")
        bits = int.from_bytes(argument.read(SIGSET_SIZE, ctypes.sizeof(kvm_signal_mask)), "little")
        self.signal_mask = frozenset(number for number in range(1, 65) if bits >> number - 1 & 1)

    @answers(Requests.KVM_KVMCLOCK_CTRL)
    def kvmclock_ctrl(self, argument: Argument) -> None:
        if not self.pvclock.mark_stopped():
            raise OSError(errno.EINVAL, "the guest does not use kvmclock")

    @answers(Requests.KVM_TRANSLATE)
    def translate(self, argument: Argument) -> None:
        """kvm_arch_vcpu_ioctl_translate()."""
        request = argument.get(kvm_translation)
        found = self.vendor.gva_to_gpa(request.linear_address)
        request.physical_address = 0xFFFF_FFFF_FFFF_FFFF if found is None else found
        request.valid, request.writeable, request.usermode = int(found is not None), 1, 0
        argument.put(request)

    @answers(Requests.KVM_PRE_FAULT_MEMORY)
    def pre_fault_memory(self, argument: Argument) -> None:
        """kvm_vcpu_pre_fault_memory(): map a range for reading, as far as it goes; the rest is told in the argument."""
        request = argument.get(kvm_pre_fault_memory)
        gpa, size = request.gpa, request.size
        if request.flags or any(request.padding) or (gpa | size) & 0xFFF or not size or gpa + size > 1 << 64:
            raise OSError(errno.EINVAL, "flags, or no whole pages")
        try:
            while size:
                if self.signal_pending:
                    raise OSError(errno.EINTR, "a signal is pending")
                if not self.kvm.mmu.page_fault(gpa, False):
                    raise OSError(errno.ENOENT, "there is no memory slot")
                gpa, size = gpa + 4096, size - 4096
        except OSError:
            if gpa == request.gpa:
                raise
        finally:
            request.gpa, request.size = gpa, size
            argument.put(request)

    @answers(Requests.KVM_ENABLE_CAP)
    def enable_cap(self, argument: Argument) -> None:
        """kvm_vcpu_ioctl_enable_cap()."""
        request = argument.get(kvm_enable_cap)
        if request.flags or request.cap != Cap.ENFORCE_PV_FEATURE_CPUID:
            raise OSError(errno.EINVAL, "flags, or no capability that can be enabled")
        self.pv.enforced = bool(request.args[0])

    # ---- the run loop ------------------------------------------------------------------------------------

    def request_tlb_flush(self) -> None:
        """KVM_REQ_TLB_FLUSH: before the next instruction of the guest."""
        self.arch.tlb_flush_requested = True
        if self.arch.in_guest:  # else it looks for requests when it enters
            self.vendor.kick()

    def vcpu_run(self, reentered: bool = False) -> int:
        """kvm_arch_vcpu_ioctl_run(): 0 when user space must act. Raises OSError: EINTR, EAGAIN.

        *reentered*: reentry.reenter() has come as far as an exit.
        """
        if reentered:
            try:
                self._loop(reentered)
            finally:
                self._save_run()
            return 0
        if self.apic is None:
            self.set_cr8(self.run.cr8)
        if self.mp_state == flags.KVM_MP_STATE_UNINITIALIZED:
            self._wait_for_init()
        valid, dirty = SYNC_REGS.unpack_from(self.page, SYNC_REGS_AT)
        if valid & ~SYNC_FIELDS:
            raise OSError(errno.EINVAL, "unknown register class in kvm_valid_regs")
        if dirty & ~SYNC_FIELDS:
            raise OSError(errno.EINVAL, "unknown register class in kvm_dirty_regs")
        if dirty:
            self.load_sync_regs()
        self.vendor.host_had_control()
        completion, self.completion = self.completion, None
        if size := self.arch.take_input():
            completion = partial(self.vendor.complete_in, bytes(self.page[PIO_DATA_OFFSET : PIO_DATA_OFFSET + size]))
        elif load := self.arch.take_load():
            gpa, size = load
            completion = partial(self.vendor.complete_load, gpa, bytes(self.page[MMIO_DATA : MMIO_DATA + size]))
        if completion is not None and not completion():
            self._save_run()
            return 0
        if self.page[IMMEDIATE_EXIT_AT]:
            raise OSError(errno.EINTR, "immediate_exit is set")
        self.has_run = True
        try:
            if self.signal_mask is None:
                self._loop()
            else:
                self._loop_with_mask(self.signal_mask)
        finally:
            self._save_run()
        return 0

    def _loop_with_mask(self, mask: frozenset[int]) -> None:
        """Signals of *mask* don't end the run; others do, also those that the thread blocks, which stay pending."""
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, mask)
        poll: Timer | None = None

        def look() -> None:
            nonlocal poll
            self.mask_poll = True
            self.kick()
            poll = self.kvm.timers.arm(time.monotonic_ns() + MASK_POLL_NS, look)

        try:
            look()
            self._loop()
        finally:
            if poll is not None:
                poll.cancel()
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def _wait_for_init(self) -> None:
        while not self._has_apic_events():
            self._check_signal()
            self._sleep()
        self._accept_apic_events()
        raise OSError(errno.EAGAIN, "the vCPU has just been started")

    def _check_signal(self) -> None:
        if self.mask_poll:
            self.mask_poll = False
            if self.signal_mask is not None and pending_through(self.signal_mask):
                self.signal_pending = True
        if self.signal_pending or self.run.immediate_exit:
            self.run.exit_reason = Exit.INTR
            self.stats.values[SIGNAL_EXITS] += 1
            raise OSError(errno.EINTR, "a signal is pending")

    def _loop(self, reentered: bool = False) -> None:
        if reentered and not self._after_reentry():
            return
        while True:
            self.arch.take_requests()
            # After the processor is ours: a kick that came before may have found the vCPU on none.
            if self.signal_pending or self.mask_poll:
                self._check_signal()
            if self.need_resched:
                self._resched()
            if self._runnable():
                if not self._enter_guest():
                    return
            else:
                self._block()
            if self._window_exit():
                return

    def _runnable(self) -> bool:
        """kvm_vcpu_running()."""
        return self.mp_state == flags.KVM_MP_STATE_RUNNABLE and not self.async_pf.halted

    def _block(self) -> None:
        """vcpu_block(): wait for an event that makes the vCPU runnable."""
        if self.apic is not None:
            self.apic.block(True)
        try:
            self._wait_for_event()
        finally:
            if self.apic is not None:
                self.apic.block(False)

    def _wait_for_event(self) -> None:
        since = time.monotonic_ns()
        if self._poll(since):
            self._unblocked()
            return
        self.stats.values[BLOCKING] = 1
        try:
            while not self._has_wakeup():
                self._check_signal()
                self._sleep()
        finally:
            self.stats.values[BLOCKING] = 0
            self.stats.waited(time.monotonic_ns() - since)
        self._unblocked()

    def _poll(self, since: int) -> bool:
        """kvm_vcpu_halt(): look for a wake-up without sleeping, for as long as halt_poll_ns allows."""
        limit = self.kvm.max_halt_poll_ns
        until = since + (self.kvm.module.kvm.halt_poll_ns if limit is None else limit)
        if until == since or not self.pv.may_poll or self.mp_state != flags.KVM_MP_STATE_HALTED:
            return False
        successful = False
        while (now := time.monotonic_ns()) < until:
            successful = self._has_wakeup()
            if successful or self.signal_pending or self.need_resched:
                break
            time.sleep(0)  # others may need the interpreter to wake this one
        self.stats.polled(now - since, successful)
        return successful

    def _unblocked(self) -> None:
        if self._has_apic_events():
            self._accept_apic_events()
        elif self.mp_state == flags.KVM_MP_STATE_HALTED:
            self.pv_unhalted = False
            self.mp_state = flags.KVM_MP_STATE_RUNNABLE
        self.async_pf.halted = False

    def _has_apic_events(self) -> bool:
        return self.apic is not None and (self.apic.init_pending or self.apic.sipi_pending)

    def _accept_apic_events(self) -> None:
        """kvm_apic_accept_events(): INIT, then SIPI."""
        if self.apic is not None:
            self.apic.accept_events()

    def init_received(self) -> None:
        """INIT: reset, then wait for a SIPI unless this is the boot processor."""
        assert self.apic is not None
        self.vendor.reset(init=True)
        self.apic.reset(init_event=True)
        self.pv.reset()
        self.pvclock.set_system_time(0)
        self.mp_state = flags.KVM_MP_STATE_RUNNABLE if self.apic.bsp else flags.KVM_MP_STATE_INIT_RECEIVED

    def sipi_received(self, vector: int) -> None:
        """kvm_vcpu_deliver_sipi_vector(): start in real mode at page *vector*, if waiting for it."""
        if self.mp_state != flags.KVM_MP_STATE_INIT_RECEIVED:
            return
        self.sipi_vector = vector
        segment = self.vendor.get_segment("cs")
        segment.selector, segment.base = vector << 8, vector << 12
        self.vendor.set_segment("cs", segment)
        self.vendor.set_rip(0)
        self.mp_state = flags.KVM_MP_STATE_RUNNABLE

    def pv_unhalt(self) -> None:
        """Another vCPU ends this one's halt, or its next one."""
        self.pv_unhalted = True

    def ioapic_eoi(self, vector: int) -> None:
        """Split irqchip: the next exit tells user space of this EOI."""
        self.pending_ioapic_eoi.append(vector)

    def _has_wakeup(self) -> bool:
        """kvm_arch_vcpu_runnable()."""
        if self._runnable() or self._has_apic_events() or self.async_pf.done:
            return True
        if self.mp_state not in (flags.KVM_MP_STATE_HALTED, flags.KVM_MP_STATE_RUNNABLE):
            return False
        return (
            self.pv_unhalted
            or bool(self.arch.nmi_pending)
            or (bool(self.vendor.get_rflags() & RFLAGS_IF) and self._has_interrupt())
        )

    def _has_interrupt(self) -> bool:
        if self.apic is None:
            return False
        return self._has_extint(self.apic) or self.kvm.irqs.has_interrupt(self.apic)

    def _has_extint(self, apic: Lapic) -> bool:
        """Split irqchip: user space's PIC has an interrupt, and the local APIC lets it in."""
        return self.external_vector is not None and apic.accept_pic_intr()

    def _take_interrupt(self) -> int | None:
        if self.apic is None:
            return None
        if self._has_extint(self.apic):
            vector, self.external_vector = self.external_vector, None
            return vector
        return self.kvm.irqs.get_interrupt(self.apic)

    def _wants_interrupt_window(self) -> bool:
        """dm_request_for_irq_injection()."""
        return self._user_space_injects() and bool(self.run.request_interrupt_window) and self._ready_for_injection()

    def _user_space_injects(self) -> bool:
        """Whether the PIC is user space's, so that interrupts come by KVM_INTERRUPT."""
        return self.kvm.irqs.pic is None

    def _accepts_injection(self) -> bool:
        """kvm_cpu_accept_dm_intr()."""
        return self.apic is None or (self.external_vector is None and self.apic.accept_pic_intr())

    def _ready_for_injection(self) -> bool:
        """kvm_vcpu_ready_for_interrupt_injection()."""
        return self.interrupt_injected is None and self.vendor.interrupt_allowed() and self._accepts_injection()

    def _enter_guest(self) -> bool:
        """vcpu_enter_guest(): True to go on, False for an exit to user space."""
        if self._has_apic_events():
            self._accept_apic_events()
            if not self._runnable():
                return True
        if self.async_pf.ready_requested:
            self.async_pf.check_completion()
        if self.triple_fault_pending:
            self.triple_fault_pending = False
            self.run.exit_reason = Exit.SHUTDOWN
            return False
        if self.step_done:
            return self.debug_exit(flags.DB_VECTOR, DR6_ACTIVE_LOW | DR6_BS, self.vendor.get_debug(7))
        if self.dirty_ring is not None and self.dirty_ring.soft_full:
            self.run.exit_reason = Exit.DIRTY_RING_FULL
            return False
        if self._tpr_access is not None:
            (self.run.u.tpr_access.rip, is_write), self._tpr_access = self._tpr_access, None
            self.run.u.tpr_access.is_write = int(is_write)
            self.run.exit_reason = Exit.TPR_ACCESS
            return False
        if self.pending_ioapic_eoi:
            self.run.u.eoi.vector = self.pending_ioapic_eoi.pop(0)
            self.run.exit_reason = Exit.IOAPIC_EOI
            return False
        if self.msr_filter_requested:
            self.msr_filter_requested = False
            self.vendor.msr_filter_changed()
        if self.clock_update_requested:
            self.clock_update_requested = False
            self.pvclock.update()
        self._inject_pending_event()
        if self.pv.active:
            self.pv.record_steal_time()
            self.pv.eoi_to_guest()
        self._allow_fast()
        if self._vapic_addr:
            self._sync_to_vapic()
            self.guest_mode(self.vendor.run)
            self._sync_from_vapic()
        elif self.kvm.tracer is not None:
            self._run_traced(self.kvm.tracer)
        else:
            self.guest_mode(self.vendor.run)
        if self.pv.active:
            self.pv.eoi_from_guest()
        self.stats.values[EXITS] += 1
        return not self.arch.take_user_exit() and self._handle_exit()

    def _handle_exit(self) -> bool:
        if (rung := self.arch.take_rung()) < 0:
            return self.vendor.handle_exit()
        self.kvm.ioeventfds.answer(rung)
        return True

    def _after_reentry(self) -> bool:
        """The end of _enter_guest()."""
        self.vendor.after_reentry()
        self.stats.values[EXITS] += 1
        return self._handle_exit() and not self._window_exit()

    def _window_exit(self) -> bool:
        """Whether user space wants to know that it can inject an interrupt now."""
        if not self._wants_interrupt_window():
            return False
        self.run.exit_reason = Exit.IRQ_WINDOW_OPEN
        self.stats.values[REQUEST_IRQ_EXITS] += 1
        return True

    def _allow_fast(self) -> None:
        """Whether exits may be handled in fastpath.py: nothing that Python must do around each of them is going on."""
        kvm, apic = self.kvm, self.apic
        plain = (
            kvm.tracer is None
            and not (self.guest_debug or self._vapic_addr or self.pv.eoi_told or self.vendor.vm86_active)
            and (self.arch.fast_nmi or not self.arch.nmi_pending)
            and (apic is None or not (self._has_extint(apic) or kvm.irqs.has_extint(apic)))
            and not (self.run.request_interrupt_window and self._user_space_injects())
        )
        user_injects = self._user_space_injects()
        # What reentry.reenter() does not look at: rings, shadow tables, a signal mask, a PIC of user space's.
        again = not (
            self.dirty_ring is not None
            or self.signal_mask is not None
            or self.vendor.shadow is not None
            or (user_injects and apic is not None)
        )
        self.arch.allow_fast(plain, kvm.msr_filter is None, again, user_injects, self.pv.tells_eoi)

    def _run_traced(self, tracer: Tracer) -> None:
        entered = time.monotonic_ns()
        self.guest_mode(self.vendor.run)
        left = time.monotonic_ns()
        reason, qualification = self.vendor.exit_info()
        tracer(
            ExitRecord(
                self.vcpu_id, entered, left, reason, self.vendor.exit_names.get(reason, str(reason)), qualification,
                self.vendor.get_rip(),
            )
        )  # fmt: skip

    def guest_mode(self, enter: Callable[[], T]) -> T:
        """Do *enter* in guest mode, after a flush that was asked for; see flush_remote_tlbs() for the order."""
        arch = self.arch
        while True:
            self.vendor.mmu_load()
            arch.in_guest = True
            try:
                if arch.tlb_flush_requested:
                    arch.tlb_flush_requested = False
                    self.stats.values[TLB_FLUSH] += 1
                    self.vendor.flush_tlb()
                if self.vendor.mmu_ready():  # another vCPU may have dropped the tables meanwhile
                    return enter()
            finally:
                arch.in_guest = False

    def _inject_pending_event(self) -> None:
        """kvm_check_and_inject_events(): one event a time, what was interrupted first."""
        vendor = self.vendor
        injected = True
        if self.exception is not None:
            # Also one that the delivery of an interrupt met: the interrupt comes behind it.
            exception, self.exception = self.exception, None
            vendor.inject_exception(exception)
        elif self.interrupt_injected is not None:
            vector, self.interrupt_injected = self.interrupt_injected, None
            self.stats.values[IRQ_INJECTIONS] += 1
            vendor.inject_irq(vector)
        elif self.nmi_injected:
            self.nmi_injected = False
            self.stats.values[NMI_INJECTIONS] += 1
            vendor.inject_nmi()
        else:
            injected = False
        if self.arch.nmi_pending:
            if vendor.get_nmi_mask():  # process_nmi(): one in progress, one behind it
                self.arch.limit_nmi()
            if not injected and vendor.nmi_allowed():
                self.arch.take_nmi()
                self.stats.values[NMI_INJECTIONS] += 1
                vendor.inject_nmi()
                injected = True
            if self.arch.nmi_pending:
                vendor.enable_nmi_window()
        if self.guest_debug & flags.KVM_GUESTDBG_BLOCKIRQ:
            return
        if self._has_interrupt():
            if not injected and vendor.interrupt_allowed():
                if (taken := self._take_interrupt()) is not None:
                    self.stats.values[IRQ_INJECTIONS] += 1
                    vendor.inject_irq(taken)
            else:
                vendor.enable_irq_window()
        elif self._user_space_injects() and self.run.request_interrupt_window and self._accepts_injection():
            vendor.enable_irq_window()

    def _save_run(self) -> None:
        """post_kvm_run_save()."""
        ready = not self._user_space_injects() or self._ready_for_injection()
        interrupts = bool(self.vendor.get_rflags() & RFLAGS_IF)
        apic = self.apic
        cr8, base = (self._cr8, self._apic_base) if apic is None else (apic.get_cr8(), apic.regs.apic_base)
        RUN_SAVED.pack_into(self.page, RUN_SAVED_AT, ready, interrupts, cr8, base)
        self.arch.cr8 = cr8
        if SYNC_REGS.unpack_from(self.page, SYNC_REGS_AT)[0]:
            self.store_sync_regs()

    # ---- halting --------------------------------------------------------------------------------------------

    def halt(self) -> bool:
        """kvm_emulate_halt(): wait here with an in-kernel local APIC, else tell user space."""
        self.stats.values[HALT_EXITS] += 1
        if self.apic is not None and self.pv_unhalted:
            self.pv_unhalted = False
            return True
        if self.apic is not None:
            self.mp_state = flags.KVM_MP_STATE_HALTED
            return True
        self.run.exit_reason = Exit.HLT
        return False
