"""Where shadow tables do not help, the processor executes over two-dimensional ones: accesses to devices, writes of the
guest to its own root, real mode.

The kernel has its instruction emulator for these, and hardware without EPT. Here the processor is the emulator.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from vmonty.kvm.soft.mmu.context import MmuContext
    from vmonty.kvm.soft.x86 import VcpuX86


class NestedFault(NamedTuple):
    """What the second dimension refused: an access of the guest, or (*walk*) of the processor to the guest's tables."""

    gpa: int
    write: bool
    fetch: bool
    walk: bool


class Steps(Protocol):
    """The processor, as Processor of the vendor has it."""

    def emulate(self, resume: bool, instructions: int, devices: bool = True) -> str: ...
    def mmio(self) -> tuple[int, int, bool, int]: ...
    def answer_mmio(self, data: int) -> None: ...
    def forget_mmio(self) -> None: ...


class Vendor(Protocol):
    """What the vendor must be able to do."""

    vcpu: VcpuX86
    shadow: MmuContext | None
    restricted: bool

    def enter_two_dimensional(self, step: bool) -> None:
        """The guest's own registers, over two-dimensional tables."""

    def leave_two_dimensional(self) -> None:
        """Back, with what the guest changed."""

    def nested_fault(self) -> NestedFault | None:
        """The exit, if it is that."""


class TwoDimensional:
    """The processor as the emulator uses it."""

    def __init__(self, vendor: Vendor, cpu: Steps) -> None:
        self._vendor = vendor
        self._cpu = cpu
        self.mmio = cpu.mmio

    def emulate(self, resume: bool, instructions: int) -> str:
        """One instruction, or several; see cpu.vmx.Vmx.emulate()."""
        if self._vendor.shadow is None and not self._vendor.restricted:
            return self._step(resume, instructions, devices=True)
        self._vendor.enter_two_dimensional(step=True)
        try:
            return self._emulate(resume, instructions)
        finally:
            self._vendor.leave_two_dimensional()

    def _emulate(self, resume: bool, instructions: int) -> str:
        """First as if there were only memory, which is mapped as it is missed; then the access to a device."""
        vcpu = self._vendor.vcpu
        while not resume:
            ended = self._step(False, instructions, devices=False)
            fault = self._vendor.nested_fault() if ended == "vm" else None
            if fault is None:
                return ended
            if vcpu.page_fault(fault.gpa, fault.write, fault.walk):
                continue
            if fault.fetch or fault.walk:
                return ended
            break
        while (ended := self._step(resume, 1, devices=True)) == "vm":
            fault = self._vendor.nested_fault()
            if fault is None or not vcpu.page_fault(fault.gpa, fault.write, fault.walk):
                break
            # The instruction starts again, with the answers that it has had.
        return ended

    def _step(self, resume: bool, instructions: int, devices: bool) -> str:
        return self._vendor.vcpu.guest_mode(partial(self._cpu.emulate, resume, instructions, devices))

    def answer_mmio(self, data: int) -> None:
        """The data of a read."""
        self._cpu.answer_mmio(data)

    def forget_mmio(self) -> None:
        """There is memory after all."""
        self._cpu.forget_mmio()
