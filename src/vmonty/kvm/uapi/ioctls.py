"""The ioctls of /dev/kvm and of the files made from it: linux/kvm.h, asm-generic/ioctl.h.

Each constant is an int, the request number, that also knows its name and the layout of its argument:

     31   30 29                16 15          8 7           0
    ┌───────┬────────────────────┬─────────────┬─────────────┐
    │ R  W  │ size of argument   │ 0xAE        │ nr          │
    └───────┴────────────────────┴─────────────┴─────────────┘
"""

from __future__ import annotations

import ctypes
from typing import Any

from vmonty.kvm.uapi import irq, legacy, nested, run, vcpu, vm, xen_hyperv

KVMIO = 0xAE
_WRITE, _READ = 1, 2


class Ioctl(int):
    """A request number with its *name* (as in linux/kvm.h) and *argument* (a ctypes type, or None)."""

    name: str
    argument: type[Any] | None

    def __new__(cls, direction: int, nr: int, argument: type[Any] | None) -> Ioctl:
        size = ctypes.sizeof(argument) if argument is not None else 0
        self = super().__new__(cls, direction << 30 | size << 16 | KVMIO << 8 | nr)
        self.argument = argument
        return self

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name

    @property
    def size(self) -> int:
        """Bytes that the kernel copies from or to the argument (without a flexible array's elements)."""
        return (self >> 16) & 0x3FFF


def _io(nr: int) -> Ioctl:
    return Ioctl(0, nr, None)


def _iow(nr: int, argument: type[Any]) -> Ioctl:
    return Ioctl(_WRITE, nr, argument)


def _ior(nr: int, argument: type[Any]) -> Ioctl:
    return Ioctl(_READ, nr, argument)


def _iowr(nr: int, argument: type[Any]) -> Ioctl:
    return Ioctl(_READ | _WRITE, nr, argument)


_u32, _u64 = ctypes.c_uint32, ctypes.c_uint64


class Requests:
    """Every x86 request of linux/kvm.h, in the order of the header's numbers."""

    KVM_GET_API_VERSION = _io(0x00)
    KVM_CREATE_VM = _io(0x01)
    KVM_GET_MSR_INDEX_LIST = _iowr(0x02, vm.kvm_msr_list)
    KVM_CHECK_EXTENSION = _io(0x03)
    KVM_GET_VCPU_MMAP_SIZE = _io(0x04)
    KVM_GET_SUPPORTED_CPUID = _iowr(0x05, vcpu.kvm_cpuid2)
    KVM_GET_EMULATED_CPUID = _iowr(0x09, vcpu.kvm_cpuid2)
    KVM_GET_MSR_FEATURE_INDEX_LIST = _iowr(0x0A, vm.kvm_msr_list)
    KVM_SET_MEMORY_REGION = _iow(0x40, legacy.kvm_memory_region)
    KVM_CREATE_VCPU = _io(0x41)
    KVM_GET_DIRTY_LOG = _iow(0x42, vm.kvm_dirty_log)
    KVM_SET_MEMORY_ALIAS = _iow(0x43, legacy.kvm_memory_alias)
    KVM_SET_NR_MMU_PAGES = _io(0x44)
    KVM_GET_NR_MMU_PAGES = _io(0x45)
    KVM_SET_USER_MEMORY_REGION = _iow(0x46, vm.kvm_userspace_memory_region)
    KVM_SET_TSS_ADDR = _io(0x47)
    KVM_SET_IDENTITY_MAP_ADDR = _iow(0x48, _u64)
    KVM_SET_USER_MEMORY_REGION2 = _iow(0x49, vm.kvm_userspace_memory_region2)
    KVM_CREATE_IRQCHIP = _io(0x60)
    KVM_IRQ_LINE = _iow(0x61, irq.kvm_irq_level)
    KVM_GET_IRQCHIP = _iowr(0x62, irq.kvm_irqchip)
    KVM_SET_IRQCHIP = _ior(0x63, irq.kvm_irqchip)
    KVM_CREATE_PIT = _io(0x64)
    KVM_GET_PIT = _iowr(0x65, irq.kvm_pit_state)
    KVM_SET_PIT = _ior(0x66, irq.kvm_pit_state)
    KVM_IRQ_LINE_STATUS = _iowr(0x67, irq.kvm_irq_level)
    KVM_REGISTER_COALESCED_MMIO = _iow(0x67, run.kvm_coalesced_mmio_zone)
    KVM_UNREGISTER_COALESCED_MMIO = _iow(0x68, run.kvm_coalesced_mmio_zone)
    KVM_ASSIGN_PCI_DEVICE = _ior(0x69, legacy.kvm_assigned_pci_dev)
    KVM_SET_GSI_ROUTING = _iow(0x6A, irq.kvm_irq_routing)
    KVM_ASSIGN_DEV_IRQ = _iow(0x70, legacy.kvm_assigned_irq)
    KVM_REINJECT_CONTROL = _io(0x71)
    KVM_DEASSIGN_PCI_DEVICE = _iow(0x72, legacy.kvm_assigned_pci_dev)
    KVM_ASSIGN_SET_MSIX_NR = _iow(0x73, legacy.kvm_assigned_msix_nr)
    KVM_ASSIGN_SET_MSIX_ENTRY = _iow(0x74, legacy.kvm_assigned_msix_entry)
    KVM_DEASSIGN_DEV_IRQ = _iow(0x75, legacy.kvm_assigned_irq)
    KVM_IRQFD = _iow(0x76, irq.kvm_irqfd)
    KVM_CREATE_PIT2 = _iow(0x77, irq.kvm_pit_config)
    KVM_SET_BOOT_CPU_ID = _io(0x78)
    KVM_IOEVENTFD = _iow(0x79, irq.kvm_ioeventfd)
    KVM_XEN_HVM_CONFIG = _iow(0x7A, xen_hyperv.kvm_xen_hvm_config)
    KVM_SET_CLOCK = _iow(0x7B, vm.kvm_clock_data)
    KVM_GET_CLOCK = _ior(0x7C, vm.kvm_clock_data)
    KVM_RUN = _io(0x80)
    KVM_GET_REGS = _ior(0x81, vcpu.kvm_regs)
    KVM_SET_REGS = _iow(0x82, vcpu.kvm_regs)
    KVM_GET_SREGS = _ior(0x83, vcpu.kvm_sregs)
    KVM_SET_SREGS = _iow(0x84, vcpu.kvm_sregs)
    KVM_TRANSLATE = _iowr(0x85, vcpu.kvm_translation)
    KVM_INTERRUPT = _iow(0x86, vcpu.kvm_interrupt)
    KVM_GET_MSRS = _iowr(0x88, vcpu.kvm_msrs)
    KVM_SET_MSRS = _iow(0x89, vcpu.kvm_msrs)
    KVM_SET_CPUID = _iow(0x8A, vcpu.kvm_cpuid)
    KVM_SET_SIGNAL_MASK = _iow(0x8B, vcpu.kvm_signal_mask)
    KVM_GET_FPU = _ior(0x8C, vcpu.kvm_fpu)
    KVM_SET_FPU = _iow(0x8D, vcpu.kvm_fpu)
    KVM_GET_LAPIC = _ior(0x8E, irq.kvm_lapic_state)
    KVM_SET_LAPIC = _iow(0x8F, irq.kvm_lapic_state)
    KVM_SET_CPUID2 = _iow(0x90, vcpu.kvm_cpuid2)
    KVM_GET_CPUID2 = _iowr(0x91, vcpu.kvm_cpuid2)
    KVM_TPR_ACCESS_REPORTING = _iowr(0x92, vcpu.kvm_tpr_access_ctl)
    KVM_SET_VAPIC_ADDR = _iow(0x93, irq.kvm_vapic_addr)
    KVM_GET_MP_STATE = _ior(0x98, vcpu.kvm_mp_state)
    KVM_SET_MP_STATE = _iow(0x99, vcpu.kvm_mp_state)
    KVM_NMI = _io(0x9A)
    KVM_SET_GUEST_DEBUG = _iow(0x9B, vcpu.kvm_guest_debug)
    KVM_X86_SETUP_MCE = _iow(0x9C, _u64)
    KVM_X86_GET_MCE_CAP_SUPPORTED = _ior(0x9D, _u64)
    KVM_X86_SET_MCE = _iow(0x9E, vcpu.kvm_x86_mce)
    KVM_GET_PIT2 = _ior(0x9F, irq.kvm_pit_state2)
    KVM_GET_VCPU_EVENTS = _ior(0x9F, vcpu.kvm_vcpu_events)
    KVM_SET_PIT2 = _iow(0xA0, irq.kvm_pit_state2)
    KVM_SET_VCPU_EVENTS = _iow(0xA0, vcpu.kvm_vcpu_events)
    KVM_GET_DEBUGREGS = _ior(0xA1, vcpu.kvm_debugregs)
    KVM_SET_DEBUGREGS = _iow(0xA2, vcpu.kvm_debugregs)
    KVM_SET_TSC_KHZ = _io(0xA2)
    KVM_ENABLE_CAP = _iow(0xA3, vm.kvm_enable_cap)
    KVM_GET_TSC_KHZ = _io(0xA3)
    KVM_ASSIGN_SET_INTX_MASK = _iow(0xA4, legacy.kvm_assigned_pci_dev)
    KVM_GET_XSAVE = _ior(0xA4, vcpu.kvm_xsave)
    KVM_SET_XSAVE = _iow(0xA5, vcpu.kvm_xsave)
    KVM_SIGNAL_MSI = _iow(0xA5, irq.kvm_msi)
    KVM_GET_XCRS = _ior(0xA6, vcpu.kvm_xcrs)
    KVM_SET_XCRS = _iow(0xA7, vcpu.kvm_xcrs)
    KVM_GET_ONE_REG = _iow(0xAB, vcpu.kvm_one_reg)
    KVM_SET_ONE_REG = _iow(0xAC, vcpu.kvm_one_reg)
    KVM_KVMCLOCK_CTRL = _io(0xAD)
    KVM_GET_REG_LIST = _iowr(0xB0, vcpu.kvm_reg_list)
    KVM_SET_PMU_EVENT_FILTER = _iow(0xB2, vm.kvm_pmu_event_filter)
    KVM_SMI = _io(0xB7)
    KVM_MEMORY_ENCRYPT_OP = _iowr(0xBA, _u64)
    KVM_MEMORY_ENCRYPT_REG_REGION = _ior(0xBB, vm.kvm_enc_region)
    KVM_MEMORY_ENCRYPT_UNREG_REGION = _ior(0xBC, vm.kvm_enc_region)
    KVM_HYPERV_EVENTFD = _iow(0xBD, xen_hyperv.kvm_hyperv_eventfd)
    KVM_GET_NESTED_STATE = _iowr(0xBE, nested.kvm_nested_state)
    KVM_SET_NESTED_STATE = _iow(0xBF, nested.kvm_nested_state)
    KVM_CLEAR_DIRTY_LOG = _iowr(0xC0, vm.kvm_clear_dirty_log)
    KVM_GET_SUPPORTED_HV_CPUID = _iowr(0xC1, vcpu.kvm_cpuid2)
    KVM_X86_SET_MSR_FILTER = _iow(0xC6, vm.kvm_msr_filter)
    KVM_RESET_DIRTY_RINGS = _io(0xC7)
    KVM_XEN_HVM_GET_ATTR = _iowr(0xC8, xen_hyperv.kvm_xen_hvm_attr)
    KVM_XEN_HVM_SET_ATTR = _iow(0xC9, xen_hyperv.kvm_xen_hvm_attr)
    KVM_XEN_VCPU_GET_ATTR = _iowr(0xCA, xen_hyperv.kvm_xen_vcpu_attr)
    KVM_XEN_VCPU_SET_ATTR = _iow(0xCB, xen_hyperv.kvm_xen_vcpu_attr)
    KVM_GET_SREGS2 = _ior(0xCC, vcpu.kvm_sregs2)
    KVM_SET_SREGS2 = _iow(0xCD, vcpu.kvm_sregs2)
    KVM_GET_STATS_FD = _io(0xCE)
    KVM_GET_XSAVE2 = _ior(0xCF, vcpu.kvm_xsave)
    KVM_XEN_HVM_EVTCHN_SEND = _iow(0xD0, irq.kvm_irq_routing_xen_evtchn)
    KVM_SET_MEMORY_ATTRIBUTES = _iow(0xD2, vm.kvm_memory_attributes)
    KVM_CREATE_GUEST_MEMFD = _iowr(0xD4, vm.kvm_create_guest_memfd)
    KVM_PRE_FAULT_MEMORY = _iowr(0xD5, vm.kvm_pre_fault_memory)
    KVM_CREATE_DEVICE = _iowr(0xE0, vm.kvm_create_device)
    KVM_SET_DEVICE_ATTR = _iow(0xE1, vm.kvm_device_attr)
    KVM_GET_DEVICE_ATTR = _iow(0xE2, vm.kvm_device_attr)
    KVM_HAS_DEVICE_ATTR = _iow(0xE3, vm.kvm_device_attr)


NAMES: dict[int, str] = {}
for _name, _request in vars(Requests).items():
    if isinstance(_request, Ioctl):
        NAMES.setdefault(int(_request), _name)


def name_of(request: int) -> str:
    """The header's name of *request*, or its number in hexadecimal."""
    return request.name if isinstance(request, Ioctl) else NAMES.get(request, f"ioctl {request:#x}")
