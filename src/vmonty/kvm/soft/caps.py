"""What KVM_CHECK_EXTENSION answers: every capability that works here, with its number."""

from __future__ import annotations

from vmonty.kvm.soft.memslots import KVM_USER_MEM_SLOTS
from vmonty.kvm.uapi import Cap
from vmonty.kvm.uapi.flags import KVM_COALESCED_MMIO_PAGE_OFFSET

KVM_MAX_VCPUS = 1024
KVM_MAX_VCPU_IDS = 4096
RECOMMENDED_VCPUS = 8

CAPABILITIES: dict[Cap, int] = {
    Cap.IRQCHIP: 1,
    Cap.HLT: 1,
    Cap.USER_MEMORY: 1,
    Cap.DESTROY_MEMORY_REGION_WORKS: 1,
    Cap.JOIN_MEMORY_REGIONS_WORKS: 1,
    Cap.SET_TSS_ADDR: 1,
    Cap.SET_IDENTITY_MAP_ADDR: 1,
    Cap.EXT_CPUID: 1,
    Cap.NR_VCPUS: RECOMMENDED_VCPUS,
    Cap.MAX_VCPUS: KVM_MAX_VCPUS,
    Cap.MAX_VCPU_ID: KVM_MAX_VCPU_IDS,
    Cap.NR_MEMSLOTS: KVM_USER_MEM_SLOTS,
    Cap.READONLY_MEM: 1,
    Cap.PIT: 1,
    Cap.PIT2: 1,
    Cap.PIT_STATE2: 1,
    Cap.REINJECT_CONTROL: 1,
    Cap.NOP_IO_DELAY: 1,
    Cap.MP_STATE: 1,
    Cap.COALESCED_MMIO: KVM_COALESCED_MMIO_PAGE_OFFSET,
    Cap.COALESCED_PIO: 1,
    Cap.SYNC_MMU: 1,
    Cap.USER_NMI: 1,
    Cap.IRQ_ROUTING: 1,
    Cap.IRQ_INJECT_STATUS: 1,
    Cap.IRQFD: 1,
    Cap.IRQFD_RESAMPLE: 1,
    Cap.IOEVENTFD: 1,
    Cap.IOEVENTFD_NO_LENGTH: 1,
    Cap.IOEVENTFD_ANY_LENGTH: 1,
    Cap.SIGNAL_MSI: 1,
    Cap.VCPU_EVENTS: 1,
    Cap.DEBUGREGS: 1,
    Cap.XSAVE: 1,
    Cap.XCRS: 1,
    Cap.GET_TSC_KHZ: 1,
    Cap.TSC_DEADLINE_TIMER: 1,
    Cap.SET_BOOT_CPU_ID: 1,
    Cap.INTR_SHADOW: 1,
    Cap.IMMEDIATE_EXIT: 1,
    Cap.CHECK_EXTENSION_VM: 1,
    Cap.INTERNAL_ERROR_DATA: 1,
    Cap.SREGS2: 1,
    Cap.MCE: 32,
    Cap.CLOCKSOURCE: 1,
    Cap.KVMCLOCK_CTRL: 1,
    Cap.ADJUST_CLOCK: 14,
    Cap.SYNC_REGS: 7,
    Cap.ENABLE_CAP: 1,
    Cap.ENABLE_CAP_VM: 1,
    Cap.MMU_SHADOW_CACHE_CONTROL: 1,
    Cap.IOAPIC_POLARITY_IGNORED: 1,
}
