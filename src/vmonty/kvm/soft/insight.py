"""What only a KVM in software can show: control structures by field name, every step of an address, each exit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from vmonty.kvm.exit_record import ExitRecord as ExitRecord
from vmonty.kvm.soft.mmu.context import MmuContext
from vmonty.kvm.soft.mmu.guest_walk import walk
from vmonty.kvm.soft.mmu.shadow import ShadowMmu
from vmonty.kvm.soft.mmu.spte import ADDRESS, LARGE, is_mmio_spte
from vmonty.kvm.soft.mmu.tdp import PRESENT

if TYPE_CHECKING:
    from vmonty.kvm.soft.kvm_main import Kvm
    from vmonty.kvm.soft.x86 import VcpuX86

PAGE_MASK = 0xFFF

# SDM, "VMX Basic Exit Reasons".
EXIT_NAMES: dict[int, str] = {
    0: "EXCEPTION_NMI", 1: "EXTERNAL_INTERRUPT", 2: "TRIPLE_FAULT", 7: "INTERRUPT_WINDOW", 8: "NMI_WINDOW",
    9: "TASK_SWITCH", 10: "CPUID", 12: "HLT", 13: "INVD", 14: "INVLPG", 15: "RDPMC", 16: "RDTSC", 18: "VMCALL",
    28: "CR_ACCESS", 29: "DR_ACCESS", 30: "IO_INSTRUCTION", 31: "MSR_READ", 32: "MSR_WRITE", 33: "INVALID_STATE",
    36: "MWAIT", 37: "MONITOR_TRAP", 39: "MONITOR", 40: "PAUSE", 43: "TPR_BELOW_THRESHOLD", 46: "GDTR_IDTR",
    47: "LDTR_TR", 48: "EPT_VIOLATION", 49: "EPT_MISCONFIG", 52: "PREEMPTION_TIMER", 54: "WBINVD", 55: "XSETBV",
    58: "INVPCID",
}  # fmt: skip


Tracer = Callable[[ExitRecord], None]


class Step(NamedTuple):
    """One step of a translation: what kind of table, its level (0: none), where the entry is, and what it holds."""

    table: str
    level: int
    address: int
    value: int


class Translation(NamedTuple):
    """GVA → GPA → HVA → HPA; None from where it ends. The software's host-physical address is one of the process."""

    gva: int
    gpa: int | None
    hva: int | None
    hpa: int | None
    steps: tuple[Step, ...]


def _hardware_walk(kvm: Kvm, vcpu: VcpuX86, gva: int, gpa: int) -> tuple[str, Iterator[tuple[int, int, int]]]:
    """Which of our tables the processor walks, and its entries: shadow tables for *gva*, or those of *gpa*."""
    if not isinstance(kvm.mmu, ShadowMmu):
        return "host", kvm.mmu.walk(gpa)
    shadow = vcpu.vendor.shadow
    entries = shadow.walk(gva) if isinstance(shadow, MmuContext) else None
    return ("host", kvm.mmu.tdp.walk(gpa)) if entries is None else ("shadow", entries)


def translate(kvm: Kvm, vcpu: VcpuX86, gva: int) -> Translation:
    """Walk the guest's tables, the memory slots and the second dimension. The vCPU must not run."""
    get = vcpu.vendor.get_control
    found = walk(kvm, gva, get("cr0"), get("cr3"), get("cr4"), get("efer"))
    steps = [Step("guest", entry.level, entry.gpa, entry.value) for entry in found.entries]
    if found.gpa is None:
        return Translation(gva, None, None, None, tuple(steps))
    slot = kvm.memslots.find(found.gpa)
    hva = None if slot is None else slot.hva(found.gpa)
    if slot is not None:
        steps.append(Step("slot", 0, slot.base_gfn << 12, slot.userspace_addr))
    hpa = None
    table, entries = _hardware_walk(kvm, vcpu, gva, found.gpa)
    for level, address, value in entries:
        steps.append(Step(table, level, address, value))
        if value & PRESENT and (level == 1 or value & LARGE) and not (table == "shadow" and is_mmio_spte(value)):
            offset = (1 << 12 + 9 * (level - 1)) - 1
            hpa = value & ADDRESS & ~offset | found.gpa & offset
    return Translation(gva, found.gpa, hva, hpa, tuple(steps))
