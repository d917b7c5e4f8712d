"""VMX used by code on the bare processor. SDM, "VMX Instruction Reference", "VM Entries", "Loading Host State"."""

from __future__ import annotations

import pytest

from vmonty.cpu.vmcs import REVISION, Field
from vmonty.cpu.vmx import Vmx

from .machine import TSS, Machine
from .nested import GUEST_CODE, GUEST_STACK, MAPS, REGION, boot

F = Field
VMXON, EPT = REGION + 0x1000, 0x36000
POINTERS = 0x22000  # operands of VMXON, VMCLEAR, VMPTRLD
CF, ZF = 1, 0x40
CPUID, HLT, VMCALL, EPT_VIOLATION, EXTERNAL = 10, 12, 18, 48, 1

ENABLE = f"""
    mov rax, cr4
    or eax, 0x2000
    mov cr4, rax
    mov dword [{VMXON}], {REVISION}
    mov dword [{REGION}], {REVISION}
    mov qword [{POINTERS}], {VMXON}
    mov qword [{POINTERS + 8}], {REGION}
    vmxon [{POINTERS}]
"""
CURRENT = f"{ENABLE}\nvmclear [{POINTERS + 8}]\nvmptrld [{POINTERS + 8}]\n"


def start(source: str, guest: str = "hlt") -> Machine:
    machine = boot(source, guest)
    Vmx(machine.cpu)
    return machine


def fields(values: dict[Field, int | str]) -> str:
    """Code that writes them; a string is the register that has the value."""
    lines = []
    for field, value in values.items():
        if isinstance(value, int):
            lines += [f"mov rax, {value:#x}"]
        elif value != "rax":
            lines += [f"mov rax, {value}"]
        lines += [f"mov edx, {int(field):#x}", "vmwrite rdx, rax"]
    return "\n".join(lines)


def set_up(ept: bool = False, host: dict[Field, int | str] | None = None) -> str:
    """A 64-bit guest with the host's tables; exits go to the label ``exited``."""
    values: dict[Field, int | str] = {
        F.PIN_BASED_VM_EXEC_CONTROL: 0x16 | 1,
        F.CPU_BASED_VM_EXEC_CONTROL: 0x04006172 | 1 << 7 | (1 << 31 if ept else 0),
        F.SECONDARY_VM_EXEC_CONTROL: 2 if ept else 0, F.EPT_POINTER: EPT | 0x1E,
        F.VM_EXIT_CONTROLS: 0x36DFB | 0x200, F.VM_ENTRY_CONTROLS: 0x11FB | 0x200,
        F.VMCS_LINK_POINTER: 0xFFFFFFFFFFFFFFFF, F.MSR_BITMAP: MAPS,
        F.GUEST_CR0: "cr0", F.GUEST_CR3: "cr3", F.GUEST_CR4: "cr4", F.GUEST_DR7: 0x400,
        F.GUEST_RIP: GUEST_CODE, F.GUEST_RSP: GUEST_STACK, F.GUEST_RFLAGS: 2,
        F.GUEST_GDTR_BASE: 0x1000, F.GUEST_GDTR_LIMIT: 0xFFF, F.GUEST_IDTR_BASE: 0x2000, F.GUEST_IDTR_LIMIT: 0xFFF,
        F.GUEST_CS_SELECTOR: 8, F.GUEST_CS_AR_BYTES: 0xA09B, F.GUEST_CS_LIMIT: 0xFFFFFFFF,
        F.GUEST_TR_SELECTOR: 0x38, F.GUEST_TR_AR_BYTES: 0x8B, F.GUEST_TR_LIMIT: 0x67, F.GUEST_TR_BASE: TSS,
        F.GUEST_LDTR_AR_BYTES: 0x10000,
        F.HOST_CR0: "cr0", F.HOST_CR3: "cr3", F.HOST_CR4: "cr4", F.HOST_CS_SELECTOR: 8, F.HOST_SS_SELECTOR: 0x10,
        F.HOST_DS_SELECTOR: 0x10, F.HOST_ES_SELECTOR: 0x10, F.HOST_TR_SELECTOR: 0x38, F.HOST_TR_BASE: TSS,
        F.HOST_GDTR_BASE: 0x1000, F.HOST_IDTR_BASE: 0x2000, F.HOST_RSP: 0xB000, F.HOST_RIP: "exited",
    }  # fmt: skip
    for name in ("ES", "SS", "DS", "FS", "GS"):
        values[F[f"GUEST_{name}_SELECTOR"]] = 0x10
        values[F[f"GUEST_{name}_AR_BYTES"]] = 0xC093
        values[F[f"GUEST_{name}_LIMIT"]] = 0xFFFFFFFF
    return CURRENT + fields(values | (host or {}))


def read(field: Field, register: str) -> str:
    return f"mov r15d, {int(field):#x}\nvmread {register}, r15"


FAILED = f"\npushfq\npop rbx\n{read(F.VM_INSTRUCTION_ERROR, 'rcx')}\nhlt\nexited: hlt\n"


def test_a_guest_runs_exits_and_resumes() -> None:
    source = f"""
        {set_up()}
        xor esi, esi
        vmlaunch
        hlt
    exited:
        {read(F.VM_EXIT_REASON, "rbx")}
        {read(F.GUEST_RIP, "rcx")}
        {read(F.VM_EXIT_INSTRUCTION_LEN, "rdx")}
        inc esi
        cmp ebx, {HLT}
        je over
        add rcx, rdx
        mov edi, {int(F.GUEST_RIP)}
        vmwrite rdi, rcx
        vmresume
    over:
        mov rdi, rsp
        hlt
    """
    machine = start(source, "mov r8d, 5\ncpuid\nadd r8d, 2\nhlt")
    assert machine.cpu.run() == "halt"
    assert (machine["rbx"], machine["rsi"], machine["r8"], machine["rdi"]) == (HLT, 2, 7, 0xB000)
    assert machine["guest_mode"] == 0


def test_an_extended_page_table_in_the_hosts_memory() -> None:
    """The guest's page at 1 MiB is the host's at 256 KiB; one without an entry is an EPT violation."""
    source = f"""
        {set_up(ept=True)}
        mov qword [{EPT}], {EPT + 0x1000 + 7}
        mov qword [{EPT + 0x1000}], {EPT + 0x2000 + 7}
        mov qword [{EPT + 0x2000}], {EPT + 0x3000 + 7}
        xor ecx, ecx
    more:
        mov rax, rcx
        shl rax, 12
        or rax, 0x37
        mov [{EPT + 0x3000} + rcx * 8], rax
        inc ecx
        cmp ecx, 0x100
        jb more
        mov qword [{EPT + 0x3000 + 0x100 * 8}], 0x40037
        mov dword [0x40010], 0xBEEF
        vmlaunch
        hlt
    exited:
        mov rsi, rax
        {read(F.VM_EXIT_REASON, "rbx")}
        {read(F.EXIT_QUALIFICATION, "rcx")}
        {read(F.GUEST_PHYSICAL_ADDRESS, "rdx")}
        hlt
    """
    machine = start(source, "mov eax, [0x100010]\nmov [0x101018], eax\nvmcall")
    assert machine.cpu.run() == "halt"
    assert (machine["rbx"], machine["rcx"] & 7, machine["rdx"]) == (EPT_VIOLATION, 2, 0x101018)
    assert machine["rsi"] == 0xBEEF


@pytest.mark.parametrize(
    ("code", "flag", "error"),
    [
        (f"{ENABLE}\nvmlaunch", CF, None),
        (f"{CURRENT}\nvmresume", ZF, 5),
        (f"{CURRENT}\nvmlaunch", ZF, 7),
        (f"{CURRENT}\nvmxon [{POINTERS}]", ZF, 15),
        (f"{CURRENT}\nvmptrld [{POINTERS}]", ZF, 10),
        (f"{CURRENT}\nvmclear [{POINTERS}]", ZF, 3),
        (f"{CURRENT}\nmov qword [{POINTERS}], 0x123\nvmptrld [{POINTERS}]", ZF, 9),
        (f"{CURRENT}\nmov qword [{POINTERS}], 0x123\nvmclear [{POINTERS}]", ZF, 2),
        (f"{CURRENT}\nmov qword [{POINTERS}], 0x30000\nvmptrld [{POINTERS}]", ZF, 11),
        (f"{CURRENT}\nmov edx, 0x6FFE\nvmwrite rdx, rax", ZF, 12),
        (f"{CURRENT}\nmov edx, 0x4402\nvmwrite rdx, rax", ZF, 13),
        (f"{CURRENT}\nmov edx, 7\ninvept rdx, [{POINTERS}]", ZF, 28),
        (f"{CURRENT}\nvmcall", ZF, 1),
        (f"{CURRENT}\nvmclear [{POINTERS + 8}]", 0, None),
        (set_up(host={F.HOST_CR3: 1 << 60}) + "\nvmlaunch", ZF, 8),
        (set_up(host={F.HOST_RIP: 1 << 60}) + "\nvmlaunch", ZF, 8),
        (set_up(host={F.HOST_CS_SELECTOR: 0}) + "\nvmlaunch", ZF, 8),
    ],
)
def test_failures_in_rflags_and_the_error_field(code: str, flag: int, error: int | None) -> None:
    """SDM, "Conventions" and "VM-Instruction Error Numbers"."""
    machine = start(f"{code}\n{FAILED}")
    assert machine.cpu.run() == "halt"
    assert machine["rbx"] & (CF | ZF) == flag
    if error is not None:
        assert machine["rcx"] == error


def test_an_entry_that_fails_late_is_an_exit() -> None:
    """SDM, "VM-Entry Failures During or After Loading Guest State": bit 31 of the reason."""
    source = f"{set_up(host={F.GUEST_RFLAGS: 0})}\nvmlaunch\nhlt\nexited:\n{read(F.VM_EXIT_REASON, 'rbx')}\nhlt"
    machine = start(source)
    assert machine.cpu.run() == "halt"
    assert machine["rbx"] == 1 << 31 | 33


@pytest.mark.parametrize("code", [f"vmxon [{POINTERS}]", f"vmptrst [{POINTERS}]", "vmxoff", "vmread rax, rdx"])
def test_undefined_outside_vmx_operation(code: str) -> None:
    """VMXON: while CR4.VMXE is clear."""
    machine = start(code)
    assert machine.cpu.run() == "halt"
    assert machine.handler == 6


def test_cr4_vmxe_is_fixed_in_vmx_operation() -> None:
    machine = start(f"{ENABLE}\nmov rax, cr4\nand eax, ~0x2000\nmov cr4, rax\nhlt")
    assert machine.cpu.run() == "halt"
    assert machine.handler == 13


def test_vmptrst_and_vmxoff() -> None:
    source = f"""
        {CURRENT}
        vmptrst [{GUEST_STACK}]
        mov rbx, [{GUEST_STACK}]
        vmxoff
        mov rax, cr4
        and eax, ~0x2000
        mov cr4, rax
        hlt
    """
    machine = start(source)
    assert machine.cpu.run() == "halt"
    assert machine.handler not in (6, 13)
    assert machine["rbx"] == REGION


def test_an_interrupt_that_exits_waits_for_the_host() -> None:
    """External-interrupt exiting without acknowledgement: the host takes it through its own IDT."""
    source = f"""
        {set_up()}
        vmlaunch
        hlt
    exited:
        {read(F.VM_EXIT_REASON, "rbx")}
        sti
        nop
        hlt
    """
    machine = start(source, "jmp $")
    machine["rflags"] = 2
    machine.cpu.interrupt(0x60)
    assert machine.cpu.run() == "halt"
    assert machine["rbx"] == EXTERNAL
    assert machine.handler == 0x60
