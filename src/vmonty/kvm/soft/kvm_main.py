"""The three kinds of file: /dev/kvm, VMs and vCPUs; life times, memory slots, the run ioctl.

A VM is counted by the files that need it (``users_count``): its own fd and those of its vCPUs. It is destroyed
when the last one closes, in whatever order. Source: virt/kvm/kvm_main.c, Documentation/virt/kvm/api.rst.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import time
from contextlib import ExitStack
from threading import get_ident
from typing import ClassVar

from vmonty.base import hostcall
from vmonty.base.ram import Ram
from vmonty.cpu.core import memory_written
from vmonty.kvm.soft import dirty_ring, pcpu
from vmonty.kvm.soft.async_pf import VmAsyncPf
from vmonty.kvm.soft.caps import CAPABILITIES, KVM_MAX_VCPU_IDS, KVM_MAX_VCPUS
from vmonty.kvm.soft.clock import ClockIoctls
from vmonty.kvm.soft.dirty_log import DirtyLogIoctls
from vmonty.kvm.soft.dirty_ring import DirtyRing
from vmonty.kvm.soft.enable_cap import CapIoctls
from vmonty.kvm.soft.files import Install, KvmFile, anon_inode_getfd, answers
from vmonty.kvm.soft.insight import Tracer
from vmonty.kvm.soft.irqchip import IrqchipIoctls
from vmonty.kvm.soft.mce import MCE_CAP_SUPPORTED
from vmonty.kvm.soft.memslots import PAGE_SHIFT, Change, Memslot, Memslots
from vmonty.kvm.soft.mmu.spte import GENERATION_BITS
from vmonty.kvm.soft.modules import Module
from vmonty.kvm.soft.msr_filter import MsrFilter, from_user
from vmonty.kvm.soft.msrs import FEATURE_MSRS, MAX_IO_MSRS, MSRS_TO_SAVE
from vmonty.kvm.soft.pmu_filter import PmuFilter
from vmonty.kvm.soft.reentry import EXITED, REFUSED, USER_EXIT, USER_EXIT_AND_MORE, reenter
from vmonty.kvm.soft.signals import SignalWatch
from vmonty.kvm.soft.stats import REMOTE_TLB_FLUSH, REMOTE_TLB_FLUSH_REQUESTS, VM_STATISTICS, Statistics
from vmonty.kvm.soft.user import Argument
from vmonty.kvm.soft.x86 import SUPPORTED_CPUID, VcpuX86
from vmonty.kvm.uapi import Cap, Requests
from vmonty.kvm.uapi.flags import KVM_API_VERSION, KVM_COALESCED_MMIO_PAGE_OFFSET, KVM_DIRTY_LOG_INITIALLY_SET
from vmonty.kvm.uapi.run import kvm_run
from vmonty.kvm.uapi.vcpu import kvm_cpuid2, kvm_cpuid_entry2, kvm_msr_entry, kvm_msrs
from vmonty.kvm.uapi.vm import (
    kvm_create_device,
    kvm_msr_filter,
    kvm_msr_list,
    kvm_userspace_memory_region,
    kvm_userspace_memory_region2,
)

KVM_MIN_ALLOC_MMU_PAGES = 64
IDENTITY_MAP_ADDR = 0xFFFB_C000  # VMX_EPT_IDENTITY_PAGETABLE_ADDR
VCPU_MMAP_SIZE = 3 * mmap.PAGESIZE
FLUSH_POLL_S = 20e-6
KVM_RUN = int(Requests.KVM_RUN)
MAIN_THREAD = threading.main_thread().ident


def check_extension(module: Module, number: int) -> int:
    """The value of a capability, 0 when it is absent."""
    if number in (Cap.TSC_CONTROL, Cap.VM_TSC_CONTROL) and not module.ops.tsc_scaling:
        return 0
    try:
        return CAPABILITIES.get(Cap(number), 0)
    except ValueError:
        return 0


class KvmDevice(KvmFile):
    """/dev/kvm."""

    def __init__(self, install: Install, module: Module) -> None:
        self._install = install
        self._module = module
        module.get()

    def release(self) -> None:
        """The file was closed."""
        self._module.put()

    @answers(Requests.KVM_GET_API_VERSION)
    def get_api_version(self, argument: Argument) -> int:
        if argument.number:
            raise OSError(errno.EINVAL, "takes no argument")
        return KVM_API_VERSION

    @answers(Requests.KVM_CREATE_VM)
    def create_vm(self, argument: Argument) -> int:
        if argument.number:
            raise OSError(errno.EINVAL, "unknown VM type")
        return anon_inode_getfd(Kvm(self._install, self._module), "kvm-vm", self._install)

    @answers(Requests.KVM_CHECK_EXTENSION)
    def check_extension(self, argument: Argument) -> int:
        return check_extension(self._module, argument.number)

    @answers(Requests.KVM_GET_VCPU_MMAP_SIZE)
    def get_vcpu_mmap_size(self, argument: Argument) -> int:
        if argument.number:
            raise OSError(errno.EINVAL, "takes no argument")
        return VCPU_MMAP_SIZE

    @answers(Requests.KVM_GET_MSR_INDEX_LIST)
    def get_msr_index_list(self, argument: Argument) -> None:
        self._msr_list(argument, MSRS_TO_SAVE)

    @answers(Requests.KVM_GET_MSR_FEATURE_INDEX_LIST)
    def get_msr_feature_index_list(self, argument: Argument) -> None:
        self._msr_list(argument, tuple(FEATURE_MSRS))

    @staticmethod
    def _msr_list(argument: Argument, indices: tuple[int, ...]) -> None:
        room = argument.get(kvm_msr_list).nmsrs
        argument.put(kvm_msr_list(nmsrs=len(indices)))
        if room < len(indices):
            raise OSError(errno.E2BIG, "the list is longer")
        argument.write(b"".join(index.to_bytes(4, "little") for index in indices), ctypes.sizeof(kvm_msr_list))

    @answers(Requests.KVM_GET_MSRS)
    def get_msrs(self, argument: Argument) -> int:
        """do_get_msr_feature(): up to the first that is none."""
        count = argument.get(kvm_msrs).nmsrs
        if count >= MAX_IO_MSRS:
            raise OSError(errno.E2BIG, "too many MSRs at a time")
        entries = argument.entries(kvm_msrs, kvm_msr_entry, count)
        done = 0
        while done < count and entries[done].index in FEATURE_MSRS:
            entries[done].data = FEATURE_MSRS[entries[done].index]
            done += 1
        argument.write(b"".join(bytes(entry) for entry in entries), ctypes.sizeof(kvm_msrs))
        return done

    @answers(Requests.KVM_X86_GET_MCE_CAP_SUPPORTED)
    def get_mce_cap_supported(self, argument: Argument) -> None:
        argument.put(ctypes.c_uint64(MCE_CAP_SUPPORTED))

    @answers(Requests.KVM_GET_SUPPORTED_CPUID)
    def get_supported_cpuid(self, argument: Argument) -> None:
        parameters = self._module.parameters
        put_cpuid(argument, SUPPORTED_CPUID(bool(parameters.get("ept", parameters.get("npt")))))

    @answers(Requests.KVM_GET_EMULATED_CPUID)
    def get_emulated_cpuid(self, argument: Argument) -> None:
        put_cpuid(argument, [kvm_cpuid_entry2(function=1, ecx=1 << 22)])  # MOVBE, which the emulator knows


def put_cpuid(argument: Argument, entries: list[kvm_cpuid_entry2]) -> None:
    """Hand out CPUID leaves; E2BIG when there is no room for them."""
    head = argument.get(kvm_cpuid2)
    if head.nent < len(entries):
        raise OSError(errno.E2BIG, "there are more leaves")
    argument.put(kvm_cpuid2(nent=len(entries)))
    argument.write(b"".join(bytes(entry) for entry in entries), ctypes.sizeof(kvm_cpuid2))


class Kvm(IrqchipIoctls, ClockIoctls, CapIoctls, DirtyLogIoctls):
    """struct kvm: a virtual machine, and its fd."""

    def __init__(self, install: Install, module: Module) -> None:
        self.module = module
        IrqchipIoctls.__init__(self)
        ClockIoctls.__init__(self)
        CapIoctls.__init__(self)
        self._install = install
        self.lock = threading.RLock()
        self.stats = Statistics(VM_STATISTICS, f"kvm-{os.getpid()}")
        self.memslots = Memslots()
        self.vcpus: dict[int, KvmVcpuFile] = {}
        self.created_vcpus = 0
        self.boot_vcpu_id = 0
        self.nr_mmu_pages = 0
        # Where kvm-intel puts what a guest without paging, or in real mode, needs; see vmx/rmode.py.
        self.tss_addr: int | None = None
        self.identity_map_addr = IDENTITY_MAP_ADDR
        self._private_memory: dict[int, Ram] = {}
        self.mmu_notifier_seq = 0
        self.tracer: Tracer | None = None
        self.msr_filter: MsrFilter | None = None
        self.pmu_filter: PmuFilter | None = None
        # None until a guest asks for asynchronous page faults.
        self.async_pf: VmAsyncPf | None = None
        self.users_count = 1
        try:
            self.mmu = module.ops.mmu_create(self)
            module.get()
        except BaseException:
            self.destroy_irqchip()
            raise
        module.vm_list.append(self)

    def clock_changed(self) -> None:
        """KVM_REQ_CLOCK_UPDATE for all vCPUs."""
        for vcpu in list(self.vcpus.values()):
            vcpu.clock_update_requested = True
            vcpu.vendor.kick()

    def start_async_pf(self) -> None:
        """A guest of this VM wants asynchronous page faults."""
        with self.lock:
            if self.async_pf is None:
                self.async_pf = VmAsyncPf(self)

    def get(self) -> None:
        """kvm_get_kvm()."""
        with self.lock:
            self.users_count += 1

    def put(self) -> None:
        """kvm_put_kvm(): the last user destroys the VM."""
        with self.lock:
            self.users_count -= 1
            last = self.users_count == 0
        if last:
            self.destroy_irqchip()
            for vcpu in self.vcpus.values():
                vcpu.destroy()
            self.vcpus.clear()
            if self.async_pf is not None:
                self.async_pf.workers.close()
            for slot in self.memslots:
                self._forget_code(slot)
            self.stats.close()
            self.module.vm_list.remove(self)
            self.module.put()

    def release(self) -> None:
        """The VM's own fd was closed."""
        self.put()

    @answers(Requests.KVM_CHECK_EXTENSION)
    def check_extension(self, argument: Argument) -> int:
        return check_extension(self.module, argument.number)

    @answers(Requests.KVM_CREATE_VCPU)
    def create_vcpu(self, argument: Argument) -> int:
        """kvm_vm_ioctl_create_vcpu(): it becomes visible only when it is complete."""
        vcpu_id = argument.number & 0xFFFF_FFFF
        if vcpu_id >= KVM_MAX_VCPU_IDS:
            raise OSError(errno.EINVAL, "the vCPU id is too large")
        with self.lock:
            if self.created_vcpus >= KVM_MAX_VCPUS:
                raise OSError(errno.EINVAL, "too many vCPUs")
            if self.max_vcpu_ids and vcpu_id >= self.max_vcpu_ids:
                raise OSError(errno.EINVAL, "the vCPU id is beyond the VM's limit")
            if vcpu_id in self.vcpus:
                raise OSError(errno.EEXIST, "there is a vCPU with this id")
            with ExitStack() as undo:
                vcpu = KvmVcpuFile(self, vcpu_id)
                undo.callback(vcpu.destroy)
                ring_size = self.dirty_ring_size
                size = dirty_ring.OFFSET + ring_size if ring_size else VCPU_MMAP_SIZE
                fd = vcpu.make_fd(f"kvm-vcpu:{vcpu_id}", size)
                undo.callback(os.close, fd)
                vcpu.map_run_page(fd)
                if ring_size:
                    vcpu.map_dirty_ring(fd, ring_size)
                undo.pop_all()
            self.created_vcpus += 1
            self.vcpus[vcpu_id] = vcpu
            if vcpu.apic is not None:
                self.irqs.add_apic(vcpu.apic)
            self.users_count += 1
            self._install(vcpu, fd)
            return fd

    @answers(Requests.KVM_SET_USER_MEMORY_REGION)
    def set_user_memory_region(self, argument: Argument) -> None:
        self._set_region(argument.get(kvm_userspace_memory_region))

    @answers(Requests.KVM_SET_USER_MEMORY_REGION2)
    def set_user_memory_region2(self, argument: Argument) -> None:
        """As the first request: there is no guest_memfd here, and its flag is unknown."""
        self._set_region(argument.get(kvm_userspace_memory_region2))

    def _set_region(self, region: kvm_userspace_memory_region | kvm_userspace_memory_region2) -> None:
        with self.lock:
            change = self.memslots.set(
                region.slot, region.flags, region.guest_phys_addr, region.memory_size, region.userspace_addr,
                initially_dirty=bool(self.manual_dirty_log_protect & KVM_DIRTY_LOG_INITIALLY_SET),
                to_ring=self.push_dirty if self.dirty_ring_size else None,
            )  # fmt: skip
            self._memory_changed(change)

    def set_private_memory(self, slot: int, guest_phys_addr: int, ram: Ram) -> None:
        """__x86_set_memory_region(): memory of the VM's own, in a slot that user space cannot name."""
        with self.lock:
            self._memory_changed(self.memslots.set_private(slot, guest_phys_addr, ram.size, ram.address))
            self._private_memory[slot] = ram

    def _memory_changed(self, change: Change) -> None:
        self.irqs.arch.mmio_changed()
        self.ioeventfds.memory_changed()
        if not self.memslots.generation & (1 << GENERATION_BITS) - 1:
            self.mmu.invalidate_mmio_sptes()
        if change.old is not None:
            self.mmu.zap(change.old)
            self.flush_remote_tlbs()
            self._forget_code(change.old)

    @staticmethod
    def _forget_code(slot: Memslot) -> None:
        """The memory may be anything next time: processors, which outlive the VM, must not know code in it."""
        memory_written(slot.userspace_addr, slot.npages << PAGE_SHIFT)

    def zap_all(self) -> int:
        """Free all page tables but the roots, which guests fill anew; how many pages."""
        with self.lock:
            pages = self.mmu.zap_all()
            self.flush_remote_tlbs()
            self.mmu.free(pages)
        return len(pages)

    def invalidate_range(self, start: int, end: int) -> None:
        """The MMU notifier: user space takes the memory from *start* to *end* away, or puts something else there.

        A process is not told of what it does to its own mappings, so whoever does it must call this first (unlike the
        kernel, which knows); an access of the guest then finds what is there by then.
        """
        with self.lock:
            self.mmu_notifier_seq += 1
            for slot in self.memslots:
                first = max(start, slot.userspace_addr)
                last = min(end, slot.userspace_addr + (slot.npages << PAGE_SHIFT))
                if first < last:
                    base = slot.base_gfn - (slot.userspace_addr >> PAGE_SHIFT)
                    slot.fetched = None
                    self.mmu.zap_range(base + (first >> PAGE_SHIFT), base + (last - 1 >> PAGE_SHIFT) + 1)
            self.flush_remote_tlbs()
            memory_written(start, end - start)

    def push_dirty(self, slot: int, offset: int) -> None:
        """mark_page_dirty_in_slot() with rings: in that of the vCPU at work, else of any."""
        vcpu = KvmVcpuFile.loaded.get(threading.get_ident())
        if vcpu is None or vcpu.kvm is not self:
            vcpu = next(iter(self.vcpus.values()), None)
        if vcpu is not None and vcpu.dirty_ring is not None:
            vcpu.dirty_ring.push(slot, offset)

    def flush_remote_tlbs(self) -> None:
        """kvm_flush_remote_tlbs(): no vCPU uses a translation from before when this returns."""
        self.stats.values[REMOTE_TLB_FLUSH_REQUESTS] += 1
        self.stats.values[REMOTE_TLB_FLUSH] += 1
        retired = self.mmu.retired()
        vcpus = list(self.vcpus.values())
        for vcpu in vcpus:
            vcpu.request_tlb_flush()
        # A vCPU first says that it is in guest mode, then looks for requests: one of us two sees the other's word.
        for vcpu in vcpus:
            while vcpu.arch.in_guest and vcpu.arch.tlb_flush_requested:
                time.sleep(FLUSH_POLL_S)
        if retired:
            self.mmu.free(retired)

    @answers(Requests.KVM_X86_SET_MSR_FILTER)
    def set_msr_filter(self, argument: Argument) -> None:
        chosen = from_user(argument.get(kvm_msr_filter))
        with self.lock:
            self.msr_filter = chosen
            for vcpu in list(self.vcpus.values()):
                vcpu.msr_filter_requested = True
                vcpu.vendor.kick()

    @answers(Requests.KVM_SET_PMU_EVENT_FILTER)
    def set_pmu_event_filter(self, argument: Argument) -> None:
        self.pmu_filter = PmuFilter.from_user(argument)

    @answers(Requests.KVM_SET_TSS_ADDR)
    def set_tss_addr(self, argument: Argument) -> None:
        if argument.number > 0xFFFF_FFFF - 3 * mmap.PAGESIZE:
            raise OSError(errno.EINVAL, "the TSS must lie below 4 GiB")
        with self.lock:
            self.module.ops.set_tss_addr(self, argument.number)

    @answers(Requests.KVM_SET_IDENTITY_MAP_ADDR)
    def set_identity_map_addr(self, argument: Argument) -> None:
        address = int.from_bytes(argument.read(8), "little")
        with self.lock:
            if self.created_vcpus:
                raise OSError(errno.EINVAL, "there are vCPUs already")
            self.identity_map_addr = address or IDENTITY_MAP_ADDR

    @answers(Requests.KVM_SET_NR_MMU_PAGES)
    def set_nr_mmu_pages(self, argument: Argument) -> None:
        if argument.number < KVM_MIN_ALLOC_MMU_PAGES:
            raise OSError(errno.EINVAL, "too few pages")
        self.nr_mmu_pages = argument.number & 0x7FFF_FFFF

    @answers(Requests.KVM_GET_NR_MMU_PAGES)
    def get_nr_mmu_pages(self, argument: Argument) -> int:
        return self.nr_mmu_pages

    @answers(Requests.KVM_CREATE_DEVICE)
    def create_device(self, argument: Argument) -> None:
        """kvm_ioctl_create_device(): no device type is registered here."""
        argument.get(kvm_create_device)
        raise OSError(errno.ENODEV, "no such device type")

    @answers(Requests.KVM_GET_STATS_FD)
    def get_stats_fd(self, argument: Argument) -> int:
        with self.lock, self.mmu.lock:
            return self.stats.open()

    @answers(Requests.KVM_SET_BOOT_CPU_ID)
    def set_boot_cpu_id(self, argument: Argument) -> None:
        with self.lock:
            if self.created_vcpus:
                raise OSError(errno.EBUSY, "there are vCPUs already")
            self.boot_vcpu_id = argument.number


class KvmVcpuFile(VcpuX86):
    """struct kvm_vcpu: a virtual CPU, and its fd."""

    # Thread ident → the vCPU that it runs, or ran last: what a signal must find.
    _running: ClassVar[dict[int, KvmVcpuFile]] = {}
    # Thread ident → the vCPU on which an ioctl is at work there: kvm_get_running_vcpu().
    loaded: ClassVar[dict[int, KvmVcpuFile]] = {}
    _watch: ClassVar[SignalWatch | None] = None
    _watch_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, kvm: Kvm, vcpu_id: int) -> None:
        super().__init__(kvm, vcpu_id)
        self.mutex = threading.Lock()

    def map_run_page(self, fd: int) -> None:
        """Map the pages that user space maps too."""
        self.page = memoryview(mmap.mmap(fd, VCPU_MMAP_SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE))
        self.run = kvm_run.from_buffer(self.page)
        self.arch.set_run_page(self.page)

    def map_dirty_ring(self, fd: int, size: int) -> None:
        """Map the dirty ring, *size* bytes."""
        self.dirty_ring = DirtyRing(memoryview(mmap.mmap(fd, size, mmap.MAP_SHARED, offset=dirty_ring.OFFSET)))

    def overlay_ring(self, address: int, size: int) -> None:
        """The VM's one ring of coalesced accesses appears in each vCPU's mapping, here the one at *address*."""
        offset = KVM_COALESCED_MMIO_PAGE_OFFSET * mmap.PAGESIZE
        if size >= offset + mmap.PAGESIZE:
            hostcall.map_over(address + offset, self.kvm.ring_fd, mmap.PAGESIZE)

    @classmethod
    def signal(cls, thread: int) -> None:
        """A signal for *thread*: if it is in KVM_RUN, that ends with EINTR."""
        vcpu = cls._running.get(thread)
        if vcpu is not None and vcpu.arch.runner == thread:
            vcpu.signal_pending = True
            vcpu.kick()

    def ioctl(self, request: int, value: object) -> int:
        """One request at a time, as vcpu->mutex has it in the kernel."""
        if request == KVM_RUN and not value:
            return self.enter()
        with self.mutex:
            thread = get_ident()
            self.arch.touched()
            self.vcpu_load(brief=True)
            self.loaded[thread] = self
            try:
                return super().ioctl(request, value)
            finally:
                del self.loaded[thread]
                self.vcpu_put()

    def enter(self) -> int:
        """KVM_RUN: kvm_vcpu_ioctl() and kvm_arch_vcpu_ioctl_run()."""
        with self.mutex:
            thread = get_ident()
            self._running[thread] = self
            if thread == MAIN_THREAD:
                watch = self._watch or self._signal_watch()
                previous = watch.enter()
                try:
                    return self._kvm_run(thread, reenter(self.arch, thread))
                finally:
                    watch.leave(previous)
            # All in one place: devices in Python wait for this.
            went = reenter(self.arch, thread)
            return 0 if went == USER_EXIT else self._kvm_run(thread, went)

    @answers(Requests.KVM_RUN)
    def kvm_run_ioctl(self, argument: Argument) -> int:
        raise OSError(errno.EINVAL, "takes no argument")  # without one it does not come here

    def _kvm_run(self, thread: int, went: int) -> int:
        if went == USER_EXIT:
            return 0
        if went == USER_EXIT_AND_MORE:
            self.signal_pending = False
            pcpu.POOL.seat_is_free()
            return 0
        if self._watch is None:
            self._signal_watch()
        if went == REFUSED:
            self.vcpu_load()
            self.arch.runner = thread
        self.loaded[thread] = self
        try:
            return self.vcpu_run(went == EXITED)
        finally:
            self.arch.runner = 0
            self.signal_pending = False
            del self.loaded[thread]
            self.vcpu_put()

    @classmethod
    def _signal_watch(cls) -> SignalWatch:
        with cls._watch_lock:
            if cls._watch is None:
                cls._watch = SignalWatch(cls.signal)
            return cls._watch

    def release(self) -> None:
        """The vCPU's fd was closed; the VM keeps the vCPU until it is destroyed itself."""
        for thread, vcpu in list(self._running.items()):
            if vcpu is self:
                self._running.pop(thread, None)
        self.kvm.put()
