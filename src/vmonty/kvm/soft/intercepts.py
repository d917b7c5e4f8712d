"""What instructions that exit do, whichever vendor's exit it was: CPUID, MSRs, hypercalls, port I/O, XSETBV, CR8.

A handler returns True to enter the guest again, False to leave to user space with kvm_run filled in. Source:
arch/x86/kvm/x86.c: kvm_emulate_cpuid(), kvm_emulate_rdmsr(), kvm_emulate_hypercall(), kvm_fast_pio() and their like.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmonty.kvm.soft.cpuid import CR0_VALID, CR4_LA57
from vmonty.kvm.soft.emulate import Emulator
from vmonty.kvm.soft.mmu.context import MmuContext
from vmonty.kvm.soft.mmu.guest_walk import walk
from vmonty.kvm.soft.mmu.shadow import Outcome
from vmonty.kvm.soft.msr_filter import reason
from vmonty.kvm.soft.pv import KVM_EINVAL, KVM_ENOSYS, KVM_EPERM
from vmonty.kvm.soft.stats import HYPERCALLS, INSN_EMULATION_FAIL, INVLPG, IO_EXITS, IRQ_EXITS
from vmonty.kvm.soft.string_io import StringIo
from vmonty.kvm.uapi import Exit, flags

if TYPE_CHECKING:
    from vmonty.kvm.soft.x86 import VcpuX86

RAX, RCX, RDX, RBX, RSP, RSI, RDI = 0, 1, 2, 3, 4, 6, 7
NOP = b"\x90"
UD_VECTOR, GP_VECTOR = 6, 13
MASK32 = 0xFFFF_FFFF
MAX_INSTRUCTION = 15
CR4_OSXSAVE, FEATURE_OSXSAVE = 1 << 18, 1 << 27
APIC_BASE_ENABLE, FEATURE_APIC = 1 << 11, 1 << 9
CR0_PE, CR0_ET, CR0_NW, CR0_CD, CR0_PG = 1, 1 << 4, 1 << 29, 1 << 30, 1 << 31
CR4_PAE, CR4_PCIDE, EFER_LME, EFER_LMA = 1 << 5, 1 << 17, 1 << 8, 1 << 10
CR3_NO_FLUSH, CR3_LONG_RESERVED = 1 << 63, ~((1 << 46) - 1)
# Instructions to execute over two-dimensional tables where the guest writes its own root.
WHILE_TABLES_CHANGE = 512
CONTROLS = ("cr0", "cr3", "cr4", "efer")


class Intercepts:
    """The handlers that need nothing of the VMCS or VMCB."""

    emulator: Emulator
    # EPT without unrestricted guest: see vmx/rmode.py.
    restricted = False

    def __init__(self, vcpu: VcpuX86) -> None:
        self.vcpu = vcpu
        # Without two-dimensional paging: the shadow MMU, and the guest's view of the registers that paging needs.
        self.shadow: MmuContext | None = None
        self.two_dimensional = False  # while the emulator steps
        self.vm86_active = False  # the guest's real mode is the processor's virtual-8086 mode
        self.guest_controls = dict.fromkeys(CONTROLS, 0)

    def _skip(self) -> None:
        """skip_emulated_instruction(): the one that exited."""
        raise AssertionError("the vendor has it")

    def _skip_bytes(self, length: int) -> None:
        raise AssertionError("the vendor has it")

    def _linear_rip(self) -> int:
        vendor = self.vcpu.vendor
        segment = vendor.get_segment("cs")
        return vendor.get_rip() if segment.l else vendor.get_rip() + segment.base & MASK32

    def _last_cpu(self) -> int:
        """last_vmentry_cpu."""
        pcpu = self.vcpu.vendor.pcpu
        return 0 if pcpu is None else pcpu.number

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
        """The host wanted the processor: a kick. The loop looks for what it was. Raises OSError: EFAULT."""
        self.vcpu.stats.values[IRQ_EXITS] += 1
        if hva := self.lost_memory():
            self._memory_fault(hva)
        return True

    def lost_memory(self) -> int:
        """Where the guest met host memory that is gone, if that was the exit; else 0. See cpu.vmx.Vmx.lost_memory()."""
        raise AssertionError("the vendor has it")

    def _memory_fault(self, hva: int) -> None:
        """kvm_handle_error_pfn(), kvm_prepare_memory_fault_exit(): nothing is mapped there, or the file ends before."""
        gpa = self.vcpu.kvm.memslots.gpa(hva)
        if gpa is None:
            raise RuntimeError(f"the processor met no memory at {hva:#x}, which is not the guest's: a defect of ours")
        run = self.vcpu.run
        run.exit_reason = Exit.MEMORY_FAULT
        fault = run.u.memory_fault
        fault.flags, fault.gpa, fault.size = 0, gpa & ~0xFFF, 0x1000
        raise OSError(errno.EFAULT, "the memory behind a slot is gone")

    def handle_cpuid(self) -> bool:
        function, index = self.vcpu.vendor.get_gpr(RAX) & MASK32, self.vcpu.vendor.get_gpr(RCX) & MASK32
        eax, ebx, ecx, edx = self.cpuid(function, index)
        self._set32(RAX, eax)
        self._set32(RBX, ebx)
        self._set32(RCX, ecx)
        self._set32(RDX, edx)
        self._skip()
        return True

    def cpuid(self, function: int, index: int) -> tuple[int, int, int, int]:
        """kvm_cpuid(): the guest's leaf."""
        eax, ebx, ecx, edx = self.vcpu.arch.cpuid(function, index)
        if function == 1:
            os_xsave = self.vcpu.vendor.get_control("cr4") & CR4_OSXSAVE
            ecx = ecx & ~FEATURE_OSXSAVE | (FEATURE_OSXSAVE if os_xsave else 0)
            if not self.vcpu.get_apic_base() & APIC_BASE_ENABLE:
                edx &= ~FEATURE_APIC
        return eax, ebx, ecx, edx

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

    def _hypercall(self, length: int) -> bool:
        """kvm_emulate_hypercall(), of an instruction of *length* bytes.

        -KVM_ENOSYS for what is not known, -KVM_EPERM outside of CPL 0. Linux patches the other vendor's instruction;
        here the guest's code stays as it is.
        """
        vcpu = self.vcpu
        vcpu.stats.values[HYPERCALLS] += 1
        is_long = bool(vcpu.vendor.get_segment("cs").l)
        mask = (1 << 64) - 1 if is_long else MASK32

        def answer(value: int) -> bool:
            self.vcpu.vendor.set_gpr(RAX, value & mask)
            self._skip_bytes(length)
            return True

        if vcpu.vendor.get_cpl():
            return answer(-KVM_EPERM)
        number, gpa, npages, attributes = (vcpu.vendor.get_gpr(register) & mask for register in (RAX, RBX, RCX, RDX))
        if number != flags.KVM_HC_MAP_GPA_RANGE:
            arguments = [gpa, npages, attributes, vcpu.vendor.get_gpr(RSI) & mask]
            return answer(vcpu.pv.hypercall(number, arguments, is_long))
        if not vcpu.kvm.hypercall_exit_enabled >> number & 1:
            return answer(-KVM_ENOSYS)
        if gpa & 0xFFF or not npages or (gpa >> 12) + npages >> 64:
            return answer(-KVM_EINVAL)
        return vcpu.hypercall_exit(number, [gpa, npages, attributes], is_long, answer)

    def complete_in(self, data: bytes) -> bool:
        """complete_fast_pio_in()."""
        mask = (1 << 8 * len(data)) - 1
        old = self.vcpu.vendor.get_gpr(RAX) if len(data) < 4 else 0
        self.vcpu.vendor.set_gpr(RAX, old & ~mask | int.from_bytes(data, "little"))
        self._skip()
        return True

    def complete_load(self, gpa: int, data: bytes) -> bool:
        """complete_emulated_mmio(), of a read that left by way of fast_mmio."""
        return self.emulator.answered(gpa, data)

    def _string_io(self, port: int, size: int, is_in: bool, repeated: bool, bits: int, linear: int) -> bool:
        """INS or OUTS. *bits*: its address size; *linear*: where its operand is."""
        return StringIo(self, port, size, is_in, repeated, bits, linear).emulate()

    def handle_rdmsr(self) -> bool:
        index = self.vcpu.vendor.get_gpr(RCX) & MASK32
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
        value = self.vcpu.vendor.get_gpr(RAX) & MASK32 | (self.vcpu.vendor.get_gpr(RDX) & MASK32) << 32
        index = self.vcpu.vendor.get_gpr(RCX) & MASK32
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
        value = self.vcpu.vendor.get_gpr(RAX) & MASK32 | (self.vcpu.vendor.get_gpr(RDX) & MASK32) << 32
        if self.vcpu.vendor.get_gpr(RCX) & MASK32 or value & ~self.vcpu.xcr0_valid or not value & 1 or value & 6 == 4:
            return self._gp()
        self.vcpu.vendor.set_control("xcr0", value)
        self._skip()
        return True

    def skip(self) -> None:
        """The instruction that exited is done."""
        self._skip()

    def emulation_failure(self) -> bool:
        """handle_emulation_failure(): #UD; in CPL 0, or if user space wants all of them, it is user space's.

        With KVM_CAP_EXIT_ON_EMULATION_FAILURE the guest gets none.
        """
        vcpu = self.vcpu
        vcpu.stats.values[INSN_EMULATION_FAIL] += 1
        if not vcpu.kvm.exit_on_emulation_error:
            vcpu.queue_exception(UD_VECTOR)
            if vcpu.vendor.get_cpl():
                return True
        return self._emulation_failure_exit(self._fetch(self._linear_rip()))

    def _emulation_failure_exit(self, code: bytes = b"") -> bool:
        """prepare_emulation_failure_exit(): flags, the instruction if there is one, and what the exit was."""
        run = self.vcpu.run
        run.exit_reason = Exit.INTERNAL_ERROR
        failure, data = run.u.emulation_failure, run.u.internal.data
        data[:] = [0] * len(data)
        failure.suberror, count = flags.KVM_INTERNAL_ERROR_EMULATION, 1
        if code:
            count += 2
            failure.flags = flags.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
            failure.u.u.insn_size = len(code)
            failure.u.u.insn_bytes[:] = list(code.ljust(MAX_INSTRUCTION, NOP))
        told = self.vcpu.vendor.exit_details()
        data[count : count + len(told)] = [*told]
        failure.ndata = count + len(told)
        return False

    def gva_to_gpa(self, linear: int) -> int | None:
        """Walk the guest's page tables."""
        get = self.vcpu.vendor.get_control
        return walk(self.vcpu.kvm, linear, get("cr0"), get("cr3"), get("cr4"), get("efer")).gpa

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

    def _fetch(self, linear: int) -> bytes:
        """Up to 15 bytes of code; fewer where the next page is not mapped."""
        first = min(MAX_INSTRUCTION, 0x1000 - (linear & 0xFFF))
        code = self.read_linear(linear, first) or b""
        if len(code) == first < MAX_INSTRUCTION:
            code += self.read_linear(linear + first, MAX_INSTRUCTION - first) or b""
        return code

    def _set32(self, number: int, value: int) -> None:
        self.vcpu.vendor.set_gpr(number, value & MASK32)

    # ---- control registers --------------------------------------------------------------------------------

    def mmu_load(self) -> None:
        """kvm_mmu_reload(): with shadow paging, the roots that the processor's CR3 names."""
        if self.shadow is not None and not self.two_dimensional:
            self.hardware_root(self.shadow.root())

    def mmu_ready(self) -> bool:
        """Whether they are still there. In guest mode."""
        return self.shadow is None or self.two_dimensional or self.shadow.ready()

    def hardware_root(self, root: int) -> None:
        """Put it into the processor's CR3."""
        raise AssertionError("the vendor has it")

    def hardware_invlpg(self, gva: int) -> None:
        """The processor forgets one page."""
        raise AssertionError("the vendor has it")

    def _controls(self) -> list[int]:
        return [self.vcpu.vendor.get_control(name) for name in CONTROLS]

    def _mov_to_cr(self, number: int, value: int) -> bool:
        """MOV to CR0, CR3 or CR4 that exits."""
        done = {0: self.set_cr0, 3: self.set_cr3, 4: self.set_cr4}[number](value)
        if not done:
            return self._gp()
        self._skip()
        return True

    def set_cr0(self, value: int) -> bool:
        """kvm_set_cr0(): False for what is a #GP."""
        vendor = self.vcpu.vendor
        old, cr3, cr4, efer = self._controls()
        if value >> 32 or (value & CR0_PG and not value & CR0_PE) or (value & CR0_NW and not value & CR0_CD):
            return False
        value = value & CR0_VALID | CR0_ET
        if (old ^ value) & CR0_PG:
            if value & CR0_PG and efer & EFER_LME:
                if not cr4 & CR4_PAE or vendor.get_segment("cs").l:
                    return False
                efer |= EFER_LMA
            elif not value & CR0_PG:
                if cr4 & CR4_PCIDE or (efer & EFER_LMA and vendor.get_segment("cs").l):
                    return False
                efer &= ~EFER_LMA
        if self.shadow is not None and not self.shadow.load_pdptrs(value, cr3, cr4, efer):
            return False
        vendor.set_control("efer", efer)
        vendor.set_control("cr0", value)
        if self.shadow is not None and (old ^ value) & CR0_PG:
            self.shadow.flush()  # kvm_post_set_cr0(): tables that went out of step
        vendor.flush_tlb()
        return True

    def set_cr3(self, value: int) -> bool:
        """kvm_set_cr3()."""
        vendor = self.vcpu.vendor
        cr0, _, cr4, efer = self._controls()
        keep = bool(cr4 & CR4_PCIDE and value & CR3_NO_FLUSH)
        if cr4 & CR4_PCIDE:
            value &= ~CR3_NO_FLUSH
        if efer & EFER_LMA and value & CR3_LONG_RESERVED:
            return False
        if self.shadow is None:
            raise AssertionError("CR3 is the guest's own")
        before = self.shadow.root()
        if not self.shadow.load_pdptrs(cr0, value, cr4, efer):
            return False
        vendor.set_control("cr3", value)
        if not keep:
            self.shadow.flush()
        if self.shadow.root() == before:  # else the processor flushes for its own CR3
            vendor.flush_tlb()
        return True

    def set_cr4(self, value: int) -> bool:
        """kvm_set_cr4()."""
        vendor = self.vcpu.vendor
        cr0, cr3, old, efer = self._controls()
        if not vendor.valid_controls(cr0, value, efer) or (efer & EFER_LMA and not value & CR4_PAE):
            return False
        if efer & EFER_LMA and (value ^ old) & CR4_LA57:
            return False
        if value & ~old & CR4_PCIDE and (not efer & EFER_LMA or cr3 & 0xFFF):
            return False
        if self.shadow is not None:
            if not self.shadow.load_pdptrs(cr0, cr3, value, efer):
                return False
            self.shadow.flush()
        vendor.set_control("cr4", value)
        vendor.flush_tlb()
        return True

    def _invlpg(self, gva: int) -> bool:
        self.vcpu.stats.values[INVLPG] += 1
        if self.shadow is not None:
            self.shadow.invlpg(gva)
        self.hardware_invlpg(gva)
        self._skip()
        return True

    def _shadow_fault(self, gva: int, error: int) -> bool:
        """#PF of the processor, which walks shadow tables."""
        if self.shadow is None:
            raise AssertionError("#PF exits without shadow paging")
        match self.shadow.page_fault(gva, error):
            case Outcome.FIXED | Outcome.LATER:
                return True
            case Outcome.EMULATE | Outcome.DEVICE:
                return self.emulator.emulate()
            case Outcome.WRITES_ROOT:
                return self.emulator.emulate(WHILE_TABLES_CHANGE)
            case _:
                return self.emulation_failure()

    def _port_io(self, port: int, size: int, is_in: bool) -> bool:
        """kvm_fast_pio()."""
        self.vcpu.stats.values[IO_EXITS] += 1
        if is_in:
            return self.vcpu.port_in(port, size, 1, self.complete_in)
        data = (self.vcpu.vendor.get_gpr(RAX) & MASK32).to_bytes(4, "little")[:size]
        self._skip()
        return self.vcpu.port_out(port, size, data)

    def _read_cr8(self, register: int) -> bool:
        self.vcpu.vendor.set_gpr(register, self.vcpu.get_cr8())
        self._skip()
        return True

    def _write_cr8(self, register: int) -> bool:
        """handle_set_cr8(): without an in-kernel local APIC user space is told that interrupts may come now."""
        value = self.vcpu.vendor.get_gpr(register)
        if value >> 4:
            return self._gp()
        before = self.vcpu.get_cr8()
        self.vcpu.set_cr8(value)
        self._skip()
        if self.vcpu.apic is not None or before <= value:
            return True
        self.vcpu.run.exit_reason = Exit.SET_TPR
        return False

    def _access_dr(self, number: int, register: int, is_read: bool) -> bool:
        """MOV DR, while user space's debugger has the registers."""
        vendor = self.vcpu.vendor
        if number in (4, 5):
            number += 2
        if is_read:
            vendor.set_gpr(register, vendor.get_debug(number))
        else:
            value = vendor.get_gpr(register)
            if number >= 6 and value >> 32:
                return self._gp()
            vendor.set_debug(number, value)
        self._skip()
        return True

    def handle_triple_fault(self) -> bool:
        self.vcpu.run.exit_reason = Exit.SHUTDOWN
        return False
