"""kvm-amd: a vCPU as a VMCB on a processor with SVM. The table of exit handlers is in exits.py.

Source: arch/x86/kvm/svm/svm.c; APM, "VMCB Layout", "Event Injection", "Interrupt Support".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmonty.cpu import vmcb
from vmonty.cpu.vmcb import ExitCode, Field
from vmonty.kvm.soft import pcpu as pcpus
from vmonty.kvm.soft.cpuid import CR0_VALID, CR4_VALID, EFER_VALID, LINEAR_BITS, PAT_RESET, PHYSICAL_BITS
from vmonty.kvm.soft.intercepts import UD_VECTOR
from vmonty.kvm.soft.mmu.context import CR0_PE, CR0_PG, MmuContext
from vmonty.kvm.soft.mmu.shadow import ShadowMmu
from vmonty.kvm.soft.msr_filter import READ, WRITE
from vmonty.kvm.soft.stats import FPU_RELOAD, HOST_STATE_RELOAD
from vmonty.kvm.soft.svm import exits as e
from vmonty.kvm.soft.svm.exits import SvmExits
from vmonty.kvm.soft.svm.processor import PASSED_THROUGH, Processor
from vmonty.kvm.soft.vcpu_state import QueuedException
from vmonty.kvm.uapi import flags
from vmonty.kvm.uapi.vcpu import kvm_cpuid_entry2, kvm_segment

if TYPE_CHECKING:
    from vmonty.kvm.soft.pcpu import PhysicalCpu
    from vmonty.kvm.soft.svm.main import SvmOperation
    from vmonty.kvm.soft.x86 import VcpuX86

X = ExitCode
EXIT_NAMES = {int(code): code.name for code in ExitCode}
RAX, RSP = 0, 4
IN_VMCB = {RAX: Field.RAX, RSP: Field.RSP}
SEGMENTS = {"es": "ES", "cs": "CS", "ss": "SS", "ds": "DS", "fs": "FS", "gs": "GS", "ldt": "LDTR", "tr": "TR"}
SEGMENT_FIELDS = {
    name: tuple(Field[f"{field}_{part}"] for part in ("SELECTOR", "BASE", "LIMIT", "ATTRIB"))
    for name, field in SEGMENTS.items()
}
TABLE_FIELDS = {"gdt": (Field.GDTR_BASE, Field.GDTR_LIMIT), "idt": (Field.IDTR_BASE, Field.IDTR_LIMIT)}
CONTROL_FIELDS = {"cr0": Field.CR0, "cr2": Field.CR2, "cr3": Field.CR3, "cr4": Field.CR4}
MSR_FIELDS = {
    0x174: Field.SYSENTER_CS, 0x175: Field.SYSENTER_ESP, 0x176: Field.SYSENTER_EIP, 0x1D9: Field.DBGCTL,
    0x277: Field.G_PAT, 0xC000_0081: Field.STAR, 0xC000_0082: Field.LSTAR, 0xC000_0083: Field.CSTAR,
    0xC000_0084: Field.SFMASK, 0xC000_0100: Field.FS_BASE, 0xC000_0101: Field.GS_BASE,
    0xC000_0102: Field.KERNEL_GS_BASE,
}  # fmt: skip
# As wide as the processor has them, whatever CR4.LA57 says.
CANONICAL_MSRS = frozenset((0x175, 0x176, 0xC000_0082, 0xC000_0083, 0xC000_0100, 0xC000_0101, 0xC000_0102))
MSR_EFER, EFER_LME, EFER_LMA, EFER_NX, EFER_SVME = 0xC000_0080, 1 << 8, 1 << 10, 1 << 11, 1 << 12
MSR_DEBUGCTL = 0x1D9
CR0_WP, CR4_PAE, CR4_PCIDE, CR4_SMEP, CR4_SMAP = 1 << 16, 1 << 5, 1 << 17, 1 << 20, 1 << 21
DEBUG_REGISTERS = (0, 1, 2, 3, 7)
RFLAGS_IF, RFLAGS_TF = 1 << 9, 1 << 8
# init_vmcb()
INTERCEPTED = (
    X.WRITE_CR0 + 8, X.EXCEPTION_DE + UD_VECTOR, X.INTR, X.NMI, X.SMI, X.RDPMC, X.CPUID, X.INVD, X.HLT,
    X.INVLPGA, X.IOIO, X.MSR, X.TASK_SWITCH, X.SHUTDOWN, X.VMRUN, X.VMMCALL, X.VMLOAD, X.VMSAVE, X.STGI, X.CLGI,
    X.SKINIT, X.WBINVD, X.MONITOR, X.MWAIT, X.XSETBV, X.RSM,
)  # fmt: skip
SHADOW_INTERCEPTED = (
    *(first + number for first in (X.READ_CR0, X.WRITE_CR0) for number in (0, 3, 4)),
    X.EXCEPTION_DE + 14, X.INVLPG, X.INVPCID,
)  # fmt: skip
SHADOW_BOTH = 3  # KVM_X86_SHADOW_INT_MOV_SS | _STI: the VMCB does not tell them apart


class Svm(SvmExits):
    """The SVM filling of kvm_x86_ops."""

    name = "svm"

    def __init__(self, vcpu: VcpuX86) -> None:
        super().__init__(vcpu, Processor(vcpu.arch))
        self.preempt = vcpu.preempt
        # Whose ASID it has: a processor's, and of which generation.
        self._asid_of: tuple[SvmOperation, int] | None = None
        mmu = vcpu.kvm.mmu
        self.shadow = MmuContext(vcpu, mmu) if isinstance(mmu, ShadowMmu) else None
        # The guest's DR0 to DR3 and DR7, while user space's debugger has the processor's.
        self._guest_debug_registers: dict[int, int] | None = None
        with pcpus.POOL.creation(self):
            self._init_vmcb()
            self.reset(init=False)

    # ---- scheduling ------------------------------------------------------------------------------------

    @property
    def pcpu(self) -> PhysicalCpu | None:
        """The physical processor that has the registers."""
        return self.cpu.pcpu

    def load(self, pcpu: PhysicalCpu) -> None:
        """svm_vcpu_load(), pre_svm_run(): its ASID is good while it stays on a processor and its generation lasts."""
        self.cpu.load(pcpu)
        operation: SvmOperation = pcpu.virtualization
        generation = operation, operation.asid_generation
        if generation != self._asid_of:
            self.vmcb[Field.ASID] = operation.new_asid()
            self._asid_of = operation, operation.asid_generation
        self.vcpu.stats.values[FPU_RELOAD] += 1

    def store(self) -> None:
        """svm_vcpu_put(), and off the processor."""
        self.cpu.store()
        self.vcpu.stats.values[HOST_STATE_RELOAD] += 1

    def destroy(self) -> None:
        """svm_vcpu_free()."""
        pcpus.POOL.forget(self)
        if self.shadow is not None:
            self.shadow.destroy()

    def _init_vmcb(self) -> None:
        """What makes the guest exit, and where its maps and tables are."""
        vmcb = self.vmcb
        for code in INTERCEPTED:
            vmcb.intercept(code)
        vmcb[Field.IOPM_BASE_PA], vmcb[Field.MSRPM_BASE_PA] = self.cpu.iopm, self.cpu.msrpm
        vmcb[Field.INT_CTL] = e.V_INTR_MASKING
        vmcb[Field.N_CR3] = self.vcpu.kvm.mmu.root
        vmcb[Field.NP_ENABLE] = int(self.shadow is None)
        if self.shadow is not None:
            for code in SHADOW_INTERCEPTED:
                vmcb.intercept(code)

    def lapic_created(self, page: int) -> None:
        """The guest has V_TPR for CR8; when writes exit, svm_vcpu_run() knows. (Without an APIC all do.)"""
        self.vmcb.intercept(X.WRITE_CR0 + 8, False)

    def reset(self, init: bool) -> None:
        """svm_vcpu_reset(): real mode at the reset vector. APM, "Processor Initialization State"."""
        vmcb = self.vmcb
        for number in range(16):
            self.set_gpr(number, 0)
        self.set_gpr(2, 0x600)  # EDX: family 6
        for name in ("es", "ss", "ds", "fs", "gs"):
            self.set_segment(name, kvm_segment(limit=0xFFFF, type=3, present=1, s=1))
        self.set_segment("cs", kvm_segment(selector=0xF000, base=0xFFFF_0000, limit=0xFFFF, type=11, present=1, s=1))
        self.set_segment("tr", kvm_segment(limit=0xFFFF, type=11, present=1))
        self.set_segment("ldt", kvm_segment(limit=0xFFFF, type=2, present=1))
        for name in TABLE_FIELDS:
            self.set_table(name, 0, 0xFFFF)
        self.set_control("efer", 0)
        self.set_control("cr0", 0x6000_0010)
        for name in ("cr2", "cr3", "cr4"):
            self.set_control(name, 0)
        vmcb[Field.RFLAGS], vmcb[Field.RIP] = 2, 0xFFF0
        vmcb[Field.DR7], vmcb[Field.DR6] = 0x400, 0xFFFF_0FF0
        vmcb[Field.INT_STATE] = vmcb[Field.EVENTINJ] = 0
        self._mask_nmi(False)
        if not init:
            vmcb[Field.G_PAT] = PAT_RESET
            for field in (Field.SYSENTER_CS, Field.SYSENTER_ESP, Field.SYSENTER_EIP):
                vmcb[field] = 0
            self.set_control("xcr0", 1)

    exit_names = EXIT_NAMES

    def exit_info(self) -> tuple[int, int]:
        """The last exit's code and EXITINFO1."""
        return self.vmcb[Field.EXITCODE], self.vmcb[Field.EXITINFO1]

    def exit_details(self) -> tuple[int, ...]:
        """svm_get_exit_info(): the code, both words about it, what was being delivered, and its error code."""
        vmcb = self.vmcb
        event = vmcb[Field.EXITINTINFO]
        code = event >> 32 if event & e.EVENT_VALID and event & e.EVENT_ERROR else 0
        return vmcb[Field.EXITCODE], vmcb[Field.EXITINFO1], vmcb[Field.EXITINFO2], event & 0xFFFF_FFFF, code

    def dump(self) -> dict[str, int]:
        """dump_vmcb(): every field by its name, as they were at the last exit."""
        return vmcb.dump(self.cpu.region())

    # ---- registers -----------------------------------------------------------------------------------

    def host_had_control(self, wrote: bool = False) -> None:
        self.cpu.host_had_control(wrote)

    def get_gpr(self, number: int) -> int:
        return self.vmcb[IN_VMCB[number]] if number in IN_VMCB else self.cpu.get_gpr(number)

    def set_gpr(self, number: int, value: int) -> None:
        if number in IN_VMCB:
            self.vmcb[IN_VMCB[number]] = value
        else:
            self.cpu.set_gpr(number, value)

    def get_rip(self) -> int:
        return self.vmcb[Field.RIP]

    def set_rip(self, value: int) -> None:
        self.vmcb[Field.RIP] = value & 0xFFFF_FFFF_FFFF_FFFF

    def get_rflags(self) -> int:
        return self.vmcb[Field.RFLAGS]

    def set_rflags(self, value: int) -> None:
        self.vmcb[Field.RFLAGS] = value & 0x3F_7FD7 | 2

    def get_cpl(self) -> int:
        return self.vmcb[Field.CPL]

    def get_segment(self, name: str) -> kvm_segment:
        selector, base, limit, rights = (self.vmcb[field] for field in SEGMENT_FIELDS[name])
        present = rights >> 7 & 1
        segment = kvm_segment(
            selector=selector, base=base, limit=limit, type=rights & 15, s=rights >> 4 & 1, dpl=rights >> 5 & 3,
            present=present, avl=rights >> 8 & 1, l=rights >> 9 & 1, db=rights >> 10 & 1, g=rights >> 11 & 1,
            unusable=1 - present,
        )  # fmt: skip
        if name == "ss":
            segment.dpl = self.vmcb[Field.CPL]
        return segment

    def set_segment(self, name: str, segment: kvm_segment) -> None:
        present = segment.present and not segment.unusable
        rights = (
            segment.type | segment.s << 4 | segment.dpl << 5 | (0x80 if present else 0) | segment.avl << 8
            | segment.l << 9 | segment.db << 10 | segment.g << 11
        )  # fmt: skip
        for field, value in zip(
            SEGMENT_FIELDS[name], (segment.selector, segment.base, segment.limit, rights), strict=True
        ):
            self.vmcb[field] = value
        if name == "ss":
            self.vmcb[Field.CPL] = segment.dpl

    def get_table(self, name: str) -> tuple[int, int]:
        base, limit = TABLE_FIELDS[name]
        return self.vmcb[base], self.vmcb[limit]

    def set_table(self, name: str, base: int, limit: int) -> None:
        for field, value in zip(TABLE_FIELDS[name], (base, limit), strict=True):
            self.vmcb[field] = value

    def get_control(self, name: str) -> int:
        if self.shadow is not None and name in self.guest_controls:
            return self.guest_controls[name]
        if name == "efer":
            return self.vmcb[Field.EFER] & ~EFER_SVME
        if name == "xcr0":
            return self.cpu.get_xcr0()
        return self.vmcb[CONTROL_FIELDS[name]]

    def set_control(self, name: str, value: int) -> None:
        if self.shadow is not None and name in self.guest_controls:
            self.guest_controls[name] = value
            self.shadow.set(**self.guest_controls)
            self._set_hardware()
        elif name == "efer":
            self.vmcb[Field.EFER] = value | EFER_SVME
        elif name == "xcr0":
            self.cpu.set_xcr0(value)
        else:
            self.vmcb[CONTROL_FIELDS[name]] = value

    def _set_hardware(self) -> None:
        """svm_set_cr0(), svm_set_cr4(), svm_set_efer() without npt: what the processor has while it walks our tables.

        In real mode, which has no tables to shadow, the guest runs over nested ones.
        """
        vmcb, (cr0, _, cr4, efer) = self.vmcb, self.guest_controls.values()
        if not cr0 & CR0_PE:
            self.enter_two_dimensional(step=False)
            return
        vmcb[Field.NP_ENABLE] = 0
        vmcb[Field.CR0] = cr0 | CR0_PG | CR0_WP
        vmcb[Field.CR4] = (cr4 | CR4_PAE) & ~(CR4_PCIDE | (0 if cr0 & CR0_PG else CR4_SMEP | CR4_SMAP))
        vmcb[Field.EFER] = (efer if efer & EFER_LMA else efer & ~EFER_LME) | EFER_NX | EFER_SVME
        for code in SHADOW_INTERCEPTED:
            vmcb.intercept(code)

    def hardware_invlpg(self, gva: int) -> None:
        self.cpu.invlpga(gva, self.vmcb[Field.ASID])

    def hardware_root(self, root: int) -> None:
        if self.guest_controls["cr0"] & CR0_PE and self.vmcb[Field.CR3] != root:
            self.vmcb[Field.CR3] = root

    def enter_two_dimensional(self, step: bool) -> None:
        """The guest's own registers, over nested page tables. One *step* may write them: they are read back."""
        self.two_dimensional = step
        vmcb = self.vmcb
        for name, value in self.guest_controls.items():
            if name != "efer":
                vmcb[CONTROL_FIELDS[name]] = value
        vmcb[Field.EFER] = self.guest_controls["efer"] | EFER_SVME
        vmcb[Field.NP_ENABLE] = 1
        for code in SHADOW_INTERCEPTED:
            vmcb.intercept(code, not step and code != X.EXCEPTION_DE + 14)

    def leave_two_dimensional(self) -> None:
        """After a step: what the instruction changed, and back to the shadow tables."""
        self.two_dimensional = False
        now = {name: self.vmcb[CONTROL_FIELDS[name]] for name in ("cr0", "cr3", "cr4")}
        now["efer"] = self.vmcb[Field.EFER] & ~EFER_SVME
        if now != self.guest_controls and self.shadow is not None:
            self.guest_controls.update(now)
            self.shadow.load_pdptrs(**now)
            self.shadow.set(**now)
        if self.shadow is not None:
            self.shadow.flush()  # it may have flushed the TLB, which does not exit there
        self._set_hardware()
        self.mmu_load()

    def valid_controls(self, cr0: int, cr4: int, efer: int) -> bool:
        return not (cr0 & ~CR0_VALID or cr4 & ~self.vcpu.cr4_valid or efer & ~EFER_VALID)

    def valid_cr3(self, cr3: int) -> bool:
        return not cr3 >> PHYSICAL_BITS

    def state_loaded(self) -> None:
        if self.shadow is not None:
            self.shadow.load_pdptrs(**self.guest_controls)
            self.shadow.reset()
        self.flush_tlb()

    def get_debug(self, number: int) -> int:
        if (own := self._guest_debug_registers) is not None and number in own:
            return own[number]
        if number >= 6:
            return self.vmcb[Field.DR7 if number == 7 else Field.DR6]
        return self.cpu.get_debug(number)

    def set_debug(self, number: int, value: int) -> None:
        if number == 7:
            value = value & 0xFFFF_2BFF | 0x400
        if (own := self._guest_debug_registers) is not None and number in own:
            own[number] = value
        elif number >= 6:
            self.vmcb[Field.DR7 if number == 7 else Field.DR6] = value & 0xFFFF_FFFF
        else:
            self.cpu.set_debug(number, value)

    def update_guest_debug(self, registers: list[int] | None) -> None:
        """Lend the debug registers to user space's debugger, or give them back; and intercept what it wants to see."""
        if self._guest_debug_registers is not None:
            own, self._guest_debug_registers = self._guest_debug_registers, None
            for number, value in own.items():
                self.set_debug(number, value)
        if registers is not None:
            lent = {number: self.get_debug(number) for number in DEBUG_REGISTERS}
            for number in DEBUG_REGISTERS:
                self.set_debug(number, registers[number])
            self._guest_debug_registers = lent
        for number in range(8):
            self.vmcb.intercept(X.READ_DR0 + number, registers is not None)
            self.vmcb.intercept(X.WRITE_DR0 + number, registers is not None)
        wanted = self.vcpu.guest_debug
        steps = wanted & (flags.KVM_GUESTDBG_SINGLESTEP | flags.KVM_GUESTDBG_USE_HW_BP)
        self.vmcb.intercept(X.EXCEPTION_DE + flags.DB_VECTOR, bool(steps))
        self.vmcb.intercept(X.EXCEPTION_DE + flags.BP_VECTOR, bool(wanted & flags.KVM_GUESTDBG_USE_SW_BP))

    def get_xsave(self) -> bytes:
        return self.cpu.get_xsave()

    def set_xsave(self, area: bytes) -> None:
        self.cpu.set_xsave(area)

    def get_msr(self, index: int) -> int | None:
        if index == MSR_EFER:
            return self.get_control("efer")
        if (field := MSR_FIELDS.get(index)) is not None:
            return self.vmcb[field]
        return self.cpu.get_msr(index)

    def set_msr(self, index: int, value: int) -> bool:
        if index == MSR_EFER:
            if value & ~EFER_VALID:
                return False
            # LMA follows paging, not the write.
            self.set_control("efer", value & ~EFER_LMA | self.get_control("efer") & EFER_LMA)
            return True
        if index == MSR_DEBUGCTL:
            return True  # dropped, and 0: the processor has no LBR virtualization
        if (field := MSR_FIELDS.get(index)) is not None:
            if index in CANONICAL_MSRS and value + (1 << LINEAR_BITS - 1) & (1 << 64) - 1 >= 1 << LINEAR_BITS:
                return False
            self.vmcb[field] = value
            return True
        return self.cpu.set_msr(index, value)

    def msr_filter_changed(self) -> None:
        """svm_msr_filter_changed(): MSRs that are filtered exit."""
        chosen = self.vcpu.kvm.msr_filter
        for index in PASSED_THROUGH:
            read, write = (chosen is None or chosen.allows(index, access) for access in (READ, WRITE))
            self.cpu.pass_msr_through(index, read, write)

    def set_tsc_offset(self, offset: int) -> None:
        self.vmcb[Field.TSC_OFFSET] = offset

    def set_tsc_multiplier(self, ratio: int) -> None:
        self.cpu.set_tsc_ratio(ratio >> 16)

    def set_cpuid(self, entries: list[kvm_cpuid_entry2]) -> None:
        self.cpu.set_cpuid(entries)
        # What the guest may not set becomes #GP.
        self.vmcb.intercept(X.WRITE_CR0 + 4, self.shadow is not None or self.vcpu.cr4_valid != CR4_VALID)

    # ---- events ----------------------------------------------------------------------------------------

    def interrupt_allowed(self) -> bool:
        return bool(self.vmcb[Field.RFLAGS] & RFLAGS_IF) and not self.get_interrupt_shadow()

    def nmi_allowed(self) -> bool:
        return not self.nmi_masked and not self.get_interrupt_shadow()

    def get_interrupt_shadow(self) -> int:
        return SHADOW_BOTH if self.vmcb[Field.INT_STATE] & 1 else 0

    def set_interrupt_shadow(self, bits: int) -> None:
        self.vmcb[Field.INT_STATE] = int(bool(bits))

    def get_nmi_mask(self) -> bool:
        return self.nmi_masked

    def set_nmi_mask(self, masked: bool) -> None:
        self._mask_nmi(masked)

    def enable_irq_window(self) -> None:
        """svm_enable_irq_window(): a virtual interrupt of the highest priority, which exits when it would be taken."""
        self.vmcb[Field.INT_CTL] = self.vmcb[Field.INT_CTL] | e.V_IRQ | e.V_PRIO_MASK | e.V_IGN_TPR
        self.vmcb.intercept(X.VINTR)

    def enable_nmi_window(self) -> None:
        """svm_enable_nmi_window(): IRET exits anyway; out of an interrupt shadow leads one step."""
        self.stepping_to_nmi = not self.nmi_masked

    def inject_irq(self, vector: int) -> None:
        self.vmcb[Field.EVENTINJ] = e.EVENT_VALID | e.TYPE_INTR | vector

    def inject_nmi(self) -> None:
        self.vmcb[Field.EVENTINJ] = e.EVENT_VALID | e.TYPE_NMI | 2
        self._mask_nmi(True)

    def inject_exception(self, exception: QueuedException) -> None:
        event = e.EVENT_VALID | e.TYPE_EXCEPTION | exception.vector
        self.vcpu.deliver_payload(exception)
        if exception.error_code is not None and self.vmcb[Field.CR0] & 1:
            event |= e.EVENT_ERROR | exception.error_code << 32
        if exception.vector in (flags.BP_VECTOR, flags.OF_VECTOR):
            # svm_update_soft_interrupt_rip(): the handler returns behind INT3 or INTO.
            self.set_rip(self.get_rip() + 1)
        self.vmcb[Field.EVENTINJ] = event

    def flush_tlb(self) -> None:
        self.cpu.flush()

    def run(self) -> None:
        """svm_vcpu_run(): enter, and stay until the #VMEXIT."""
        if self.vcpu.guest_debug:
            self._run_debugged()
        elif self.stepping_to_nmi and not self.vmcb[Field.EVENTINJ] & e.EVENT_VALID:
            # The instruction behind STI or MOV SS; the kernel uses the trap flag.
            self.stepping_to_nmi = False
            self.stepped = self.emulator.emulate()
            return
        else:
            self.cpu.enter()
        self.complete_interrupts()

    def after_reentry(self) -> None:
        """The end of run(), after reentry.reenter() did the rest of it."""
        self.cpu.outcome()
        self.complete_interrupts()

    def _run_debugged(self) -> None:
        """User space's debugger steps, or has breakpoints: #DB is its own, and the guest's DR6 stays."""
        vmcb = self.vmcb
        own, steps = vmcb[Field.DR6], self.vcpu.guest_debug & flags.KVM_GUESTDBG_SINGLESTEP
        vmcb[Field.DR6] = e.DR6_ACTIVE_LOW
        old = vmcb[Field.RFLAGS]
        if steps:
            vmcb[Field.RFLAGS] = old | RFLAGS_TF
            self.set_interrupt_shadow(0)
        self.cpu.enter()
        if steps:
            vmcb[Field.RFLAGS] = vmcb[Field.RFLAGS] & ~RFLAGS_TF | old & RFLAGS_TF
        self.debug_dr6 = vmcb[Field.DR6]
        if vmcb[Field.EXITCODE] == X.EXCEPTION_DE + flags.DB_VECTOR or self.debug_dr6 == e.DR6_ACTIVE_LOW:
            vmcb[Field.DR6] = own

    def kick(self) -> None:
        self.vcpu.arch.kick()
