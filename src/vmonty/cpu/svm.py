"""SVM as host software uses it: each instruction is a method of ``Svm``; ``vmrun`` comes back with the #VMEXIT.

A VMCB is named by its address in this process, page-aligned; in nested page tables and permission maps too a
host-physical address is an address in this process. APM, "Secure Virtual Machine".
"""

from __future__ import annotations

import cython
from cython.cimports.libc.stdlib import calloc
from cython.cimports.vmonty.cpu.breakpoints import debug_changed
from cython.cimports.vmonty.cpu.dispatch import run_cpu
from cython.cimports.vmonty.cpu.mmio import mmio_begin, mmio_end
from cython.cimports.vmonty.cpu.msr import read_msr, write_msr
from cython.cimports.vmonty.cpu.state import EXIT_BUDGET, EXIT_HOST_FAULT, EXIT_MMIO, EXIT_NONE, EXIT_RUN_FLAG, EXIT_VM
from cython.cimports.vmonty.cpu.svm_entry import enter_svm_guest, leave_svm_guest, load_state, save_state
from cython.cimports.vmonty.cpu.svm_exit import svm_exit
from cython.cimports.vmonty.cpu.tlb import flush_all, flush_page
from cython.cimports.vmonty.cpu.vmcb import SVM_INTR, VMCB_EXITCODE, get64

from vmonty.cpu.core import EXIT_REASONS


def svm_run_guest(s):
    """Run the guest that is in place until the #VMEXIT; EXIT_VM, or why it stopped without one."""
    v: cython.pointer(SvmState) = cython.cast(cython.pointer(SvmState), s.svm)
    reason: cython.int = run_cpu(s)
    while reason == EXIT_RUN_FLAG:
        if s.interrupt_line:
            svm_exit(s, SVM_INTR, 0, 0, 0)
            reason = EXIT_VM
        else:
            s.exit.reason = EXIT_NONE
            reason = run_cpu(s)
    if reason == EXIT_HOST_FAULT:
        svm_exit(s, SVM_INTR, 0, 0, 0)  # the host has something to look at
        s.lost_memory = s.trap_address | 1
        reason = EXIT_VM
    elif reason == EXIT_VM and get64(v.vmcb, VMCB_EXITCODE) == SVM_INTR:
        s.interrupt_line = 0  # the host takes it
    return reason


def svm_run(s, vmcb):
    """Enter the guest and run it until the #VMEXIT."""
    v: cython.pointer(SvmState) = cython.cast(cython.pointer(SvmState), s.svm)
    reason: cython.int
    v.vmcb = cython.cast(cython.pointer(uint8_t), vmcb)
    v.vmcb_pointer = vmcb
    v.guest_code = 0
    if not enter_svm_guest(s):
        return EXIT_VM
    reason = EXIT_VM if s.exit.reason == EXIT_VM else svm_run_guest(s)
    leave_svm_guest(s)
    return reason


def svm_emulate(s, vmcb, resume, instructions, mmio):
    """Execute instructions of the guest one by one, with missing memory as MMIO."""
    v: cython.pointer(SvmState) = cython.cast(cython.pointer(SvmState), s.svm)
    reason: cython.int = mmio_begin(s, resume)
    if reason != EXIT_NONE:
        return reason
    v.vmcb = cython.cast(cython.pointer(uint8_t), vmcb)
    v.vmcb_pointer = vmcb
    v.guest_code = 0
    if not enter_svm_guest(s):
        return EXIT_VM
    if resume:
        s.exit.reason = EXIT_MMIO
    v.emulating = 1 if mmio else 0
    s.budget = instructions
    reason = run_cpu(s)
    if reason in (EXIT_RUN_FLAG, EXIT_HOST_FAULT):
        s.lost_memory = s.trap_address | 1 if reason == EXIT_HOST_FAULT else 0
        svm_exit(s, SVM_INTR, 0, 0, 0)
        reason = EXIT_VM
    v.emulating = 0
    mmio_end(s)
    leave_svm_guest(s)
    return reason


@cython.cclass
class Svm:
    """The SVM side of one processor.

    One thread at a time may use it, except ``kick`` and ``nmi``. General registers other than RAX and RSP, DR0–DR3,
    XCR0 and the x87/SSE/AVX state aren't part of the VMCB: they stay in the processor across VMRUN and #VMEXIT.
    """

    def __cinit__(self, cpu: Cpu):
        self.cpu = cpu
        self.s = cpu.s
        if cpu.s.svm == cython.NULL:
            cpu.s.svm = calloc(1, cython.sizeof(SvmState))
        self.v = cython.cast(cython.pointer(SvmState), cpu.s.svm)
        if self.v == cython.NULL:
            raise MemoryError("no memory for the SVM state of a processor")
        if self.v.entries == 0:
            self.v.gif = 1

    def _page(self, instruction, vmcb: cython.ulonglong):
        if vmcb == 0 or vmcb & 0xFFF:
            raise ValueError(f"{instruction} takes the address of a page, not {vmcb:#x}: it would raise #GP")

    def outcome(self, reason: cython.int) -> int:
        """What vmrun() gives or raises for *reason* of svm_run()."""
        if reason == EXIT_VM:
            return get64(self.v.vmcb, VMCB_EXITCODE)
        raise RuntimeError(
            f"the processor stopped without a #VMEXIT: reason {reason}, data {self.s.exit.data:#x}, rip {self.s.rip:#x}"
        )

    def vmrun(self, vmcb: cython.ulonglong) -> int:
        """VMRUN: the exit code, all ones (``vmcb.INVALID``) when the consistency checks refuse the VMCB.

        The GIL is released. ValueError for an address that raises #GP, RuntimeError when the processor itself stopped.
        """
        reason: cython.int
        self._page("VMRUN", vmcb)
        with cython.nogil:
            reason = svm_run(self.s, vmcb)
        return self.outcome(reason)

    def enter(self, vmcb: cython.ulonglong) -> int:
        """VMLOAD, VMRUN and VMSAVE of one VMCB: what a hypervisor's entry code does."""
        reason: cython.int
        self._page("VMRUN", vmcb)
        with cython.nogil:
            load_state(self.s, cython.cast(cython.pointer(uint8_t), vmcb))
            reason = svm_run(self.s, vmcb)
            save_state(self.s, cython.cast(cython.pointer(uint8_t), vmcb))
        return self.outcome(reason)

    def vmload(self, vmcb: cython.ulonglong) -> None:
        """VMLOAD."""
        self._page("VMLOAD", vmcb)
        load_state(self.s, cython.cast(cython.pointer(uint8_t), vmcb))

    def vmsave(self, vmcb: cython.ulonglong) -> None:
        """VMSAVE."""
        self._page("VMSAVE", vmcb)
        save_state(self.s, cython.cast(cython.pointer(uint8_t), vmcb))

    def emulate(
        self, vmcb: cython.ulonglong, resume: bool = False, instructions: cython.ulonglong = 1, devices: bool = True
    ) -> str:  # fmt: skip
        """Execute the guest's next instruction (or several) here, with accesses to where no memory is mapped as MMIO.

        As ``vmx.Vmx.emulate``: "mmio", "budget" or "vm"; without *devices* missing memory is an exit as usual.
        State is loaded and saved as ``enter`` does.
        """
        reason: cython.int
        again: cython.bint = resume
        mmio: cython.bint = devices
        self._page("VMRUN", vmcb)
        with cython.nogil:
            load_state(self.s, cython.cast(cython.pointer(uint8_t), vmcb))
            reason = svm_emulate(self.s, vmcb, again, instructions, mmio)
            save_state(self.s, cython.cast(cython.pointer(uint8_t), vmcb))
        if reason != EXIT_MMIO and reason != EXIT_BUDGET and reason != EXIT_VM:
            raise RuntimeError(f"the processor stopped without a #VMEXIT: reason {reason}, rip {self.s.rip:#x}")
        return EXIT_REASONS[reason]

    @property
    def mmio(self) -> tuple:
        """The access that emulate() reported: (guest-physical address, size, is a write, data)."""
        e = self.s.exit
        return e.address, e.size, bool(e.write), e.data

    def answer_mmio(self, data: cython.ulonglong) -> None:
        """The data of the read that emulate() reported."""
        self.s.exit.data = data

    def forget_mmio(self) -> None:
        """The access that emulate() reported last meets memory by now: do it again."""
        if self.s.mmio_count:
            self.s.mmio_count -= 1
        self.s.exit.write = 1  # there is no answer to keep

    def kick(self) -> None:
        """Signal a physical interrupt from any thread: the guest exits with INTR soon, or right at its next entry."""
        self.s.interrupt_line = 1
        self.s.run = 0

    def nmi(self) -> None:
        """Signal an NMI from any thread: #VMEXIT(NMI) when intercepted, else the guest's own handler."""
        self.s.nmi_line = 1
        self.s.run = 0

    def invlpga(self, address: cython.ulonglong, asid: cython.uint) -> None:
        """INVLPGA: forget one page of an address space."""
        if self.v.tlb_asid == asid:
            flush_page(self.s, address)

    def flush(self) -> None:
        """Forget every translation, as TLB_CONTROL 1 makes the next VMRUN do."""
        flush_all(self.s)

    # ---- what isn't in the VMCB -------------------------------------------------------------------------------

    def gpr(self, index: cython.uint) -> int:
        """A general register by number: rax rcx rdx rbx rsp rbp rsi rdi r8 … r15 (RAX, RSP: use the VMCB)."""
        if index > 15:
            raise IndexError(f"no general register {index}")
        return self.s.gpr[index]

    def set_gpr(self, index: cython.uint, value: cython.ulonglong) -> None:
        """Write a general register."""
        if index > 15:
            raise IndexError(f"no general register {index}")
        self.s.gpr[index] = value

    @property
    def xcr0(self) -> int:
        """XCR0."""
        return self.s.xcr0

    @xcr0.setter
    def xcr0(self, value: cython.ulonglong) -> None:
        self.s.xcr0 = value

    def lost_memory(self) -> int:
        """The host address whose memory was gone when the guest used it, made odd, if it exited for that (as by an
        external interrupt); else 0. Told once.
        """
        address: uint64_t = self.s.lost_memory
        self.s.lost_memory = 0
        return address

    def dr(self, index: cython.uint) -> int:
        """A debug register (0–3; 6 and 7 of the host)."""
        if index > 7:
            raise IndexError(f"no debug register {index}")
        return self.s.dr[index]

    def set_dr(self, index: cython.uint, value: cython.ulonglong) -> None:
        """Write a debug register."""
        if index > 7:
            raise IndexError(f"no debug register {index}")
        self.s.dr[index] = value
        debug_changed(self.s)

    def rdmsr(self, index: cython.uint) -> int:
        """Read an MSR of the processor. KeyError when unknown."""
        value: uint64_t = 0
        if not read_msr(self.s, index, cython.address(value)):
            raise KeyError(f"no MSR {index:#x}")
        return value

    def wrmsr(self, index: cython.uint, value: cython.ulonglong) -> None:
        """Write an MSR of the processor. ValueError when WRMSR would raise #GP."""
        if not write_msr(self.s, index, value):
            raise ValueError(f"WRMSR of {index:#x} with {value:#x} would raise #GP")

    @property
    def entries(self) -> int:
        """VMRUNs so far."""
        return self.v.entries
