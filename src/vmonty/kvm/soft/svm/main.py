"""kvm-amd as a module: its parameters, and SVM on each physical processor.

Source: arch/x86/kvm/svm/svm.c: svm_hardware_setup(), svm_hardware_enable().
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vmonty.base.ram import Ram
from vmonty.base.record import Record
from vmonty.cpu.svm import Svm as SvmInstructions
from vmonty.kvm.soft.mmu.shadow import ShadowMmu
from vmonty.kvm.soft.mmu.spte import NPT
from vmonty.kvm.soft.mmu.tdp import TdpMmu
from vmonty.kvm.soft.svm.svm import Svm

if TYPE_CHECKING:
    from vmonty.kvm.soft.kvm_main import Kvm
    from vmonty.kvm.soft.pcpu import PhysicalCpu
    from vmonty.kvm.soft.vcpu_state import KvmX86Ops
    from vmonty.kvm.soft.x86 import VcpuX86

MSR_VM_CR = 0xC001_0114
VM_CR_SVMDIS = 1 << 4


class Parameters(Record):
    """As modinfo kvm_amd tells them."""

    npt: bool = True
    nested: bool = False


class SvmOperation:
    """struct svm_cpu_data: a processor with SVM on, and who has which of its ASIDs.

    Each vCPU that comes gets the next ASID. When they are used up a new generation begins: the TLB forgets all of them,
    and every vCPU needs another. Source: svm.c, new_asid(), pre_svm_run(); APM, "TLB Control".
    """

    max_asid = 0x7FFF

    def __init__(self, processor: PhysicalCpu) -> None:
        self.svm = SvmInstructions(processor.cpu)
        self._save_area = Ram(4096, "vmonty-hsave")
        self.asid_generation = 1
        self.next_asid = 1

    def new_asid(self) -> int:
        """One that no vCPU has had in this generation, in a TLB that knows nothing of it."""
        if self.next_asid > self.max_asid:
            self.asid_generation += 1
            self.next_asid = 1
            self.svm.flush()
        self.next_asid += 1
        return self.next_asid - 1


class KvmAmd:
    """struct kvm_x86_init_ops of SVM."""

    name, feature = "kvm_amd", "svm"
    tsc_scaling = True  # by the TSC ratio MSR

    def __init__(self) -> None:
        self.parameters = Parameters()

    def hardware_setup(self) -> None:
        """Turn off what the processor cannot do."""
        if self.parameters.nested:
            raise OSError(errno.EOPNOTSUPP, "nested virtualization is not offered")

    def hardware_unsetup(self) -> None:
        """There is nothing to forget."""

    def check_processor_compatibility(self, processor: PhysicalCpu) -> None:
        """kvm_is_svm_supported()."""
        if SvmInstructions(processor.cpu).rdmsr(MSR_VM_CR) & VM_CR_SVMDIS:
            raise OSError(errno.EIO, f"SVM is locked on processor {processor.number}")

    def hardware_enable(self, processor: PhysicalCpu) -> None:
        """svm_hardware_enable(). VM_HSAVE_PA has fewer bits than an address of a process: nothing is written there."""
        processor.virtualization = SvmOperation(processor)

    def hardware_disable(self, processor: PhysicalCpu) -> None:
        """svm_hardware_disable()."""
        processor.virtualization = None

    def mmu_create(self, kvm: Kvm) -> TdpMmu | ShadowMmu:
        """The nested page table, or shadow tables."""
        return TdpMmu(kvm.memslots, kvm.stats, NPT) if self.parameters.npt else ShadowMmu(kvm, NPT)

    def set_tss_addr(self, kvm: Kvm, address: int) -> None:
        """svm_set_tss_addr(): SVM has real mode."""

    def vcpu_create(self, vcpu: VcpuX86) -> KvmX86Ops:
        """svm_vcpu_create()."""
        return Svm(vcpu)
