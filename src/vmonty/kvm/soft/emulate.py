"""The instruction emulator, for accesses to where no memory is: the processor itself, one instruction at a time.

In the kernel it is a second implementation of the instruction set (arch/x86/kvm/emulate.c). Here the processor executes
the instruction from its own table, and tells of each access that finds no memory; so whatever the guest can execute
can be emulated, and it is the same in both places.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from vmonty.kvm.soft.stats import INSN_EMULATION

if TYPE_CHECKING:
    from vmonty.kvm.soft.x86 import VcpuX86


class Processor(Protocol):
    """What executes the instruction: see cpu.vmx.Vmx.emulate()."""

    def emulate(self, resume: bool, instructions: int) -> str: ...
    def mmio(self) -> tuple[int, int, bool, int]: ...
    def answer_mmio(self, data: int) -> None: ...
    def forget_mmio(self) -> None: ...


class Emulator:
    """Emulates for *vcpu*, whose state is in *cpu*."""

    def __init__(self, vcpu: VcpuX86, cpu: Processor) -> None:
        self._vcpu = vcpu
        self._cpu = cpu
        self._instructions = 1
        self._ready: tuple[int, bytes] | None = None

    def emulate(self, instructions: int = 1) -> bool:
        """x86_emulate_instruction(): execute the instruction at rip; True to go on, False for an exit to user space.

        *instructions*: how many are worth while, when it is the guest's memory that cannot be used otherwise.
        """
        self._instructions = 1 if self._vcpu.guest_debug else instructions
        self._vcpu.stats.values[INSN_EMULATION] += 1
        self._vcpu.note_step()
        return self._run(resume=False)

    def answered(self, gpa: int, data: bytes) -> bool:
        """Execute the instruction at rip, which was left before it was begun to have *data* read at *gpa*."""
        self._ready = gpa, data
        try:
            self._instructions = 1
            self._vcpu.note_step()
            return self._run(resume=False)
        finally:
            self._ready = None

    def _run(self, resume: bool) -> bool:
        mapped = None
        while (ended := self._cpu.emulate(resume, self._instructions)) == "mmio":
            gpa, size, is_write, data = self._cpu.mmio()
            resume = True
            if self._ready is not None and not is_write and (gpa, size) == (self._ready[0], len(self._ready[1])):
                self._cpu.answer_mmio(int.from_bytes(self._ready[1], "little"))
            elif self._vcpu.page_fault(gpa, is_write):
                # Memory after all, which is not mapped yet: the instruction has several operands.
                if is_write:
                    self._vcpu.kvm.write_gpa(gpa, data.to_bytes(8, "little")[:size])
                elif mapped != gpa:
                    self._cpu.forget_mmio()
                    mapped = gpa
                else:
                    # It can be read only, and is to be written next: that will be the device's.
                    self._cpu.answer_mmio(int.from_bytes(self._vcpu.kvm.read_gpa(gpa, size) or b"", "little"))
            elif is_write:
                if not self._vcpu.mmio_write(gpa, data.to_bytes(8, "little")[:size], self._resume):
                    return False
            else:
                return self._vcpu.mmio_read(gpa, size, self._answer)
        return self._vcpu.vendor.handle_exit() if ended == "vm" else True

    def _resume(self) -> bool:
        return self._run(resume=True)

    def _answer(self, data: bytes) -> bool:
        self._cpu.answer_mmio(int.from_bytes(data, "little"))
        return self._run(resume=True)
