"""The local APIC's registers, bits and messages, for all that deal with it. SDM, "Local APIC Register Address Map"."""

from __future__ import annotations

from typing import NamedTuple

# Offsets in the register page.
ID, LVR, TPR, ARBPRI, PPR, EOI, LDR, DFR = 0x20, 0x30, 0x80, 0x90, 0xA0, 0xB0, 0xD0, 0xE0
SVR, ISR, TMR, IRR, ESR, LVT_CMCI, ICR, ICR2 = 0xF0, 0x100, 0x180, 0x200, 0x280, 0x2F0, 0x300, 0x310
LVTT, LVT_THERMAL, LVT_PMC, LVT0, LVT1, LVT_ERROR = 0x320, 0x330, 0x340, 0x350, 0x360, 0x370
TMICT, TMCCT, TDCR, SELF_IPI = 0x380, 0x390, 0x3E0, 0x3F0

# Delivery modes, as in bits 10–8 of the ICR and the LVTs. 3 is remote read, which KVM uses to end a PV halt.
FIXED, LOWEST, SMI, REMOTE_READ, NMI, INIT, STARTUP, EXTINT = range(8)
NO_SHORTHAND, SELF, ALL_INCLUDING, ALL_BUT_SELF = range(4)

MSR_IA32_APICBASE = 0x1B
MSR_IA32_TSC_DEADLINE = 0x6E0
APIC_BASE_MSR = 0x800
APICBASE_BSP, APICBASE_EXTD, APICBASE_ENABLE = 1 << 8, 1 << 10, 1 << 11
APIC_DEFAULT_PHYS_BASE = 0xFEE00000
LAPIC_MMIO_LENGTH = 0x1000

LVT_MASKED = 1 << 16
SVR_ENABLED = 1 << 8
DIRECTED_EOI_VERSION, DIRECTED_EOI_SVR = 1 << 24, 1 << 12
ESR_SEND_ILLEGAL, ESR_RECEIVE_ILLEGAL, ESR_ILLEGAL_REGISTER = 1 << 5, 1 << 6, 1 << 7
ICR_BUSY = 1 << 12
X2APIC_ICR_RESERVED = 0xFFF00000 | 0x30000 | 0x2000
XAPIC_BROADCAST, X2APIC_BROADCAST = 0xFF, 0xFFFFFFFF

# Which bits of each LVT can be written; LVTT's mode depends on CPUID.
LVT_BITS = {
    LVTT: 0x110FF, LVT_THERMAL: 0x117FF, LVT_PMC: 0x117FF, LVT0: 0x1F7FF, LVT1: 0x1F7FF, LVT_ERROR: 0x110FF,
    LVT_CMCI: 0x117FF,
}  # fmt: skip
VECTOR_REGISTERS = range(ISR, IRR + 0x80, 0x10)
# What can be read, LVT CMCI apart, and what only xAPIC has of it.
READABLE = frozenset(
    {ID, LVR, TPR, ARBPRI, PPR, LDR, DFR, SVR, ESR, ICR, ICR2, TMICT, TMCCT, TDCR, *VECTOR_REGISTERS, *LVT_BITS}
) - {LVT_CMCI}  # fmt: skip
XAPIC_ONLY = frozenset({ARBPRI, DFR, ICR2})

# Kinds of logical IDs.
XAPIC_FLAT, XAPIC_CLUSTER, X2APIC_CLUSTER = range(3)

ONE_SHOT, PERIODIC, TSC_DEADLINE = 0, 1 << 17, 2 << 17
# KVM's min_timer_period_us.
MIN_PERIOD_NS = 200_000


class LapicIrq(NamedTuple):
    """One interrupt message (kvm_lapic_irq)."""

    vector: int
    delivery_mode: int = FIXED
    logical: bool = False
    dest_id: int = 0
    level: int = 1
    level_triggered: bool = False
    shorthand: int = NO_SHORTHAND
    msi_redir_hint: bool = False

    @property
    def lowest_priority(self) -> bool:
        """Whether one of the destinations is to be chosen."""
        return self.delivery_mode == LOWEST or self.msi_redir_hint
