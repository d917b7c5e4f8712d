"""What a vCPU consists of, for the modules that each handle a part of it; and what a vendor module must do."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple, Protocol

from vmonty.kvm.soft.cpuid import CR4_VALID, EFER_VALID, XCR0_VALID
from vmonty.kvm.soft.files import KvmFile
from vmonty.kvm.soft.memslots import PAGE_SHIFT
from vmonty.kvm.soft.mmu.tdp import NO_SLOT
from vmonty.kvm.soft.msr_table import StoredMsrs
from vmonty.kvm.soft.pv import Paravirt
from vmonty.kvm.soft.stats import VCPU_STATISTICS, Statistics
from vmonty.kvm.soft.vcpu_arch import VcpuArch
from vmonty.kvm.uapi import flags
from vmonty.kvm.uapi.run import kvm_run
from vmonty.kvm.uapi.vcpu import kvm_cpuid_entry2, kvm_segment, kvm_vcpu_events

if TYPE_CHECKING:
    from vmonty.kvm.soft.kvm_main import Kvm
    from vmonty.kvm.soft.lapic import Lapic
    from vmonty.kvm.soft.pcpu import PhysicalCpu
    from vmonty.kvm.soft.pvclock import PvClock


DB_VECTOR, PF_VECTOR = 1, 14
DR6_TRAPS, DR6_BS, DR6_RTM = 0xF, 1 << 14, 1 << 16
RFLAGS_TF = 1 << 8
# More pages of devices than machines have.
MOST_MMIO_PAGES = 256


class QueuedException(NamedTuple):
    """An exception to inject: its vector, error code (None: it has none), and payload (#PF: CR2, #DB: DR6).

    Not *pending*: its delivery was begun and goes on. A payload of None is in its register already.
    """

    vector: int
    error_code: int | None = None
    payload: int | None = None
    pending: bool = True


class KvmX86Ops(Protocol):
    """struct kvm_x86_ops, as far as a vCPU is concerned: one filling for VMX, one for SVM.

    Register state is that of the guest between two runs. Numbers of general registers are the processor's.
    ``host_had_control``: user space ran, and may have written (with *wrote*: has probably written) code.
    """

    name: str

    @property
    def pcpu(self) -> PhysicalCpu | None: ...
    # Exits need Python while the processor's virtual-8086 mode is the guest's real mode.
    @property
    def vm86_active(self) -> bool: ...
    # The shadow MMU, None with two-dimensional paging.
    @property
    def shadow(self) -> object | None: ...
    def load(self, pcpu: PhysicalCpu) -> None: ...
    def store(self) -> None: ...
    def preempt(self) -> None: ...

    # Exit reasons by the vendor's numbers.
    exit_names: dict[int, str]

    def exit_info(self) -> tuple[int, int]: ...
    def exit_details(self) -> tuple[int, ...]: ...
    def dump(self) -> dict[str, int]: ...
    def host_had_control(self, wrote: bool = False) -> None: ...
    def get_gpr(self, number: int) -> int: ...
    def set_gpr(self, number: int, value: int) -> None: ...
    def get_rip(self) -> int: ...
    def set_rip(self, value: int) -> None: ...
    def get_rflags(self) -> int: ...
    def set_rflags(self, value: int) -> None: ...
    def get_cpl(self) -> int: ...
    def get_segment(self, name: str) -> kvm_segment: ...
    def set_segment(self, name: str, segment: kvm_segment) -> None: ...
    def get_table(self, name: str) -> tuple[int, int]: ...
    def set_table(self, name: str, base: int, limit: int) -> None: ...
    def get_control(self, name: str) -> int: ...
    def set_control(self, name: str, value: int) -> None: ...
    def valid_controls(self, cr0: int, cr4: int, efer: int) -> bool: ...
    def valid_cr3(self, cr3: int) -> bool: ...
    def state_loaded(self) -> None: ...
    def mmu_load(self) -> None: ...
    def mmu_ready(self) -> bool: ...
    def get_debug(self, number: int) -> int: ...
    def set_debug(self, number: int, value: int) -> None: ...
    def get_xsave(self) -> bytes: ...
    def set_xsave(self, area: bytes) -> None: ...
    def get_msr(self, index: int) -> int | None: ...
    def set_msr(self, index: int, value: int) -> bool: ...
    def lapic_created(self, page: int) -> None: ...
    def set_tsc_offset(self, offset: int) -> None: ...
    def set_tsc_multiplier(self, ratio: int) -> None: ...
    def set_cpuid(self, entries: list[kvm_cpuid_entry2]) -> None: ...
    def interrupt_allowed(self) -> bool: ...
    def nmi_allowed(self) -> bool: ...
    def get_interrupt_shadow(self) -> int: ...
    def set_interrupt_shadow(self, bits: int) -> None: ...
    def get_nmi_mask(self) -> bool: ...
    def set_nmi_mask(self, masked: bool) -> None: ...
    def enable_irq_window(self) -> None: ...
    def enable_nmi_window(self) -> None: ...
    def inject_irq(self, vector: int) -> None: ...
    def inject_nmi(self) -> None: ...
    def inject_exception(self, exception: QueuedException) -> None: ...
    def flush_tlb(self) -> None: ...
    def update_guest_debug(self, registers: list[int] | None) -> None: ...
    def msr_filter_changed(self) -> None: ...
    def gva_to_gpa(self, linear: int) -> int | None: ...
    def run(self) -> None: ...
    def after_reentry(self) -> None: ...
    def complete_in(self, data: bytes) -> bool: ...
    def complete_load(self, gpa: int, data: bytes) -> bool: ...
    def handle_exit(self) -> bool: ...
    def kick(self) -> None: ...
    def reset(self, init: bool) -> None: ...
    def destroy(self) -> None: ...


class VcpuState(KvmFile):
    """struct kvm_vcpu and kvm_vcpu_arch."""

    vendor: KvmX86Ops
    run: kvm_run
    page: memoryview

    def __init__(self, kvm: Kvm, vcpu_id: int) -> None:
        self.kvm = kvm
        self.vcpu_id = vcpu_id
        self.stats = Statistics(VCPU_STATISTICS, f"kvm-{os.getpid()}/vcpu-{vcpu_id}")
        self.apic: Lapic | None = None
        self.arch = VcpuArch(kvm.irqs.arch)
        self.arch.set_counters(self.stats.values)
        self.stored_msrs = StoredMsrs({})
        self.cpuid: list[kvm_cpuid_entry2] = []
        # What its CPUID lets the guest set: bits of CR4, EFER, XCR0.
        self.cr4_valid, self.efer_valid, self.xcr0_valid = CR4_VALID, EFER_VALID, XCR0_VALID
        self.exception: QueuedException | None = None
        self.interrupt_injected: int | None = None
        # Split irqchip: what user space's PIC has acknowledged.
        self.external_vector: int | None = None
        self.nmi_injected = False
        self.mp_state = 0
        # KVM_SET_GUEST_DEBUG: KVM_GUESTDBG_*, 0 when off; and an instruction was emulated that was to be stepped.
        self.guest_debug = 0
        self.step_done = False
        # vcpu_cache_mmio_info(): frames that were devices' when last looked at, and the slots' generation then.
        self._mmio_gfns: set[int] = set()
        self._mmio_gen = 0
        self.sipi_vector = 0
        self.signal_pending = False
        self.triple_fault_pending = False
        self.pvclock: PvClock
        self.pv = Paravirt(self)
        self.async_pf = self.pv.async_pf
        # KVM_HC_KICK_CPU has come: the next halt, or the present one, ends.
        self.pv_unhalted = False

    def page_fault(self, gpa: int, write: bool, walk: bool = False) -> int:
        """kvm_mmu_page_fault(), of the second dimension: 0 where no memory allows the access; see TdpMmu.page_fault().

        Devices' pages are met again and again: then neither slots nor tables are looked at (vcpu_match_mmio_gpa()).
        """
        memslots = self.kvm.memslots
        generation = memslots.generation  # before the slots are looked at
        if self._is_known_mmio(gpa, generation):
            return NO_SLOT
        came_to = self.kvm.mmu.page_fault(gpa, write, walk)
        if not came_to and memslots.find(gpa) is None:
            if generation != self._mmio_gen or len(self._mmio_gfns) == MOST_MMIO_PAGES:
                self._mmio_gfns.clear()
                self._mmio_gen = generation
            self._mmio_gfns.add(gpa >> PAGE_SHIFT)
        return came_to

    def _is_known_mmio(self, gpa: int, generation: int) -> bool:
        """vcpu_match_mmio_gpa()."""
        return gpa >> PAGE_SHIFT in self._mmio_gfns and generation == self._mmio_gen

    def page_absent(self, gpa: int) -> bool:
        """Whether the page of *gpa* is fetched by somebody else, and the guest does something else: async_pf."""
        if self.kvm.async_pf is None or self._is_known_mmio(gpa, self.kvm.memslots.generation):
            return False
        return self.async_pf.fault(gpa)

    def store_events(self) -> kvm_vcpu_events:
        """KVM_GET_VCPU_EVENTS' struct."""
        raise AssertionError("EventIoctls has it")

    def load_events(self, events: kvm_vcpu_events) -> None:
        """Take KVM_SET_VCPU_EVENTS' struct. Raises OSError with EINVAL."""
        raise AssertionError("EventIoctls has it")

    def deliver_payload(self, exception: QueuedException) -> None:
        """kvm_deliver_exception_payload(): SDM, "Page-Fault Exception (#PF)", "Debug Status Register (DR6)"."""
        if exception.payload is None:
            return
        if exception.vector == PF_VECTOR:
            self.vendor.set_control("cr2", exception.payload)
        elif exception.vector == DB_VECTOR:
            # RTM is inverted: the payload has a one where DR6 gets a zero.
            dr6 = self.vendor.get_debug(6) & ~DR6_TRAPS | DR6_RTM | exception.payload
            self.vendor.set_debug(6, dr6 ^ exception.payload & DR6_RTM)

    def note_step(self) -> None:
        """An instruction is emulated: a debugger that steps sees its end."""
        if self.guest_debug & flags.KVM_GUESTDBG_SINGLESTEP:
            self.step_done = True

    def note_skip(self) -> None:
        """kvm_skip_emulated_instruction(): what steps sees the end of the instruction, be it outside or the guest."""
        self.note_step()
        if not self.step_done and self.vendor.get_rflags() & RFLAGS_TF:
            self.queue_exception(DB_VECTOR, payload=DR6_BS)

    def queue_exception(self, vector: int, error_code: int | None = None, payload: int | None = None) -> None:
        """kvm_queue_exception(): before the next instruction."""
        self.exception = QueuedException(vector, error_code, payload)

    def scale_tsc(self, host_tsc: int) -> int:
        """The guest's time-stamp counter when the host's is *host_tsc*."""
        raise AssertionError("VcpuX86 has it")

    def guest_tsc(self) -> int:
        """The guest's time-stamp counter now."""
        raise AssertionError("VcpuX86 has it")

    def set_guest_tsc(self, value: int) -> None:
        """Set the guest's time-stamp counter."""
        raise AssertionError("VcpuX86 has it")

    def synchronize_tsc(self, value: int) -> None:
        """Set it as user space does."""
        raise AssertionError("VcpuX86 has it")

    def get_apic_base(self) -> int:
        """IA32_APIC_BASE."""
        raise AssertionError("VcpuX86 has it")

    def set_apic_base(self, value: int, host: bool = True) -> None:
        """Set IA32_APIC_BASE. Raises OSError with EINVAL for what user space, or else WRMSR, may not write."""
        raise AssertionError("VcpuX86 has it")

    def get_cr8(self) -> int:
        """The task priority, 0 to 15."""
        raise AssertionError("VcpuX86 has it")

    def set_cr8(self, value: int) -> None:
        """Set the task priority."""
        raise AssertionError("VcpuX86 has it")

    def kick(self) -> None:
        """kvm_vcpu_kick(): out of guest mode, or awake."""
        self.arch.kick()

    def request_event(self) -> None:
        """An interrupt is in the local APIC's IRR."""
        self.arch.request_event()
