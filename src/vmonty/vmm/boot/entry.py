"""Where and how the boot processor enters a kernel."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple

from vmonty.kvm.api import Vcpu
from vmonty.vmm.boot import longmode, protected
from vmonty.vmm.memory import GuestMemory

TABLES = 0x1000  # of either mode, in guest RAM


class Mode(Enum):
    """The mode of the processor at the entry."""

    PROTECTED = 32
    LONG = 64


class Entry(NamedTuple):
    """A guest-physical address, and the general registers that are not zero there, by KVM's names."""

    mode: Mode
    address: int
    registers: Mapping[str, int] = MappingProxyType({})

    def write_tables(self, memory: GuestMemory) -> None:
        """Put the tables of the mode into low RAM."""
        (longmode if self.mode is Mode.LONG else protected).write_tables(memory, TABLES)

    def enter(self, vcpu: Vcpu) -> None:
        """Point *vcpu* at the kernel, interrupts off."""
        (longmode if self.mode is Mode.LONG else protected).enter(vcpu, TABLES)
        regs = vcpu.get_regs()
        for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp"):
            setattr(regs, name, self.registers.get(name, 0))
        regs.rip, regs.rflags = self.address, 2
        vcpu.set_regs(regs)
