"""kvm_intel with unrestricted_guest=0: virtual-8086 mode shows a guest what real mode would (unrestricted_guest=1)."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vmonty import kvm
from vmonty.base.errors import KvmError
from vmonty.base.ram import Ram
from vmonty.kvm.soft import modules
from vmonty.kvm.soft.vmx.rmode import IDENTITY_PDE
from vmonty.kvm.uapi import Exit
from vmonty.testing.guests import CODE, DATA, RAM_SIZE, Mode, TinyGuest

IDENTITY_MAP, TSS = 0xFEFF_C000, 0xFEFF_D000
VM, IOPL = 1 << 17, 3 << 12
DONE = "out 0x10, al\n"
# A flat data segment, and 16-bit code and data, in a GDT at 0x6000.
FLAT = """
    lgdt [gdt_register]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    jmp 0x18:protected
protected:
    mov bx, 8
    mov fs, bx
    and al, 0xfe
    mov cr0, eax
    jmp 0:back
gdt_register:
    dw 31
    dd gdt
gdt:
    dq 0, 0x00cf93000000ffff, 0x000093000000ffff, 0x00009b000000ffff
back:
"""

# name → program; each ends with DONE. A handler of vector v writes v to DATA + v and returns.
PROGRAMS = {
    "segments": f"mov ax, 0x412\n mov es, ax\n mov word [es:0], 0x1234\n lds bx, [es:0]\n mov cx, ds\n {DONE}",
    "flags": f"pushf\n pop ax\n sti\n pushf\n pop bx\n cli\n pushf\n pop cx\n {DONE}",
    "int-n": f"int 0x50\n mov al, [{DATA + 0x50}]\n {DONE}",
    "int3-into": f"int3\n mov al, 0x7f\n add al, 1\n into\n mov ax, [{DATA + 3}]\n {DONE}",
    "divide": f"mov cx, after\n xor bl, bl\n div bl\n after: mov al, [{DATA}]\n {DONE}",
    "undefined": f"mov cx, after\n ud2\n after: mov al, [{DATA + 6}]\n {DONE}",
    "bound": f"mov cx, after\n mov ax, 9\n bound ax, [limits]\n after: mov al, [{DATA + 5}]\n {DONE}\n limits: dw 1, 2",
    "privileged": f"mov eax, cr0\n mov ebx, cr4\n mov edx, cr3\n smsw si\n clts\n sgdt [{DATA + 0x100}]\n {DONE}",
    "strings": f"cld\n mov si, {CODE}\n mov di, {DATA + 0x200}\n mov cx, 300\n rep movsb\n {DONE}",
    "far": f"call 0x10:far_code - 0x100\n jmp 0:over\n far_code: mov ax, cs\n retf\n over: mov bx, cs\n {DONE}",
    "flat": f"{FLAT} mov ebx, 0x7fffc\n mov dword [fs:ebx], 0x55aa1234\n mov ecx, [fs:ebx]\n xor eax, eax\n {DONE}",
    "step": f"pushf\n pop ax\n or ah, 1\n push ax\n popf\n nop\n mov al, [{DATA + 1}]\n {DONE}",
    "cpuid": f"xor eax, eax\n cpuid\n {DONE}",
    "protected": f"{FLAT} mov eax, cr0\n {DONE}",
    "vectors": f"""
        mov word [0x7000 + 4 * 0x51], handler
        mov word [0x7000 + 4 * 0x51 + 2], 0
        lidt [table]
        int 0x51
        {DONE}
        handler: mov dx, 0x5151
        iret
        table: dw 0x3ff
        dd 0x7000
    """,
}


def returns(vector: int, skips: bool = False) -> str:
    """Note *vector*; *skips*: go on where CX says, behind what faulted."""
    onwards = "mov bp, sp\n mov [bp + 2], cx\n" if skips else ""
    step = "mov bp, sp\n and byte [bp + 7], 0xfe\n" if vector == 1 else ""
    return f"push bp\n {onwards or step} mov byte [cs:{DATA + vector}], {vector + 1}\n pop bp\n iret"


HANDLERS = {vector: returns(vector, vector in (0, 5, 6)) for vector in (0, 1, 2, 3, 4, 5, 6, 0x50)}


@contextmanager
def guest(unrestricted: bool, tss: bool = True) -> Iterator[TinyGuest]:
    with (
        modules.only("kvm_intel", unrestricted_guest=unrestricted),
        kvm.open("soft") as system,
        system.create_vm() as vm,
    ):
        vm.set_identity_map_addr(IDENTITY_MAP)
        if tss:
            vm.set_tss_addr(TSS)
        ram = Ram(RAM_SIZE)
        vm.set_user_memory_region(0, 0, ram)
        with vm.create_vcpu() as vcpu:
            yield TinyGuest(vm, vcpu, ram)


def outcome(found: TinyGuest, program: str) -> tuple[object, ...]:
    """Registers and memory at its end; IOPL is not the guest's in virtual-8086 mode."""
    found.load(Mode.REAL, program, HANDLERS)
    while (exit_reason := found.run()) is not Exit.IO:
        assert exit_reason is Exit.INTR, exit_reason
    found.vcpu.complete_io()
    regs, sregs = found.vcpu.get_regs(), found.vcpu.get_sregs()
    segments = [
        (at.selector, at.base, at.limit, at.type, at.s, at.dpl, at.present, at.db, at.g)
        for at in (sregs.cs, sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.tr, sregs.ldt)
    ]
    general = [
        getattr(regs, name) for name in ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "rip", "rflags"]
    ]
    return general, segments, sregs.cr0, sregs.cr3, sregs.cr4, bytes(found.ram.read(DATA, 0x400))


@pytest.mark.parametrize("tss", [True, False], ids=["vm86", "emulated"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_as_in_real_mode(name: str, tss: bool) -> None:
    with guest(unrestricted=True) as real:
        expected = outcome(real, PROGRAMS[name])
    with guest(unrestricted=False, tss=tss) as restricted:
        found = outcome(restricted, PROGRAMS[name])
    if name in ("flags", "step"):  # PUSHF shows IOPL 3
        found = ([found[0][0] & ~IOPL, found[0][1] & ~IOPL, found[0][2] & ~IOPL, *found[0][3:]], *found[1:])  # type: ignore[index]
    assert found == expected


def test_the_processor_is_in_virtual_8086_mode() -> None:
    """And executes the guest itself, but for what is privileged there."""
    with guest(unrestricted=False) as found, found.vcpu.stats() as counters:
        found.load(Mode.REAL, f"mov ecx, 100000\n again: add eax, ecx\n dec ecx\n jnz again\n {DONE} hlt")
        assert found.out()[0] == 0x10
        assert found.vcpu.dump_vmcs()["GUEST_RFLAGS"] & VM
        assert not found.vcpu.get_regs().rflags & (VM | IOPL)
        assert counters.read()["insn_emulation"] == 0
        assert found.run() is Exit.HLT
        assert counters.read()["insn_emulation"] == 1


def test_without_a_tss_it_is_emulated() -> None:
    with guest(unrestricted=False, tss=False) as found, found.vcpu.stats() as counters:
        found.load(Mode.REAL, f"mov ecx, 1000\n again: dec ecx\n jnz again\n {DONE}")
        assert found.out()[0] == 0x10
        assert counters.read()["insn_emulation"] >= 2000 // 64


@pytest.mark.parametrize("nmi", [False, True], ids=["irq", "nmi"])
def test_an_interrupt_goes_by_the_guests_vectors(nmi: bool) -> None:
    with guest(unrestricted=False) as found:
        vector = 2 if nmi else 0x50
        wait = f"again: cmp byte [{DATA + vector}], 0\n je again\n"
        found.load(Mode.REAL, f"{'' if nmi else 'sti'}\n nop\n {DONE} {wait} {DONE}", HANDLERS)
        assert found.out()[0] == 0x10
        found.vcpu.complete_io()
        if nmi:
            found.vcpu.nmi()
        else:
            found.vcpu.interrupt(vector)
        assert found.out()[0] == 0x10
        assert found.ram.read_u8(DATA + vector) == vector + 1


def test_no_paging_is_an_identity_map() -> None:
    """In the guest's memory; the guest sees its own CR3."""
    with guest(unrestricted=False) as found:
        found.load(
            Mode.PROTECTED,
            f"mov eax, 0x5000\n mov cr3, eax\n mov ebx, cr3\n mov [{DATA + 4}], ebx\n"
            f"mov eax, [{IDENTITY_MAP + 4 * 3:#x}]\n mov [{DATA}], eax\n {DONE}",
        )
        assert found.out()[0] == 0x10
        assert found.ram.read_u32(DATA) == (3 << 22) + IDENTITY_PDE
        assert found.ram.read_u32(DATA + 4) == 0x5000
        assert found.vcpu.dump_vmcs()["GUEST_CR3"] == IDENTITY_MAP
        assert found.vcpu.get_sregs().cr3 == 0x5000


def test_private_slots_are_taken() -> None:
    with guest(unrestricted=False) as found:
        for address in (IDENTITY_MAP, TSS + 0x2000):
            with pytest.raises(KvmError) as refusal:
                found.vm.set_user_memory_region(1, address, Ram(0x1000))
            assert refusal.value.errno == errno.EEXIST
        with pytest.raises(KvmError) as refusal:
            found.vm.set_tss_addr(TSS + 0x8000)  # it is set once
        assert refusal.value.errno == errno.EEXIST
