"""kvm-intel: a vCPU as a VMCS on a processor with VMX. The table of exit handlers is in exits.py.

Source: arch/x86/kvm/vmx/vmx.c; SDM, "Virtual Machine Control Structures", "VM Entries".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmonty.cpu import vmcs
from vmonty.cpu.vmcs import Field
from vmonty.kvm.soft import pcpu as pcpus
from vmonty.kvm.soft.cpuid import CR0_VALID, CR4_VALID, EFER_VALID, PAT_RESET, PHYSICAL_BITS
from vmonty.kvm.soft.insight import EXIT_NAMES
from vmonty.kvm.soft.intercepts import UD_VECTOR
from vmonty.kvm.soft.mmu.context import CR0_PE, CR0_PG, MmuContext
from vmonty.kvm.soft.mmu.paging_tmpl import GuestWalker
from vmonty.kvm.soft.mmu.shadow import ShadowMmu
from vmonty.kvm.soft.msr_filter import READ, WRITE
from vmonty.kvm.soft.stats import FPU_RELOAD, HOST_STATE_RELOAD
from vmonty.kvm.soft.vcpu_state import QueuedException
from vmonty.kvm.soft.vmx import controls as c
from vmonty.kvm.soft.vmx.exits import FAILED_ENTRY, VmxExits
from vmonty.kvm.soft.vmx.processor import PASSED_THROUGH, Processor
from vmonty.kvm.uapi import flags
from vmonty.kvm.uapi.vcpu import kvm_cpuid_entry2, kvm_segment

if TYPE_CHECKING:
    from vmonty.kvm.soft.pcpu import PhysicalCpu
    from vmonty.kvm.soft.vmx.main import KvmIntel
    from vmonty.kvm.soft.x86 import VcpuX86

RSP = 4
SEGMENTS = {"es": "ES", "cs": "CS", "ss": "SS", "ds": "DS", "fs": "FS", "gs": "GS", "ldt": "LDTR", "tr": "TR"}
SEGMENT_FIELDS = {
    name: tuple(Field[f"GUEST_{field}_{part}"] for part in ("SELECTOR", "BASE", "LIMIT", "AR_BYTES"))
    for name, field in SEGMENTS.items()
}
TABLE_FIELDS = {
    "gdt": (Field.GUEST_GDTR_BASE, Field.GUEST_GDTR_LIMIT),
    "idt": (Field.GUEST_IDTR_BASE, Field.GUEST_IDTR_LIMIT),
}
MSR_FIELDS = {
    0x174: Field.GUEST_SYSENTER_CS, 0x175: Field.GUEST_SYSENTER_ESP, 0x176: Field.GUEST_SYSENTER_EIP,
    0x1D9: Field.GUEST_IA32_DEBUGCTL, 0x277: Field.GUEST_IA32_PAT, 0xC000_0080: Field.GUEST_IA32_EFER,
    0xC000_0100: Field.GUEST_FS_BASE, 0xC000_0101: Field.GUEST_GS_BASE,
}  # fmt: skip
PDPTES = (Field.GUEST_PDPTR0, Field.GUEST_PDPTR1, Field.GUEST_PDPTR2, Field.GUEST_PDPTR3)
SECOND_NESTED = c.SECOND_EPT | c.SECOND_UNRESTRICTED
ALL = (1 << 64) - 1
MSR_EFER, EFER_LME, EFER_NX = 0xC000_0080, 1 << 8, 1 << 11
MSR_DEBUGCTL, DEBUGCTL_LBR, DEBUGCTL_BTF = 0x1D9, 1, 2
CR0_WP, CR4_PAE, CR4_PCIDE, CR4_SMEP, CR4_SMAP = 1 << 16, 1 << 5, 1 << 17, 1 << 20, 1 << 21
DEBUG_REGISTERS = (0, 1, 2, 3, 7)
RFLAGS_TF = 1 << 8


class Vmx(VmxExits):
    """The VMX filling of kvm_x86_ops."""

    name = "vmx"

    def __init__(self, vcpu: VcpuX86, module: KvmIntel) -> None:
        super().__init__(vcpu, Processor(vcpu.arch))
        self._module = module
        self.preempt = vcpu.preempt
        mmu = vcpu.kvm.mmu
        self.shadow = MmuContext(vcpu, mmu) if isinstance(mmu, ShadowMmu) else None
        self._vpid = module.allocate_vpid()
        # The guest's DR0 to DR3 and DR7, while user space's debugger has the processor's.
        self._guest_debug_registers: dict[int, int] | None = None
        with pcpus.POOL.creation(self):
            self._setup_controls()
            self.reset(init=False)

    # ---- scheduling ------------------------------------------------------------------------------------

    @property
    def pcpu(self) -> PhysicalCpu | None:
        """The physical processor that has the VMCS."""
        return self.cpu.pcpu

    def load(self, pcpu: PhysicalCpu) -> None:
        """vmx_vcpu_load()."""
        self.cpu.load(pcpu)
        self.vcpu.stats.values[FPU_RELOAD] += 1

    def store(self) -> None:
        """vmx_vcpu_put(), and off the processor."""
        self.cpu.store()
        self.vcpu.stats.values[HOST_STATE_RELOAD] += 1

    def destroy(self) -> None:
        """vmx_vcpu_free()."""
        pcpus.POOL.forget(self)
        if self.shadow is not None:
            self.shadow.destroy()
        self._module.free_vpid(self._vpid)

    def _setup_controls(self) -> None:
        """vmx_vcpu_setup(): what makes the guest exit."""
        write = self.cpu.vmwrite
        write(Field.VMCS_LINK_POINTER, 0xFFFF_FFFF_FFFF_FFFF)
        write(
            Field.PIN_BASED_VM_EXEC_CONTROL, c.PIN_REQUIRED | c.PIN_EXTERNAL_INTERRUPT | c.PIN_NMI | c.PIN_VIRTUAL_NMIS
        )
        write(
            Field.CPU_BASED_VM_EXEC_CONTROL,
            c.PROC_REQUIRED | c.PROC_HLT | c.PROC_TSC_OFFSETTING | c.PROC_UNCONDITIONAL_IO | c.PROC_MSR_BITMAPS
            | c.PROC_MWAIT | c.PROC_MONITOR | c.PROC_RDPMC | c.PROC_CR8_LOAD | c.PROC_CR8_STORE | c.PROC_SECONDARY,
        )  # fmt: skip
        write(
            Field.SECONDARY_VM_EXEC_CONTROL,
            (SECOND_NESTED if self.shadow is None else 0) | (c.SECOND_VPID if self._vpid else 0) | c.SECOND_RDTSCP
            | c.SECOND_INVPCID,
        )  # fmt: skip
        write(
            Field.VM_EXIT_CONTROLS,
            c.EXIT_REQUIRED | c.EXIT_HOST_64 | c.EXIT_SAVE_EFER | c.EXIT_SAVE_PAT | c.EXIT_SAVE_DEBUG,
        )
        write(Field.VM_ENTRY_CONTROLS, c.ENTRY_REQUIRED | c.ENTRY_LOAD_EFER | c.ENTRY_LOAD_PAT | c.ENTRY_LOAD_DEBUG)
        write(Field.EXCEPTION_BITMAP, 1 << UD_VECTOR)  # VMMCALL
        write(Field.EPT_POINTER, self.vcpu.kvm.mmu.root | c.EPTP_WRITE_BACK | c.EPTP_FOUR_LEVELS)
        write(Field.VIRTUAL_PROCESSOR_ID, self._vpid)
        write(Field.MSR_BITMAP, self.cpu.msr_bitmap.address)
        write(Field.CR0_GUEST_HOST_MASK, c.CR0_NE if self.shadow is None else ALL)
        write(Field.CR4_GUEST_HOST_MASK, c.CR4_VMXE if self.shadow is None else ALL)
        self.cpu.setup_host_state()

    def lapic_created(self, page: int) -> None:
        """cpu_need_tpr_shadow(): MOV CR8 is the processor's own, in the APIC's register page."""
        self.cpu.vmwrite(Field.VIRTUAL_APIC_PAGE_ADDR, page)
        self._enable(Field.CPU_BASED_VM_EXEC_CONTROL, c.PROC_CR8_LOAD | c.PROC_CR8_STORE, False)
        self._enable(Field.CPU_BASED_VM_EXEC_CONTROL, c.PROC_TPR_SHADOW, True)
        self.vcpu.arch.hv_timer = self._module.parameters.preemption_timer

    def reset(self, init: bool) -> None:
        """vmx_vcpu_reset(): real mode at the reset vector. SDM, "Processor State After Reset"."""
        write = self.cpu.vmwrite
        for number in range(16):
            self.cpu.set_gpr(number, 0)
        self.cpu.set_gpr(2, 0x600)  # EDX: family 6
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
        self.set_rflags(2)
        write(Field.GUEST_RIP, 0xFFF0)
        write(Field.GUEST_RSP, 0)
        write(Field.GUEST_DR7, 0x400)
        self.cpu.set_debug(6, 0xFFFF_0FF0)
        write(Field.GUEST_INTERRUPTIBILITY_INFO, 0)
        write(Field.GUEST_ACTIVITY_STATE, 0)
        write(Field.GUEST_PENDING_DBG_EXCEPTIONS, 0)
        write(Field.VM_ENTRY_INTR_INFO_FIELD, 0)
        if not init:
            write(Field.GUEST_IA32_PAT, PAT_RESET)
            for field in (Field.GUEST_SYSENTER_CS, Field.GUEST_SYSENTER_ESP, Field.GUEST_SYSENTER_EIP):
                write(field, 0)
            self.set_control("xcr0", 1)

    exit_names = EXIT_NAMES

    def exit_info(self) -> tuple[int, int]:
        """The last exit's reason and qualification."""
        return self.cpu.vmread(Field.VM_EXIT_REASON) & 0xFFFF, self.cpu.vmread(Field.EXIT_QUALIFICATION)

    def exit_details(self) -> tuple[int, ...]:
        """vmx_get_exit_info(): reason, qualification, what was being delivered, the event and its error code."""
        read = self.cpu.vmread
        event = read(Field.VM_EXIT_INTR_INFO)
        code = read(Field.VM_EXIT_INTR_ERROR_CODE) if event & c.INFO_VALID and event & c.INFO_ERROR_CODE else 0
        vectoring = read(Field.IDT_VECTORING_INFO_FIELD)
        return read(Field.VM_EXIT_REASON), read(Field.EXIT_QUALIFICATION), vectoring, event, code

    def dump(self) -> dict[str, int]:
        """dump_vmcs(): every field by its name, as they were at the last exit."""
        return vmcs.dump(self.cpu.region())

    # ---- registers -----------------------------------------------------------------------------------

    def host_had_control(self, wrote: bool = False) -> None:
        self.cpu.host_had_control(wrote)

    def get_gpr(self, number: int) -> int:
        return self.cpu.vmread(Field.GUEST_RSP) if number == RSP else self.cpu.get_gpr(number)

    def set_gpr(self, number: int, value: int) -> None:
        if number == RSP:
            self.cpu.vmwrite(Field.GUEST_RSP, value)
        else:
            self.cpu.set_gpr(number, value)

    def get_rip(self) -> int:
        return self.cpu.vmread(Field.GUEST_RIP)

    def set_rip(self, value: int) -> None:
        self.cpu.vmwrite(Field.GUEST_RIP, value & 0xFFFF_FFFF_FFFF_FFFF)

    def get_rflags(self) -> int:
        return self.cpu.vmread(Field.GUEST_RFLAGS)

    def set_rflags(self, value: int) -> None:
        self.cpu.vmwrite(Field.GUEST_RFLAGS, value & 0x3F_7FD7 | 2)

    def get_cpl(self) -> int:
        return self.cpu.vmread(Field.GUEST_SS_AR_BYTES) >> 5 & 3

    def get_segment(self, name: str) -> kvm_segment:
        selector, base, limit, rights = (self.cpu.vmread(field) for field in SEGMENT_FIELDS[name])
        unusable = rights >> 16 & 1
        return kvm_segment(
            selector=selector, base=base, limit=limit, type=rights & 15, s=rights >> 4 & 1, dpl=rights >> 5 & 3,
            present=int(not unusable), avl=rights >> 12 & 1, l=rights >> 13 & 1, db=rights >> 14 & 1,
            g=rights >> 15 & 1, unusable=unusable,
        )  # fmt: skip

    def set_segment(self, name: str, segment: kvm_segment) -> None:
        rights = (
            segment.type | segment.s << 4 | segment.dpl << 5 | segment.present << 7 | segment.avl << 12
            | segment.l << 13 | segment.db << 14 | segment.g << 15
        )  # fmt: skip
        if segment.unusable or not segment.present:
            rights = 1 << 16
        elif self.unrestricted and name != "ldt":
            rights |= 1  # accessed: an entry check that KVM satisfies for user space
        for field, value in zip(
            SEGMENT_FIELDS[name], (segment.selector, segment.base, segment.limit, rights), strict=True
        ):
            self.cpu.vmwrite(field, value)

    def get_table(self, name: str) -> tuple[int, int]:
        base, limit = TABLE_FIELDS[name]
        return self.cpu.vmread(base), self.cpu.vmread(limit)

    def set_table(self, name: str, base: int, limit: int) -> None:
        for field, value in zip(TABLE_FIELDS[name], (base, limit), strict=True):
            self.cpu.vmwrite(field, value)

    def get_control(self, name: str) -> int:
        if self.shadow is not None and name in self.guest_controls:
            return self.guest_controls[name]
        match name:
            case "cr0":
                own = self.cpu.vmread(Field.CR0_READ_SHADOW) & c.CR0_NE
                return self.cpu.vmread(Field.GUEST_CR0) & ~c.CR0_NE | own
            case "cr3":
                return self.cpu.vmread(Field.GUEST_CR3)
            case "cr4":
                return self.cpu.vmread(Field.GUEST_CR4) & ~c.CR4_VMXE
            case "efer":
                return self.cpu.vmread(Field.GUEST_IA32_EFER)
            case _:
                return self.cpu.get_control(name)

    def set_control(self, name: str, value: int) -> None:
        if self.shadow is not None and name in self.guest_controls:
            self.guest_controls[name] = value
            self.shadow.set(**self.guest_controls)
            self._set_hardware()
            return
        match name:
            case "cr0":
                self.cpu.vmwrite(Field.GUEST_CR0, value | c.CR0_NE)
                self.cpu.vmwrite(Field.CR0_READ_SHADOW, value)
            case "cr3":
                self.cpu.vmwrite(Field.GUEST_CR3, value)
            case "cr4":
                self.cpu.vmwrite(Field.GUEST_CR4, value | c.CR4_VMXE)
                self.cpu.vmwrite(Field.CR4_READ_SHADOW, value)
            case "efer":
                self.cpu.vmwrite(Field.GUEST_IA32_EFER, value)
                entry = self.cpu.vmread(Field.VM_ENTRY_CONTROLS) & ~c.ENTRY_IA32E
                self.cpu.vmwrite(Field.VM_ENTRY_CONTROLS, entry | (c.ENTRY_IA32E if value & c.EFER_LMA else 0))
            case _:
                self.cpu.set_control(name, value)

    def _set_hardware(self) -> None:
        """vmx_set_cr0(), vmx_set_cr4(), vmx_set_efer() without ept: what the processor has while it walks our tables.

        In real mode, which VMX has only with EPT, the guest runs over that.
        """
        write, (cr0, _, cr4, efer) = self.cpu.vmwrite, self.guest_controls.values()
        write(Field.CR0_READ_SHADOW, cr0)
        write(Field.CR4_READ_SHADOW, cr4)
        if not cr0 & CR0_PE:
            self.enter_two_dimensional(step=False)
            return
        self._enable(Field.SECONDARY_VM_EXEC_CONTROL, SECOND_NESTED, False)
        self._enable(Field.CPU_BASED_VM_EXEC_CONTROL, c.PROC_CR3_LOAD | c.PROC_CR3_STORE | c.PROC_INVLPG, True)
        self._enable(Field.EXCEPTION_BITMAP, 1 << flags.PF_VECTOR, True)
        write(Field.GUEST_CR0, cr0 | c.CR0_NE | CR0_PG | CR0_WP)
        hidden = CR4_PCIDE | (0 if cr0 & CR0_PG else CR4_SMEP | CR4_SMAP)
        write(Field.GUEST_CR4, (cr4 | CR4_PAE | c.CR4_VMXE) & ~hidden)
        self._set_efer((efer if efer & c.EFER_LMA else efer & ~EFER_LME) | EFER_NX)

    def _set_efer(self, value: int) -> None:
        self.cpu.vmwrite(Field.GUEST_IA32_EFER, value)
        self._enable(Field.VM_ENTRY_CONTROLS, c.ENTRY_IA32E, bool(value & c.EFER_LMA))

    def _enable(self, field: Field, bits: int, on: bool) -> None:
        old = self.cpu.vmread(field)
        new = old | bits if on else old & ~bits
        if new != old:
            self.cpu.vmwrite(field, new)

    def hardware_invlpg(self, gva: int) -> None:
        self.cpu.invvpid(0, self._vpid, gva)

    def hardware_root(self, root: int) -> None:
        if self.guest_controls["cr0"] & CR0_PE and self.cpu.vmread(Field.GUEST_CR3) != root:
            self.cpu.vmwrite(Field.GUEST_CR3, root)

    def enter_two_dimensional(self, step: bool) -> None:
        """The guest's own registers, over the EPT."""
        self.two_dimensional = step
        write, (cr0, cr3, cr4, efer) = self.cpu.vmwrite, self.guest_controls.values()
        self._enable(Field.SECONDARY_VM_EXEC_CONTROL, SECOND_NESTED, True)
        self._enable(Field.CPU_BASED_VM_EXEC_CONTROL, c.PROC_INVLPG, not step)
        self._enable(Field.EXCEPTION_BITMAP, 1 << flags.PF_VECTOR, False)
        write(Field.GUEST_CR0, cr0 | c.CR0_NE)
        write(Field.GUEST_CR3, cr3)
        write(Field.GUEST_CR4, cr4 | c.CR4_VMXE)
        self._set_efer(efer)
        if self.shadow is not None:
            for number, pdpte in enumerate(self.shadow.registers.pdptrs):
                write(PDPTES[number], pdpte)

    def leave_two_dimensional(self) -> None:
        """After some steps, in which control registers exit but INVLPG does not."""
        self.two_dimensional = False
        if self.shadow is not None:
            self.shadow.flush()
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
        else:
            self._load_pdptrs()
        self.flush_tlb()

    def _load_pdptrs(self) -> None:
        """load_pdptrs(), ept_load_pdptrs(): with EPT the processor takes PAE's four from the VMCS at each entry."""
        cr0, cr3, cr4, efer = (self.get_control(name) for name in ("cr0", "cr3", "cr4", "efer"))
        if not cr0 & CR0_PG or not cr4 & CR4_PAE or efer & c.EFER_LMA:
            return
        walker = GuestWalker(self.vcpu.kvm.memslots)
        for number, field in enumerate(PDPTES):
            self.cpu.vmwrite(field, walker.read((cr3 & 0xFFFF_FFE0) + 8 * number, 8) or 0)

    def get_debug(self, number: int) -> int:
        if (own := self._guest_debug_registers) is not None and number in own:
            return own[number]
        return self.cpu.vmread(Field.GUEST_DR7) if number == 7 else self.cpu.get_debug(number)

    def set_debug(self, number: int, value: int) -> None:
        if number == 7:
            value = value & 0xFFFF_2BFF | 0x400
        if (own := self._guest_debug_registers) is not None and number in own:
            own[number] = value
        elif number == 7:
            self.cpu.vmwrite(Field.GUEST_DR7, value)
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
        self._window(c.PROC_MOV_DR, registers is not None)
        self._update_exception_bitmap()

    def _debugger_wants(self) -> int:
        """The exceptions that are user space's debugger's, a bit each."""
        wanted = self.vcpu.guest_debug
        steps = wanted & (flags.KVM_GUESTDBG_SINGLESTEP | flags.KVM_GUESTDBG_USE_HW_BP)
        return (1 << flags.DB_VECTOR if steps else 0) | (
            1 << flags.BP_VECTOR if wanted & flags.KVM_GUESTDBG_USE_SW_BP else 0
        )

    def _update_exception_bitmap(self) -> None:
        """vmx_update_exception_bitmap(). Without EPT #PF exits while shadow tables are in use."""
        faults = 0 if self.shadow is None else self.cpu.vmread(Field.EXCEPTION_BITMAP) & 1 << flags.PF_VECTOR
        self.cpu.vmwrite(Field.EXCEPTION_BITMAP, 1 << UD_VECTOR | faults | self._debugger_wants())

    def get_xsave(self) -> bytes:
        return self.cpu.get_xsave()

    def set_xsave(self, area: bytes) -> None:
        self.cpu.set_xsave(area)

    def get_msr(self, index: int) -> int | None:
        if index == MSR_EFER:
            return self.get_control("efer")
        if (field := MSR_FIELDS.get(index)) is not None:
            return self.cpu.vmread(field)
        return self.cpu.get_msr(index)

    def set_msr(self, index: int, value: int) -> bool:
        if index == 0xC000_0080:
            if value & ~EFER_VALID:
                return False
            # LMA follows paging, not the write.
            self.set_control("efer", value & ~c.EFER_LMA | self.get_control("efer") & c.EFER_LMA)
            return True
        if index == MSR_DEBUGCTL:
            # vmx_get_supported_debugctl(): nothing. These two are dropped all the same, as it is 0 at each entry.
            return not value & ~(DEBUGCTL_LBR | DEBUGCTL_BTF)
        if (field := MSR_FIELDS.get(index)) is not None:
            self.cpu.vmwrite(field, value)
            return True
        return self.cpu.set_msr(index, value)

    def msr_filter_changed(self) -> None:
        """vmx_msr_filter_changed(): MSRs that are filtered exit."""
        chosen = self.vcpu.kvm.msr_filter
        for index in PASSED_THROUGH:
            read, write = (chosen is None or chosen.allows(index, access) for access in (READ, WRITE))
            self.cpu.pass_msr_through(index, read, write)

    def set_tsc_offset(self, offset: int) -> None:
        self.cpu.vmwrite(Field.TSC_OFFSET, offset)

    def set_tsc_multiplier(self, ratio: int) -> None:
        self.cpu.vmwrite(Field.TSC_MULTIPLIER, ratio)
        old = self.cpu.vmread(Field.SECONDARY_VM_EXEC_CONTROL) & ~c.SECOND_TSC_SCALING
        scaled = c.SECOND_TSC_SCALING if ratio != 1 << 48 else 0
        self.cpu.vmwrite(Field.SECONDARY_VM_EXEC_CONTROL, old | scaled)

    def set_cpuid(self, entries: list[kvm_cpuid_entry2]) -> None:
        self.cpu.set_cpuid(entries)
        if self.shadow is None:  # what the guest may not set exits, and becomes #GP
            self.cpu.vmwrite(Field.CR4_GUEST_HOST_MASK, c.CR4_VMXE | CR4_VALID & ~self.vcpu.cr4_valid)

    # ---- events ----------------------------------------------------------------------------------------

    def interrupt_allowed(self) -> bool:
        return bool(self.get_rflags() & c.RFLAGS_IF) and not self.get_interrupt_shadow()

    def nmi_allowed(self) -> bool:
        return not self.cpu.vmread(Field.GUEST_INTERRUPTIBILITY_INFO) & (c.SHADOW_STI | c.SHADOW_MOV_SS | c.BLOCKED_NMI)

    def get_interrupt_shadow(self) -> int:
        """KVM_X86_SHADOW_INT_*: bit 0 MOV SS, bit 1 STI; the VMCS has them the other way round."""
        bits = self.cpu.vmread(Field.GUEST_INTERRUPTIBILITY_INFO)
        return (2 if bits & c.SHADOW_STI else 0) | (1 if bits & c.SHADOW_MOV_SS else 0)

    def set_interrupt_shadow(self, bits: int) -> None:
        old = self.cpu.vmread(Field.GUEST_INTERRUPTIBILITY_INFO) & ~(c.SHADOW_STI | c.SHADOW_MOV_SS)
        new = old | (c.SHADOW_STI if bits & 2 else 0) | (c.SHADOW_MOV_SS if bits & 1 else 0)
        self.cpu.vmwrite(Field.GUEST_INTERRUPTIBILITY_INFO, new)

    def get_nmi_mask(self) -> bool:
        return bool(self.cpu.vmread(Field.GUEST_INTERRUPTIBILITY_INFO) & c.BLOCKED_NMI)

    def set_nmi_mask(self, masked: bool) -> None:
        old = self.cpu.vmread(Field.GUEST_INTERRUPTIBILITY_INFO) & ~c.BLOCKED_NMI
        self.cpu.vmwrite(Field.GUEST_INTERRUPTIBILITY_INFO, old | (c.BLOCKED_NMI if masked else 0))

    def enable_irq_window(self) -> None:
        self._window(c.PROC_INTERRUPT_WINDOW, True)

    def enable_nmi_window(self) -> None:
        self._window(c.PROC_NMI_WINDOW, True)

    def inject_irq(self, vector: int) -> None:
        self.cpu.vmwrite(Field.VM_ENTRY_INTR_INFO_FIELD, c.INFO_VALID | c.TYPE_EXTERNAL | vector)

    def inject_nmi(self) -> None:
        self.cpu.vmwrite(Field.VM_ENTRY_INTR_INFO_FIELD, c.INFO_VALID | c.TYPE_NMI | 2)

    def inject_exception(self, exception: QueuedException) -> None:
        info = c.INFO_VALID | c.TYPE_EXCEPTION | exception.vector
        self.vcpu.deliver_payload(exception)
        if exception.error_code is not None and self.get_control("cr0") & 1:
            info |= c.INFO_ERROR_CODE
            self.cpu.vmwrite(Field.VM_ENTRY_EXCEPTION_ERROR_CODE, exception.error_code)
        if exception.vector in (3, 4):
            info = info & ~c.TYPE_EXCEPTION | c.TYPE_SOFT_EXCEPTION
            self.cpu.vmwrite(Field.VM_ENTRY_INSTRUCTION_LEN, 1)
        self.cpu.vmwrite(Field.VM_ENTRY_INTR_INFO_FIELD, info)

    def flush_tlb(self) -> None:
        self.cpu.invalidate(self.vcpu.kvm.mmu.root | c.EPTP_WRITE_BACK | c.EPTP_FOUR_LEVELS)

    def run(self) -> None:
        """vmx_vcpu_run(): enter, and stay until the VM exit."""
        if self.vcpu.guest_debug & flags.KVM_GUESTDBG_SINGLESTEP:
            self._step()
        else:
            self.cpu.enter()
        self._exited()

    def after_reentry(self) -> None:
        """The end of run(), after reentry.reenter() did the rest of it."""
        self.cpu.outcome()
        self._exited()

    def _exited(self) -> None:
        if self.cpu.vmread(Field.VM_EXIT_REASON) & FAILED_ENTRY:
            self.cancel_injection()
        else:
            self.complete_interrupts()

    def _step(self) -> None:
        """One instruction, whose end is a #DB. The guest's own trap flag comes back behind it."""
        old = self.cpu.vmread(Field.GUEST_RFLAGS)
        self.cpu.vmwrite(Field.GUEST_RFLAGS, old | RFLAGS_TF)
        self.set_interrupt_shadow(0)
        self.cpu.enter()
        self.cpu.vmwrite(Field.GUEST_RFLAGS, self.cpu.vmread(Field.GUEST_RFLAGS) & ~RFLAGS_TF | old & RFLAGS_TF)

    def kick(self) -> None:
        self.vcpu.arch.kick()
