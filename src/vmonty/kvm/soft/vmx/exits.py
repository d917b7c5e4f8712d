"""VM exits: what happened and what is done about it. One handler per reason, named as in vmx.c.

A handler returns True to enter the guest again, False to leave to user space with kvm_run filled in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from vmonty.cpu.vmcs import Field
from vmonty.kvm.soft.emulate import Emulator
from vmonty.kvm.soft.mmu.guest_walk import walk
from vmonty.kvm.soft.msr_filter import reason
from vmonty.kvm.soft.stats import (
    HYPERCALLS,
    INSN_EMULATION_FAIL,
    IO_EXITS,
    IRQ_EXITS,
    IRQ_WINDOW_EXITS,
    NMI_WINDOW_EXITS,
    PF_EMULATE,
    PF_FIXED,
    PF_TAKEN,
)
from vmonty.kvm.soft.vcpu_state import QueuedException
from vmonty.kvm.soft.vmx import controls as c
from vmonty.kvm.soft.vmx.processor import Processor
from vmonty.kvm.uapi import Exit, flags
from vmonty.kvm.uapi.vcpu import kvm_cpuid_entry2

if TYPE_CHECKING:
    from vmonty.kvm.soft.x86 import VcpuX86

RAX, RCX, RDX, RBX, RSI, RDI = 0, 1, 2, 3, 6, 7
UD_VECTOR, GP_VECTOR = 6, 13
FAILED_ENTRY = 1 << 31
MASK32 = 0xFFFF_FFFF
EPT_WRITE_ACCESS, EPT_FETCH, EPT_FINAL = 2, 4, 1 << 8
MAX_INSTRUCTION = 15
VMMCALL = b"\x0f\x01\xd9"
AR_LONG = 1 << 13
DR6_ACTIVE_LOW = 0xFFFF_0FF0
# What hypercalls answer, negated. asm/kvm_para.h.
KVM_EPERM, KVM_EINVAL, KVM_ENOSYS = 1, 22, 1000
CR4_OSXSAVE, FEATURE_OSXSAVE = 1 << 18, 1 << 27
CR0_PE, CR0_ET, CR0_NW, CR0_CD, CR0_PG = 1, 1 << 4, 1 << 29, 1 << 30, 1 << 31
CR4_PAE, EFER_LME = 1 << 5, 1 << 8

Handler = Callable[["VmxExits"], bool]


class VmxExits:
    """The handlers, and what they need of the VMCS."""

    unrestricted = True

    def __init__(self, vcpu: VcpuX86, cpu: Processor) -> None:
        self.vcpu = vcpu
        self.cpu = cpu
        self.emulator = Emulator(vcpu, cpu)
        self.leaves: dict[tuple[int, int | None], kvm_cpuid_entry2] = {}

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
        self.vcpu.note_step()

    def _set32(self, number: int, value: int) -> None:
        self.cpu.set_gpr(number, value & MASK32)

    def _window(self, control: int, on: bool) -> None:
        old = self.cpu.vmread(Field.CPU_BASED_VM_EXEC_CONTROL)
        self.cpu.vmwrite(Field.CPU_BASED_VM_EXEC_CONTROL, old | control if on else old & ~control)

    def complete_interrupts(self) -> None:
        """vmx_complete_interrupts(): an event whose delivery was cut short is queued again."""
        info = self.cpu.vmread(Field.IDT_VECTORING_INFO_FIELD)
        if not info & c.INFO_VALID:
            return
        vector = info & c.INFO_VECTOR
        match info & c.INFO_TYPE:
            case c.TYPE_EXTERNAL:
                self.vcpu.interrupt_injected = vector
            case c.TYPE_NMI:
                self.vcpu.nmi_injected = True
                old = self.cpu.vmread(Field.GUEST_INTERRUPTIBILITY_INFO)
                self.cpu.vmwrite(Field.GUEST_INTERRUPTIBILITY_INFO, old & ~c.BLOCKED_NMI)
            case c.TYPE_EXCEPTION:
                code = self.cpu.vmread(Field.IDT_VECTORING_ERROR_CODE) if info & c.INFO_ERROR_CODE else None
                self.vcpu.exception = QueuedException(vector, code, pending=False)
            case _:
                pass  # INT n, INT3, INTO: rip is still at the instruction, which runs again

    def handle_exit(self) -> bool:
        """vmx_handle_exit()."""
        reason = self.cpu.vmread(Field.VM_EXIT_REASON)
        if reason & FAILED_ENTRY:
            return self._fail_entry(reason)
        handler = self.HANDLERS.get(reason & 0xFFFF)
        if handler is None:
            return self._internal_error(flags.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, [reason, self.vcpu.vcpu_id])
        return handler(self)

    def _fail_entry(self, reason: int) -> bool:
        run = self.vcpu.run
        run.exit_reason = Exit.FAIL_ENTRY
        run.u.fail_entry.hardware_entry_failure_reason = reason
        run.u.fail_entry.cpu = 0
        return False

    def _internal_error(self, suberror: int, data: list[int]) -> bool:
        run = self.vcpu.run
        run.exit_reason = Exit.INTERNAL_ERROR
        run.u.internal.suberror, run.u.internal.ndata = suberror, len(data)
        run.u.internal.data[: len(data)] = [*data]
        return False

    def _gp(self) -> bool:
        self.vcpu.queue_exception(GP_VECTOR, 0)
        return True

    def _ud(self) -> bool:
        self.vcpu.queue_exception(UD_VECTOR)
        return True

    def handle_external_interrupt(self) -> bool:
        """The host wanted the processor: a kick. The loop looks for what it was."""
        self.vcpu.stats.values[IRQ_EXITS] += 1
        return True

    def handle_triple_fault(self) -> bool:
        self.vcpu.run.exit_reason = Exit.SHUTDOWN
        return False

    def handle_interrupt_window(self) -> bool:
        self.vcpu.stats.values[IRQ_WINDOW_EXITS] += 1
        self._window(c.PROC_INTERRUPT_WINDOW, False)
        return True

    def handle_nmi_window(self) -> bool:
        self.vcpu.stats.values[NMI_WINDOW_EXITS] += 1
        self._window(c.PROC_NMI_WINDOW, False)
        return True

    def handle_cpuid(self) -> bool:
        function, index = self.cpu.get_gpr(RAX) & MASK32, self.cpu.get_gpr(RCX) & MASK32
        eax, ebx, ecx, edx = self.cpuid(function, index)
        self._set32(RAX, eax)
        self._set32(RBX, ebx)
        self._set32(RCX, ecx)
        self._set32(RDX, edx)
        self._skip()
        return True

    def cpuid(self, function: int, index: int) -> tuple[int, int, int, int]:
        """kvm_cpuid(): the guest's leaf; beyond the highest one, as Intel does, the highest basic leaf."""
        entry = self.leaves.get((function, index)) or self.leaves.get((function, None))
        if entry is None:
            base = function & 0x8000_0000
            highest = max(
                (leaf for leaf, _ in self.leaves if leaf & 0x8000_0000 == base and leaf >> 16 != 0x4000), default=0
            )
            if not base and function > highest:
                entry = self.leaves.get((highest, index)) or self.leaves.get((highest, None))
        if entry is None:
            return 0, 0, (index & 0xFF if function in (0xB, 0x1F) else 0), 0
        ecx = entry.ecx
        if function == 1:
            os_xsave = self.cpu.vmread(Field.GUEST_CR4) & CR4_OSXSAVE
            ecx = ecx & ~FEATURE_OSXSAVE | (FEATURE_OSXSAVE if os_xsave else 0)
        return entry.eax, entry.ebx, ecx, entry.edx

    def handle_halt(self) -> bool:
        self._skip()
        return self.vcpu.halt()

    def handle_skip(self) -> bool:
        """INVD, WBINVD, PAUSE, MONITOR, MWAIT: nothing to do."""
        self._skip()
        return True

    def handle_invalid_op(self) -> bool:
        return self._ud()

    def handle_rdpmc(self) -> bool:
        return self._gp()

    def handle_exception_nmi(self) -> bool:
        """Exceptions that are intercepted: #UD for AMD's VMMCALL, #DB and #BP for user space's debugger."""
        vector = self.cpu.vmread(Field.VM_EXIT_INTR_INFO) & c.INFO_VECTOR
        if vector == UD_VECTOR:
            code = self._fetch(self.cpu.vmread(Field.GUEST_RIP) + self.cpu.vmread(Field.GUEST_CS_BASE))
            return self._hypercall(len(VMMCALL)) if code.startswith(VMMCALL) else self._ud()
        dr6 = self.cpu.vmread(Field.EXIT_QUALIFICATION) if vector == flags.DB_VECTOR else 0
        return self.vcpu.debug_exit(vector, dr6 | DR6_ACTIVE_LOW, self.cpu.vmread(Field.GUEST_DR7))

    def handle_dr(self) -> bool:
        """MOV DR, while user space's debugger has the registers. SDM, "Exit Qualification for MOV DR"."""
        qualification = self.cpu.vmread(Field.EXIT_QUALIFICATION)
        number, register = qualification & 7, qualification >> 8 & 15
        vendor = self.vcpu.vendor
        if number in (4, 5):
            number += 2
        if qualification >> 4 & 1:
            vendor.set_gpr(register, vendor.get_debug(number))
        else:
            value = vendor.get_gpr(register)
            if number >= 6 and value >> 32:
                return self._gp()
            vendor.set_debug(number, value)
        self._skip()
        return True

    def handle_vmcall(self) -> bool:
        return self._hypercall(self.cpu.vmread(Field.VM_EXIT_INSTRUCTION_LEN))

    def _hypercall(self, length: int) -> bool:
        """kvm_emulate_hypercall(), of an instruction of *length* bytes.

        -KVM_ENOSYS for what is not known, -KVM_EPERM outside of CPL 0. Linux patches the other vendor's instruction;
        here the guest's code stays as it is.
        """
        vcpu = self.vcpu
        vcpu.stats.values[HYPERCALLS] += 1
        is_long = bool(self.cpu.vmread(Field.GUEST_CS_AR_BYTES) & AR_LONG)
        mask = (1 << 64) - 1 if is_long else MASK32

        def answer(value: int) -> bool:
            self.cpu.set_gpr(RAX, value & mask)
            self._skip_bytes(length)
            return True

        if self.cpu.vmread(Field.GUEST_SS_AR_BYTES) >> 5 & 3:
            return answer(-KVM_EPERM)
        number, gpa, npages, attributes = (self.cpu.get_gpr(register) & mask for register in (RAX, RBX, RCX, RDX))
        if number != flags.KVM_HC_MAP_GPA_RANGE or not vcpu.kvm.hypercall_exit_enabled >> number & 1:
            return answer(-KVM_ENOSYS)
        if gpa & 0xFFF or not npages or (gpa >> 12) + npages >> 64:
            return answer(-KVM_EINVAL)
        return vcpu.hypercall_exit(number, [gpa, npages, attributes], is_long, answer)

    def handle_cr(self) -> bool:
        """CR accesses that exit: CR4 bits that we own, CR8. SDM, "Exit Qualification for Control-Register Accesses"."""
        qualification = self.cpu.vmread(Field.EXIT_QUALIFICATION)
        number, kind, register = qualification & 15, qualification >> 4 & 3, qualification >> 8 & 15
        vendor = self.vcpu.vendor
        if number == 8:
            if kind == 1:
                vendor.set_gpr(register, self.vcpu.get_cr8())
                self._skip()
                return True
            value = vendor.get_gpr(register)
            if value >> 4:
                return self._gp()
            self.vcpu.set_cr8(value)
            self._skip()
            if self.vcpu.apic is not None:
                return True
            self.vcpu.run.exit_reason = Exit.SET_TPR
            return False
        if number == 4 and kind == 0:
            value = vendor.get_gpr(register)
            if not vendor.valid_controls(vendor.get_control("cr0"), value, vendor.get_control("efer")):
                return self._gp()
            vendor.set_control("cr4", value)
            vendor.flush_tlb()
            self._skip()
            return True
        if number == 0:
            return self._handle_cr0(qualification, kind, register)
        return self._internal_error(flags.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, [28, qualification])

    def _handle_cr0(self, qualification: int, kind: int, register: int) -> bool:
        """handle_set_cr0(): MOV, CLTS and LMSW where NE, which VMX wants set, would change."""
        vendor = self.vcpu.vendor
        old = vendor.get_control("cr0")
        if kind == 0:
            value = vendor.get_gpr(register) & 0xFFFF_FFFF_FFFF_FFFF
        elif kind == 2:
            value = old & ~8
        else:
            value = old & ~0xE | qualification >> 16 & 0xF
        if value >> 32 or (value & CR0_PG and not value & CR0_PE) or (value & CR0_NW and not value & CR0_CD):
            return self._gp()
        if (old ^ value) & CR0_PG:
            efer = vendor.get_control("efer")
            if value & CR0_PG and efer & EFER_LME:
                if not vendor.get_control("cr4") & CR4_PAE or vendor.get_segment("cs").l:
                    return self._gp()
                vendor.set_control("efer", efer | c.EFER_LMA)
            elif not value & CR0_PG:
                vendor.set_control("efer", efer & ~c.EFER_LMA)
        vendor.set_control("cr0", value | CR0_ET)
        vendor.flush_tlb()
        self._skip()
        return True

    def handle_io(self) -> bool:
        """IN, OUT, INS, OUTS. SDM, "Exit Qualification for I/O Instructions"."""
        self.vcpu.stats.values[IO_EXITS] += 1
        qualification = self.cpu.vmread(Field.EXIT_QUALIFICATION)
        size, is_in, is_string = (qualification & 7) + 1, qualification >> 3 & 1, qualification >> 4 & 1
        port = qualification >> 16 & 0xFFFF
        if is_string:
            return self._string_io(port, size, bool(is_in), bool(qualification >> 5 & 1))
        if not is_in:
            data = (self.cpu.get_gpr(RAX) & MASK32).to_bytes(4, "little")[:size]
            self._skip()
            return self.vcpu.port_out(port, size, data)
        return self.vcpu.port_in(port, size, 1, self._complete_in)

    def _complete_in(self, data: bytes) -> bool:
        """complete_fast_pio_in()."""
        mask = (1 << 8 * len(data)) - 1
        old = self.cpu.get_gpr(RAX) if len(data) < 4 else 0
        self.cpu.set_gpr(RAX, old & ~mask | int.from_bytes(data, "little"))
        self._skip()
        return True

    def _string_io(self, port: int, size: int, is_in: bool, repeated: bool) -> bool:
        """Emulate up to a page of INS or OUTS; the instruction runs again for the rest."""
        vendor = self.vcpu.vendor
        bits = self.address_bits()
        mask = (1 << bits) - 1
        left = vendor.get_gpr(RCX) & mask if repeated else 1
        if left == 0:
            self._skip()
            return True
        pointer = RDI if is_in else RSI
        backwards = bool(vendor.get_rflags() & 0x400)
        linear = self.cpu.vmread(Field.GUEST_LINEAR_ADDRESS)
        # One element across a page boundary, or what lies in this page.
        room = (linear & 0xFFF) // size + 1 if backwards else (0x1000 - (linear & 0xFFF)) // size
        count = max(1, min(left, room, 1024))

        def advance() -> None:
            step = -size * count if backwards else size * count
            old = vendor.get_gpr(pointer)
            vendor.set_gpr(pointer, old & ~mask | (old + step) & mask)
            if repeated:
                old = vendor.get_gpr(RCX)
                vendor.set_gpr(RCX, old & ~mask | (left - count) & mask)
            if not repeated or left == count:
                self._skip()

        start = linear - size * (count - 1) if backwards else linear
        if is_in:

            def done(data: bytes) -> bool:
                self.write_linear(start, _reversed(data, size) if backwards else data)
                advance()
                return True

            return self.vcpu.port_in(port, size, count, done)
        fetched = self.read_linear(start, size * count)
        if fetched is None:
            return self._internal_error(flags.KVM_INTERNAL_ERROR_EMULATION, [])
        advance()
        return self.vcpu.port_out(port, size, _reversed(fetched, size) if backwards else fetched)

    def handle_rdmsr(self) -> bool:
        index = self.cpu.get_gpr(RCX) & MASK32
        try:
            value = self.vcpu.read_guest_msr(index)
        except OSError as error:
            return self._msr_refused(error, Exit.X86_RDMSR, index, 0, self._complete_rdmsr)
        return self._complete_rdmsr(value)

    def _complete_rdmsr(self, value: int) -> bool:
        self._set32(RAX, value)
        self._set32(RDX, value >> 32)
        self._skip()
        return True

    def handle_wrmsr(self) -> bool:
        value = self.cpu.get_gpr(RAX) & MASK32 | (self.cpu.get_gpr(RDX) & MASK32) << 32
        index = self.cpu.get_gpr(RCX) & MASK32
        try:
            self.vcpu.write_guest_msr(index, value)
        except OSError as error:
            return self._msr_refused(error, Exit.X86_WRMSR, index, value, self._complete_wrmsr)
        return self._complete_wrmsr(value)

    def _complete_wrmsr(self, _value: int) -> bool:
        self._skip()
        return True

    def _msr_refused(
        self, error: OSError, exit_reason: Exit, index: int, data: int, done: Callable[[int], bool]
    ) -> bool:
        """#GP, or with KVM_CAP_X86_USER_SPACE_MSR what user space says: *done* with its value."""
        why = reason(error)
        if not self.vcpu.kvm.user_space_msr_mask & why:
            return self._gp()
        self.vcpu.msr_exit(exit_reason, why, index, data, lambda value: self._gp() if value is None else done(value))
        return False

    def handle_xsetbv(self) -> bool:
        value = self.cpu.get_gpr(RAX) & MASK32 | (self.cpu.get_gpr(RDX) & MASK32) << 32
        if self.cpu.get_gpr(RCX) & MASK32 or value & ~7 or not value & 1 or value & 6 == 4:
            return self._gp()
        self.cpu.set_control("xcr0", value)
        self._skip()
        return True

    def handle_ept_violation(self) -> bool:
        """A page that is not mapped yet, or no memory at all."""
        gpa = self.cpu.vmread(Field.GUEST_PHYSICAL_ADDRESS)
        access = self.cpu.vmread(Field.EXIT_QUALIFICATION)
        counters = self.vcpu.stats.values
        counters[PF_TAKEN] += 1
        if self.vcpu.kvm.mmu.page_fault(gpa, bool(access & EPT_WRITE_ACCESS)):
            counters[PF_FIXED] += 1
            return True
        counters[PF_EMULATE] += 1
        if access & EPT_FETCH or not access & EPT_FINAL:
            # Code, or a page table, where no memory is.
            return self._emulation_failure()
        return self.emulator.emulate()

    def _emulation_failure(self) -> bool:
        """prepare_emulation_failure_exit()."""
        self.vcpu.stats.values[INSN_EMULATION_FAIL] += 1
        code = self._fetch(self.cpu.vmread(Field.GUEST_RIP) + self.cpu.vmread(Field.GUEST_CS_BASE))
        run = self.vcpu.run
        run.exit_reason = Exit.INTERNAL_ERROR
        failure = run.u.emulation_failure
        failure.suberror, failure.ndata = flags.KVM_INTERNAL_ERROR_EMULATION, 3
        failure.flags = flags.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
        failure.u.u.insn_size = len(code)
        failure.u.u.insn_bytes[: len(code)] = list(code)
        return False

    def address_bits(self) -> int:
        """The address size of the string I/O instruction. SDM, "VM-Exit Instruction-Information Field"."""
        return (16, 32, 64)[min(self.cpu.vmread(Field.VMX_INSTRUCTION_INFO) >> 7 & 7, 2)]

    # ---- guest memory by linear address ---------------------------------------------------------------

    def gva_to_gpa(self, linear: int) -> int | None:
        """Walk the guest's page tables."""
        read = self.cpu.vmread
        return walk(
            self.vcpu.kvm, linear, read(Field.GUEST_CR0), read(Field.GUEST_CR3), read(Field.GUEST_CR4),
            read(Field.GUEST_IA32_EFER),
        ).gpa  # fmt: skip

    def read_linear(self, linear: int, size: int) -> bytes | None:
        """kvm_read_guest_virt(): None where something is not mapped."""
        data = b""
        while size:
            part = min(size, 0x1000 - (linear & 0xFFF))
            gpa = self.gva_to_gpa(linear)
            chunk = None if gpa is None else self.vcpu.kvm.read_gpa(gpa, part)
            if chunk is None:
                return None
            data += chunk
            linear, size = linear + part, size - part
        return data

    def write_linear(self, linear: int, data: bytes) -> bool:
        """kvm_write_guest_virt(): False where something is not mapped."""
        while data:
            part = min(len(data), 0x1000 - (linear & 0xFFF))
            gpa = self.gva_to_gpa(linear)
            if gpa is None or not self.vcpu.kvm.write_gpa(gpa, data[:part]):
                return False
            linear, data = linear + part, data[part:]
        return True

    def _fetch(self, linear: int) -> bytes:
        """Up to 15 bytes of code; fewer where the next page is not mapped."""
        first = min(MAX_INSTRUCTION, 0x1000 - (linear & 0xFFF))
        code = self.read_linear(linear, first) or b""
        if len(code) == first < MAX_INSTRUCTION:
            code += self.read_linear(linear + first, MAX_INSTRUCTION - first) or b""
        return code

    # Basic exit reasons. SDM, "VMX Basic Exit Reasons".
    HANDLERS: ClassVar[dict[int, Handler]] = {
        0: handle_exception_nmi,
        1: handle_external_interrupt,
        2: handle_triple_fault,
        7: handle_interrupt_window,
        8: handle_nmi_window,
        10: handle_cpuid,
        12: handle_halt,
        13: handle_skip,
        15: handle_rdpmc,
        18: handle_vmcall,
        **dict.fromkeys((*range(19, 28), 50, 53), handle_invalid_op),
        28: handle_cr,
        29: handle_dr,
        30: handle_io,
        31: handle_rdmsr,
        32: handle_wrmsr,
        36: handle_skip,
        39: handle_skip,
        40: handle_skip,
        48: handle_ept_violation,
        49: handle_ept_violation,
        54: handle_skip,
        55: handle_xsetbv,
    }


def _reversed(data: bytes, size: int) -> bytes:
    """The elements of *size* bytes in reverse order."""
    return b"".join(data[at : at + size] for at in range(len(data) - size, -1, -size))
