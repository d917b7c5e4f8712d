"""SVM used by code on the bare processor. APM, "Enabling SVM", "VMRUN Instruction", "#VMEXIT"."""

from __future__ import annotations

import pytest

from vmonty.cpu.svm import Svm
from vmonty.cpu.vmcb import INVALID, ExitCode, Field

from .machine import Machine
from .nested import GUEST_CODE, GUEST_STACK, HOST_SAVE, MAPS, REGION, boot

F, X = Field, ExitCode
TABLES = 0x36000  # nested page tables


def at(field: Field) -> str:
    return f"[{REGION} + {field & 0xFFF}]"


def enable() -> str:
    return f"""
        mov ecx, 0xC0000080
        rdmsr
        or eax, 0x1000
        wrmsr
        mov ecx, 0xC0010117
        mov eax, {HOST_SAVE}
        xor edx, edx
        wrmsr
    """


def set_up(*intercepts: ExitCode, nested: bool = False) -> str:
    """A guest with the host's own mode: what VMSAVE and the segment registers give."""
    lines = [enable(), f"mov eax, {REGION}", "vmsave"]
    lines += [f"bts dword [{REGION} + {4 * (code >> 5)}], {code & 31}" for code in (X.VMRUN, *intercepts)]
    for field, register in ((F.CR0, "cr0"), (F.CR3, "cr3"), (F.CR4, "cr4")):
        lines += [f"mov rax, {register}", f"mov {at(field)}, rax"]
    values = {
        F.ASID: 1, F.IOPM_BASE_PA: MAPS, F.MSRPM_BASE_PA: MAPS, F.CS_ATTRIB: 0xA9B, F.CS_SELECTOR: 8,
        F.SS_ATTRIB: 0xC93, F.DS_ATTRIB: 0xC93, F.ES_ATTRIB: 0xC93, F.EFER: 0x1D01, F.RIP: GUEST_CODE,
        F.RSP: GUEST_STACK, F.RFLAGS: 2, F.IDTR_BASE: 0x2000, F.IDTR_LIMIT: 0xFFF, F.GDTR_BASE: 0x1000,
        F.GDTR_LIMIT: 0xFFF, F.DR7: 0x400, F.DR6: 0xFF0,
    }  # fmt: skip
    if nested:
        values |= {F.NP_ENABLE: 1, F.N_CR3: TABLES, F.G_PAT: 0x00070406}
    sizes = {1: "byte", 2: "word", 4: "dword", 8: "qword"}
    lines += [f"mov {sizes[field >> 12]} {at(field)}, {value}" for field, value in values.items()]
    return "\n".join(lines)


def start(source: str, guest: str = "hlt") -> Machine:
    machine = boot(source, guest)
    Svm(machine.cpu)
    return machine


def test_a_guest_runs_and_comes_back() -> None:
    source = f"""
        {set_up(X.CPUID)}
        mov rbx, 5
        mov eax, {REGION}
        vmrun
        mov rcx, {at(F.EXITCODE)}
        mov rdx, {at(F.RIP)}
        mov rsi, {at(F.RAX)}
        mov rdi, rax
        hlt
    """
    machine = start(source, "mov eax, 0x1234\nadd rbx, 2\ncpuid")
    assert machine.cpu.run() == "halt"
    assert machine["rcx"] == X.CPUID
    assert machine["rdx"] == GUEST_CODE + 9
    assert (machine["rsi"], machine["rdi"], machine["rbx"]) == (0x1234, REGION, 7)
    assert machine["guest_mode"] == 0


def test_the_host_comes_back_as_it_was_whatever_the_guest_changed() -> None:
    """APM, "#VMEXIT": host state from the host save area, DR7 off, GIF clear."""
    source = f"""
        {set_up(X.VMMCALL)}
        mov eax, {REGION}
        vmrun
        mov rbx, cr4
        mov rdx, dr7
        sgdt [{GUEST_STACK}]
        mov rsi, [{GUEST_STACK} + 2]
        hlt
    """
    guest = f"""
        mov rax, cr4
        and eax, ~0x80
        mov cr4, rax
        lgdt [{GUEST_STACK}]
        mov rax, dr7
        vmmcall
    """
    machine = start(source, guest)
    before = machine["cr4"]
    assert machine.cpu.run() == "halt"
    assert (machine["rbx"], machine["rdx"], machine["rsi"]) == (before, 0x400, 0x1000)


def test_nested_tables_in_the_hosts_memory_and_their_faults() -> None:
    """NPT: the guest's page at 1 MiB is the host's at 256 KiB; one without an entry is #VMEXIT(NPF)."""
    source = f"""
        {set_up(X.VMMCALL, nested=True)}
        mov qword [{TABLES}], {TABLES + 0x1000 + 7}
        mov qword [{TABLES + 0x1000}], {TABLES + 0x2000 + 7}
        mov qword [{TABLES + 0x2000}], {TABLES + 0x3000 + 7}
        xor ecx, ecx
    more:
        mov rax, rcx
        shl rax, 12
        or rax, 7
        mov [{TABLES + 0x3000} + rcx * 8], rax
        inc ecx
        cmp ecx, 0x100
        jb more
        mov qword [{TABLES + 0x3000 + 0x100 * 8}], 0x40007
        mov dword [0x40010], 0xBEEF
        mov eax, {REGION}
        vmrun
        mov rbx, {at(F.EXITCODE)}
        mov rcx, {at(F.EXITINFO1)}
        mov rdx, {at(F.EXITINFO2)}
        mov rsi, {at(F.RAX)}
        hlt
    """
    machine = start(source, "mov eax, [0x100010]\nmov [0x101018], eax\nvmmcall")
    assert machine.cpu.run() == "halt"
    assert (machine["rbx"], machine["rcx"], machine["rdx"]) == (X.NPF, 1 << 32 | 6, 0x101018)
    assert machine["rsi"] == 0xBEEF


def test_refused_by_the_checks() -> None:
    source = f"""
        {set_up()}
        mov dword {at(F.ASID)}, 0
        mov eax, {REGION}
        vmrun
        mov rbx, {at(F.EXITCODE)}
        hlt
    """
    machine = start(source)
    assert machine.cpu.run() == "halt"
    assert machine["rbx"] == INVALID


@pytest.mark.parametrize("instruction", ["vmrun", "vmload", "vmsave", "stgi", "clgi", "invlpga"])
def test_without_svme_they_do_not_exist(instruction: str) -> None:
    machine = start(f"mov eax, {REGION}\n{instruction}")
    assert machine.cpu.run() == "halt"
    assert machine.handler == 6


@pytest.mark.parametrize("instruction", ["vmmcall", "skinit"])
def test_vmmcall_of_a_host_and_skinit(instruction: str) -> None:
    machine = start(f"{enable()}\n{instruction}")
    assert machine.cpu.run() == "halt"
    assert machine.handler == 6


@pytest.mark.parametrize("address", [REGION + 8, 1 << 30, 1 << 50])
@pytest.mark.parametrize("instruction", ["vmrun", "vmload", "vmsave"])
def test_addresses_that_are_no_pages_of_memory(instruction: str, address: int) -> None:
    machine = start(f"{enable()}\nmov rax, {address}\n{instruction}")
    assert machine.cpu.run() == "halt"
    assert machine.handler == 13


def test_the_global_interrupt_flag_holds_interrupts_back() -> None:
    """APM, "Global Interrupt Flag, STGI and CLGI Instructions"."""
    machine = start(f"{enable()}\nclgi\nsti\nmov ebx, 1\nnop\nmov ebx, 2\nstgi\nnop\nmov ebx, 3\nhlt")
    machine.cpu.interrupt(0x60)
    assert machine.cpu.run() == "halt"
    assert machine.handler == 0x60
    assert machine["rbx"] == 2


def test_svm_can_be_switched_off() -> None:
    """APM, "VM_CR MSR (C001_0114h)": SVMDIS makes EFER.SVME a reserved bit."""
    machine = start(f"mov ecx, 0xC0010114\nmov eax, 0x10\nxor edx, edx\nwrmsr\n{enable()}")
    assert machine.cpu.run() == "halt"
    assert machine.handler == 13
