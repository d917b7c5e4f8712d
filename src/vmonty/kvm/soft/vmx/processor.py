"""A vCPU's VMCS and the pages that it names, and the physical processor which has it at present.

Source: arch/x86/kvm/vmx/vmx.c: vmx_vcpu_load_vmcs(), loaded_vmcs_clear().
"""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING

from vmonty.base.ram import Ram
from vmonty.cpu import models
from vmonty.cpu.context import Context
from vmonty.cpu.cpuid import set_features
from vmonty.cpu.vmcs import REVISION, Field
from vmonty.kvm.soft.cpuid import instructions
from vmonty.kvm.soft.vcpu_arch import VcpuArch
from vmonty.kvm.soft.vmx.run import attach, enter, outcome
from vmonty.kvm.uapi.vcpu import kvm_cpuid_entry2

if TYPE_CHECKING:
    from vmonty.cpu.core import Cpu
    from vmonty.cpu.vmx import Vmx as VmxInstructions
    from vmonty.kvm.soft.pcpu import PhysicalCpu

XSAVE_SIZE = 832
MSR_BITMAP_SIZE = 4096

# MSRs that the guest may read and write without an exit: they are the processor's own.
PASSED_THROUGH = (
    0x174, 0x175, 0x176,
    *range(0xC000_0081, 0xC000_0085), *range(0xC000_0100, 0xC000_0104),
)  # fmt: skip

# Kept in the processor, not in the VMCS.
PROCESSOR_MSRS = frozenset((0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084, 0xC000_0102, 0xC000_0103))


class Page:
    """One page that the VMCS points at."""

    def __init__(self, ram: Ram, offset: int) -> None:
        self._ram = ram
        self._offset = offset
        self.address = ram.address + offset

    def clear_bit(self, bit: int) -> None:
        """Set bit number *bit* of the page to zero."""
        at = self._offset + (bit >> 3)
        self._ram.write_u8(at, self._ram.read_u8(at) & ~(1 << (bit & 7)))

    def set_bit(self, bit: int) -> None:
        """Set bit number *bit* of the page to one."""
        at = self._offset + (bit >> 3)
        self._ram.write_u8(at, self._ram.read_u8(at) | 1 << (bit & 7))


class Processor:
    """Names the registers for the vendor module; VMREAD and VMWRITE go straight through to the physical processor.

    Between ``store`` and ``load`` there is none: only the vCPU's thread, between sched_in and sched_out, may use it.
    """

    _cpu: Cpu
    _vmx: VmxInstructions

    def __init__(self, arch: VcpuArch) -> None:
        self._arch = arch
        self._pages = Ram(2 * 4096, "vmonty-vmcs")
        self.vmcs, self.msr_bitmap = (Page(self._pages, 4096 * index) for index in range(2))
        self._pages.write_u32(0, REVISION)
        self._pages.fill(4096, MSR_BITMAP_SIZE, 0xFF)
        for index in PASSED_THROUGH:
            self.pass_msr_through(index, read=True, write=True)
        self._registers = Context()
        self._features = models.feature_words(instructions(()))
        self.pcpu: PhysicalCpu | None = None

    def load(self, pcpu: PhysicalCpu) -> None:
        """vmx_vcpu_load(): the VMCS is current there, and the registers are in the processor."""
        if pcpu.virtualization is None:
            raise OSError(errno.EIO, "virtualization is off: the host restarts")
        self._cpu, self._vmx = pcpu.cpu, pcpu.virtualization.vmx
        self._vmx.vmclear(self.vmcs.address)
        self._vmx.vmptrld(self.vmcs.address)
        self._registers.load(self._cpu)
        set_features(self._cpu.state_address, self._features)
        self.pcpu = pcpu
        self.host_had_control = self._cpu.host_had_control
        self.vmread = self._vmx.vmread
        self.vmwrite = self._vmx.vmwrite
        self.get_gpr = self._vmx.gpr
        self.set_gpr = self._vmx.set_gpr
        self.enter = partial(enter, self._vmx, self._arch)
        self.outcome = partial(outcome, self._vmx, self._arch)
        self.emulate = self._vmx.emulate
        self.answer_mmio = self._vmx.answer_mmio
        self.forget_mmio = self._vmx.forget_mmio
        self.invvpid = self._vmx.invvpid
        self.lost_memory = self._vmx.lost_memory
        self.get_debug = self._vmx.dr
        self.set_debug = self._vmx.set_dr
        attach(self._vmx, self._arch, pcpu)

    def store(self) -> None:
        """__loaded_vmcs_clear(): the VMCS's data are in memory, the registers here, and the processor is free."""
        self._arch.detach()
        self._registers.store(self._cpu)
        self._vmx.vmclear(self.vmcs.address)
        self.pcpu = None

    def region(self) -> bytes:
        """The VMCS's page."""
        return bytes(self._pages.read(0, 4096))

    def pass_msr_through(self, index: int, read: bool, write: bool) -> None:
        """Which accesses to an MSR don't exit."""
        # Read low, read high, write low, write high: 1 KiB each. SDM, "MSR-Bitmap Address".
        bit = (0x2000 if index >= 0xC000_0000 else 0) + (index & 0x1FFF)
        for at, passes in ((bit, read), (0x4000 + bit, write)):
            (self.msr_bitmap.clear_bit if passes else self.msr_bitmap.set_bit)(at)

    def setup_host_state(self) -> None:
        """vmx_set_constant_host_state(): a host that passes the checks at entry; exits return to us, not to it."""
        values = {
            Field.HOST_CR0: 0x8005_0033, Field.HOST_CR3: 0x1000, Field.HOST_CR4: 0x2020, Field.HOST_IA32_EFER: 0xD01,
            Field.HOST_IA32_PAT: 0x0007_0406_0007_0406, Field.HOST_CS_SELECTOR: 8, Field.HOST_SS_SELECTOR: 16,
            Field.HOST_DS_SELECTOR: 16, Field.HOST_ES_SELECTOR: 16, Field.HOST_TR_SELECTOR: 32,
            Field.HOST_RIP: 0x1000, Field.HOST_RSP: 0x1000,
        }  # fmt: skip
        for field, value in values.items():
            self.vmwrite(field, value)

    def mmio(self) -> tuple[int, int, bool, int]:
        """The access that emulate() reported: guest-physical address, size, whether a write, data."""
        address, size, is_write, data = self._vmx.mmio
        return address, size, is_write, data

    def get_control(self, name: str) -> int:
        """CR2 or XCR0."""
        value: int = getattr(self._vmx, name)
        return value

    def set_control(self, name: str, value: int) -> None:
        """Set CR2 or XCR0."""
        setattr(self._vmx, name, value)

    def get_msr(self, index: int) -> int | None:
        """An MSR that the processor keeps for the guest; None for others."""
        return self._vmx.rdmsr(index) if index in PROCESSOR_MSRS else None

    def set_msr(self, index: int, value: int) -> bool:
        """Write one; False for others and for values that it refuses."""
        if index not in PROCESSOR_MSRS:
            return False
        try:
            self._vmx.wrmsr(index, value)
        except ValueError:
            return False
        return True

    def get_xsave(self) -> bytes:
        """The x87, SSE and AVX state, standard format."""
        return bytes(self._cpu.xsave)

    def set_xsave(self, area: bytes) -> None:
        """Load it."""
        self._cpu.xsave = area[:XSAVE_SIZE]

    def invalidate(self, eptp: int) -> None:
        """INVEPT of everything."""
        self._vmx.invept(2, eptp)

    def set_cpuid(self, entries: list[kvm_cpuid_entry2]) -> None:
        """CPUID exits, so the processor's own table stays as it is; its instructions follow the guest's."""
        self._features = models.feature_words(instructions(entries))
        set_features(self._cpu.state_address, self._features)
