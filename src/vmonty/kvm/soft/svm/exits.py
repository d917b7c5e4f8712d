"""#VMEXITs: what happened and what is done about it. One handler per exit code, named as in svm.c.

A handler returns True to enter the guest again, False to leave to user space with kvm_run filled in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from vmonty.cpu.vmcb import INVALID, ExitCode, Field
from vmonty.kvm.soft.emulate import Emulator
from vmonty.kvm.soft.intercepts import MASK32, RAX, RCX, RDI, RDX, RSI, UD_VECTOR, Intercepts
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
from vmonty.kvm.soft.svm.processor import Processor
from vmonty.kvm.soft.vcpu_state import QueuedException
from vmonty.kvm.uapi import Exit, flags

if TYPE_CHECKING:
    from vmonty.kvm.soft.x86 import VcpuX86

MSR_TSC_AUX = 0xC000_0103
VMCALL = b"\x0f\x01\xc1"
DR6_ACTIVE_LOW, DR6_CAUSES = 0xFFFF_0FF0, 0xE00F
# EVENTINJ and EXITINTINFO. APM, "Event Injection".
EVENT_VALID, EVENT_ERROR, EVENT_TYPE = 1 << 31, 1 << 11, 7 << 8
TYPE_INTR, TYPE_NMI, TYPE_EXCEPTION, TYPE_SOFT = (kind << 8 for kind in (0, 2, 3, 4))
# INT_CTL
V_IRQ, V_PRIO_MASK, V_IGN_TPR, V_INTR_MASKING = 1 << 8, 0xF << 16, 1 << 20, 1 << 24
# EXITINFO1 of NPF
NPF_WRITE, NPF_FETCH, NPF_FINAL = 1 << 1, 1 << 4, 1 << 32
MSR_WRITE = 1
IO_IN, IO_STRING, IO_REP = 1, 4, 8
SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")

Handler = Callable[["SvmExits"], bool]


class SvmExits(Intercepts):
    """The handlers, and what they need of the VMCB."""

    def __init__(self, vcpu: VcpuX86, cpu: Processor) -> None:
        super().__init__(vcpu)
        self.cpu = cpu
        self.vmcb = cpu.vmcb
        self.emulator = Emulator(vcpu, TwoDimensional(self, cpu))
        # The VMCB has no place for it: NMIs are masked until the guest's IRET, which is intercepted meanwhile.
        self.nmi_masked = False
        self.stepping_to_nmi = False
        # Such a step was all that run() did: whether the guest can go on.
        self.stepped: bool | None = None
        self.debug_dr6 = DR6_ACTIVE_LOW

    def _skip(self) -> None:
        """svm_skip_emulated_instruction(): the processor saved where the next one is."""
        self._skip_bytes(self.vmcb[Field.NRIP] - self.vmcb[Field.RIP])

    def _skip_bytes(self, length: int) -> None:
        vmcb = self.vmcb
        vmcb[Field.RIP] = vmcb[Field.RIP] + length & 0xFFFF_FFFF_FFFF_FFFF
        vmcb[Field.INT_STATE] = 0
        self.vcpu.note_skip()

    def lost_memory(self) -> int:
        return self.cpu.lost_memory()

    def complete_interrupts(self) -> None:
        """svm_complete_interrupts(): an event whose delivery was cut short is queued again."""
        info = self.vmcb[Field.EXITINTINFO]
        if not info & EVENT_VALID:
            return
        vector = info & 0xFF
        match info & EVENT_TYPE:
            case c if c == TYPE_INTR:
                self.vcpu.interrupt_injected = vector
            case c if c == TYPE_NMI:
                self.vcpu.nmi_injected = True
                self._mask_nmi(False)
            case c if c == TYPE_EXCEPTION and vector not in (flags.BP_VECTOR, flags.OF_VECTOR):
                code = info >> 32 if info & EVENT_ERROR else None
                self.vcpu.exception = QueuedException(vector, code, pending=False)
            case _:
                pass  # INT n, INT3, INTO: rip is still at the instruction, which runs again

    def _mask_nmi(self, masked: bool) -> None:
        self.nmi_masked = masked
        self.vmcb.intercept(ExitCode.IRET, masked)

    def handle_exit(self) -> bool:
        """svm_handle_exit()."""
        if self.stepped is not None:
            stay, self.stepped = self.stepped, None
            return stay
        code = self.vmcb[Field.EXITCODE]
        if code == INVALID:
            return self._fail_entry(code)
        handler = self.HANDLERS.get(code)
        if handler is None:
            return self._internal_error(flags.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, [code, self._last_cpu()])
        return handler(self)

    def _fail_entry(self, code: int) -> bool:
        run = self.vcpu.run
        run.exit_reason = Exit.FAIL_ENTRY
        run.u.fail_entry.hardware_entry_failure_reason = code
        run.u.fail_entry.cpu = self._last_cpu()
        return False

    def interrupt_window_interception(self) -> bool:
        """The guest takes interrupts: the virtual one that waited for that has done its work."""
        self.vcpu.stats.values[IRQ_WINDOW_EXITS] += 1
        self.vmcb[Field.INT_CTL] = self.vmcb[Field.INT_CTL] & ~(V_IRQ | V_PRIO_MASK | V_IGN_TPR)
        self.vmcb.intercept(ExitCode.VINTR, False)
        return True

    def iret_interception(self) -> bool:
        """The NMI handler ends: execute the IRET here, then NMIs are taken again."""
        self.vcpu.stats.values[NMI_WINDOW_EXITS] += 1
        self._mask_nmi(False)
        rip = self.vmcb[Field.RIP]
        stay = self.emulator.emulate()
        if self.vmcb[Field.EXITCODE] != ExitCode.IRET and self.vmcb[Field.RIP] == rip:
            self._mask_nmi(True)  # it met a fault or an exit, and comes again
        return stay

    def db_interception(self) -> bool:
        """#DB for user space's debugger."""
        dr6 = self.debug_dr6 & DR6_CAUSES
        return self.vcpu.debug_exit(flags.DB_VECTOR, dr6 | DR6_ACTIVE_LOW, self.vmcb[Field.DR7])

    def bp_interception(self) -> bool:
        """#BP for user space's debugger."""
        return self.vcpu.debug_exit(flags.BP_VECTOR, DR6_ACTIVE_LOW, self.vmcb[Field.DR7])

    def ud_interception(self) -> bool:
        """#UD: Intel's VMCALL is a hypercall here too."""
        code = self._fetch(self._linear_rip())
        return self._hypercall(len(VMCALL)) if code.startswith(VMCALL) else self._ud()

    def vmmcall_interception(self) -> bool:
        return self._hypercall(self.vmcb[Field.NRIP] - self.vmcb[Field.RIP])

    def rdtsc_interception(self) -> bool:
        """RDTSC and RDTSCP of a guest whose TSC has a frequency of its own."""
        vendor, value = self.vcpu.vendor, self.vcpu.guest_tsc()
        vendor.set_gpr(RAX, value & MASK32)
        vendor.set_gpr(RDX, value >> 32)
        if self.vmcb[Field.EXITCODE] == ExitCode.RDTSCP:
            vendor.set_gpr(RCX, (self.cpu.get_msr(MSR_TSC_AUX) or 0) & MASK32)
        self._skip()
        return True

    def cr_interception(self) -> bool:
        """CR8; and with shadow paging CR0, CR3, CR4. APM, "MOV CRx/DRx Intercepts"."""
        info, code = self.vmcb[Field.EXITINFO1], self.vmcb[Field.EXITCODE]
        register, number = info & 15, code & 15
        if number == 8:
            return self._read_cr8(register) if code < ExitCode.WRITE_CR0 else self._write_cr8(register)
        if not info >> 63:  # CLTS, LMSW, SMSW
            return self.emulator.emulate()
        vendor = self.vcpu.vendor
        if code < ExitCode.WRITE_CR0:
            vendor.set_gpr(register, vendor.get_control(f"cr{number}"))
            self._skip()
            return True
        value = vendor.get_gpr(register)
        return self._mov_to_cr(number, value if vendor.get_segment("cs").l else value & MASK32)

    def pf_interception(self) -> bool:
        return self._shadow_fault(self.vmcb[Field.EXITINFO2], self.vmcb[Field.EXITINFO1])

    def invlpg_interception(self) -> bool:
        return self._invlpg(self.vmcb[Field.EXITINFO1])

    def invpcid_interception(self) -> bool:
        """Everything is synchronized; the instruction itself, with its faults, executes over nested tables."""
        if self.shadow is not None:
            self.shadow.flush()
        return self.emulator.emulate()

    def nested_fault(self) -> NestedFault | None:
        """What the nested tables refused, if that is the exit; an event that was on its way is injected again."""
        vmcb = self.vmcb
        if vmcb[Field.EXITCODE] != ExitCode.NPF:
            return None
        vmcb[Field.EVENTINJ] = vmcb[Field.EXITINTINFO]
        access = vmcb[Field.EXITINFO1]
        return NestedFault(
            vmcb[Field.EXITINFO2], bool(access & NPF_WRITE), bool(access & NPF_FETCH), not access & NPF_FINAL
        )

    def enter_two_dimensional(self, step: bool) -> None:
        raise AssertionError("Svm has it")

    def leave_two_dimensional(self) -> None:
        raise AssertionError("Svm has it")

    def dr_interception(self) -> bool:
        code = self.vmcb[Field.EXITCODE]
        return self._access_dr(code & 7, self.vmcb[Field.EXITINFO1] & 15, code < ExitCode.WRITE_DR0)

    def io_interception(self) -> bool:
        """IN, OUT, INS, OUTS. APM, "IN and OUT Behavior"."""
        info = self.vmcb[Field.EXITINFO1]
        port, size, is_in = info >> 16 & 0xFFFF, info >> 4 & 7, bool(info & IO_IN)
        if not info & IO_STRING:
            return self._port_io(port, size, is_in)
        self.vcpu.stats.values[IO_EXITS] += 1
        vendor = self.vcpu.vendor
        bits = 8 * 2 * (info >> 7 & 7)
        segment = vendor.get_segment("es" if is_in else SEGMENTS[info >> 10 & 7])
        linear = segment.base + (vendor.get_gpr(RDI if is_in else RSI) & (1 << bits) - 1)
        if not vendor.get_segment("cs").l:
            linear &= MASK32
        return self._string_io(port, size, is_in, bool(info & IO_REP), bits, linear & 0xFFFF_FFFF_FFFF_FFFF)

    def msr_interception(self) -> bool:
        return self.handle_wrmsr() if self.vmcb[Field.EXITINFO1] & MSR_WRITE else self.handle_rdmsr()

    def npf_interception(self) -> bool:
        """A page that is not mapped yet, or no memory at all."""
        gpa, access = self.vmcb[Field.EXITINFO2], self.vmcb[Field.EXITINFO1]
        counters = self.vcpu.stats.values
        counters[PF_TAKEN] += 1
        write = bool(access & NPF_WRITE)
        if self.vcpu.page_absent(gpa):
            return True
        if came_to := self.vcpu.page_fault(gpa, write, walk=not access & NPF_FINAL):
            counters[PF_SPURIOUS if came_to == SPURIOUS else PF_FIXED] += 1
            return True
        counters[PF_EMULATE] += 1
        if access & NPF_FETCH or not access & NPF_FINAL:
            # Code, or a page table, where no memory is.
            return self.emulation_failure()
        return self.emulator.emulate()

    def task_switch_interception(self) -> bool:
        """The processor does not switch tasks for a guest, and neither does the emulator."""
        return self._emulation_failure_exit()

    HANDLERS: ClassVar[dict[int, Handler]] = {
        **dict.fromkeys(range(ExitCode.READ_CR0, ExitCode.WRITE_CR0 + 16), cr_interception),
        ExitCode.EXCEPTION_DE + flags.PF_VECTOR: pf_interception,
        ExitCode.INVLPG: invlpg_interception,
        ExitCode.INVPCID: invpcid_interception,
        **dict.fromkeys(range(ExitCode.READ_DR0, ExitCode.WRITE_DR0 + 16), dr_interception),
        ExitCode.EXCEPTION_DE + flags.DB_VECTOR: db_interception,
        ExitCode.EXCEPTION_DE + flags.BP_VECTOR: bp_interception,
        ExitCode.EXCEPTION_DE + UD_VECTOR: ud_interception,
        ExitCode.INTR: Intercepts.handle_external_interrupt,
        ExitCode.NMI: Intercepts.handle_external_interrupt,
        ExitCode.VINTR: interrupt_window_interception,
        ExitCode.RDPMC: Intercepts.handle_rdpmc,
        ExitCode.CPUID: Intercepts.handle_cpuid,
        ExitCode.IRET: iret_interception,
        ExitCode.RDTSC: rdtsc_interception,
        ExitCode.RDTSCP: rdtsc_interception,
        ExitCode.HLT: Intercepts.handle_halt,
        ExitCode.IOIO: io_interception,
        ExitCode.MSR: msr_interception,
        ExitCode.TASK_SWITCH: task_switch_interception,
        ExitCode.SHUTDOWN: Intercepts.handle_triple_fault,
        ExitCode.VMMCALL: vmmcall_interception,
        **dict.fromkeys((ExitCode.INVD, ExitCode.PAUSE, ExitCode.WBINVD), Intercepts.handle_skip),
        **dict.fromkeys((ExitCode.MONITOR, ExitCode.MWAIT), Intercepts.handle_skip),
        **dict.fromkeys(
            (ExitCode.VMRUN, ExitCode.VMLOAD, ExitCode.VMSAVE, ExitCode.STGI, ExitCode.CLGI, ExitCode.SKINIT,
             ExitCode.INVLPGA, ExitCode.RSM),
            Intercepts.handle_invalid_op,
        ),
        ExitCode.XSETBV: Intercepts.handle_xsetbv,
        ExitCode.NPF: npf_interception,
    }  # fmt: skip
