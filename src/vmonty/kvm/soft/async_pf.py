"""Asynchronous page faults: while the host fetches a page, the guest does something else, or waits as if halted.

A worker touches the page, which may take any time. Meanwhile the guest has a #PF with a token in CR2, and later an
interrupt that says, by the same token, that the page is there. It asks for both by MSRs. Source: virt/kvm/async_pf.c;
arch/x86/kvm/x86.c: kvm_arch_async_page_not_present(), kvm_arch_async_page_present(), kvm_pv_enable_async_pf();
Documentation/virt/kvm/x86/msr.rst.

    struct kvm_vcpu_pv_apf_data, 64 bytes, aligned:  0 flags, 1 for such a #PF   4 token of a page that is there

The guest clears each when it has seen it, and acknowledges tokens by an MSR: there is one at a time.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from vmonty.base import hostcall
from vmonty.kvm.soft.apicdef import FIXED
from vmonty.kvm.soft.memslots import PAGE_SHIFT
from vmonty.kvm.soft.mmu.residency import Residency
from vmonty.kvm.uapi import flags

if TYPE_CHECKING:
    from vmonty.kvm.soft.kvm_main import Kvm
    from vmonty.kvm.soft.vcpu_state import VcpuState

PF_VECTOR = 14
CR0_PG = 1 << 31
RESERVED = 0x30
ON = flags.KVM_ASYNC_PF_ENABLED | flags.KVM_ASYNC_PF_DELIVERY_AS_INT
ADDRESS, TOKEN_AT = ~0x3F, 4
PAGE_NOT_PRESENT = (1).to_bytes(4, "little")
# ASYNC_PF_PER_VCPU; and how many pages of a VM are fetched at a time, each of which takes a thread.
MOST_PAGES, MOST_THREADS = 64, 16
BROADCAST = 0xFFFF_FFFF


class Work:
    """struct kvm_async_pf: a page that is fetched for a vCPU, or (*gfn* is None) a broadcast to the guest."""

    __slots__ = ("cancelled", "failed", "gfn", "hva", "owner", "token", "told")

    def __init__(self, owner: AsyncPf, gfn: int | None, hva: int, token: int) -> None:
        self.owner, self.gfn, self.hva, self.token = owner, gfn, hva, token
        # Whether the guest knows that the page is not there; whether nobody waits any more; whether it never comes.
        self.told = self.cancelled = self.failed = False


class Workers:
    """The threads of a VM that wait for pages, as many as there are pages to wait for."""

    def __init__(self) -> None:
        self._wake = threading.Condition()
        self._queue: deque[Work | None] = deque()
        self._threads = self._idle = 0

    def submit(self, work: Work) -> bool:
        """schedule_work(); False when the host has no more threads."""
        with self._wake:
            if self._idle <= len(self._queue) and self._threads < MOST_THREADS:
                try:
                    threading.Thread(target=self._run, name="kvm-async-pf", daemon=True).start()
                except RuntimeError:
                    if not self._threads:
                        return False
                else:
                    self._threads += 1
            self._queue.append(work)
            self._wake.notify()
        return True

    def close(self) -> None:
        """The VM is gone. A thread whose page never comes stays with it."""
        with self._wake:
            self._queue.extend([None] * self._threads)
            self._wake.notify_all()

    def _run(self) -> None:
        while (work := self._next()) is not None:
            if not work.cancelled:
                # A byte, through the kernel: what is no memory any more, or by then something else, harms nobody.
                work.failed = hostcall.touch(work.hva) != 0
                work.owner.fetched(work)

    def _next(self) -> Work | None:
        with self._wake:
            self._idle += 1
            while not self._queue:
                self._wake.wait()
            self._idle -= 1
            return self._queue.popleft()


class VmAsyncPf:
    """What the vCPUs of a VM share, from when the first guest asks for it."""

    def __init__(self, kvm: Kvm) -> None:
        self.residency = Residency()
        self.workers = Workers()
        kvm.mmu.watch(self.residency)
        self.residency.look(kvm.memslots)
        for slot in kvm.memslots:
            if self.residency.may_wait(slot):  # it may be mapped whole
                kvm.invalidate_range(slot.userspace_addr, slot.userspace_addr + (slot.npages << PAGE_SHIFT))


class AsyncPf:
    """kvm_vcpu.async_pf and kvm_vcpu_arch.apf. Used on the vCPU's thread or while it does not run, but ``fetched``."""

    def __init__(self, vcpu: VcpuState) -> None:
        self._vcpu = vcpu
        self.control = self.vector = 0
        # In the artificial halt; and KVM_REQ_APF_READY: something may be told to the guest.
        self.halted = self.ready_requested = False
        self._lock = threading.Lock()
        self.done: deque[Work] = deque()
        self._fetching: dict[int, Work] = {}  # by gfn
        self._queued = 0
        self._hopeless: set[int] = set()
        self._id = 0

    @property
    def enabled(self) -> bool:
        """kvm_pv_async_pf_enabled()."""
        return self.control & ON == ON

    # ---- MSRs ------------------------------------------------------------------------------------------------

    def write_control(self, value: int) -> bool:
        """kvm_pv_enable_async_pf(): MSR_KVM_ASYNC_PF_EN; False where WRMSR would fault."""
        vcpu = self._vcpu
        if (
            value & RESERVED
            or (value & flags.KVM_ASYNC_PF_DELIVERY_AS_PF_VMEXIT and not vcpu.pv.has(flags.KVM_FEATURE_ASYNC_PF_VMEXIT))
            or (value & flags.KVM_ASYNC_PF_DELIVERY_AS_INT and not vcpu.pv.has(flags.KVM_FEATURE_ASYNC_PF_INT))
        ):
            return False
        if vcpu.apic is None:
            return not value
        self.control = value
        if not self.enabled:
            self._forget()
            return True
        if vcpu.kvm.memslots.find(value & ADDRESS) is None:
            return False
        vcpu.kvm.start_async_pf()
        self._wakeup_all()
        return True

    def write_vector(self, value: int) -> bool:
        """kvm_pv_enable_async_pf_int(): MSR_KVM_ASYNC_PF_INT."""
        if value >> 8 or self._vcpu.apic is None:
            return False
        self.vector = value
        return True

    def acknowledge(self, value: int) -> bool:
        """MSR_KVM_ASYNC_PF_ACK: the guest has seen a token."""
        if value & 1:
            self.check_completion()
        return True

    def reset(self) -> None:
        """kvm_vcpu_reset()."""
        self.control = self.vector = 0
        self._forget()

    def _forget(self) -> None:
        """kvm_clear_async_pf_completion_queue(): pages come, but nobody is told."""
        with self._lock:
            for work in self._fetching.values():
                work.cancelled = True
            self._fetching.clear()
            self._hopeless.clear()
            self.done.clear()
            self._queued = 0
            self.ready_requested = False
            self.halted = False  # nobody would wake it

    # ---- a page that is not there ----------------------------------------------------------------------------

    def fault(self, gpa: int) -> bool:
        """__kvm_faultin_pfn(): whether the page of *gpa* is left to a worker, and the vCPU not to touch it yet."""
        vcpu, shared = self._vcpu, self._vcpu.kvm.async_pf
        slot = vcpu.kvm.memslots.find(gpa)
        gfn = gpa >> PAGE_SHIFT
        if shared is None or slot is None or shared.residency.present(slot, gfn, 1)[0] or not self._can_do():
            return False
        if gfn in self._hopeless:
            self._hopeless.discard(gfn)
            return False
        if gfn in self._fetching:  # again: there is nothing else to do
            self.halted = True
            return True
        if self._queued >= MOST_PAGES:
            return False
        # alloc_apf_token(): never 0.
        self._id = self._id + 1 & 0xF_FFFF or 1
        work = Work(self, gfn, slot.hva(gfn << PAGE_SHIFT), self._id << 12 | vcpu.vcpu_id)
        if not shared.workers.submit(work):
            return False
        self._fetching[gfn] = work
        self._queued += 1
        work.told = self._can_deliver() and self._put(0, PAGE_NOT_PRESENT)
        if work.told:
            vcpu.queue_exception(PF_VECTOR, 0, payload=work.token)
        else:
            self.halted = True
        return True

    def _can_do(self) -> bool:
        """kvm_can_do_async_pf(): with interrupts off not even a halt is possible."""
        vcpu = self._vcpu
        in_flight = vcpu.exception is not None or vcpu.interrupt_injected is not None or vcpu.nmi_injected
        return self.enabled and not in_flight and vcpu.vendor.interrupt_allowed()

    def _can_deliver(self) -> bool:
        """kvm_can_deliver_async_pf()."""
        vendor = self._vcpu.vendor
        at_all = self.control & flags.KVM_ASYNC_PF_SEND_ALWAYS or vendor.get_cpl()
        return bool(at_all and vendor.get_control("cr0") & CR0_PG)

    # ---- a page that is there again --------------------------------------------------------------------------

    def fetched(self, work: Work) -> None:
        """async_pf_execute(): on the worker's thread."""
        with self._lock:
            if work.cancelled:
                return
            self.done.append(work)
            self.ready_requested = True
        self._vcpu.kick()

    def _wakeup_all(self) -> None:
        """kvm_async_pf_wakeup_all(): the guest may wait for pages that another host was to fetch."""
        with self._lock:
            if self.done:
                return
            self.done.append(Work(self, None, 0, BROADCAST))
            self._queued += 1
            self.ready_requested = True

    def check_completion(self) -> None:
        """kvm_check_async_pf_completion(): tell the guest of the first page, unless it has still to see another."""
        self.ready_requested = False
        while self.done:
            if self.enabled and not self._apic_on():
                self.ready_requested = True  # look again until the guest has turned it on
                return
            if not self._can_dequeue():
                return
            with self._lock:
                work = self.done.popleft()
            self._queued -= 1
            if work.gfn is not None:
                del self._fetching[work.gfn]
                if work.failed:
                    self._hopeless.add(work.gfn)
            self._present(work)

    def _apic_on(self) -> bool:
        """kvm_lapic_enabled()."""
        apic = self._vcpu.apic
        return apic is not None and apic.enabled and apic.sw_enabled

    def _can_dequeue(self) -> bool:
        """kvm_arch_can_dequeue_async_page_present()."""
        if not self.enabled:
            return True
        try:
            token = self._vcpu.kvm.read_gpa((self.control & ADDRESS) + TOKEN_AT, 4)
        except OSError:
            return False
        return token == b"\0\0\0\0"

    def _present(self, work: Work) -> None:
        """kvm_arch_async_page_present()."""
        vcpu = self._vcpu
        tell = (work.told or work.gfn is None) and self.enabled
        if tell and vcpu.apic is not None and self._put(TOKEN_AT, work.token.to_bytes(4, "little")):
            vcpu.apic.accept_irq(FIXED, self.vector)
        self.halted = False
        vcpu.mp_state = flags.KVM_MP_STATE_RUNNABLE

    def _put(self, offset: int, data: bytes) -> bool:
        """apf_put_user_notpresent(), apf_put_user_ready()."""
        try:
            return self._vcpu.kvm.write_gpa((self.control & ADDRESS) + offset, data)
        except OSError:
            return False  # user space has unmapped it
