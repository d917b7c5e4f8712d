"""kvm-intel with EPT and without unrestricted guest: real mode by virtual-8086 mode, no paging by an identity map.

VMX without that control enters only with CR0.PE and CR0.PG on. So a guest in real mode runs in virtual-8086 mode, with
a TSS of ours whose redirection map sends INT n to its own vectors; what is privileged there, and whatever virtual-8086
mode has no segments for, the emulator executes. A guest without paging runs on a page table that maps 4 GiB onto
themselves. Both lie in the guest's memory, in private slots: KVM_SET_TSS_ADDR, KVM_SET_IDENTITY_MAP_ADDR.

Source: arch/x86/kvm/vmx/vmx.c: enter_rmode(), fix_rmode_seg(), init_rmode_tss(), init_rmode_identity_map(),
ept_update_paging_mode_cr0(), handle_rmode_exception(), handle_invalid_guest_state(); SDM, "Virtual-8086 Mode".
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, ClassVar, cast

from vmonty.base.ram import Ram
from vmonty.cpu.vmcs import Field
from vmonty.kvm.soft.intercepts import CR0_PE, CR0_PG, GP_VECTOR, RSP, UD_VECTOR
from vmonty.kvm.soft.memslots import KVM_USER_MEM_SLOTS
from vmonty.kvm.soft.vcpu_state import QueuedException
from vmonty.kvm.soft.vmx import controls as c
from vmonty.kvm.soft.vmx.exits import WHILE_INVALID, Handler, VmxExits
from vmonty.kvm.soft.vmx.vmx import ALL, CR4_PAE, CR4_PCIDE, CR4_SMAP, CR4_SMEP, EFER_LME, SEGMENT_FIELDS, Vmx
from vmonty.kvm.uapi import flags
from vmonty.kvm.uapi.vcpu import kvm_cpuid_entry2, kvm_segment

if TYPE_CHECKING:
    from vmonty.kvm.soft.kvm_main import Kvm
    from vmonty.kvm.soft.vmx.main import KvmIntel
    from vmonty.kvm.soft.x86 import VcpuX86

TSS_PRIVATE_MEMSLOT, IDENTITY_PAGETABLE_PRIVATE_MEMSLOT = KVM_USER_MEM_SLOTS + 1, KVM_USER_MEM_SLOTS + 2
# A TSS: its base, the redirection map (zeros: INT n goes to the guest's own vectors), all ports open, a byte of ones.
TSS_PAGES, TSS_BASE_SIZE, TSS_REDIRECTION_SIZE, TSS_IOPB_SIZE, TSS_IOPB_BASE_OFFSET = 3, 0x68, 32, 8192, 0x66
RMODE_TSS_SIZE = TSS_BASE_SIZE + TSS_REDIRECTION_SIZE + TSS_IOPB_SIZE + 1
# Present, writable, a user's, accessed, dirty, 4 MiB.
IDENTITY_PDE = 0xE7
CR0_AM, CR4_VME, CR4_PSE = 1 << 18, 1, 1 << 4
RFLAGS_TF, RFLAGS_IF, RFLAGS_RF, RFLAGS_AC = 1 << 8, 1 << 9, 1 << 16, 1 << 18
RFLAGS_HIDDEN = 3 << 12 | 1 << 17  # IOPL, VM
RIGHTS_DPL, RIGHTS_TYPE, RIGHTS_UNUSABLE, RIGHTS_DATA, RIGHTS_BUSY_TSS = 3 << 5, 15, 1 << 16, 3, 0x8B
CODE_AND_DATA = ("es", "cs", "ss", "ds", "fs", "gs")
ALL_EXCEPTIONS = (1 << 32) - 1
NMI_VECTOR = 2
ALL_VECTORS = 0x3FF
SOFT_EXCEPTIONS = (3, 4)


def init_rmode_tss(kvm: Kvm, address: int) -> None:
    """Put the TSS at guest-physical *address*. Raises OSError, EEXIST where a slot lies."""
    ram = Ram(TSS_PAGES * 4096, "vmonty-rmode-tss")
    ram.write(TSS_IOPB_BASE_OFFSET, struct.pack("<H", TSS_BASE_SIZE + TSS_REDIRECTION_SIZE))
    ram.write(RMODE_TSS_SIZE - 1, b"\xff")
    kvm.set_private_memory(TSS_PRIVATE_MEMSLOT, address, ram)


def init_rmode_identity_map(kvm: Kvm) -> None:
    """Put the page table where the VM has it, unless it is there."""
    if kvm.memslots.get(IDENTITY_PAGETABLE_PRIVATE_MEMSLOT) is None:
        ram = Ram(4096, "vmonty-identity-map")
        ram.write(0, struct.pack("<1024I", *((page << 22) + IDENTITY_PDE for page in range(1024))))
        kvm.set_private_memory(IDENTITY_PAGETABLE_PRIVATE_MEMSLOT, kvm.identity_map_addr, ram)


class RestrictedVmx(Vmx):
    """A vCPU whose CR0, CR4 and EFER are not the processor's; CR3 is, while the guest has paging on."""

    restricted = True

    def __init__(self, vcpu: VcpuX86, module: KvmIntel) -> None:
        # What the guest has, of which virtual-8086 mode shows something else: limit and rights, TR, RFLAGS.
        self._rmode_segments: dict[str, tuple[int, int]] = {}
        self._rmode_tr = (0, 0, 0, 0)
        self._rmode_rflags = 0
        self._has_own_cr3 = False
        self._emulation_required = False
        init_rmode_identity_map(vcpu.kvm)
        super().__init__(vcpu, module)

    def _setup_controls(self) -> None:
        super()._setup_controls()
        self.cpu.vmwrite(Field.CR0_GUEST_HOST_MASK, ALL)
        self.cpu.vmwrite(Field.CR4_GUEST_HOST_MASK, ALL)

    def set_cpuid(self, entries: list[kvm_cpuid_entry2]) -> None:
        self.cpu.set_cpuid(entries)

    # ---- control registers ---------------------------------------------------------------------------

    def get_control(self, name: str) -> int:
        if name == "cr3" and self._has_own_cr3:
            return self.cpu.vmread(Field.GUEST_CR3)
        return self.guest_controls[name] if name in self.guest_controls else super().get_control(name)

    def set_control(self, name: str, value: int) -> None:
        if name not in self.guest_controls:
            super().set_control(name, value)
            return
        self.guest_controls["cr3"] = self.get_control("cr3")
        self.guest_controls[name] = value
        self._set_hardware()

    def set_cr0(self, value: int) -> bool:
        done = super().set_cr0(value)
        self._load_pdptrs()
        return done

    def set_cr4(self, value: int) -> bool:
        done = super().set_cr4(value)
        self._load_pdptrs()
        return done

    def set_cr3(self, value: int) -> bool:
        """It exits while the guest has paging off: there is nothing to load."""
        self.set_control("cr3", value)
        return True

    def _set_hardware(self) -> None:
        """vmx_set_cr0(), ept_update_paging_mode_cr0(), vmx_set_cr4(), vmx_set_efer()."""
        write, (cr0, cr3, cr4, efer) = self.cpu.vmwrite, self.guest_controls.values()
        write(Field.CR0_READ_SHADOW, cr0)
        write(Field.CR4_READ_SHADOW, cr4)
        real, paging = not cr0 & CR0_PE, bool(cr0 & CR0_PG)
        if real != self.vm86_active:
            (self._enter_rmode if real else self._enter_pmode)()
        self._enable(Field.SECONDARY_VM_EXEC_CONTROL, c.SECOND_UNRESTRICTED, False)
        self._enable(Field.CPU_BASED_VM_EXEC_CONTROL, c.PROC_CR3_LOAD | c.PROC_CR3_STORE, not paging)
        write(Field.GUEST_CR0, (cr0 | c.CR0_NE | CR0_PE | CR0_PG) & ~(CR0_AM if real else 0))
        if paging:
            write(Field.GUEST_CR4, cr4 | c.CR4_VMXE)
        else:
            hidden = CR4_PAE | CR4_PCIDE | CR4_SMEP | CR4_SMAP
            write(Field.GUEST_CR4, (cr4 | CR4_PSE | c.CR4_VMXE | (CR4_VME if real else 0)) & ~hidden)
        write(Field.GUEST_CR3, cr3 if paging else self.vcpu.kvm.identity_map_addr)
        self._has_own_cr3 = paging
        self._set_efer(efer if efer & c.EFER_LMA else efer & ~EFER_LME)

    def enter_two_dimensional(self, step: bool) -> None:
        """The guest's own registers, for the emulator, which is the processor with unrestricted guest."""
        self.guest_controls["cr3"] = self.get_control("cr3")
        write, (cr0, cr3, cr4, efer) = self.cpu.vmwrite, self.guest_controls.values()
        self.two_dimensional = step
        if self.vm86_active:
            self._enter_pmode()
        self._enable(Field.SECONDARY_VM_EXEC_CONTROL, c.SECOND_UNRESTRICTED, True)
        self._enable(Field.CPU_BASED_VM_EXEC_CONTROL, c.PROC_CR3_LOAD | c.PROC_CR3_STORE, False)
        write(Field.GUEST_CR0, cr0 | c.CR0_NE)
        write(Field.GUEST_CR3, cr3)
        write(Field.GUEST_CR4, cr4 | c.CR4_VMXE)
        self._has_own_cr3 = True
        self._set_efer(efer)

    def leave_two_dimensional(self) -> None:
        self.two_dimensional = False
        self.guest_controls["cr3"] = self.get_control("cr3")
        self._set_hardware()

    # ---- real mode -----------------------------------------------------------------------------------

    def _enter_rmode(self) -> None:
        """enter_rmode(): what the VMCS has now is the guest's own."""
        read, write = self.cpu.vmread, self.cpu.vmwrite
        for name in CODE_AND_DATA:
            _, _, limit, rights = SEGMENT_FIELDS[name]
            self._rmode_segments[name] = read(limit), read(rights)
            write(rights, self._fix_rmode_seg(name, read(rights)))
        self._rmode_tr = self._read_tr()
        for field, value in zip(
            SEGMENT_FIELDS["tr"], (0, self.vcpu.kvm.tss_addr or 0, RMODE_TSS_SIZE - 1, RIGHTS_BUSY_TSS), strict=True
        ):
            write(field, value)
        self._rmode_rflags = read(Field.GUEST_RFLAGS)
        write(Field.GUEST_RFLAGS, self._rmode_rflags | RFLAGS_HIDDEN)
        self.vm86_active = True
        self._update_exception_bitmap()

    def _read_tr(self) -> tuple[int, int, int, int]:
        selector, base, limit, rights = (self.cpu.vmread(field) for field in SEGMENT_FIELDS["tr"])
        return selector, base, limit, rights

    def _enter_pmode(self) -> None:
        """enter_pmode(): bases and selectors are as the guest has loaded them meanwhile."""
        write = self.cpu.vmwrite
        flags_now = self.get_rflags()
        self.vm86_active = False
        for name, (limit, rights) in self._rmode_segments.items():
            write(SEGMENT_FIELDS[name][2], limit)
            write(SEGMENT_FIELDS[name][3], rights)
        for field, value in zip(SEGMENT_FIELDS["tr"], self._rmode_tr, strict=True):
            write(field, value)
        write(Field.GUEST_RFLAGS, flags_now)
        self._update_exception_bitmap()

    @staticmethod
    def _fix_rmode_seg(name: str, rights: int) -> int:
        """fix_rmode_seg(), as with emulate_invalid_guest_state: what else is not as 8086 code has it is emulated."""
        if rights & RIGHTS_UNUSABLE:
            return rights
        return (rights & ~RIGHTS_TYPE | RIGHTS_DATA if name == "cs" else rights) | RIGHTS_DPL

    def _update_exception_bitmap(self) -> None:
        """In virtual-8086 mode all of them exit: the processor would deliver them by the protected-mode IDT."""
        if self.vm86_active:
            self.cpu.vmwrite(Field.EXCEPTION_BITMAP, ALL_EXCEPTIONS)
        else:
            super()._update_exception_bitmap()

    def get_segment(self, name: str) -> kvm_segment:
        segment = super().get_segment(name)
        if self.vm86_active and name != "ldt":
            if name == "tr":
                segment.selector, segment.base, segment.limit, rights = self._rmode_tr
            else:
                segment.limit, rights = self._rmode_segments[name]
            segment.type, segment.s, segment.dpl = rights & RIGHTS_TYPE, rights >> 4 & 1, rights >> 5 & 3
            segment.db, segment.g, segment.avl = rights >> 14 & 1, rights >> 15 & 1, rights >> 12 & 1
        return segment

    def set_segment(self, name: str, segment: kvm_segment) -> None:
        if not self.vm86_active or name == "ldt":
            super().set_segment(name, segment)
            return
        read, fields = self.cpu.vmread, SEGMENT_FIELDS[name]
        ours = [read(field) for field in fields]
        super().set_segment(name, segment)
        if name == "tr":
            self._rmode_tr = self._read_tr()
            for field, value in zip(fields, ours, strict=True):
                self.cpu.vmwrite(field, value)
        else:
            self._rmode_segments[name] = read(fields[2]), read(fields[3])
            self.cpu.vmwrite(fields[3], self._fix_rmode_seg(name, read(fields[3])))

    def get_rflags(self) -> int:
        value = super().get_rflags()
        return value & ~RFLAGS_HIDDEN | self._rmode_rflags & RFLAGS_HIDDEN if self.vm86_active else value

    def set_rflags(self, value: int) -> None:
        super().set_rflags(value)
        if self.vm86_active:
            self._rmode_rflags = super().get_rflags()
            self.cpu.vmwrite(Field.GUEST_RFLAGS, self._rmode_rflags | RFLAGS_HIDDEN)

    def get_cpl(self) -> int:
        return 0 if self.vm86_active else super().get_cpl()

    # ---- running -------------------------------------------------------------------------------------

    def run(self) -> None:
        """vmx_vcpu_run(): nothing, if the next instructions must be emulated.

        Without a TSS of the VM's there is no virtual-8086 mode; and its INT n knows vectors at 0 only.
        """
        if self.vm86_active and (self.vcpu.kvm.tss_addr is None or not self._vectors_at_zero()):
            self._emulation_required = True
        else:
            super().run()

    def _vectors_at_zero(self) -> bool:
        base, limit = self.get_table("idt")
        return base == 0 and limit >= ALL_VECTORS

    def handle_exit(self) -> bool:
        if self._emulation_required:
            self._emulation_required = False
            return self.emulator.emulate(WHILE_INVALID)  # handle_invalid_guest_state()
        return super().handle_exit()

    def handle_rmode_exception(self) -> bool:
        """#GP is for what is privileged in virtual-8086 mode; the others are the guest's."""
        if not self.vm86_active:
            return self.handle_exception_nmi()
        vector = self.cpu.vmread(Field.VM_EXIT_INTR_INFO) & c.INFO_VECTOR
        if vector == UD_VECTOR or self._debugger_wants() >> vector & 1:
            return self.handle_exception_nmi()
        if vector == GP_VECTOR:
            return self.emulator.emulate()
        payload = self.cpu.vmread(Field.EXIT_QUALIFICATION) if vector == flags.DB_VECTOR else None
        self.vcpu.queue_exception(vector, None, payload)
        return True

    def inject_irq(self, vector: int) -> None:
        if self.vm86_active:
            self._inject_realmode_interrupt(vector)
        else:
            super().inject_irq(vector)

    def inject_nmi(self) -> None:
        if self.vm86_active:
            self._inject_realmode_interrupt(NMI_VECTOR)
            self.set_nmi_mask(True)
        else:
            super().inject_nmi()

    def inject_exception(self, exception: QueuedException) -> None:
        if not self.vm86_active:
            super().inject_exception(exception)
            return
        self.vcpu.deliver_payload(exception)
        soft = exception.vector in SOFT_EXCEPTIONS
        self._inject_realmode_interrupt(exception.vector, self.cpu.vmread(Field.VM_EXIT_INSTRUCTION_LEN) if soft else 0)

    def _inject_realmode_interrupt(self, vector: int, length: int = 0) -> None:
        """kvm_inject_realmode_interrupt(): as the processor does in real mode. SDM, "Real-Address Mode Operation".

        *length*: of the instruction that asked for it.
        """
        kvm = self.vcpu.kvm
        base, limit = self.get_table("idt")
        gate = kvm.read_gpa(base + 4 * vector, 4) if 4 * vector + 3 <= limit else None
        if gate is None:
            self.vcpu.triple_fault_pending = True
            return
        offset, selector = struct.unpack("<HH", gate)
        code, stack, pointer, rflags = (
            self.get_segment("cs"),
            self.get_segment("ss"),
            self.get_gpr(RSP),
            self.get_rflags(),
        )
        for word in (rflags, code.selector, self.get_rip() + length):
            top = pointer - 2 & 0xFFFF
            pointer = pointer & ~0xFFFF | top
            kvm.write_gpa(stack.base + top & 0xFFFF_FFFF, struct.pack("<H", word & 0xFFFF))
        self.set_gpr(RSP, pointer)
        self.set_rflags(rflags & ~(RFLAGS_IF | RFLAGS_TF | RFLAGS_AC | RFLAGS_RF))
        code.selector, code.base = selector, selector << 4
        self.set_segment("cs", code)
        self.set_rip(offset)
        self.set_interrupt_shadow(0)

    HANDLERS: ClassVar[dict[int, Handler]] = {**VmxExits.HANDLERS, 0: cast("Handler", handle_rmode_exception)}
