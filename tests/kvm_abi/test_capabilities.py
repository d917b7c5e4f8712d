"""KVM_CHECK_EXTENSION tells the truth: what it offers is used here, capability by capability.

This is about whether a thing is there at all; what it does in detail is each subject's own test.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import pytest

from vmonty.base.ram import Ram
from vmonty.kvm.api import System, Vcpu, Vm
from vmonty.kvm.uapi import Cap, Exit, Requests, flags
from vmonty.kvm.uapi.irq import kvm_irq_routing_entry
from vmonty.kvm.uapi.vm import kvm_pre_fault_memory
from vmonty.testing.guests import DATA, HIGH_MMIO, RAM_SIZE, Mode, TinyGuest

MSI_ADDRESS = 0xFEE00000


@dataclass
class Parts:
    """A VM with RAM, and what a use of it asks for: made when it is first needed."""

    system: System
    vm: Vm
    value: int
    ram: Ram = field(default_factory=lambda: Ram(RAM_SIZE))
    made: list[Vcpu] = field(default_factory=list)

    def chips(self) -> Vm:
        self.vm.create_irqchip()
        return self.vm

    def vcpu(self) -> Vcpu:
        if not self.made:
            self.vm.set_user_memory_region(0, 0, self.ram)
            self.made.append(self.vm.create_vcpu())
        return self.made[0]

    def guest(self, source: str, mode: Mode = Mode.LONG) -> TinyGuest:
        return TinyGuest(self.vm, self.vcpu(), self.ram).load(mode, source)

    def enable(self, cap: Cap, argument: int = 1) -> None:
        self.vm.enable_cap(cap, argument)


USES: dict[Cap, Callable[[Parts], object]] = {}
Use = Callable[[Parts], object]


def uses(*caps: Cap) -> Callable[[Use], Use]:
    """The function uses these."""

    def note(use: Use) -> Use:
        USES.update(dict.fromkeys(caps, use))
        return use

    return note


def enabled(cap: Cap, argument: int = 1) -> None:
    """To be able to enable it is what it offers."""
    USES[cap] = lambda parts: parts.enable(cap, argument)


for capability, most in (
    (Cap.X86_USER_SPACE_MSR, flags.KVM_MSR_EXIT_REASON_VALID_MASK), (Cap.EXCEPTION_PAYLOAD, 1), (Cap.SPLIT_IRQCHIP, 24),
    (Cap.HALT_POLL, 0), (Cap.EXIT_ON_EMULATION_FAILURE, 1),
    (Cap.X86_TRIPLE_FAULT_EVENT, 1), (Cap.DISABLE_QUIRKS, 1), (Cap.DIRTY_LOG_RING, 4096),
    (Cap.DIRTY_LOG_RING_ACQ_REL, 4096),
):  # fmt: skip
    enabled(capability, most)


@uses(Cap.MANUAL_DIRTY_LOG_PROTECT2, Cap.X2APIC_API, Cap.DISABLE_QUIRKS2, Cap.X86_DISABLE_EXITS, Cap.EXIT_HYPERCALL)
def all_bits(parts: Parts) -> None:
    """The number is a mask of what can be enabled."""


@uses(Cap.ENABLE_CAP, Cap.ENABLE_CAP_VM)
def enable_cap(parts: Parts) -> None:
    parts.enable(Cap.HALT_POLL, 0)


@uses(Cap.IRQCHIP, Cap.IRQ_INJECT_STATUS, Cap.NOP_IO_DELAY)
def irqchip(parts: Parts) -> None:
    vm = parts.chips()
    vm.get_irqchip(0)
    vm.irq_line(3, 1)
    vm.irq_line_status(3, 0)


@uses(Cap.HLT)
def halt(parts: Parts) -> None:
    assert parts.guest("hlt").run() is Exit.HLT


@uses(Cap.USER_MEMORY, Cap.DESTROY_MEMORY_REGION_WORKS, Cap.JOIN_MEMORY_REGIONS_WORKS, Cap.SYNC_MMU)
def memory(parts: Parts) -> None:
    """Two slots become one, and the host's writes are seen."""
    guest = parts.guest(f"again: mov eax, [abs {DATA}]\n out 0x10, eax\n jmp again")
    half = RAM_SIZE // 2
    parts.vm.set_user_memory_region(0, 0, None)
    parts.vm.set_user_memory_region(0, 0, parts.ram, size=half)
    parts.vm.set_user_memory_region(1, half, parts.ram, offset=half)
    for slot in (0, 1):
        parts.vm.set_user_memory_region(slot, 0, None)
    parts.vm.set_user_memory_region(0, 0, parts.ram)
    for value in (1, 2):
        parts.ram.write_u32(DATA, value)
        assert guest.out() == (0x10, value)


@uses(Cap.USER_MEMORY2)
def memory2(parts: Parts) -> None:
    parts.vm.set_user_memory_region2(0, 0, parts.ram)


@uses(Cap.READONLY_MEM)
def read_only(parts: Parts) -> None:
    parts.vm.set_user_memory_region(1, 1 << 24, Ram(4096), flags=flags.KVM_MEM_READONLY)
    assert parts.guest(f"mov ebx, {1 << 24}\n mov al, [rbx]\n mov [rbx], al").run() is Exit.MMIO


@uses(Cap.NR_MEMSLOTS, Cap.MULTI_ADDRESS_SPACE)
def slots(parts: Parts) -> None:
    last = parts.system.check_extension(Cap.NR_MEMSLOTS) - 1
    parts.vm.set_user_memory_region(last, 0, parts.ram)


@uses(Cap.SET_TSS_ADDR, Cap.SET_IDENTITY_MAP_ADDR)
def addresses(parts: Parts) -> None:
    parts.vm.set_identity_map_addr(0xFFFBC000)
    parts.vm.set_tss_addr(0xFFFBD000)


@uses(Cap.EXT_CPUID, Cap.EXT_EMUL_CPUID)
def cpuid(parts: Parts) -> None:
    parts.system.emulated_cpuid()
    parts.vcpu().set_cpuid2(parts.system.supported_cpuid())


@uses(Cap.NR_VCPUS, Cap.MAX_VCPUS)
def vcpus(parts: Parts) -> None:
    count = min(parts.value, 16)
    made = [parts.vm.create_vcpu(number) for number in range(count)]
    for vcpu in made:
        vcpu.close()


@uses(Cap.MAX_VCPU_ID)
def highest_id(parts: Parts) -> None:
    parts.vm.create_vcpu(parts.value - 1).close()


@uses(Cap.PIT, Cap.PIT2, Cap.PIT_STATE2, Cap.REINJECT_CONTROL)
def pit(parts: Parts) -> None:
    vm = parts.chips()
    vm.create_pit2()
    vm.set_pit2(vm.get_pit2())
    vm.reinject_control(False)


@uses(Cap.MP_STATE, Cap.VCPU_EVENTS, Cap.DEBUGREGS, Cap.XSAVE, Cap.XSAVE2, Cap.XCRS, Cap.INTR_SHADOW, Cap.SREGS2)
def state(parts: Parts) -> None:
    parts.chips()
    vcpu = parts.vcpu()
    vcpu.set_mp_state(vcpu.get_mp_state())
    events = vcpu.get_vcpu_events()
    assert events.flags & flags.KVM_VCPUEVENT_VALID_SHADOW
    vcpu.set_vcpu_events(events)
    vcpu.set_debugregs(vcpu.get_debugregs())
    vcpu.set_xcrs(vcpu.get_xcrs())
    vcpu.set_xsave(vcpu.get_xsave())
    if size := parts.vm.check_extension(Cap.XSAVE2):
        assert vcpu.get_xsave2(size)[:4096] == bytes(vcpu.get_xsave())
    if parts.system.check_extension(Cap.SREGS2):
        vcpu.set_sregs2(vcpu.get_sregs2())


@uses(Cap.COALESCED_MMIO, Cap.COALESCED_PIO)
def coalesced(parts: Parts) -> None:
    """The number is the ring's page."""
    vm = parts.vm
    vm.register_coalesced_mmio(HIGH_MMIO, 8)
    if vm.check_extension(Cap.COALESCED_PIO):
        vm.register_coalesced_mmio(0x10, 1, pio=True)
    guest = parts.guest(f"mov ebx, {HIGH_MMIO}\n mov [rbx], al\n out 0x20, al")
    assert guest.out()[0] == 0x20
    assert [one[0] for one in guest.vcpu.drain_coalesced_mmio()] == [HIGH_MMIO]
    assert guest.vcpu.kvm_run is not None


@uses(Cap.USER_NMI)
def nmi(parts: Parts) -> None:
    parts.vcpu().nmi()


@uses(Cap.IRQ_ROUTING, Cap.IOAPIC_POLARITY_IGNORED)
def routing(parts: Parts) -> None:
    entry = kvm_irq_routing_entry(gsi=5, type=flags.KVM_IRQ_ROUTING_IRQCHIP)
    entry.u.irqchip.irqchip, entry.u.irqchip.pin = flags.KVM_IRQCHIP_IOAPIC, 7
    parts.chips().set_gsi_routing([entry])


@uses(Cap.IRQFD, Cap.IRQFD_RESAMPLE)
def irqfd(parts: Parts) -> None:
    vm = parts.chips()
    first, second = os.eventfd(0), os.eventfd(0)
    try:
        vm.irqfd(first, 5, resamplefd=second if vm.check_extension(Cap.IRQFD_RESAMPLE) else None)
        vm.irqfd(first, 5, deassign=True)
    finally:
        os.close(first)
        os.close(second)


@uses(Cap.IOEVENTFD, Cap.IOEVENTFD_ANY_LENGTH, Cap.IOEVENTFD_NO_LENGTH)
def ioeventfd(parts: Parts) -> None:
    bell = os.eventfd(0)
    try:
        parts.vm.ioeventfd(bell, HIGH_MMIO, 0 if parts.vm.check_extension(Cap.IOEVENTFD_ANY_LENGTH) else 4)
        assert parts.guest(f"mov ebx, {HIGH_MMIO}\n mov [rbx], eax\n out 0x20, al").out()[0] == 0x20
        assert os.eventfd_read(bell) == 1
    finally:
        os.close(bell)


@uses(Cap.SIGNAL_MSI)
def message(parts: Parts) -> None:
    parts.chips()
    parts.vcpu()
    parts.vm.signal_msi(MSI_ADDRESS, 0x40)


@uses(Cap.GET_TSC_KHZ, Cap.TSC_CONTROL, Cap.VM_TSC_CONTROL)
def tsc(parts: Parts) -> None:
    if parts.system.check_extension(Cap.VM_TSC_CONTROL):
        parts.vm.set_tsc_khz(2_000_000)
    vcpu = parts.vcpu()
    if parts.system.check_extension(Cap.TSC_CONTROL):
        vcpu.set_tsc_khz(1_000_000)
        assert vcpu.get_tsc_khz() == 1_000_000
    assert vcpu.get_tsc_khz() > 0


@uses(Cap.PRE_FAULT_MEMORY)
def pre_fault(parts: Parts) -> None:
    request = kvm_pre_fault_memory(gpa=0, size=4096)
    parts.vcpu().ioctl(Requests.KVM_PRE_FAULT_MEMORY, request)
    assert request.size == 0


@uses(Cap.TSC_DEADLINE_TIMER)
def deadline(parts: Parts) -> None:
    parts.chips()
    vcpu = parts.vcpu()
    vcpu.set_cpuid2([*parts.system.supported_cpuid()])
    assert 0x6E0 in vcpu.get_msrs([0x6E0])


@uses(Cap.SET_BOOT_CPU_ID)
def boot_cpu(parts: Parts) -> None:
    parts.vm.set_boot_cpu_id(1)


@uses(Cap.IMMEDIATE_EXIT)
def immediate_exit(parts: Parts) -> None:
    guest = parts.guest("again: jmp again")
    guest.vcpu.kvm_run.immediate_exit = 1
    assert guest.run() is Exit.INTR


@uses(Cap.CHECK_EXTENSION_VM)
def check_on_vm(parts: Parts) -> None:
    assert parts.vm.check_extension(Cap.USER_MEMORY) == 1


@uses(Cap.INTERNAL_ERROR_DATA, Cap.MEMORY_FAULT_INFO)
def told_with_errors(parts: Parts) -> None:
    """What they add to kvm_run: test_exits and test_memory_fault."""


@uses(Cap.MCE)
def machine_check(parts: Parts) -> None:
    """The number is that of banks."""
    parts.vcpu().setup_mce(parts.value)


@uses(Cap.CLOCKSOURCE, Cap.KVMCLOCK_CTRL, Cap.ADJUST_CLOCK)
def clock(parts: Parts) -> None:
    now = parts.vm.get_clock()
    assert not now.flags & ~parts.system.check_extension(Cap.ADJUST_CLOCK)
    parts.vm.set_clock(now.clock + 1_000_000)
    vcpu = parts.vcpu()
    assert vcpu.set_msrs({flags.MSR_KVM_SYSTEM_TIME_NEW: DATA | 1}) == 1
    vcpu.kvmclock_ctrl()


@uses(Cap.STEAL_TIME)
def steal_time(parts: Parts) -> None:
    assert parts.vcpu().set_msrs({flags.MSR_KVM_STEAL_TIME: DATA | 1}) == 1


@uses(Cap.ASYNC_PF, Cap.ASYNC_PF_INT)
def async_pf(parts: Parts) -> None:
    """Faults themselves: test_async_pf."""
    assert parts.vcpu().set_msrs({flags.MSR_KVM_ASYNC_PF_EN: 0}) == 1


@uses(Cap.ENFORCE_PV_FEATURE_CPUID)
def enforced(parts: Parts) -> None:
    parts.vcpu().enable_cap(Cap.ENFORCE_PV_FEATURE_CPUID, 1)


@uses(Cap.SYNC_REGS)
def sync_regs(parts: Parts) -> None:
    guest = parts.guest("mov ebx, 77\n out 0x10, al")
    guest.vcpu.kvm_run.kvm_valid_regs = parts.value
    guest.out()
    assert guest.vcpu.kvm_run.s.regs.regs.rbx == 77


@uses(Cap.MMU_SHADOW_CACHE_CONTROL)
def mmu_pages(parts: Parts) -> None:
    parts.vm.set_nr_mmu_pages(128)  # newer kernels don't tell it any more


@uses(Cap.BINARY_STATS_FD)
def statistics(parts: Parts) -> None:
    with closing(parts.vm.stats()), closing(parts.vcpu().stats()) as stats:
        assert "exits" in stats.read()


@uses(Cap.X86_MSR_FILTER)
def msr_filter(parts: Parts) -> None:
    parts.vm.set_msr_filter([])


@uses(Cap.X86_APIC_BUS_CYCLES_NS)
def bus_cycles(parts: Parts) -> None:
    parts.chips()
    parts.enable(Cap.X86_APIC_BUS_CYCLES_NS, 10)


@uses(Cap.GET_MSR_FEATURES)
def feature_msrs(parts: Parts) -> None:
    assert parts.system.feature_msrs(parts.system.msr_feature_index_list()[:1])


@uses(Cap.VCPU_ATTRIBUTES)
def vcpu_attributes(parts: Parts) -> None:
    assert parts.vcpu().has_device_attr(flags.KVM_VCPU_TSC_CTRL, flags.KVM_VCPU_TSC_OFFSET)


@uses(Cap.VAPIC)
def vapic(parts: Parts) -> None:
    parts.chips()
    parts.vcpu().tpr_access_reporting(True)
    parts.vcpu().set_vapic_addr(DATA)


@uses(Cap.SET_GUEST_DEBUG, Cap.SET_GUEST_DEBUG2)
def guest_debug(parts: Parts) -> None:
    guest = parts.guest("nop\n nop")
    guest.vcpu.set_guest_debug(flags.KVM_GUESTDBG_ENABLE | flags.KVM_GUESTDBG_SINGLESTEP)
    assert guest.run() is Exit.DEBUG


@uses(Cap.PMU_EVENT_FILTER, Cap.PMU_EVENT_MASKED_EVENTS)
def pmu_filter(parts: Parts) -> None:
    parts.vm.set_pmu_event_filter([])


@uses(Cap.VM_TYPES)
def vm_types(parts: Parts) -> None:
    """The number has a bit for each."""
    for kind in range(parts.value.bit_length()):
        if parts.value >> kind & 1:
            parts.system.create_vm(kind).close()


@uses(Cap.VM_GPA_BITS)
def address_bits(parts: Parts) -> None:
    parts.vm.set_user_memory_region(1, (1 << parts.value) - 4096, Ram(4096))


MASKS = (Cap.MANUAL_DIRTY_LOG_PROTECT2, Cap.X2APIC_API, Cap.DISABLE_QUIRKS2, Cap.X86_DISABLE_EXITS, Cap.EXIT_HYPERCALL)


@pytest.mark.parametrize("cap", USES, ids=lambda cap: cap.name)
def test_what_is_offered_can_be_used(system: System, cap: Cap) -> None:
    with system.create_vm() as vm:
        value = vm.check_extension(cap)
        if value <= 0:
            pytest.skip(f"this KVM has no KVM_CAP_{cap.name}")
        parts = Parts(system, vm, value)
        try:
            if cap in MASKS:
                parts.enable(cap, value)
            USES[cap](parts)
        finally:
            for vcpu in parts.made:
                vcpu.close()


def test_every_capability_of_soft_is_used(system: System) -> None:
    if not system.provider.name.startswith("soft"):
        pytest.skip("a kernel may have capabilities that are not known here")
    offered: dict[Cap, Any] = system.capabilities()
    assert {cap.name for cap in offered} - {cap.name for cap in USES} == set()
