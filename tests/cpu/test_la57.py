"""5-level paging. SDM, "4-Level Paging and 5-Level Paging", "Canonical Addressing"."""

from __future__ import annotations

import struct

import pytest

from vmonty.cpu import cpuid, models
from vmonty.testing.nasm import assemble

from .machine import CODE, CODE32, CODE64, TABLES, Machine
from .svm_guest import F as Vmcb
from .svm_guest import Guest as SvmGuest
from .vmx_guest import F as Vmcs
from .vmx_guest import Guest

LA57 = 1 << 12
ROOT, UPPER = 0x30000, 0x31000  # the fifth level, and a fourth-level table for HIGH
HIGH = 1 << 50  # maps what 0 maps
KERNEL_GS_BASE, LSTAR = 0xC0000102, 0xC0000082


def machine(model: str = "max") -> Machine:
    m = Machine()
    models.install(m.cpu, models.parse(model))
    m.long_mode()
    m.ram.write_u64(ROOT, TABLES | 7)
    m.ram.write_u64(ROOT + 8 * (HIGH >> 48), UPPER | 7)
    m.ram.write_u64(UPPER, TABLES + 0x1000 | 7)
    return m


def five(model: str = "max") -> Machine:
    """In 64-bit mode with CR4.LA57, the way software gets there: by compatibility mode, with paging off."""
    m = machine(model)
    m.ram.write(0xA000, struct.pack("<IHIH", 0xA100, CODE32, 0xA200, CODE64))
    m.ram.write(0xA100, assemble(f"""
        mov eax, cr0
        btr eax, 31
        mov cr0, eax
        mov eax, cr4
        bts eax, 12
        mov cr4, eax
        mov eax, {ROOT}
        mov cr3, eax
        mov eax, cr0
        bts eax, 31
        mov cr0, eax
        jmp far [0xA006]
    """, 32, 0xA100))  # fmt: skip
    m.ram.write(0xA200, b"\xf4")
    assert m.run(assemble("jmp dword far [abs 0xA000]", 64, CODE)) == "halt"
    assert m["rip"] == 0xA201
    assert m["cr4"] & LA57
    m["activity"] = 0
    m["rsp"] = 0xB000
    return m


def run(m: Machine, source: str) -> int:
    """Run code at another place each time; gives the vector of the handler that it ends in, or -1."""
    at = m.__dict__.setdefault("next", 0x18000)
    m.next = at + 0x100  # type: ignore[attr-defined]
    assert m.run(assemble(f"default abs\n{source}\nhlt", 64, at), at) == "halt"
    m["activity"] = 0
    return m.handler if m["rip"] < CODE else -1


def test_five_levels() -> None:
    m = five()
    assert run(m, f"mov rbx, {HIGH + 0x20000}\n mov qword [rbx], 0x55\n mov rax, [0x20000]") == -1
    assert m["rax"] == 0x55
    assert m.ram.read_u64(ROOT + 8 * (HIGH >> 48)) & 0x20  # accessed
    assert run(m, f"mov rbx, {HIGH + (1 << 48)}\n mov rax, [rbx]") == 14
    assert m["cr2"] == HIGH + (1 << 48)


@pytest.mark.parametrize(
    ("address", "vector"),
    [(1 << 47, 14), ((1 << 56) - 4096, 14), (1 << 56, 13), (0xFE << 56, 13), (0xFF << 56, 14)],
)
def test_canonical_addresses_have_57_bits(address: int, vector: int) -> None:
    m = five()
    assert run(m, f"mov rbx, {address}\n mov rax, [rbx]") == vector
    m = five()
    assert run(m, f"mov rbx, {address}\n mov [rbx - 1], eax") in (13, 14)
    m = machine()
    assert run(m, f"mov rbx, {address}\n mov rax, [rbx]") == 13


@pytest.mark.parametrize("source", ["jmp rbx", "call rbx", "push rbx\n ret"])
def test_branches(source: str) -> None:
    """#GP at the branch, or #PF at its target."""
    m = five()
    assert run(m, f"mov rbx, {1 << 47}\n {source}") == 14
    assert m.stack(2)[1] == 1 << 47
    m = five()
    at = 0x18000
    assert run(m, f"mov rbx, {1 << 56}\n {source}") == 13
    assert at < m.stack(2)[1] < at + 0x20
    m = five()
    m.ram.write(0x24000, b"\xb8\x07\x00\x00\x00\xc3")
    assert run(m, f"mov rbx, {HIGH + 0x24000}\n call rbx") == -1
    assert m["rax"] == 7


def test_invlpg() -> None:
    m = five()
    high = HIGH + 0x20000
    unmap = f"mov qword [{ROOT + 8 * (HIGH >> 48)}], 0"
    assert run(m, f"mov rbx, {high}\n mov rax, [rbx]\n {unmap}\n invlpg [rbx]\n mov rax, [rbx]") == 14
    assert m["cr2"] == high


def test_the_bit_is_fixed_in_long_mode() -> None:
    """SDM, "MOV—Move to/from Control Registers"."""
    for m in (machine(), five()):
        before = m["cr4"]
        assert run(m, "mov rax, cr4\n btc rax, 12\n mov cr4, rax") == 13
        assert m["cr4"] == before


def test_without_the_feature() -> None:
    m = machine("max,-la57")
    m.protected_mode()
    assert m.run(assemble("mov eax, 0x1020\n mov cr4, eax\n hlt", 32, CODE)) == "halt"
    assert not m["cr4"] & LA57


@pytest.mark.parametrize(
    ("model", "bits", "there"), [("max", 57, 1), ("max,-la57", 48, 0), ("Haswell", 48, 0), ("Haswell,+la57", 57, 1)]
)
def test_cpuid(model: str, bits: int, there: int) -> None:
    m = machine(model)
    assert cpuid.answer(m.cpu.state_address, 7)[2] >> 16 & 1 == there
    assert cpuid.answer(m.cpu.state_address, 0x80000008)[0] >> 8 & 0xFF == bits


@pytest.mark.parametrize("level", [4, 5])
@pytest.mark.parametrize("index", [KERNEL_GS_BASE, LSTAR, 0xC0000100, 0x175])
def test_registers_are_as_wide_as_the_processor(index: int, level: int) -> None:
    """Bases and addresses in registers: 57 bits, whatever CR4.LA57 says; 48 where there is no LA57."""
    m = five() if level == 5 else machine()
    write = f"mov ecx, {index}\n mov edx, %d\n xor eax, eax\n wrmsr"
    assert run(m, write % (1 << 18)) == -1
    assert run(m, write % (1 << 24)) == 13
    assert run(machine("max,-la57"), write % (1 << 18)) == 13


def test_wrfsbase_and_descriptor_tables() -> None:
    m = machine()
    m["cr4"] |= 1 << 16
    m.ram.write(0x20000, struct.pack("<HQ", 0xFFF, 1 << 50))
    assert run(m, f"mov rax, {1 << 50}\n wrfsbase rax\n sgdt [0x20010]\n lgdt [0x20000]\n lgdt [0x20010]") == -1
    assert m.segment("fs").base == 1 << 50


# ---- under VMX and SVM ---------------------------------------------------------------------------------------------


def vmx_guest(model: str = "max") -> Guest:
    guest = Guest()
    models.install(guest.cpu, models.parse(model))
    guest.ram.write_u64(0x30000, 0x1007)
    guest.ram.write_u64(0x30000 + 8 * (HIGH >> 48), 0x1007)
    return guest


def test_vmx_guest() -> None:
    """EPT stays at four levels: guest-physical addresses have 48 bits at most."""
    guest = vmx_guest()
    guest[Vmcs.GUEST_CR4] = guest[Vmcs.GUEST_CR4] | LA57
    guest[Vmcs.GUEST_CR3] = 0x30000
    guest.ram.write_u64(0x20000, 0x77)
    code = assemble(f"mov rbx, {HIGH + 0x20000}\n mov rax, [rbx]\n hlt", 64, 0)
    assert guest.run(code.hex()) == 12
    assert guest.cpu["rax"] == 0x77
    assert guest[Vmcs.GUEST_CR4] & LA57


def test_vm_entry_checks_cr4_and_rip() -> None:
    """SDM, "Checks on Guest Control Registers, Debug Registers, and MSRs", "Checks on Guest RIP, RFLAGS, and SSP"."""
    guest = vmx_guest("max,-la57")
    guest[Vmcs.GUEST_CR4] = guest[Vmcs.GUEST_CR4] | LA57
    assert guest.run("f4") & 0xFFFF == 33
    for model, rip, valid in (("max", 1 << 56, True), ("max", 1 << 57, False), ("max,-la57", 1 << 48, False)):
        guest = vmx_guest(model)
        guest[Vmcs.GUEST_RIP] = rip
        guest[Vmcs.EXCEPTION_BITMAP] = 1 << 13 | 1 << 14
        assert (guest.vmx.run() & 0xFFFF != 33) is valid, (model, rip)


def test_svm_guest() -> None:
    guest = SvmGuest()
    models.install(guest.cpu, models.parse("max"))
    guest.ram.write_u64(0x30000, 0x1007)
    guest.ram.write_u64(0x30000 + 8 * (HIGH >> 48), 0x1007)
    guest[Vmcb.CR4], guest[Vmcb.CR3] = guest[Vmcb.CR4] | LA57, 0x30000
    guest.ram.write_u64(0x20000, 0x77)
    code = assemble(f"mov rbx, {HIGH + 0x20000}\n mov rbx, [rbx]\n hlt", 64, 0)
    assert guest.run(code.hex()) == 0x78
    assert guest.cpu["rbx"] == 0x77
    assert guest[Vmcb.CR4] & LA57
