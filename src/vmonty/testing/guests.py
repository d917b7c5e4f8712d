"""Tiny guests: a vCPU in one mode of the processor, with its tables, stacks, handlers and code in place.

    0x00000 ┌──────────────────────┐
            │ interrupt vectors    │  real mode
    0x00800 │ GDT                  │
    0x01000 │ IDT                  │  gates of the vectors that have a handler
    0x04000 │ DATA                 │  free for the guest
    0x08000 │ CODE                 │
    0x0a000 │ HANDLERS             │  64 bytes for each of the 256 vectors
    0x0f000 │ STACK, grows down    │  of the kernel
    0x10000 │ USER_STACK           │  grows down
    0x20000 │ TSS                  │  with an I/O permission bitmap that allows CPL3 every port
    0x30000 │ page tables          │  identity map of 4 GiB in 2 MiB pages, open to CPL3
    0x80000 └──────────────────────┘  end of RAM; MMIO lies above

What real mode uses is below 64 KiB, so that the same addresses serve every mode.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from vmonty.base.ram import Ram
from vmonty.kvm.api import CpuidEntry, Vcpu, Vm
from vmonty.kvm.uapi import Exit
from vmonty.kvm.uapi.vcpu import kvm_segment, kvm_sregs
from vmonty.testing.nasm import assemble

GDT, IDT, TSS = 0x800, 0x1000, 0x20000
DATA, CODE, HANDLERS = 0x4000, 0x8000, 0xA000
STACK, USER_STACK = 0xF000, 0x10000
PML4 = 0x30000
RAM_SIZE = 0x80000
# Guest-physical addresses where there is no RAM: one that real mode reaches, one far above.
MMIO, HIGH_MMIO = 0xD0000, 0xD0000000

CODE32, DATA32, CODE64, USER_DATA, USER_CODE64, TASK = 0x08, 0x10, 0x18, 0x23, 0x2B, 0x30

CR0_PE, CR0_MP, CR0_ET, CR0_NE, CR0_WP, CR0_PG = 1, 1 << 1, 1 << 4, 1 << 5, 1 << 16, 1 << 31
CR4_PAE, CR4_OSFXSR, CR4_OSXMMEXCPT = 1 << 5, 1 << 9, 1 << 10
EFER_LME, EFER_LMA = 1 << 8, 1 << 10
RFLAGS, RFLAGS_TF, RFLAGS_IF, RFLAGS_IOPL3 = 1 << 1, 1 << 8, 1 << 9, 3 << 12

PTE_P, PTE_W, PTE_U, PTE_PS = 1, 2, 4, 0x80

# What lies in front of the bitmap in a TSS, and the whole: 65,536 bits and a byte of ones.
TSS_IOPB = 0x68
TSS_SIZE = TSS_IOPB + 0x2001

_HANDLER_SIZE = 64
_CODE_TYPE, _DATA_TYPE, _TSS_TYPE = 11, 3, 11


class Mode(Enum):
    """What the vCPU runs in; the value is nasm's ``bits``."""

    REAL = "real"
    PROTECTED = "protected"
    LONG = "long-cpl0"
    USER = "long-cpl3"

    @property
    def bits(self) -> int:
        """The width that code of this mode is assembled for."""
        return {Mode.REAL: 16, Mode.PROTECTED: 32}.get(self, 64)

    @property
    def long(self) -> bool:
        """Whether it is 64-bit mode."""
        return self.bits == 64


@dataclass
class TinyGuest:
    """A VM with one slot of RAM at 0 and one vCPU; ``load`` gives the vCPU a mode and a program."""

    vm: Vm
    vcpu: Vcpu
    ram: Ram

    def load(
        self,
        mode: Mode,
        source: str,
        handlers: Mapping[int, str] | None = None,
        cpuid: Iterable[CpuidEntry] | None = None,
    ) -> TinyGuest:
        """As load() of this module, on this guest's vCPU; returns the guest."""
        load(self.vcpu, self.ram, mode, source, handlers, cpuid)
        return self

    def run(self) -> Exit | int:
        """Vcpu.run()."""
        return self.vcpu.run()

    def out(self) -> tuple[int, int]:
        """Run to an OUT; return its port and value. Raises AssertionError for any other exit."""
        reason = self.run()
        io = self.vcpu.kvm_run.u.io
        if reason is not Exit.IO or io.direction != 1:
            raise AssertionError(f"the guest should have executed OUT, but {describe(self.vcpu, reason)}")
        return io.port, int.from_bytes(self.vcpu.io_data(), "little")

    def outs(self, count: int) -> list[int]:
        """The values of the next *count* OUTs."""
        return [self.out()[1] for _ in range(count)]

    def close(self) -> None:
        """Close the vCPU and the VM."""
        self.vcpu.close()
        self.vm.close()


def load(
    vcpu: Vcpu,
    ram: Ram,
    mode: Mode,
    source: str,
    handlers: Mapping[int, str] | None = None,
    cpuid: Iterable[CpuidEntry] | None = None,
    code: int = CODE,
    stack: int = STACK,
) -> None:
    """Put *source* at *code*, a handler for each vector of *handlers*, and *vcpu* at its first instruction.

    In CPL3 the I/O privilege level is 3 and the permission bitmap is clear: IN and OUT work. *cpuid*, when
    given, becomes the guest's. Raises VmontyError when nasm refuses a program, ValueError when a handler is too long.
    """
    ram.write(code, assemble(source, mode.bits, code))
    write_handlers(ram, mode, handlers or {})
    if cpuid is not None:
        vcpu.set_cpuid2(cpuid)
    sregs = vcpu.get_sregs()
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = CR0_ET, 0, 0, 0
    if mode is Mode.REAL:
        enter_real(sregs)
    else:
        ram.write(GDT, _gdt())
        ram.write(TSS, _tss(mode))
        sregs.gdt.base, sregs.gdt.limit = GDT, 0x3F
        sregs.idt.base, sregs.idt.limit = IDT, 0xFFF if mode.long else 0x7FF
        sregs.tr = kvm_segment(base=TSS, limit=TSS_SIZE - 1, selector=TASK, type=_TSS_TYPE, present=1)
        sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP
        if mode.long:
            ram.write(PML4, identity_map())
            enter_long(sregs, 3 if mode is Mode.USER else 0)
        else:
            sregs.cs = segment(CODE32, _CODE_TYPE, wide=True)
            _data_segments(sregs, DATA32)
    vcpu.set_sregs(sregs)
    regs = vcpu.get_regs()
    regs.rip, regs.rflags = code, RFLAGS | (RFLAGS_IOPL3 if mode is Mode.USER else 0)
    regs.rsp = USER_STACK if mode is Mode.USER else stack
    vcpu.set_regs(regs)


def enter_real(sregs: kvm_sregs) -> None:
    """Real mode with all segments at 0."""
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        selected = getattr(sregs, name)
        selected.base, selected.selector = 0, 0


def enter_long(sregs: kvm_sregs, cpl: int) -> None:
    """64-bit mode at *cpl* on the page tables at PML4."""
    sregs.cr3 = PML4
    sregs.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT
    sregs.cr0 |= CR0_PG
    sregs.efer = EFER_LME | EFER_LMA
    sregs.cs = segment(USER_CODE64 if cpl == 3 else CODE64, _CODE_TYPE, long=True)
    _data_segments(sregs, USER_DATA if cpl == 3 else DATA32)


def segment(selector: int, kind: int, wide: bool = False, long: bool = False) -> kvm_segment:
    """A flat code or data segment; its privilege level is the selector's."""
    return kvm_segment(
        base=0, limit=0xFFFFFFFF, selector=selector, type=kind, present=1, dpl=selector & 3,
        db=wide, s=1, l=long, g=1,
    )  # fmt: skip


def identity_map(tables: int = PML4) -> bytes:
    """A PML4, a PDPT and four page directories, to lie at *tables*: 4 GiB mapped onto themselves."""
    flags = PTE_P | PTE_W | PTE_U
    pml4 = struct.pack("<Q4088x", tables + 0x1000 | flags)
    pdpt = struct.pack("<4Q4064x", *(tables + 0x2000 + 0x1000 * index | flags for index in range(4)))
    return pml4 + pdpt + struct.pack("<2048Q", *(page << 21 | flags | PTE_PS for page in range(2048)))


def write_handlers(ram: Ram, mode: Mode, handlers: Mapping[int, str]) -> None:
    """Assemble each handler at its place and point its vector there."""
    for vector, source in handlers.items():
        address = HANDLERS + vector * _HANDLER_SIZE
        program = assemble(source, mode.bits, address)
        if len(program) > _HANDLER_SIZE:
            raise ValueError(f"the handler of vector {vector:#x} has {len(program)} bytes, more than {_HANDLER_SIZE}")
        ram.write(address, program)
        if mode is Mode.REAL:
            ram.write(vector * 4, struct.pack("<HH", address, 0))
        elif mode is Mode.PROTECTED:
            ram.write(IDT + vector * 8, struct.pack("<HHHH", address, CODE32, 0xEE00, 0))
        else:
            ram.write(IDT + vector * 16, struct.pack("<HHHHQ", address, CODE64, 0xEE00, 0, 0))


def describe(vcpu: Vcpu, reason: Exit | int) -> str:
    """One line on an exit and where the guest is, for a test's failure."""
    regs, run = vcpu.get_regs(), vcpu.kvm_run.u
    detail = ""
    if reason is Exit.IO:
        detail = f" {'out' if run.io.direction else 'in'} port {run.io.port:#x} size {run.io.size} count {run.io.count}"
    elif reason is Exit.MMIO:
        detail = f" {'write' if run.mmio.is_write else 'read'} of {run.mmio.len} at {run.mmio.phys_addr:#x}"
    elif reason is Exit.INTERNAL_ERROR:
        detail = f" suberror {run.internal.suberror} {[hex(value) for value in run.internal.data]}"
    elif reason is Exit.FAIL_ENTRY:
        detail = f" {run.fail_entry.hardware_entry_failure_reason:#x}"
    return f"KVM_RUN gave {reason!r}{detail} at rip {regs.rip:#x}, rax {regs.rax:#x}, rflags {regs.rflags:#x}"


def _data_segments(sregs: kvm_sregs, selector: int) -> None:
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, segment(selector, _DATA_TYPE, wide=True))


def _gdt() -> bytes:
    """Descriptors in the order of the selectors above."""
    code32, data32, code64, user_data, user_code64 = (
        0x00CF9B000000FFFF,
        0x00CF93000000FFFF,
        0x00AF9B000000FFFF,
        0x00CFF3000000FFFF,
        0x00AFFB000000FFFF,
    )
    task = TSS_SIZE - 1 | (TSS & 0xFFFFFF) << 16 | 0x8B << 40
    return struct.pack("<8Q", 0, code32, data32, code64, user_data, user_code64, task, 0)


def _tss(mode: Mode) -> bytes:
    """A TSS that says where the stack of CPL0 is, and that every port is open."""
    stack = struct.pack("<IQ", 0, STACK) if mode.long else struct.pack("<III", 0, STACK, DATA32)
    return stack + struct.pack("<90xH8192xB", TSS_IOPB, 0xFF)
