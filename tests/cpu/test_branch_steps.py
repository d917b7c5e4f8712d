"""IA32_DEBUGCTL.BTF: TF traps behind branches only. SDM, "Single-Stepping on Branches"."""

from __future__ import annotations

import pytest

from vmonty.cpu import inspection
from vmonty.testing.nasm import assemble

from .machine import CODE, HANDLERS, IDT, Machine, gate64
from .vmx_guest import F as Vmcs
from .vmx_guest import Guest

DEBUGCTL, BTF, LBR = 0x1D9, 2, 1
TF, BS = 0x100, 0x4000
ARM = "pushfq\n or dword [rsp], 0x100\n mov ecx, 0x1d9\n mov eax, 2\n xor edx, edx\n wrmsr\n popfq\n"
DATA_AT = 0x20000
IRET = "push 8\n lea rax, [rel away]\n push rax\n iretq"


@pytest.fixture
def long() -> Machine:
    return Machine().long_mode()


def run(machine: Machine, source: str) -> int:
    """Arm, run, and give where the #DB handler would return to, from the label that follows ARM; -1 for no #DB."""
    arm = len(assemble(ARM, 64, CODE))
    code = assemble(f"default abs\n{ARM}{source}\n", 64, CODE)
    assert machine.run(code) == "halt"
    if machine.handler != 1:
        return -1
    return machine.stack(1)[0] - CODE - arm


BRANCHES = {
    "jmp": ("nop\n jmp away\n nop\n away: hlt", 4),
    "jmp-next": ("nop\n jmp away\n away: hlt", 3),
    "jcc": ("xor eax, eax\n jz away\n nop\n away: hlt", 5),
    "jcc-not-taken": ("xor eax, eax\n jnz away\n jz away\n nop\n away: hlt", 7),
    "call": ("nop\n call away\n away: hlt", 6),
    "call-indirect": ("lea rax, [rel away]\n call rax\n nop\n away: hlt", 10),
    "ret": ("lea rax, [rel away]\n push rax\n ret\n nop\n away: hlt", 10),
    "loop": ("mov ecx, 2\n away: nop\n loop away\n hlt", 5),
    "loop-ends": ("mov ecx, 1\n away: nop\n loop away\n hlt", None),
    "iret-next": (f"mov rax, rsp\n push 0x10\n push rax\n push 0x102\n {IRET}\n away: hlt", 23),
    "iret": (f"mov rax, rsp\n push 0x10\n push rax\n push 0x102\n {IRET}\n nop\n away: hlt", 24),
    "string": (f"mov edi, {DATA_AT}\n mov ecx, 3\n rep stosb\n jmp away\n nop\n away: hlt", 15),
    "control-register": ("mov rax, cr0\n mov cr0, rax\n jmp away\n nop\n away: hlt", 9),
}


@pytest.mark.parametrize(("source", "at"), BRANCHES.values(), ids=BRANCHES.keys())
def test_traps_behind_the_first_branch(long: Machine, source: str, at: int | None) -> None:
    """DR6 shows a single step; both flags are off in the handler."""
    where = run(long, source)
    if at is None:
        assert where == -1
        return
    assert where == at
    assert long["dr6"] & BS
    assert long["debugctl"] == 0
    assert not long["rflags"] & TF
    assert long.stack(3)[2] & TF


def test_without_it_every_instruction_traps(long: Machine) -> None:
    long["rflags"] = TF | 2
    long.run(assemble("nop\n nop\n jmp $\n", 64, CODE))
    assert (long.handler, long.stack(1)[0]) == (1, CODE + 1)


def test_any_debug_exception_clears_it(long: Machine) -> None:
    """Not only that of a branch: also INT1's. SDM, "IA32_DEBUGCTL MSR", BTF."""
    long["debugctl"] = BTF
    long.run(b"\xf1")
    assert (long.handler, long["debugctl"]) == (1, 0)


def test_other_exceptions_leave_it(long: Machine) -> None:
    """And the step is off in their handlers, as TF is; the returning IRET is a branch again."""
    long["debugctl"] = BTF
    long.run(b"\x0f\x0b")
    assert (long.handler, long["debugctl"]) == (6, BTF)


def test_a_handler_that_returns_to_a_stepped_program(long: Machine) -> None:
    """IRET sets TF: the branch that traps is the first one behind it."""
    long.ram.write(IDT + 16 * 0x20, gate64(HANDLERS + 0x800))
    long.ram.write(HANDLERS + 0x800, b"\x48\xcf")
    assert run(long, "int 0x20\n nop\n jmp away\n nop\n away: hlt") == 6


def test_the_register(long: Machine) -> None:
    """No branch records: LBR reads as 0; reserved bits are refused."""
    long["rcx"], long["rax"], long["rdx"] = DEBUGCTL, BTF | LBR, 0
    assert long.run(assemble("wrmsr\n xor eax, eax\n rdmsr\n hlt", 64, CODE)) == "halt"
    assert (long["rax"], long["rdx"]) == (BTF, 0)
    long = Machine().long_mode()
    long["rcx"], long["rax"], long["rdx"] = DEBUGCTL, 1 << 16, 0
    long.run(assemble("wrmsr\n hlt", 64, CODE))
    assert long.handler == 13


def test_vm_entry_and_exit() -> None:
    """SDM, "Loading Guest Control Registers, Debug Registers, and MSRs", and the same for saving and for the host's."""
    guest = Guest()
    guest[Vmcs.GUEST_IA32_DEBUGCTL] = BTF
    guest[Vmcs.GUEST_RFLAGS] = TF | 2
    guest[Vmcs.EXCEPTION_BITMAP] = 1 << 1
    assert guest.run("90 90 eb 01 90 f4") == 0  # the trap behind the jump
    assert guest[Vmcs.GUEST_RIP] & 0xFFF == 5
    assert guest.qualification == BS
    assert guest[Vmcs.GUEST_IA32_DEBUGCTL] == BTF  # an intercepted one has not happened yet
    assert inspection.get(guest.cpu, "debugctl") == 0


def test_vm_entry_without_the_control_keeps_the_hosts() -> None:
    guest = Guest()
    guest[Vmcs.GUEST_IA32_DEBUGCTL] = BTF
    guest[Vmcs.VM_ENTRY_CONTROLS] = guest[Vmcs.VM_ENTRY_CONTROLS] & ~4
    guest[Vmcs.GUEST_RFLAGS] = TF | 2
    guest[Vmcs.EXCEPTION_BITMAP] = 1 << 1
    assert guest.run("90 90 eb 01 90 f4") == 0
    assert guest[Vmcs.GUEST_RIP] & 0xFFF == 1


@pytest.mark.parametrize(("pending", "btf", "valid"), [(BS, 0, True), (0, 0, False), (BS, BTF, False), (0, BTF, True)])
def test_vm_entry_with_a_pending_step(pending: int, btf: int, valid: bool) -> None:
    """SDM, "Checks on Guest Non-Register State", pending debug exceptions: BS as TF and BTF say."""
    guest = Guest()
    guest[Vmcs.GUEST_IA32_DEBUGCTL], guest[Vmcs.GUEST_RFLAGS] = btf, TF | 2
    guest[Vmcs.GUEST_INTERRUPTIBILITY_INFO], guest[Vmcs.GUEST_PENDING_DBG_EXCEPTIONS] = 2, pending
    guest[Vmcs.EXCEPTION_BITMAP] = 1 << 1
    assert (guest.run("90 f4") & 0xFFFF != 33) is valid


def test_vm_entry_checks_reserved_bits() -> None:
    guest = Guest()
    guest[Vmcs.GUEST_IA32_DEBUGCTL] = 1 << 16
    assert guest.run("f4") & 0xFFFF == 33
