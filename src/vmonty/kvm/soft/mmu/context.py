"""The shadow MMU as one vCPU uses it: the guest's control registers, and the roots that the processor's CR3 names.

Source: arch/x86/kvm/mmu/mmu.c: kvm_mmu_load(), kvm_mmu_new_pgd(), kvm_mmu_page_fault(); SDM, "PDPTE Registers".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vmonty.kvm.soft.mmu.paging_tmpl import CR4_PAE, EFER_LMA, ERROR_RESERVED, PRESENT, GuestFault, Registers
from vmonty.kvm.soft.mmu.shadow import PAE_ROOT, Outcome, ShadowMmu, ShadowPage
from vmonty.kvm.soft.stats import PF_EMULATE, PF_FIXED, PF_GUEST, PF_MMIO_SPTE_CREATED, PF_TAKEN
from vmonty.kvm.soft.vcpu_state import PF_VECTOR, QueuedException

if TYPE_CHECKING:
    from vmonty.kvm.soft.x86 import VcpuX86

CR0_PE, CR0_PG = 1, 1 << 31
DOUBLE_FAULT = 8
PDPTE_RESERVED = 0x1E6 | ~((1 << 46) - 1)


class MmuContext:
    """struct kvm_mmu."""

    def __init__(self, vcpu: VcpuX86, mmu: ShadowMmu) -> None:
        self._vcpu = vcpu
        self._mmu = mmu
        self._roots: dict[int, ShadowPage] = {}
        self._pae_root = mmu.tables.allocate()
        self.registers = Registers(0, 0, 0, 0)

    def destroy(self) -> None:
        """kvm_mmu_destroy(): the vCPU is gone."""
        self._mmu.tables.free(self._pae_root)

    def set(self, cr0: int, cr3: int, cr4: int, efer: int) -> None:
        """The guest has other control registers: the roots are looked up anew."""
        self.registers = Registers(cr0, cr3, cr4, efer, self.registers.pdptrs)
        self._roots = {}

    def load_pdptrs(self, cr0: int, cr3: int, cr4: int, efer: int) -> bool:
        """load_pdptrs(): with PAE paging; False for reserved bits, which are a #GP."""
        if not cr0 & CR0_PG or not cr4 & CR4_PAE or efer & EFER_LMA:
            return True
        base = cr3 & 0xFFFF_FFE0
        values = tuple(self._mmu.walker.read(base + 8 * n, 8) for n in range(4))
        known = tuple(value for value in values if value is not None)
        if len(known) < len(values) or any(value & PRESENT and value & PDPTE_RESERVED for value in known):
            return False
        self.registers = Registers(cr0, cr3, cr4, efer, known)
        self._roots = {}
        return True

    def root(self) -> int:
        """kvm_mmu_load(): what the processor's CR3 must be."""
        if not self._roots or any(page.invalid for page in self._roots.values()):
            self._roots = self._mmu.make_roots(self.registers)
            if PAE_ROOT not in self._roots:
                for number in range(4):
                    page = self._roots.get(number)
                    self._mmu.tables.write(self._pae_root, number, 0 if page is None else page.table | PRESENT)
        page = self._roots.get(PAE_ROOT)
        return self._pae_root if page is None else page.table

    def walk(self, gva: int) -> Iterator[tuple[int, int, int]] | None:
        """As ShadowMmu's, from this vCPU's root; None in real mode, which has no tables to shadow."""
        if not self.registers.cr0 & CR0_PE:
            return None
        root = self.root()
        return self._mmu.walk(root, 4, gva) if PAE_ROOT in self._roots else self._mmu.walk(root, 3, gva & 0xFFFF_FFFF)

    def ready(self) -> bool:
        """Whether the root is still good."""
        return bool(self._roots) and not any(page.invalid for page in self._roots.values())

    def reset(self) -> None:
        """kvm_mmu_reset_context(), of a vCPU whose state user space has set: it may have written tables too."""
        self._mmu.drop_all()
        self._roots = {}

    def flush(self) -> None:
        """The guest flushes its TLB."""
        self._mmu.sync_all()

    def invlpg(self, gva: int) -> None:
        """kvm_mmu_invlpg()."""
        self._mmu.sync_address(self._root_of(gva), gva)

    def _root_of(self, gva: int) -> ShadowPage | None:
        return self._roots.get(PAE_ROOT if self.registers.long_mode else gva >> 30 & 3)

    def page_fault(self, gva: int, error: int) -> Outcome:
        """kvm_mmu_page_fault(): the processor's #PF; that of the guest's own tables is queued."""
        counters = self._vcpu.stats.values
        if error & ERROR_RESERVED:
            if self._mmu.is_mmio(self._root_of(gva), gva):
                return Outcome.EMULATE
            error &= ~ERROR_RESERVED  # the slots have changed since
        counters[PF_TAKEN] += 1
        vendor = self._vcpu.vendor
        try:
            outcome = self._mmu.fault(
                self._roots, self.registers, gva, error, vendor.get_cpl(), vendor.get_rflags(), self._vcpu.page_absent
            )
        except GuestFault as fault:
            counters[PF_GUEST] += 1
            self._queue(gva, fault.error_code)
            return Outcome.FIXED
        counters[PF_MMIO_SPTE_CREATED] += outcome is Outcome.DEVICE
        if outcome is not Outcome.LATER:
            counters[PF_FIXED if outcome is Outcome.FIXED else PF_EMULATE] += 1
        return outcome

    def _queue(self, gva: int, error_code: int) -> None:
        """kvm_inject_page_fault(), with what was being delivered. SDM, "Double Fault Exception (#DF)"."""
        vcpu = self._vcpu
        first = vcpu.exception
        if first is not None and not first.pending and first.vector == DOUBLE_FAULT:
            vcpu.exception = None
            vcpu.triple_fault_pending = True
        elif first is not None and not first.pending and first.vector == PF_VECTOR:
            vcpu.exception = QueuedException(DOUBLE_FAULT, 0)
        else:
            vcpu.queue_exception(PF_VECTOR, error_code, gva)
