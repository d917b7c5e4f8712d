"""Ends of a run that are no I/O: HLT, shutdown, errors, hypercalls. Source: api.rst, "The kvm_run structure"."""

from __future__ import annotations

import errno

import pytest

from vmonty.kvm.api import Vcpu, Vm
from vmonty.kvm.uapi import Cap, Exit
from vmonty.kvm.uapi.exits import KVM_EXIT_HYPERCALL_LONG_MODE
from vmonty.kvm.uapi.flags import KVM_HC_MAP_GPA_RANGE, KVM_INTERNAL_ERROR_EMULATION, KVM_X86_DISABLE_EXITS_PAUSE
from vmonty.testing.guests import CODE, DATA, HIGH_MMIO, MMIO, Mode, TinyGuest, describe

from .refusals import refused

KERNEL_MODES = [Mode.REAL, Mode.PROTECTED, Mode.LONG]


@pytest.mark.parametrize("mode", KERNEL_MODES, ids=lambda mode: mode.value)
def test_hlt(guest: TinyGuest, mode: Mode) -> None:
    """Without an in-kernel irqchip HLT comes to user space, with RIP behind it."""
    guest.load(mode, "nop\n hlt\n out 0x10, al")
    assert guest.run() is Exit.HLT
    assert guest.vcpu.get_regs().rip == CODE + 2
    assert guest.out()[0] == 0x10


def test_hlt_in_cpl3_is_a_fault(guest: TinyGuest) -> None:
    guest.load(Mode.USER, "hlt", handlers={13: "mov al, 13\n out 0x20, al"})
    assert guest.out() == (0x20, 13)


IDT_LIMIT_MODES = [
    pytest.param(Mode.REAL, marks=pytest.mark.known_gap("real-mode-idt-limit"), id="real"),
    *(pytest.param(mode, id=mode.value) for mode in Mode if mode is not Mode.REAL),
]


@pytest.mark.parametrize("mode", IDT_LIMIT_MODES)
def test_triple_fault_is_a_shutdown(guest: TinyGuest, mode: Mode) -> None:
    """No IDT: the first exception cannot be delivered, nor the double fault."""
    guest.load(mode, "ud2")
    sregs = guest.vcpu.get_sregs()
    sregs.idt.limit = 0
    guest.vcpu.set_sregs(sregs)
    assert guest.run() is Exit.SHUTDOWN


def test_page_fault_without_handler_is_a_shutdown(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, "mov rbx, 0x7f0000000000\n mov al, [rbx]\n out 0x10, al")
    assert guest.run() is Exit.SHUTDOWN


FAULTS = [
    ("divide", "xor eax, eax\n xor edx, edx\n div eax", 0),
    ("invalid-opcode", "ud2", 6),
    ("general-protection", "mov eax, 0x40\n mov ds, ax", 13),
    ("page-fault", "mov rbx, 0x7f0000000000\n mov al, [rbx]", 14),
]


@pytest.mark.parametrize("mode", [Mode.LONG, Mode.USER], ids=lambda mode: mode.value)
@pytest.mark.parametrize(
    ("source", "vector"),
    [
        *(pytest.param(*row[1:], id=row[0]) for row in FAULTS),
        pytest.param("int3", 3, id="breakpoint", marks=pytest.mark.known_gap("int3-cpl0")),
    ],
)
def test_guest_handles_its_exceptions(guest: TinyGuest, mode: Mode, source: str, vector: int) -> None:
    guest.load(mode, source, handlers={vector: f"mov al, {vector}\n out 0x20, al"})
    assert guest.out() == (0x20, vector)


def test_page_fault_tells_address_and_error_code(guest: TinyGuest) -> None:
    """CR2 and an error code: write, from CPL3, page not present."""
    handler = "pop rax\n out 0x20, eax\n mov rax, cr2\n out 0x21, eax"
    guest.load(Mode.USER, "mov ebx, 0x12345678\n bts rbx, 40\n mov [rbx], al", handlers={14: handler})
    assert guest.out() == (0x20, 0b110)
    assert guest.out() == (0x21, 0x12345678)


def test_fetch_from_mmio_is_an_internal_error(guest: TinyGuest) -> None:
    """KVM cannot emulate what it cannot fetch."""
    guest.load(Mode.LONG, f"mov eax, {MMIO:#x}\n jmp rax")
    reason = guest.run()
    assert reason is Exit.INTERNAL_ERROR, describe(guest.vcpu, reason)
    assert guest.vcpu.kvm_run.u.internal.suberror == KVM_INTERNAL_ERROR_EMULATION
    assert guest.vcpu.get_regs().rip == MMIO


def test_unemulatable_mmio_instruction_is_an_internal_error(guest: TinyGuest) -> None:
    """An instruction that KVM's emulator does not know, on MMIO."""
    guest.load(Mode.LONG, f"mov ebx, {HIGH_MMIO:#x}\n fld tword [rbx]")
    reason = guest.run()
    assert reason is Exit.INTERNAL_ERROR, describe(guest.vcpu, reason)
    assert guest.vcpu.kvm_run.u.internal.suberror == KVM_INTERNAL_ERROR_EMULATION


@pytest.mark.needs(Cap.EXIT_ON_EMULATION_FAILURE)
def test_emulation_failure_shows_the_instruction(guest: TinyGuest) -> None:
    guest.vm.enable_cap(Cap.EXIT_ON_EMULATION_FAILURE, 1)
    guest.load(Mode.LONG, f"mov ebx, {HIGH_MMIO:#x}\n fld tword [rbx]")
    assert guest.run() is Exit.INTERNAL_ERROR
    failure = guest.vcpu.kvm_run.u.emulation_failure
    assert failure.suberror == KVM_INTERNAL_ERROR_EMULATION
    if failure.ndata >= 3 and failure.flags & 1:
        assert bytes(failure.insn_bytes[:2]) == b"\xdb\x2b"
        assert 2 <= failure.insn_size <= 15


@pytest.mark.known_gap("emulation-cpl3")
def test_emulation_failure_in_cpl3_is_an_invalid_opcode(guest: TinyGuest) -> None:
    """A program must not be able to end its machine."""
    guest.load(Mode.USER, f"mov eax, {HIGH_MMIO:#x}\n jmp rax", handlers={6: "mov al, 6\n out 0x20, al"})
    assert guest.out() == (0x20, 6)


@pytest.mark.needs(Cap.EXIT_ON_EMULATION_FAILURE)
def test_emulation_failure_may_always_be_an_exit(guest: TinyGuest) -> None:
    """With what the exit was behind the flags; without an instruction, which could not be fetched."""
    with refused(errno.EINVAL):
        guest.vm.enable_cap(Cap.EXIT_ON_EMULATION_FAILURE, 2)
    guest.vm.enable_cap(Cap.EXIT_ON_EMULATION_FAILURE, 1)
    guest.load(Mode.USER, f"mov eax, {HIGH_MMIO:#x}\n jmp rax", handlers={6: "mov al, 6\n out 0x20, al"})
    assert guest.run() is Exit.INTERNAL_ERROR
    failure = guest.vcpu.kvm_run.u.emulation_failure
    assert failure.suberror == KVM_INTERNAL_ERROR_EMULATION
    assert failure.ndata >= 1
    assert failure.flags == 0
    assert guest.vcpu.get_regs().rip == HIGH_MMIO
    if guest.vm.provider.name.startswith("soft"):
        reason, *_ = guest.vcpu.kvm_run.u.internal.data[1 : failure.ndata]
        assert reason in (48, 0x400, 0, 0x4E), "EPT violation, NPF; exceptions with shadow tables"
    events = guest.vcpu.get_vcpu_events()
    assert not events.exception.injected
    assert not events.exception.pending


@pytest.mark.known_gap("hypercall")
@pytest.mark.needs(Cap.EXIT_HYPERCALL)
@pytest.mark.parametrize("mode", [Mode.PROTECTED, Mode.LONG], ids=lambda mode: mode.value)
def test_hypercall(guest: TinyGuest, mode: Mode) -> None:
    """KVM_HC_MAP_GPA_RANGE asks user space; kvm_run.hypercall.ret becomes RAX."""
    assert guest.vm.check_extension(Cap.EXIT_HYPERCALL) & 1 << KVM_HC_MAP_GPA_RANGE
    guest.vm.enable_cap(Cap.EXIT_HYPERCALL, 1 << KVM_HC_MAP_GPA_RANGE)
    # Either instruction works: KVM patches the other vendor's.
    guest.load(mode, f"mov eax, {KVM_HC_MAP_GPA_RANGE}\n mov ebx, {DATA}\n mov ecx, 1\n mov edx, 0x10\n vmmcall\n"
               " out 0x10, eax", handlers={6: "mov al, 6\n out 0x20, al"})  # fmt: skip
    reason = guest.run()
    assert reason is Exit.HYPERCALL, describe(guest.vcpu, reason)
    call = guest.vcpu.kvm_run.u.hypercall
    assert (call.nr, list(call.args[:3])) == (KVM_HC_MAP_GPA_RANGE, [DATA, 1, 0x10])
    assert (call.flags & KVM_EXIT_HYPERCALL_LONG_MODE) == (KVM_EXIT_HYPERCALL_LONG_MODE if mode.long else 0)
    call.ret = 0x1234
    assert guest.out() == (0x10, 0x1234)


@pytest.mark.known_gap("hypercall")
def test_unknown_hypercall_is_answered_by_kvm(guest: TinyGuest) -> None:
    """-KVM_ENOSYS, without an exit."""
    guest.load(Mode.LONG, "mov eax, 0x7777\n vmmcall\n out 0x10, eax", handlers={6: "mov al, 6\n out 0x20, al"})
    assert guest.out() == (0x10, -1000 & 0xFFFFFFFF)


def test_hypercall_from_cpl3_is_not_permitted(guest: TinyGuest) -> None:
    """-KVM_EPERM."""
    guest.load(Mode.USER, "mov eax, 1\n vmmcall\n out 0x10, eax", handlers={6: "mov al, 6\n out 0x20, al"})
    assert guest.out() == (0x10, -1 & 0xFFFFFFFF)


def test_fresh_vcpu_is_at_the_reset_vector(vcpu: Vcpu) -> None:
    """SDM, "Processor State After Reset"."""
    regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
    assert (regs.rip, regs.rflags) == (0xFFF0, 2)
    assert (sregs.cs.base, sregs.cs.selector, sregs.cs.limit) == (0xFFFF0000, 0xF000, 0xFFFF)
    assert (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) == (0x60000010, 0, 0, 0)


def test_reset_vector_without_memory(vcpu: Vcpu) -> None:
    """The first fetch meets no memory; KVM cannot go on, and does not hang."""
    assert vcpu.run() in (Exit.INTERNAL_ERROR, Exit.SHUTDOWN)


@pytest.mark.needs(Cap.X86_DISABLE_EXITS)
def test_disabled_exits(vm: Vm) -> None:
    """KVM_CAP_X86_DISABLE_EXITS takes what it offers, and nothing else."""
    offered = vm.check_extension(Cap.X86_DISABLE_EXITS)
    assert offered & KVM_X86_DISABLE_EXITS_PAUSE
    assert vm.enable_cap(Cap.X86_DISABLE_EXITS, KVM_X86_DISABLE_EXITS_PAUSE) == 0
    with refused(errno.EINVAL):
        vm.enable_cap(Cap.X86_DISABLE_EXITS, 1 << 20)


def test_unknown_capability_cannot_be_enabled(guest: TinyGuest) -> None:
    with refused(errno.EINVAL):
        guest.vm.enable_cap(0x7FFF)
    with refused(errno.EINVAL):
        guest.vcpu.enable_cap(0x7FFF)


def test_capability_flags_must_be_zero(guest: TinyGuest) -> None:
    with refused(errno.EINVAL):
        guest.vm.enable_cap(Cap.EXCEPTION_PAYLOAD, 1, flags=1)
