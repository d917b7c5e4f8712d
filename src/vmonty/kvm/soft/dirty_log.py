"""The dirty log of a VM: bitmaps by slot, or rings by vCPU.

Source: virt/kvm/kvm_main.c, kvm_get_dirty_log_protect(), kvm_clear_dirty_log_protect() and
kvm_vm_ioctl_reset_dirty_pages().
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vmonty.kvm.soft.files import KvmFile, answers
from vmonty.kvm.soft.memslots import KVM_USER_MEM_SLOTS, Memslot, Memslots
from vmonty.kvm.soft.user import Argument
from vmonty.kvm.uapi import Requests
from vmonty.kvm.uapi.vm import kvm_clear_dirty_log, kvm_dirty_log

if TYPE_CHECKING:
    from vmonty.kvm.soft.mmu.shadow import ShadowMmu
    from vmonty.kvm.soft.mmu.tdp import TdpMmu
    from vmonty.kvm.soft.x86 import VcpuX86


class DirtyLogIoctls(KvmFile):
    """The ioctls."""

    lock: threading.RLock
    memslots: Memslots
    mmu: TdpMmu | ShadowMmu
    vcpus: Mapping[int, VcpuX86]
    manual_dirty_log_protect: int
    dirty_ring_size: int

    def flush_remote_tlbs(self) -> None:
        """No vCPU uses a translation from before when this returns."""
        raise AssertionError("Kvm has it")

    @answers(Requests.KVM_GET_DIRTY_LOG)
    def get_dirty_log(self, argument: Argument) -> None:
        """kvm_get_dirty_log_protect()."""
        request = argument.get(kvm_dirty_log)
        with self.lock:
            slot = self._logged_slot(request.slot)
            if self.manual_dirty_log_protect:
                bitmap = bytes(slot.dirty)
            elif any(bitmap := slot.take_dirty()):
                # What is written from here on is logged again, or is there when user space reads the pages.
                self.mmu.write_protect(slot.base_gfn, slot.end_gfn)
                self.flush_remote_tlbs()
        Argument(request.u.dirty_bitmap, 0).write(bitmap)

    def _logged_slot(self, number: int) -> Memslot:
        if self.dirty_ring_size:
            raise OSError(errno.ENXIO, "the VM's log is in rings")
        if number & 0xFFFF >= KVM_USER_MEM_SLOTS:
            raise OSError(errno.EINVAL, "no such slot can be")
        slot = self.memslots.get(number & 0xFFFF)
        if number >> 16 or slot is None or not slot.dirty:
            raise OSError(errno.ENOENT, "the slot keeps no dirty log")
        return slot

    @answers(Requests.KVM_CLEAR_DIRTY_LOG)
    def clear_dirty_log(self, argument: Argument) -> None:
        """kvm_clear_dirty_log_protect()."""
        request = argument.get(kvm_clear_dirty_log)
        first, count = request.first_page, request.num_pages
        with self.lock:
            if first & 63:
                raise OSError(errno.EINVAL, "the first page must be a multiple of 64")
            slot = self._logged_slot(request.slot)
            left = slot.npages - first
            if left < 0 or count > left or (count < left and count & 63):
                raise OSError(errno.EINVAL, "the pages must lie in the slot, and be a multiple of 64 or end with it")
            bitmap = Argument(request.u.dirty_bitmap, 0).read((count + 63) // 64 * 8)
            bits = int.from_bytes(bitmap, "little") & (1 << count) - 1
            runs = list(slot.dirty_runs(first, bits))
            for run in runs:
                # First the bits: a write that comes in between may be logged once more, and is never lost.
                slot.clear_dirty(run)
                self.mmu.write_protect(slot.base_gfn + run.start, slot.base_gfn + run.stop)
            if runs:
                self.flush_remote_tlbs()

    @answers(Requests.KVM_RESET_DIRTY_RINGS)
    def reset_dirty_rings(self, argument: Argument) -> int:
        """Arm the pages again that user space has taken out of the rings; how many."""
        if not self.dirty_ring_size:
            raise OSError(errno.EINVAL, "the VM has no dirty rings")
        with self.lock:
            taken = [page for vcpu in self.vcpus.values() if vcpu.dirty_ring for page in vcpu.dirty_ring.reset()]
            for number, offset in taken:
                slot = self.memslots.get(number)
                if slot is not None and offset < slot.npages:
                    self.mmu.write_protect(slot.base_gfn + offset, slot.base_gfn + offset + 1)
            if taken:
                self.flush_remote_tlbs()
        return len(taken)
