"""Registers of a vCPU: KVM_GET/SET_REGS, SREGS, SREGS2, FPU, XSAVE, XCRS, DEBUGREGS."""

from __future__ import annotations

import ctypes
import errno

from vmonty.kvm.soft.caps import XSAVE_SIZE
from vmonty.kvm.soft.files import answers
from vmonty.kvm.soft.user import Argument
from vmonty.kvm.soft.vcpu_state import VcpuState
from vmonty.kvm.uapi import Requests, flags, vcpu

# kvm_regs' order by the processor's register numbers.
GPRS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{number}" for number in range(8, 16)))
SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", "ldt", "tr")

CR0_PE, CR0_PG, CR4_PAE, EFER_LME, EFER_LMA = 1, 1 << 31, 1 << 5, 1 << 8, 1 << 10
XSTATE_X87, XSTATE_SSE, XSTATE_AVX = 1, 2, 4
XSAVE_HEADER = 512


class RegisterIoctls(VcpuState):
    """The ioctls; state lies with the vendor module and the processor."""

    @answers(Requests.KVM_GET_REGS)
    def get_regs(self, argument: Argument) -> None:
        argument.put(self.store_regs())

    def store_regs(self) -> vcpu.kvm_regs:
        """__get_regs()."""
        regs = vcpu.kvm_regs(rip=self.vendor.get_rip(), rflags=self.vendor.get_rflags())
        for number, name in enumerate(GPRS):
            setattr(regs, name, self.vendor.get_gpr(number))
        return regs

    @answers(Requests.KVM_SET_REGS)
    def set_regs(self, argument: Argument) -> None:
        self.load_regs(argument.get(vcpu.kvm_regs))

    def load_regs(self, regs: vcpu.kvm_regs) -> None:
        """__set_regs()."""
        for number, name in enumerate(GPRS):
            self.vendor.set_gpr(number, getattr(regs, name))
        if regs.rip != self.vendor.get_rip():
            self.vendor.host_had_control(wrote=True)  # a loader or a debugger at work
            self.vendor.set_rip(regs.rip)
        self.vendor.set_rflags(regs.rflags | 2)
        if self.exception is not None and self.exception.pending:
            self.exception = None

    @answers(Requests.KVM_GET_SREGS)
    def get_sregs(self, argument: Argument) -> None:
        argument.put(self.store_sregs())

    def store_sregs(self) -> vcpu.kvm_sregs:
        """__get_sregs()."""
        sregs = vcpu.kvm_sregs()
        self.fill_sregs(sregs)
        if self.interrupt_injected is not None:
            sregs.interrupt_bitmap[self.interrupt_injected >> 6] |= 1 << (self.interrupt_injected & 63)
        return sregs

    def store_sync_regs(self) -> None:
        """store_regs() of x86.c: what kvm_valid_regs asks for, after each run."""
        wanted, regs = self.run.kvm_valid_regs, self.run.s.regs
        if wanted & flags.KVM_SYNC_X86_REGS:
            regs.regs = self.store_regs()
        if wanted & flags.KVM_SYNC_X86_SREGS:
            regs.sregs = self.store_sregs()
        if wanted & flags.KVM_SYNC_X86_EVENTS:
            regs.events = self.store_events()

    def load_sync_regs(self) -> None:
        """sync_regs(): what kvm_dirty_regs says user space has changed, before each run."""
        dirty, regs = self.run.kvm_dirty_regs, self.run.s.regs
        if dirty & flags.KVM_SYNC_X86_REGS:
            self.load_regs(regs.regs)
        if dirty & flags.KVM_SYNC_X86_SREGS:
            self.load_sregs(regs.sregs)
        if dirty & flags.KVM_SYNC_X86_EVENTS:
            self.load_events(regs.events)
        self.run.kvm_dirty_regs = 0

    @answers(Requests.KVM_GET_SREGS2)
    def get_sregs2(self, argument: Argument) -> None:
        sregs = vcpu.kvm_sregs2()
        self.fill_sregs(sregs)
        argument.put(sregs)

    def fill_sregs(self, sregs: vcpu.kvm_sregs | vcpu.kvm_sregs2) -> None:
        """What both forms have in common."""
        for name in SEGMENTS:
            setattr(sregs, name, self.vendor.get_segment(name))
        for name in ("gdt", "idt"):
            table = getattr(sregs, name)
            table.base, table.limit = self.vendor.get_table(name)
        for name in ("cr0", "cr2", "cr3", "cr4", "efer"):
            setattr(sregs, name, self.vendor.get_control(name))
        sregs.cr8 = self.get_cr8()
        sregs.apic_base = self.get_apic_base()

    @answers(Requests.KVM_SET_SREGS)
    def set_sregs(self, argument: Argument) -> None:
        sregs = argument.get(vcpu.kvm_sregs)
        self.load_sregs(sregs)
        pending = [number for number in range(256) if sregs.interrupt_bitmap[number >> 6] >> (number & 63) & 1]
        if pending:
            self.interrupt_injected = pending[-1]

    @answers(Requests.KVM_SET_SREGS2)
    def set_sregs2(self, argument: Argument) -> None:
        sregs = argument.get(vcpu.kvm_sregs2)
        if sregs.flags & ~1:
            raise OSError(errno.EINVAL, "unknown flags")
        self.load_sregs(sregs)

    def load_sregs(self, sregs: vcpu.kvm_sregs | vcpu.kvm_sregs2) -> None:
        """__set_sregs_common(): take what both forms have, or EINVAL for what no processor can be in."""
        if sregs.efer & EFER_LME and sregs.cr0 & CR0_PG:
            valid = bool(sregs.cr4 & CR4_PAE and sregs.efer & EFER_LMA)
        else:
            valid = not sregs.efer & EFER_LMA and not sregs.cs.l
        if not valid or sregs.cr0 >> 32 or (sregs.cr0 & CR0_PG and not sregs.cr0 & CR0_PE):
            raise OSError(errno.EINVAL, "control registers contradict each other")
        long_mode = sregs.efer & EFER_LMA
        if not self.vendor.valid_controls(sregs.cr0, sregs.cr4, sregs.efer) or (
            long_mode and not self.vendor.valid_cr3(sregs.cr3)
        ):
            raise OSError(errno.EINVAL, "control registers have reserved bits set")
        self.set_apic_base(sregs.apic_base)
        for name in ("gdt", "idt"):
            table = getattr(sregs, name)
            self.vendor.set_table(name, table.base, table.limit)
        for name in ("efer", "cr0", "cr4", "cr3", "cr2"):
            self.vendor.set_control(name, getattr(sregs, name))
        self.set_cr8(sregs.cr8)
        for name in SEGMENTS:
            self.vendor.set_segment(name, getattr(sregs, name))
        self.vendor.host_had_control(wrote=True)
        self.vendor.state_loaded()

    @answers(Requests.KVM_GET_FPU)
    def get_fpu(self, argument: Argument) -> None:
        area = self.vendor.get_xsave()
        fpu = vcpu.kvm_fpu()
        fpu.fcw = int.from_bytes(area[0:2], "little")
        fpu.fsw = int.from_bytes(area[2:4], "little")
        fpu.ftwx = area[4]
        fpu.last_opcode = int.from_bytes(area[6:8], "little")
        fpu.last_ip = int.from_bytes(area[8:16], "little")
        fpu.last_dp = int.from_bytes(area[16:24], "little")
        fpu.mxcsr = int.from_bytes(area[24:28], "little")
        ctypes.memmove(fpu.fpr, area[32:160], 128)
        ctypes.memmove(fpu.xmm, area[160:416], 256)
        argument.put(fpu)

    @answers(Requests.KVM_SET_FPU)
    def set_fpu(self, argument: Argument) -> None:
        fpu = argument.get(vcpu.kvm_fpu)
        area = bytearray(self.vendor.get_xsave())
        area[0:2], area[2:4] = fpu.fcw.to_bytes(2, "little"), fpu.fsw.to_bytes(2, "little")
        area[4] = fpu.ftwx
        area[6:8] = fpu.last_opcode.to_bytes(2, "little")
        area[8:16], area[16:24] = fpu.last_ip.to_bytes(8, "little"), fpu.last_dp.to_bytes(8, "little")
        # Not MXCSR, as in the kernel: it has no check here for bits that would make the processor's load fault.
        area[32:160], area[160:416] = bytes(fpu.fpr), bytes(fpu.xmm)
        area[XSAVE_HEADER] |= XSTATE_X87 | XSTATE_SSE
        self.vendor.set_xsave(bytes(area))

    @answers(Requests.KVM_GET_XSAVE)
    def get_xsave(self, argument: Argument) -> None:
        argument.write(self.vendor.get_xsave().ljust(XSAVE_SIZE, b"\0"))

    @answers(Requests.KVM_GET_XSAVE2)
    def get_xsave2(self, argument: Argument) -> None:
        """kvm_vcpu_ioctl_x86_get_xsave2(): as many bytes as KVM_CAP_XSAVE2 says."""
        self.get_xsave(argument)

    @answers(Requests.KVM_SET_XSAVE)
    def set_xsave(self, argument: Argument) -> None:
        area = argument.read(XSAVE_SIZE)
        features = int.from_bytes(area[XSAVE_HEADER : XSAVE_HEADER + 8], "little")
        if features & ~(XSTATE_X87 | XSTATE_SSE | XSTATE_AVX) or any(area[XSAVE_HEADER + 8 : XSAVE_HEADER + 64]):
            raise OSError(errno.EINVAL, "state components that are not offered")
        if int.from_bytes(area[24:28], "little") & ~0xFFFF:
            raise OSError(errno.EINVAL, "reserved bits in MXCSR")
        self.vendor.set_xsave(area)

    @answers(Requests.KVM_GET_XCRS)
    def get_xcrs(self, argument: Argument) -> None:
        table = vcpu.kvm_xcrs(nr_xcrs=1)
        table.xcrs[0].value = self.vendor.get_control("xcr0")
        argument.put(table)

    @answers(Requests.KVM_SET_XCRS)
    def set_xcrs(self, argument: Argument) -> None:
        table = argument.get(vcpu.kvm_xcrs)
        if table.nr_xcrs > len(table.xcrs) or table.flags:
            raise OSError(errno.EINVAL, "too many registers, or flags")
        for entry in table.xcrs[: table.nr_xcrs]:
            if entry.xcr == 0:
                if entry.value & ~self.xcr0_valid or not entry.value & XSTATE_X87 or entry.value & 6 == XSTATE_AVX:
                    raise OSError(errno.EINVAL, "not a value that XCR0 takes")
                self.vendor.set_control("xcr0", entry.value)

    @answers(Requests.KVM_GET_DEBUGREGS)
    def get_debugregs(self, argument: Argument) -> None:
        state = vcpu.kvm_debugregs(dr6=self.vendor.get_debug(6), dr7=self.vendor.get_debug(7))
        state.db[:] = [self.vendor.get_debug(number) for number in range(4)]
        argument.put(state)

    @answers(Requests.KVM_SET_DEBUGREGS)
    def set_debugregs(self, argument: Argument) -> None:
        state = argument.get(vcpu.kvm_debugregs)
        if state.flags or state.dr6 >> 32 or state.dr7 >> 32:
            raise OSError(errno.EINVAL, "flags, or high bits in DR6 or DR7")
        for number, value in enumerate(state.db):
            self.vendor.set_debug(number, value)
        self.vendor.set_debug(6, state.dr6)
        self.vendor.set_debug(7, state.dr7)
