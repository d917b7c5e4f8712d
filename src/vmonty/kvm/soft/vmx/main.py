"""kvm-intel as a module: its parameters, and VMX operation on each physical processor.

Source: arch/x86/kvm/vmx/main.c, vmx.c: hardware_setup(), vmx_hardware_enable(), alloc_loaded_vmcs().
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vmonty.base.ram import Ram
from vmonty.base.record import Record
from vmonty.cpu.vmcs import REVISION
from vmonty.cpu.vmx import Vmx as VmxInstructions
from vmonty.kvm.soft import pcpu
from vmonty.kvm.soft.mmu.shadow import ShadowMmu
from vmonty.kvm.soft.mmu.spte import EPT
from vmonty.kvm.soft.mmu.tdp import TdpMmu
from vmonty.kvm.soft.vmx.controls import PIN_PREEMPTION_TIMER
from vmonty.kvm.soft.vmx.rmode import RestrictedVmx, init_rmode_tss
from vmonty.kvm.soft.vmx.vmx import Vmx

if TYPE_CHECKING:
    from vmonty.kvm.soft.kvm_main import Kvm
    from vmonty.kvm.soft.pcpu import PhysicalCpu
    from vmonty.kvm.soft.vcpu_state import KvmX86Ops
    from vmonty.kvm.soft.x86 import VcpuX86

IA32_VMX_BASIC, IA32_VMX_PINBASED_CTLS, IA32_VMX_PROCBASED_CTLS2 = 0x480, 0x481, 0x48B
SECOND_VIRTUALIZE_APIC, SECOND_APIC_REGISTERS, SECOND_INTERRUPT_DELIVERY = 1, 1 << 8, 1 << 9
SECOND_EPT, SECOND_VPID, SECOND_UNRESTRICTED = 1 << 1, 1 << 5, 1 << 7
APICV = SECOND_VIRTUALIZE_APIC | SECOND_APIC_REGISTERS | SECOND_INTERRUPT_DELIVERY
VPIDS = 1 << 16


class Parameters(Record):
    """As modinfo kvm_intel tells them. What the processor lacks is turned off by hardware_setup()."""

    ept: bool = True
    vpid: bool = True
    unrestricted_guest: bool = True
    enable_apicv: bool = True
    preemption_timer: bool = True
    nested: bool = False


class VmxOperation:
    """A processor between VMXON and VMXOFF."""

    def __init__(self, processor: PhysicalCpu) -> None:
        self.vmx = VmxInstructions(processor.cpu)
        self._region = Ram(4096, "vmonty-vmxon")
        self._region.write_u32(0, REVISION)
        self.vmx.vmxon(self._region.address)


class KvmIntel:
    """struct kvm_x86_init_ops of VMX."""

    name, feature = "kvm_intel", "vmx"
    tsc_scaling = True

    def __init__(self) -> None:
        self.parameters = Parameters()
        self._basic = 0
        self._free_vpids: list[int] = []
        self._next_vpid = 1

    def hardware_setup(self) -> None:
        """Look at a processor, and turn off what it cannot do."""
        (first, *_) = pcpu.POOL
        vmx = VmxInstructions(first.cpu)
        self._basic = vmx.capability(IA32_VMX_BASIC)
        may = vmx.capability(IA32_VMX_PROCBASED_CTLS2) >> 32
        wanted = self.parameters
        wanted.vpid &= bool(may & SECOND_VPID)
        wanted.ept &= bool(may & SECOND_EPT)
        wanted.unrestricted_guest &= wanted.ept and bool(may & SECOND_UNRESTRICTED)
        wanted.enable_apicv &= may & APICV == APICV
        wanted.preemption_timer &= bool(vmx.capability(IA32_VMX_PINBASED_CTLS) >> 32 & PIN_PREEMPTION_TIMER)
        if wanted.nested:
            raise OSError(errno.EOPNOTSUPP, "nested virtualization is not offered")

    def hardware_unsetup(self) -> None:
        """Forget it."""
        self._basic = 0

    def check_processor_compatibility(self, processor: PhysicalCpu) -> None:
        """setup_vmcs_config() there must come to the same."""
        if VmxInstructions(processor.cpu).capability(IA32_VMX_BASIC) != self._basic:
            raise OSError(errno.EIO, f"processor {processor.number} has another VMX than the first")

    def hardware_enable(self, processor: PhysicalCpu) -> None:
        """VMXON."""
        processor.virtualization = VmxOperation(processor)

    def hardware_disable(self, processor: PhysicalCpu) -> None:
        """VMXOFF."""
        operation: VmxOperation = processor.virtualization
        operation.vmx.vmxoff()
        processor.virtualization = None

    def mmu_create(self, kvm: Kvm) -> TdpMmu | ShadowMmu:
        """The EPT, or shadow tables."""
        return TdpMmu(kvm.memslots, kvm.stats, EPT) if self.parameters.ept else ShadowMmu(kvm, EPT)

    def vcpu_create(self, vcpu: VcpuX86) -> KvmX86Ops:
        """vmx_vcpu_create()."""
        return Vmx(vcpu, self) if self.unrestricted else RestrictedVmx(vcpu, self)

    @property
    def unrestricted(self) -> bool:
        """Whether the processor enters without CR0.PE and CR0.PG; shadow paging has ways of its own."""
        return self.parameters.unrestricted_guest or not self.parameters.ept

    def set_tss_addr(self, kvm: Kvm, address: int) -> None:
        """vmx_set_tss_addr()."""
        if not self.unrestricted:
            init_rmode_tss(kvm, address)
        kvm.tss_addr = address

    def allocate_vpid(self) -> int:
        """A tag for one vCPU's translations; 0, which is none, when they are used up or turned off."""
        if not self.parameters.vpid:
            return 0
        if self._free_vpids:
            return self._free_vpids.pop()
        if self._next_vpid == VPIDS:
            return 0
        self._next_vpid += 1
        return self._next_vpid - 1

    def free_vpid(self, vpid: int) -> None:
        """Give it back."""
        if vpid:
            self._free_vpids.append(vpid)
