"""VM exits: what happened and what is done about it. One handler per reason, named as in vmx.c.

A handler returns True to enter the guest again, False to leave to user space with kvm_run filled in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from vmonty.cpu.vmcs import Field
from vmonty.kvm.soft.emulate import Emulator
from vmonty.kvm.soft.intercepts import MASK32, UD_VECTOR, Intercepts
from vmonty.kvm.soft.mmu.tdp import SPURIOUS
from vmonty.kvm.soft.mmu.two_dimensional import NestedFault, TwoDimensional
from vmonty.kvm.soft.stats import (
    IO_EXITS,
    IRQ_WINDOW_EXITS,
    NMI_WINDOW_EXITS,
    PF_EMULATE,
    PF_FIXED,
    PF_SPURIOUS,
    PF_TAKEN,
)
from vmonty.kvm.soft.vcpu_state import QueuedException
from vmonty.kvm.soft.vmx import controls as c
from vmonty.kvm.soft.vmx.processor import Processor
from vmonty.kvm.uapi import Exit, flags

if TYPE_CHECKING:
    from vmonty.kvm.soft.x86 import VcpuX86

FAILED_ENTRY, INVALID_GUEST_STATE = 1 << 31, 33
WHILE_INVALID = 64  # instructions to emulate at once
EPT_WRITE_ACCESS, EPT_FETCH, EPT_FINAL = 2, 4, 1 << 8
EPT_REASONS = (48, 49)
VMMCALL = b"\x0f\x01\xd9"
DR6_ACTIVE_LOW = 0xFFFF_0FF0

Handler = Callable[["VmxExits"], bool]


class VmxExits(Intercepts):
    """The handlers, and what they need of the VMCS."""

    unrestricted = True

    def __init__(self, vcpu: VcpuX86, cpu: Processor) -> None:
        super().__init__(vcpu)
        self.cpu = cpu
        self.emulator = Emulator(vcpu, TwoDimensional(self, cpu))
        self._emulates_invalid_state = False

    # The registers are Vmx's; here are the three that nearly every handler uses.
    def _skip(self) -> None:
        """skip_emulated_instruction()."""
        self._skip_bytes(self.cpu.vmread(Field.VM_EXIT_INSTRUCTION_LEN))

    def _skip_bytes(self, length: int) -> None:
        cpu = self.cpu
        rip = cpu.vmread(Field.GUEST_RIP) + length
        cpu.vmwrite(Field.GUEST_RIP, rip & 0xFFFF_FFFF_FFFF_FFFF)
        shadow = cpu.vmread(Field.GUEST_INTERRUPTIBILITY_INFO)
        if shadow & 3:
            cpu.vmwrite(Field.GUEST_INTERRUPTIBILITY_INFO, shadow & ~3)
        self.vcpu.note_skip()

    def _window(self, control: int, on: bool) -> None:
        old = self.cpu.vmread(Field.CPU_BASED_VM_EXEC_CONTROL)
        self.cpu.vmwrite(Field.CPU_BASED_VM_EXEC_CONTROL, old | control if on else old & ~control)

    def lost_memory(self) -> int:
        return self.cpu.lost_memory()

    def complete_interrupts(self) -> None:
        """vmx_complete_interrupts(): an event whose delivery was cut short is queued again."""
        info = self.cpu.vmread(Field.IDT_VECTORING_INFO_FIELD)
        if info & c.INFO_VALID:
            self._queue_again(info, Field.IDT_VECTORING_ERROR_CODE)

    def cancel_injection(self) -> None:
        """vmx_cancel_injection(): the entry failed, and what was to be injected is queued again."""
        info = self.cpu.vmread(Field.VM_ENTRY_INTR_INFO_FIELD)
        if info & c.INFO_VALID:
            if info & c.INFO_TYPE == c.TYPE_SOFT_EXCEPTION:  # not the guest's INT3 or INTO, which would run again
                info = info & ~c.INFO_TYPE | c.TYPE_EXCEPTION
            self._queue_again(info, Field.VM_ENTRY_EXCEPTION_ERROR_CODE)
            self.cpu.vmwrite(Field.VM_ENTRY_INTR_INFO_FIELD, 0)

    def _queue_again(self, info: int, error_code: Field) -> None:
        vector = info & c.INFO_VECTOR
        match info & c.INFO_TYPE:
            case c.TYPE_EXTERNAL:
                self.vcpu.interrupt_injected = vector
            case c.TYPE_NMI:
                self.vcpu.nmi_injected = True
                old = self.cpu.vmread(Field.GUEST_INTERRUPTIBILITY_INFO)
                self.cpu.vmwrite(Field.GUEST_INTERRUPTIBILITY_INFO, old & ~c.BLOCKED_NMI)
            case c.TYPE_EXCEPTION:
                code = self.cpu.vmread(error_code) if info & c.INFO_ERROR_CODE else None
                self.vcpu.exception = QueuedException(vector, code, pending=False)
            case _:
                pass  # INT n, INT3, INTO: rip is still at the instruction, which runs again

    def handle_exit(self) -> bool:
        """vmx_handle_exit()."""
        reason = self.cpu.vmread(Field.VM_EXIT_REASON)
        if reason & FAILED_ENTRY:
            if (self.shadow is not None or self.restricted) and reason & 0xFFFF == INVALID_GUEST_STATE:
                return self._handle_invalid_guest_state()  # with unrestricted guest it is not handled
            return self._fail_entry(reason)
        handler = self.HANDLERS.get(reason & 0xFFFF)
        if handler is None:
            return self._internal_error(flags.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, [reason, self._last_cpu()])
        return handler(self)

    def _handle_invalid_guest_state(self) -> bool:
        """handle_invalid_guest_state(): emulate until the processor takes the state; what is to be injected waits.

        An exception cannot wait, and is user space's affair: vmx_unhandleable_emulation_required(). So is a state that
        the emulator, which is the processor, does not take either.
        """
        vcpu = self.vcpu
        if self._emulates_invalid_state or (vcpu.exception is not None and not self.vm86_active):
            return self._emulation_failure_exit()
        waits = vcpu.interrupt_injected is not None or vcpu.nmi_injected
        if waits:  # what comes behind that has no window yet: it would be open, and nothing would be executed
            self._window(c.PROC_INTERRUPT_WINDOW | c.PROC_NMI_WINDOW, False)
        self._emulates_invalid_state = True
        try:
            return self.emulator.emulate(1 if waits else WHILE_INVALID)
        finally:
            self._emulates_invalid_state = False

    def _fail_entry(self, reason: int) -> bool:
        run = self.vcpu.run
        run.exit_reason = Exit.FAIL_ENTRY
        run.u.fail_entry.hardware_entry_failure_reason = reason
        run.u.fail_entry.cpu = self._last_cpu()
        return False

    def handle_interrupt_window(self) -> bool:
        self.vcpu.stats.values[IRQ_WINDOW_EXITS] += 1
        self._window(c.PROC_INTERRUPT_WINDOW, False)
        return True

    def handle_nmi_window(self) -> bool:
        self.vcpu.stats.values[NMI_WINDOW_EXITS] += 1
        self._window(c.PROC_NMI_WINDOW, False)
        return True

    def handle_tpr_below_threshold(self) -> bool:
        """The guest has lowered its task priority below what that held back, which comes now."""
        return True

    def handle_preemption_timer(self) -> bool:
        """kvm_lapic_expired_hv_timer(), where run.py cannot: somebody watches, or it is no plain interrupt."""
        if self.vcpu.apic is not None:
            self.vcpu.apic.tsc_changed()
        return True

    def handle_exception_nmi(self) -> bool:
        """Exceptions that are intercepted: #UD for AMD's VMMCALL, #DB and #BP for user space's debugger; #PF."""
        vector = self.cpu.vmread(Field.VM_EXIT_INTR_INFO) & c.INFO_VECTOR
        if vector == flags.PF_VECTOR:
            return self._shadow_fault(
                self.cpu.vmread(Field.EXIT_QUALIFICATION), self.cpu.vmread(Field.VM_EXIT_INTR_ERROR_CODE)
            )
        if vector == UD_VECTOR:
            code = self._fetch(self.cpu.vmread(Field.GUEST_RIP) + self.cpu.vmread(Field.GUEST_CS_BASE))
            return self._hypercall(len(VMMCALL)) if code.startswith(VMMCALL) else self._ud()
        dr6 = self.cpu.vmread(Field.EXIT_QUALIFICATION) if vector == flags.DB_VECTOR else 0
        return self.vcpu.debug_exit(vector, dr6 | DR6_ACTIVE_LOW, self.cpu.vmread(Field.GUEST_DR7))

    def handle_dr(self) -> bool:
        """SDM, "Exit Qualification for MOV DR"."""
        qualification = self.cpu.vmread(Field.EXIT_QUALIFICATION)
        return self._access_dr(qualification & 7, qualification >> 8 & 15, bool(qualification >> 4 & 1))

    def handle_vmcall(self) -> bool:
        return self._hypercall(self.cpu.vmread(Field.VM_EXIT_INSTRUCTION_LEN))

    def handle_cr(self) -> bool:
        """CR accesses that exit: CR4 bits that we own, CR8. SDM, "Exit Qualification for Control-Register Accesses"."""
        qualification = self.cpu.vmread(Field.EXIT_QUALIFICATION)
        number, kind, register = qualification & 15, qualification >> 4 & 3, qualification >> 8 & 15
        vendor = self.vcpu.vendor
        if number == 8:
            return self._read_cr8(register) if kind == 1 else self._write_cr8(register)
        if kind == 1:
            vendor.set_gpr(register, vendor.get_control(f"cr{number}"))
            self._skip()
            return True
        if kind == 0:
            value = vendor.get_gpr(register)
            return self._mov_to_cr(number, value if vendor.get_segment("cs").l else value & MASK32)
        old = vendor.get_control("cr0")  # CLTS, LMSW
        return self._mov_to_cr(0, old & ~8 if kind == 2 else old & ~0xE | qualification >> 16 & 0xF)

    def handle_invlpg(self) -> bool:
        return self._invlpg(self.cpu.vmread(Field.EXIT_QUALIFICATION))

    def handle_invpcid(self) -> bool:
        """Everything is synchronized; the instruction itself, with its faults, executes over the EPT."""
        if self.shadow is not None:
            self.shadow.flush()
        return self.emulator.emulate()

    def nested_fault(self) -> NestedFault | None:
        """What the EPT refused, if that is the exit; an event that was on its way is injected again."""
        read = self.cpu.vmread
        if read(Field.VM_EXIT_REASON) not in EPT_REASONS:
            return None
        if (info := read(Field.IDT_VECTORING_INFO_FIELD)) & c.INFO_VALID:
            self.cpu.vmwrite(Field.VM_ENTRY_INTR_INFO_FIELD, info)
            self.cpu.vmwrite(Field.VM_ENTRY_EXCEPTION_ERROR_CODE, read(Field.IDT_VECTORING_ERROR_CODE))
            self.cpu.vmwrite(Field.VM_ENTRY_INSTRUCTION_LEN, read(Field.VM_EXIT_INSTRUCTION_LEN))
        access = read(Field.EXIT_QUALIFICATION)
        return NestedFault(
            read(Field.GUEST_PHYSICAL_ADDRESS), bool(access & EPT_WRITE_ACCESS), bool(access & EPT_FETCH),
            not access & EPT_FINAL,
        )  # fmt: skip

    def enter_two_dimensional(self, step: bool) -> None:
        raise AssertionError("Vmx has it")

    def leave_two_dimensional(self) -> None:
        raise AssertionError("Vmx has it")

    def handle_io(self) -> bool:
        """IN, OUT, INS, OUTS. SDM, "Exit Qualification for I/O Instructions"."""
        qualification = self.cpu.vmread(Field.EXIT_QUALIFICATION)
        size, is_in, is_string = (qualification & 7) + 1, bool(qualification >> 3 & 1), qualification >> 4 & 1
        port = qualification >> 16 & 0xFFFF
        if not is_string:
            return self._port_io(port, size, is_in)
        self.vcpu.stats.values[IO_EXITS] += 1
        linear = self.cpu.vmread(Field.GUEST_LINEAR_ADDRESS)
        return self._string_io(port, size, is_in, bool(qualification >> 5 & 1), self.address_bits(), linear)

    def handle_ept_violation(self) -> bool:
        """A page that is not mapped yet, or no memory at all."""
        gpa = self.cpu.vmread(Field.GUEST_PHYSICAL_ADDRESS)
        access = self.cpu.vmread(Field.EXIT_QUALIFICATION)
        counters = self.vcpu.stats.values
        counters[PF_TAKEN] += 1
        write = bool(access & EPT_WRITE_ACCESS)
        if self.vcpu.page_absent(gpa):
            return True
        if came_to := self.vcpu.page_fault(gpa, write, walk=not access & EPT_FINAL):
            counters[PF_SPURIOUS if came_to == SPURIOUS else PF_FIXED] += 1
            return True
        counters[PF_EMULATE] += 1
        if access & EPT_FETCH or not access & EPT_FINAL:
            # Code, or a page table, where no memory is.
            return self.emulation_failure()
        return self.emulator.emulate()

    def address_bits(self) -> int:
        """The address size of the string I/O instruction. SDM, "VM-Exit Instruction-Information Field"."""
        return (16, 32, 64)[min(self.cpu.vmread(Field.VMX_INSTRUCTION_INFO) >> 7 & 7, 2)]

    # Basic exit reasons. SDM, "VMX Basic Exit Reasons".
    HANDLERS: ClassVar[dict[int, Handler]] = {
        0: handle_exception_nmi,
        1: Intercepts.handle_external_interrupt,
        2: Intercepts.handle_triple_fault,
        7: handle_interrupt_window,
        8: handle_nmi_window,
        10: Intercepts.handle_cpuid,
        12: Intercepts.handle_halt,
        13: Intercepts.handle_skip,
        14: handle_invlpg,
        15: Intercepts.handle_rdpmc,
        18: handle_vmcall,
        **dict.fromkeys((*range(19, 28), 50, 53), Intercepts.handle_invalid_op),
        28: handle_cr,
        29: handle_dr,
        30: handle_io,
        31: Intercepts.handle_rdmsr,
        32: Intercepts.handle_wrmsr,
        36: Intercepts.handle_skip,
        39: Intercepts.handle_skip,
        40: Intercepts.handle_skip,
        43: handle_tpr_below_threshold,
        52: handle_preemption_timer,
        48: handle_ept_violation,
        49: handle_ept_violation,
        54: Intercepts.handle_skip,
        55: Intercepts.handle_xsetbv,
        58: handle_invpcid,
    }
