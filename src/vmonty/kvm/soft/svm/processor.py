"""A vCPU's VMCB and the maps that it names, and the physical processor which has the rest of its registers at present.

Source: arch/x86/kvm/svm/svm.c: svm_vcpu_load(), svm_vcpu_init_msrpm(), set_msr_interception().
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vmonty.base.ram import Ram
from vmonty.cpu import models
from vmonty.cpu.context import Context
from vmonty.cpu.cpuid import set_features
from vmonty.cpu.vmcb import IOPM_SIZE, MSRPM_SIZE, PAGE_SIZE, Vmcb, msrpm_bit
from vmonty.kvm.soft.cpuid import instructions
from vmonty.kvm.soft.svm.run import attach, enter, give_cr8, outcome, take_cr8
from vmonty.kvm.soft.vcpu_arch import VcpuArch
from vmonty.kvm.uapi.vcpu import kvm_cpuid_entry2

if TYPE_CHECKING:
    from vmonty.cpu.core import Cpu
    from vmonty.cpu.svm import Svm as SvmInstructions
    from vmonty.kvm.soft.pcpu import PhysicalCpu

XSAVE_SIZE = 832
MSR_TSC_RATIO = 0xC000_0104
# MSRs that the guest may read and write without an exit: they are the processor's own.
PASSED_THROUGH = (
    0x174, 0x175, 0x176,
    *range(0xC000_0081, 0xC000_0085), *range(0xC000_0100, 0xC000_0104),
)  # fmt: skip

# Kept in the processor, not in the VMCB.
PROCESSOR_MSRS = frozenset((0xC000_0103,))
IOPM, MSRPM = PAGE_SIZE, PAGE_SIZE + IOPM_SIZE


class Processor:
    """Names the registers for the vendor module: those in the VMCB, and those that stay in the physical processor.

    Between ``store`` and ``load`` there is none: only the vCPU's thread, between sched_in and sched_out, may use it.
    """

    _cpu: Cpu
    _svm: SvmInstructions

    def __init__(self, arch: VcpuArch) -> None:
        self._arch = arch
        self._pages = Ram(MSRPM + MSRPM_SIZE, "vmonty-vmcb")
        self.vmcb = Vmcb(self._pages)
        self.iopm, self.msrpm = self._pages.address + IOPM, self._pages.address + MSRPM
        self._pages.fill(IOPM, IOPM_SIZE + MSRPM_SIZE, 0xFF)
        for index in PASSED_THROUGH:
            self.pass_msr_through(index, read=True, write=True)
        self._registers = Context()
        self._features = models.feature_words(instructions(()))
        self._tsc_ratio = 1 << 32
        self.pcpu: PhysicalCpu | None = None

    def load(self, pcpu: PhysicalCpu) -> None:
        """svm_vcpu_load(): the registers that the VMCB lacks are in the processor."""
        if pcpu.virtualization is None:
            raise OSError(errno.EIO, "virtualization is off: the host restarts")
        self._cpu, self._svm = pcpu.cpu, pcpu.virtualization.svm
        self._registers.load(self._cpu)
        set_features(self._cpu.state_address, self._features)
        self._svm.wrmsr(MSR_TSC_RATIO, self._tsc_ratio)
        self.pcpu = pcpu
        self.host_had_control = self._cpu.host_had_control
        self.get_gpr = self._svm.gpr
        self.set_gpr = self._svm.set_gpr
        self.answer_mmio = self._svm.answer_mmio
        self.forget_mmio = self._svm.forget_mmio
        self.lost_memory = self._svm.lost_memory
        self.get_debug = self._svm.dr
        self.set_debug = self._svm.set_dr
        self.flush = self._svm.flush
        self.invlpga = self._svm.invlpga
        attach(self._svm, self.vmcb.address, self._arch, pcpu)

    def store(self) -> None:
        """The registers are here, and the processor is free."""
        self._arch.detach()
        self._registers.store(self._cpu)
        self.pcpu = None

    def region(self) -> bytes:
        """The VMCB's page."""
        return bytes(self._pages.read(0, PAGE_SIZE))

    def enter(self) -> int:
        """VMLOAD, VMRUN, VMSAVE: gives the exit code."""
        return enter(self._svm, self.vmcb.address, self._arch)

    def outcome(self) -> int:
        """What enter() would give or raise for the run that reentry.reenter() made."""
        return outcome(self._svm, self._arch)

    def emulate(self, resume: bool, instructions: int, devices: bool = True) -> str:
        """Execute instructions with missing memory as MMIO; see cpu.svm.Svm.emulate()."""
        give_cr8(self.vmcb.address, self._arch)
        try:
            return self._svm.emulate(self.vmcb.address, resume, instructions, devices)
        finally:
            take_cr8(self.vmcb.address, self._arch)

    def mmio(self) -> tuple[int, int, bool, int]:
        """The access that emulate() reported: guest-physical address, size, whether a write, data."""
        return self._svm.mmio

    def pass_msr_through(self, index: int, read: bool, write: bool) -> None:
        """Which accesses to an MSR don't exit."""
        bit = msrpm_bit(index)
        assert bit is not None, f"{index:#x} always exits"
        for number, passes in ((bit, read), (bit + 1, write)):
            at, mask = MSRPM + (number >> 3), 1 << (number & 7)
            old = self._pages.read_u8(at)
            self._pages.write_u8(at, old & ~mask if passes else old | mask)

    def get_xcr0(self) -> int:
        """XCR0."""
        return self._svm.xcr0

    def set_xcr0(self, value: int) -> None:
        """Set it."""
        self._svm.xcr0 = value

    def get_msr(self, index: int) -> int | None:
        """An MSR that the processor keeps for the guest; None for others."""
        return self._svm.rdmsr(index) if index in PROCESSOR_MSRS else None

    def set_msr(self, index: int, value: int) -> bool:
        """Write one; False for others and for values that it refuses."""
        if index not in PROCESSOR_MSRS:
            return False
        try:
            self._svm.wrmsr(index, value)
        except ValueError:
            return False
        return True

    def set_tsc_ratio(self, ratio: int) -> None:
        """How many ticks the guest's counter makes for one of the processor's, with 32 bits of fraction."""
        self._tsc_ratio = ratio
        self._svm.wrmsr(MSR_TSC_RATIO, ratio)

    def set_cpuid(self, entries: list[kvm_cpuid_entry2]) -> None:
        """CPUID exits, so the processor's own table stays as it is; its instructions follow the guest's."""
        self._features = models.feature_words(instructions(entries))
        set_features(self._cpu.state_address, self._features)

    def get_xsave(self) -> bytes:
        """The x87, SSE and AVX state, standard format."""
        return bytes(self._cpu.xsave)

    def set_xsave(self, area: bytes) -> None:
        """Load it."""
        self._cpu.xsave = area[:XSAVE_SIZE]
