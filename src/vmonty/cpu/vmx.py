"""VMX as host software uses it: each instruction is a method of ``Vmx``; ``run`` is VMLAUNCH or VMRESUME up to the VM
exit.

Regions are 4 KiB, aligned, named by their address in this process; in EPT entries, bitmaps and MSR areas too a
host-physical
address is an address in this process. Methods fail as the instructions do, with VmxError. SDM, "VMX Instruction
Reference".
"""

from __future__ import annotations

import cython
from cython.cimports.libc.stdlib import calloc, free
from cython.cimports.vmonty.cpu.breakpoints import debug_changed
from cython.cimports.vmonty.cpu.dispatch import run_cpu
from cython.cimports.vmonty.cpu.mmio import mmio_begin, mmio_end
from cython.cimports.vmonty.cpu.msr import read_msr, write_msr
from cython.cimports.vmonty.cpu.preemption import halted_wait
from cython.cimports.vmonty.cpu.state import (
    EXIT_BUDGET,
    EXIT_HALT,
    EXIT_HOST_FAULT,
    EXIT_MMIO,
    EXIT_NONE,
    EXIT_RUN_FLAG,
    EXIT_SHUTDOWN,
    EXIT_VM,
)
from cython.cimports.vmonty.cpu.tlb import flush_all, flush_page
from cython.cimports.vmonty.cpu.vmcs import (
    HEADER_LAUNCHED,
    VM_EXIT_REASON,
    VM_INSTRUCTION_ERROR,
    VMCS_REVISION,
    get,
    put,
    slot,
)
from cython.cimports.vmonty.cpu.vmx_capabilities import capability, field_exists
from cython.cimports.vmonty.cpu.vmx_entry import (
    ENTRY_FAILED,
    ENTRY_NO_VMCS,
    ERROR_INVALID_OPERAND,
    ERROR_READ_ONLY_FIELD,
    ERROR_UNSUPPORTED_FIELD,
    ERROR_VMCLEAR_ADDRESS,
    ERROR_VMCLEAR_VMXON,
    ERROR_VMPTRLD_ADDRESS,
    ERROR_VMPTRLD_REVISION,
    ERROR_VMPTRLD_VMXON,
    ERROR_VMXON_IN_ROOT,
    enter_guest,
    leave_guest,
)
from cython.cimports.vmonty.cpu.vmx_exit import REASON_EXTERNAL_INTERRUPT, vm_exit

from vmonty.cpu.core import EXIT_REASONS
from vmonty.cpu.vmx_errors import VmxError


def vmx_new(s):
    """Give a processor VMX."""
    s.vmx = calloc(1, cython.sizeof(VmxState))
    return cython.cast(cython.pointer(VmxState), s.vmx)


def vmx_free(s):
    """Take VMX away."""
    free(s.vmx)
    s.vmx = cython.NULL


def vmx_run_guest(s):
    """Run the guest that is in place until the VM exit; EXIT_VM, or why it stopped without one."""
    reason: cython.int = run_cpu(s)
    while reason in (EXIT_RUN_FLAG, EXIT_HALT) or (reason == EXIT_SHUTDOWN and s.activity):
        if reason != EXIT_RUN_FLAG:  # an activity state that only an event ends
            halted_wait(s)
            s.exit.reason = EXIT_NONE
            reason = run_cpu(s)
        elif s.interrupt_line:
            vm_exit(s, REASON_EXTERNAL_INTERRUPT, 0, 0)
            reason = EXIT_VM
        else:
            s.exit.reason = EXIT_NONE
            reason = run_cpu(s)
    if reason == EXIT_HOST_FAULT:
        vm_exit(s, REASON_EXTERNAL_INTERRUPT, 0, 0)  # the host has something to look at
        s.lost_memory = s.trap_address | 1
        reason = EXIT_VM
    return reason


def vmx_run(s, launch):
    """Enter the guest and run it until the VM exit."""
    v: cython.pointer(VmxState) = cython.cast(cython.pointer(VmxState), s.vmx)
    error: uint32_t = enter_guest(s, launch)
    reason: cython.int
    if error == ENTRY_FAILED:
        return cython.cast(int64_t, get(v.vmcs, VM_EXIT_REASON))
    if error:
        if error != ENTRY_NO_VMCS:
            put(v.vmcs, VM_INSTRUCTION_ERROR, error)
        return -cython.cast(int64_t, error)
    reason = vmx_run_guest(s)
    leave_guest(s)
    if reason != EXIT_VM:
        return RUN_STOPPED - reason
    return cython.cast(int64_t, get(v.vmcs, VM_EXIT_REASON))


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _is_clear(region: cython.pointer(uint8_t)) -> cython.uint:
    """Whether the launch state wants VMLAUNCH."""
    return cython.cast(cython.pointer(uint32_t), region + HEADER_LAUNCHED)[0] == 0


def vmx_emulate(s, resume, instructions, mmio):
    """Execute instructions of the guest one by one with missing memory as MMIO; EXIT_*, or a negative number for
    VMfail.
    """
    v: cython.pointer(VmxState) = cython.cast(cython.pointer(VmxState), s.vmx)
    error: uint32_t
    reason: cython.int = mmio_begin(s, resume)
    if reason != EXIT_NONE:
        return reason
    # A VMCS that has come from another processor was cleared on the way.
    error = enter_guest(s, v.vmcs != cython.NULL and _is_clear(v.vmcs))
    if error == ENTRY_FAILED:
        return EXIT_VM
    if error:
        return -cython.cast(int64_t, error)
    if resume:
        s.exit.reason = EXIT_MMIO
    v.emulating = 1 if mmio else 0
    s.budget = instructions
    reason = run_cpu(s)
    if reason in (EXIT_RUN_FLAG, EXIT_HOST_FAULT):
        s.lost_memory = s.trap_address | 1 if reason == EXIT_HOST_FAULT else 0
        vm_exit(s, REASON_EXTERNAL_INTERRUPT, 0, 0)
        reason = EXIT_VM
    v.emulating = 0
    mmio_end(s)
    leave_guest(s)
    return reason


@cython.cclass
class Vmx:
    """The VMX side of one processor.

    One thread at a time may use it, except ``kick``. General registers, CR2, DR0–DR3, DR6, and the x87/SSE/AVX state
    aren't part of
    the VMCS: they stay in the processor across entry and exit (``gpr``, ``cr2``, ``dr``, ``cpu.xsave``).
    """

    def __cinit__(self, cpu: Cpu):
        self.cpu = cpu
        self.s = cpu.s
        self.v = cython.cast(cython.pointer(VmxState), cpu.s.vmx)
        if self.v == cython.NULL:
            self.v = vmx_new(cpu.s)
        if self.v == cython.NULL:
            raise MemoryError("no memory for the VMX state of a processor")

    # ---- VMX operation ---------------------------------------------------------------------------------------

    def vmxon(self, region: cython.ulonglong) -> None:
        """VMXON: the region's first four bytes hold the revision identifier (``vmcs.REVISION``)."""
        if self.v.on:
            self._fail("vmxon", ERROR_VMXON_IN_ROOT)
        if region == 0 or region & 0xFFF or cython.cast(cython.pointer(uint32_t), region)[0] != VMCS_REVISION:
            raise VmxError("vmxon", 0)
        self.v.on = 1
        self.v.vmxon_pointer = region
        self.v.vmcs = cython.NULL
        self.v.vmcs_pointer = 0
        self.s.cr4 |= 0x2000

    def vmxoff(self) -> None:
        """VMXOFF."""
        self._check("vmxoff")
        self.v.on = 0
        self.v.vmcs = cython.NULL
        self.v.vmcs_pointer = 0
        self.s.cr4 &= ~cython.cast(uint64_t, 0x2000)

    def _check(self, instruction):
        if not self.v.on:
            raise VmxError(instruction, -1)

    def _fail(self, instruction, error):
        if self.v.vmcs == cython.NULL:
            raise VmxError(instruction, 0)
        put(self.v.vmcs, VM_INSTRUCTION_ERROR, error)
        raise VmxError(instruction, error)

    def vmclear(self, region: cython.ulonglong) -> None:
        """VMCLEAR: the region becomes clear, and isn't current any more."""
        self._check("vmclear")
        if region == 0 or region & 0xFFF:
            self._fail("vmclear", ERROR_VMCLEAR_ADDRESS)
        if region == self.v.vmxon_pointer:
            self._fail("vmclear", ERROR_VMCLEAR_VMXON)
        cython.cast(cython.pointer(uint32_t), region + HEADER_LAUNCHED)[0] = 0
        if region == self.v.vmcs_pointer:
            self.v.vmcs = cython.NULL
            self.v.vmcs_pointer = 0

    def vmptrld(self, region: cython.ulonglong) -> None:
        """VMPTRLD: the region becomes the current VMCS."""
        self._check("vmptrld")
        if region == 0 or region & 0xFFF:
            self._fail("vmptrld", ERROR_VMPTRLD_ADDRESS)
        if region == self.v.vmxon_pointer:
            self._fail("vmptrld", ERROR_VMPTRLD_VMXON)
        if cython.cast(cython.pointer(uint32_t), region)[0] != VMCS_REVISION:
            self._fail("vmptrld", ERROR_VMPTRLD_REVISION)
        self.v.vmcs = cython.cast(cython.pointer(uint8_t), region)
        self.v.vmcs_pointer = region

    def vmptrst(self) -> int:
        """VMPTRST: the current VMCS's address, all ones when there is none."""
        self._check("vmptrst")
        if self.v.vmcs == cython.NULL:
            return cython.cast(uint64_t, 0xFFFFFFFFFFFFFFFF)
        return self.v.vmcs_pointer

    def vmread(self, field: cython.uint) -> int:
        """VMREAD of a field encoding (``vmcs.Field``); bit 0 gives the high half of a 64-bit field."""
        if self.v.vmcs == cython.NULL:
            raise VmxError("vmread", 0)
        if not field_exists(field & 0x7FFE) or field >> 15 or (field & 1 and (field >> 13) & 3 != 1):
            self._fail("vmread", ERROR_UNSUPPORTED_FIELD)
        if field & 1:
            return slot(self.v.vmcs, field)[0] >> 32
        return slot(self.v.vmcs, field)[0]

    def vmwrite(self, field: cython.uint, value: cython.ulonglong) -> None:
        """VMWRITE; bits beyond the field's width are ignored."""
        width: cython.uint = (field >> 13) & 3
        at: cython.pointer(uint64_t)
        if self.v.vmcs == cython.NULL:
            raise VmxError("vmwrite", 0)
        if not field_exists(field & 0x7FFE) or field >> 15 or (field & 1 and width != 1):
            self._fail("vmwrite", ERROR_UNSUPPORTED_FIELD)
        if (field >> 10) & 3 == 1:
            self._fail("vmwrite", ERROR_READ_ONLY_FIELD)
        at = slot(self.v.vmcs, field)
        if field & 1:
            at[0] = (at[0] & cython.cast(uint64_t, 0xFFFFFFFF)) | (value << 32)
        elif width == 0:
            at[0] = value & 0xFFFF
        elif width == 2:
            at[0] = value & cython.cast(uint64_t, 0xFFFFFFFF)
        else:
            at[0] = value

    def run(self) -> int:
        """VMLAUNCH when the current VMCS is clear, else VMRESUME; the exit reason, bit 31 set for a failed entry.

        The GIL is released. Raises VmxError for VMfail, RuntimeError when the processor itself stopped.
        """
        launch: cython.uint = 0
        result: cython.longlong
        self._check("vmlaunch")
        if self.v.vmcs != cython.NULL:
            launch = _is_clear(self.v.vmcs)
        with cython.nogil:
            result = vmx_run(self.s, launch)
        return self.outcome(result)

    def emulate(self, resume: bool = False, instructions: cython.ulonglong = 1, devices: bool = True) -> str:
        """Execute the guest's next instruction (or several) here, with accesses to where no memory is mapped as MMIO.

        "mmio": an access of up to eight bytes is in ``mmio``; to a read give the data with ``answer_mmio``. Call again
        with *resume* until it is "budget": the instruction, or one iteration of a repeated one, is done. "vm": a VM
        exit happened instead, which without *devices* missing memory is too. The GIL is released. Raises VmxError for
        VMfail, RuntimeError when the processor itself stopped.
        """
        result: cython.longlong
        again: cython.bint = resume
        mmio: cython.bint = devices
        self._check("vmresume")
        with cython.nogil:
            result = vmx_emulate(self.s, again, instructions, mmio)
        if result < 0:
            raise VmxError("vmresume", -result)
        if result != EXIT_MMIO and result != EXIT_BUDGET and result != EXIT_VM:
            raise RuntimeError(f"the processor stopped without a VM exit: reason {result}, rip {self.s.rip:#x}")
        return EXIT_REASONS[result]

    @property
    def mmio(self) -> tuple:
        """The access that emulate() reported: (guest-physical address, size, is a write, data)."""
        e = self.s.exit
        return e.address, e.size, bool(e.write), e.data

    def answer_mmio(self, data: cython.ulonglong) -> None:
        """The data of the read that emulate() reported."""
        self.s.exit.data = data

    def forget_mmio(self) -> None:
        """The read that emulate() reported last meets memory by now: do it again."""
        if self.s.mmio_count:
            self.s.mmio_count -= 1
        self.s.exit.write = 1  # there is no answer to keep

    def vmlaunch(self) -> int:
        """VMLAUNCH."""
        result: cython.longlong
        self._check("vmlaunch")
        with cython.nogil:
            result = vmx_run(self.s, 1)
        return self.outcome(result)

    def vmresume(self) -> int:
        """VMRESUME."""
        result: cython.longlong
        self._check("vmresume")
        with cython.nogil:
            result = vmx_run(self.s, 0)
        return self.outcome(result)

    def outcome(self, result: cython.longlong) -> int:
        """What run() gives or raises for *result* of vmx_run()."""
        if self.cpu.observer is not None:
            self.cpu.observer.check()
        if result >= 0:
            return result
        if result == -ENTRY_NO_VMCS:
            raise VmxError("vmlaunch", 0)
        if result > RUN_STOPPED:
            raise VmxError("vmlaunch", -result)
        reason = RUN_STOPPED - result
        raise RuntimeError(
            f"the processor stopped without a VM exit: reason {reason}, data {self.s.exit.data:#x}, rip {self.s.rip:#x}"
        )

    def kick(self) -> None:
        """Signal an external interrupt from any thread: the guest exits with reason 1 soon, or right at its
        next entry.
        """
        self.s.interrupt_line = 1
        self.s.run = 0

    def nmi(self) -> None:
        """Signal an NMI from any thread: exit reason 0 with NMI exiting, else the guest's own handler."""
        self.s.nmi_line = 1
        self.s.run = 0

    def invept(self, kind: cython.uint, eptp: cython.ulonglong = 0) -> None:
        """INVEPT: 1 single context, 2 all."""
        self._check("invept")
        if kind != 1 and kind != 2:
            self._fail("invept", ERROR_INVALID_OPERAND)
        if kind == 2 or eptp == self.v.tlb_eptp:
            flush_all(self.s)

    def invvpid(self, kind: cython.uint, vpid: cython.uint = 0, address: cython.ulonglong = 0) -> None:
        """INVVPID: 0 one address, 1 single context, 2 all, 3 single context but globals."""
        self._check("invvpid")
        if kind > 3 or (kind != 2 and (vpid == 0 or vpid > 0xFFFF)):
            self._fail("invvpid", ERROR_INVALID_OPERAND)
        if kind != 2 and vpid != self.v.tlb_vpid:
            return
        if kind == 0:
            flush_page(self.s, address)
        else:
            flush_all(self.s)

    # ---- what isn't in the VMCS -------------------------------------------------------------------------------

    def gpr(self, index: cython.uint) -> int:
        """A general register by number: rax rcx rdx rbx rsp rbp rsi rdi r8 … r15 (RSP: use GUEST_RSP)."""
        if index > 15:
            raise IndexError(f"no general register {index}")
        return self.s.gpr[index]

    def set_gpr(self, index: cython.uint, value: cython.ulonglong) -> None:
        """Write a general register."""
        if index > 15:
            raise IndexError(f"no general register {index}")
        self.s.gpr[index] = value

    @property
    def cr2(self) -> int:
        """CR2."""
        return self.s.cr2

    @cr2.setter
    def cr2(self, value: cython.ulonglong) -> None:
        self.s.cr2 = value

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
        """A debug register (0–3, 6, 7)."""
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
        """Read an MSR of the processor (what RDMSR gives a guest that isn't intercepted). KeyError when unknown."""
        value: uint64_t = 0
        if not read_msr(self.s, index, cython.address(value)):
            raise KeyError(f"no MSR {index:#x}")
        return value

    def wrmsr(self, index: cython.uint, value: cython.ulonglong) -> None:
        """Write an MSR of the processor. ValueError when WRMSR would raise #GP."""
        if not write_msr(self.s, index, value):
            raise ValueError(f"WRMSR of {index:#x} with {value:#x} would raise #GP")

    def capability(self, index: cython.uint) -> int:
        """Read IA32_VMX_BASIC (0x480) … IA32_VMX_VMFUNC (0x491). KeyError when there is none."""
        value: uint64_t = 0
        if not capability(self.s, index, cython.address(value)):
            raise KeyError(f"no VMX capability MSR {index:#x}")
        return value

    @property
    def entries(self) -> int:
        """VM entries so far."""
        return self.v.entries
