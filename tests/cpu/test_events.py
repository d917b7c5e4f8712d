"""Delivery of exceptions and interrupts. SDM, "Interrupt and Exception Handling"."""

from __future__ import annotations

import struct

import pytest

from vmonty.cpu import inspection

from .machine import (
    CODE,
    CODE32,
    CODE64,
    DATA,
    GDT,
    HANDLERS,
    IDT,
    STACK0,
    STACK3,
    STACK_IST,
    TASK,
    TSS,
    USER_CODE64,
    USER_DATA,
    Machine,
    descriptor,
    gate32,
    gate64,
)

IF, TF, RF, NT, VM, IOPL = 1 << 9, 1 << 8, 1 << 16, 1 << 14, 1 << 17, 3 << 12


@pytest.fixture
def long() -> Machine:
    return Machine().long_mode()


@pytest.fixture
def user() -> Machine:
    return Machine().long_mode(user=True)


def test_fault_frame_in_64_bit_mode(long: Machine) -> None:
    """SDM, "64-Bit Mode Stack Frame": SS:RSP always, RSP aligned to 16, error code below RIP."""
    long["rsp"] = STACK0 - 0x105
    long["rflags"] = 0x246 | TF
    assert long.deliver(13, 0x18) == "jump"
    assert long["rip"] == HANDLERS + 16 * 13
    assert long["rsp"] == ((STACK0 - 0x105) & ~15) - 48
    assert long.stack(6) == [0x18, CODE, CODE64, 0x246 | TF | RF, STACK0 - 0x105, DATA]
    assert long["rflags"] & (IF | TF | RF) == 0


def test_inner_level_takes_rsp0_and_a_null_ss(user: Machine) -> None:
    user["rflags"] = 0x202
    assert user.deliver(14, 6, address=0x1234) == "jump"
    assert (user["cpl"], user["cr2"], user["rsp"]) == (0, 0x1234, STACK0 - 48)
    assert user.segment("ss").selector == 0
    assert user.segment("ss").access_rights & 0x10060 == 0x10000
    assert user.stack(6) == [6, CODE, USER_CODE64, 0x202 | RF, STACK3, USER_DATA]


@pytest.mark.parametrize("code", ["f3 a6", "f2 ae"])  # repe cmpsb, repne scasb
def test_a_fault_in_repeated_comparisons_has_the_flags_from_before(long: Machine, code: str) -> None:
    """Not those of the iterations that are done. SDM, "REP/REPE/REPZ/REPNE/REPNZ"."""
    end = 2 << 20
    long["rsi"], long["rdi"], long["rcx"], long["rax"], long["rflags"] = 0xA000, end - 8, 100, 1, 0x8D7
    long.ram.write(0xA000, bytes(16))
    long.ram.write(end - 8, bytes(8))
    assert long.run(bytes.fromhex(code)) == "halt"
    assert (long.handler, long["cr2"], long["rdi"], long["rcx"]) == (14, end, end, 92)
    assert long.stack(4)[3] == 0x8D7 | RF


def test_interrupt_stack_table(long: Machine) -> None:
    long.ram.write(IDT + 16 * 8, gate64(HANDLERS, ist=1))
    assert long.deliver(8, 0) == "jump"
    assert long["rsp"] == STACK_IST - 48


def test_trap_gate_keeps_if(long: Machine) -> None:
    long.ram.write(IDT + 16 * 3, gate64(HANDLERS, kind=0x8F))
    long["rflags"] = 0x202
    long.deliver(3, kind=6, length=1)
    assert long["rflags"] & IF
    assert long.stack(1) == [CODE + 1]


@pytest.mark.parametrize("vector", [0x20, 3])
def test_software_interrupts_need_dpl(user: Machine, vector: int) -> None:
    """#GP(vector * 8 + 2); EXT is clear."""
    assert user.deliver(vector, kind=4 if vector == 0x20 else 6, length=2) == "jump"
    assert user["rip"] == HANDLERS + 16 * 13
    assert user.stack(2) == [vector * 8 + 2, CODE]
    user = Machine().long_mode(user=True)
    user.ram.write(IDT + 16 * vector, gate64(HANDLERS, kind=0xEE))
    user.deliver(vector, kind=4 if vector == 0x20 else 6, length=2)
    assert user["rip"] == HANDLERS
    assert user.stack(1) == [CODE + 2]


@pytest.mark.parametrize(
    ("gate", "vector", "error"),
    [
        (gate64(HANDLERS, kind=0x0E), 11, 6 * 8 + 3),  # not present
        (gate64(HANDLERS, kind=0x8C), 13, 6 * 8 + 3),  # a call gate
        (gate64(HANDLERS, selector=0), 13, 1),
        (gate64(HANDLERS, selector=DATA), 13, DATA + 1),
        (gate64(HANDLERS, selector=CODE32), 13, CODE32 + 1),  # L = 0
        (gate64(1 << 60), 13, 1),
    ],
)
def test_bad_gates(long: Machine, gate: bytes, vector: int, error: int) -> None:
    """Error codes with EXT: the event wasn't a software interrupt. #UD is benign, so no double fault."""
    long.ram.write(IDT + 16 * 6, gate)
    assert long.deliver(6) == "jump"
    assert long["rip"] == HANDLERS + 16 * vector
    assert long.stack(1) == [error]


@pytest.mark.parametrize(
    ("first", "second_is_page_fault", "result"),
    [(13, False, 8), (14, True, 8), (13, True, 14), (6, False, 13), (14, False, 8), (0, False, 8), (1, False, 13)],
)
def test_double_fault_rules(long: Machine, first: int, second_is_page_fault: bool, result: int) -> None:
    """SDM, "Conditions for Generating a Double Fault"."""
    bad = gate64(HANDLERS, ist=1) if second_is_page_fault else gate64(HANDLERS, kind=0x8C)
    long.ram.write(IDT + 16 * first, bad)
    if second_is_page_fault:
        long.ram.write_u64(TSS + 0x24, 0x7000_0000)
    error = 0 if first in (13, 14) else -1
    assert long.deliver(first, error) == "jump"
    assert long["rip"] == HANDLERS + 16 * result


def test_triple_fault_shuts_down(long: Machine) -> None:
    long["idtr_limit"] = 0
    assert long.deliver(13, 0) == "exit"
    assert long.cpu.exit["reason"] == "shutdown"


def test_debug_exception_sets_dr6(long: Machine) -> None:
    long["dr7"] = 0x2400
    long["pending_debug"] = 0x4000
    assert inspection.poll_events(long.cpu) == "jump"
    assert long["rip"] == HANDLERS + 16
    assert long["dr6"] & 0x4000
    assert long["dr7"] == 0x400
    assert long.stack(3)[2] & RF == 0


def test_interrupts_wait_for_if_and_shadow(long: Machine) -> None:
    long["interrupt_vector"], long["interrupt_line"] = 0x30, 1
    assert inspection.poll_events(long.cpu) == "go_on"
    long["rflags"] = 0x202
    long["interruptibility"] = 1
    assert inspection.poll_events(long.cpu) == "go_on"
    long["interruptibility"] = 0
    assert inspection.poll_events(long.cpu) == "jump"
    assert long["rip"] == HANDLERS + 16 * 0x30


def test_nmi_blocks_nmis_until_iret(long: Machine) -> None:
    long["nmi_line"] = 1
    assert inspection.poll_events(long.cpu) == "jump"
    assert long["interruptibility"] == 8
    long["nmi_line"] = 1
    assert inspection.poll_events(long.cpu) == "go_on"
    long.ram.write(HANDLERS + 32, bytes.fromhex("48cf"))
    long.cpu.step(1)
    assert long["interruptibility"] == 0
    assert inspection.poll_events(long.cpu) == "jump"


def test_sti_hlt_wakes(long: Machine) -> None:
    long.ram.write(HANDLERS + 16 * 0x30, bytes.fromhex("b807000000f4"))
    long["interrupt_vector"], long["interrupt_line"] = 0x30, 1
    long.ram.write(CODE, bytes.fromhex("fbf4"))
    assert long.cpu.run() == "halt"
    assert long["rax"] == 7
    assert long.stack(1) == [CODE + 2]


@pytest.mark.parametrize("size", ["", "48"])
def test_iret_in_64_bit_mode(long: Machine, size: str) -> None:
    """IRETQ to CPL 3 and SYSCALL-free return; IRETD works with 4-byte slots."""
    width = 8 if size else 4
    rsp = STACK0 - 0x200
    frame = [0x9000, USER_CODE64, 0x202, STACK3, USER_DATA]
    long.ram.write(rsp, b"".join(value.to_bytes(width, "little") for value in frame))
    long["rsp"] = rsp
    long.ram.write(0x9000, b"\xf4")
    long.ram.write(CODE, bytes.fromhex(size + "cf"))
    long.cpu.step(1)
    assert (long["rip"], long["cpl"], long["rsp"], long["rflags"]) == (0x9000, 3, STACK3, 0x202)
    assert long.segment("cs").selector == USER_CODE64


def test_iret_refuses_nt_in_long_mode(long: Machine) -> None:
    long["rflags"] = 2 | NT
    assert long.run(bytes.fromhex("48cf")) == "halt"
    assert long.handler == 13


def test_single_step(long: Machine) -> None:
    """SDM, "Single-Step Exception Condition": a trap behind each instruction; DR6.BS."""
    long["rflags"] = 2 | TF
    assert long.run(bytes.fromhex("9090f4")) == "halt"
    assert (long.handler, long.stack(3), long["dr6"] & 0x4000) == (1, [CODE + 1, CODE64, 2 | TF], 0x4000)


def test_popf_sets_tf_for_the_instruction_after_the_next(long: Machine) -> None:
    assert long.run(bytes.fromhex("68020100009d9090f4")) == "halt"
    assert (long.handler, long.stack(1)) == (1, [CODE + 7])


def test_instruction_breakpoint_and_rf(long: Machine) -> None:
    """SDM, "Instruction-Breakpoint Exception Condition": a fault that leaves RF alone; IRET with RF goes past it."""
    long["dr0"], long["dr7"] = CODE + 1, 0x402
    assert long.run(bytes.fromhex("9090f4")) == "halt"
    assert (long.handler, long.stack(1), long["dr6"] & 15) == (1, [CODE + 1], 1)
    assert not long.stack(3)[2] & RF
    long.ram.write_u64(long["rsp"] + 16, 2 | RF)
    long.ram.write(HANDLERS + 17, bytes.fromhex("48cf"))
    long["activity"] = 0
    assert long.cpu.run() == "halt"
    assert long["rip"] == CODE + 3


# ---- 32-bit protected mode, real mode, virtual-8086 mode ------------------------------------------------------------


def idt32(machine: Machine) -> None:
    for vector in range(64):
        machine.ram.write(IDT + 8 * vector, gate32(HANDLERS + 16 * vector, CODE32))


@pytest.fixture
def protected() -> Machine:
    machine = Machine().protected_mode()
    idt32(machine)
    machine.ram.write(TSS + 4, struct.pack("<II", STACK0, DATA))
    return machine


def test_protected_same_level(protected: Machine) -> None:
    protected["rflags"] = 0x202
    assert protected.deliver(13, 0x20) == "jump"
    assert protected["rip"] == HANDLERS + 16 * 13
    assert protected.stack(4, 4) == [0x20, CODE, CODE32, 0x202 | RF]


def test_protected_inner_level(protected: Machine) -> None:
    protected.set_segment("cs", 0x2B, 0, 0xFFFFFFFF, 0xC0FB)
    protected.set_segment("ss", USER_DATA, 0, 0xFFFFFFFF, 0xC0F3)
    protected["cpl"], protected["rsp"] = 3, STACK3
    assert protected.deliver(6) == "jump"
    assert (protected["cpl"], protected["rsp"]) == (0, STACK0 - 20)
    assert protected.stack(5, 4) == [CODE, 0x2B, 2 | RF, STACK3, USER_DATA]


def test_virtual_8086_to_ring_0_and_back(protected: Machine) -> None:
    """SDM, "Handling an Interrupt or Exception Through a Protected-Mode Trap or Interrupt Gate" in
    virtual-8086 mode.
    """
    protected["rflags"] = 2 | VM | IOPL
    for name, selector in (("cs", 0x800), ("ss", 0xD00), ("ds", 1), ("es", 2), ("fs", 3), ("gs", 4)):
        protected.set_segment(name, selector, selector << 4, 0xFFFF, 0xF3)
    protected["cpl"], protected["rip"], protected["rsp"] = 3, 0x10, 0x100
    assert protected.deliver(13, 0) == "jump"
    assert (protected["cpl"], protected["rsp"]) == (0, STACK0 - 40)
    assert protected.stack(10, 4) == [0, 0x10, 0x800, 2 | VM | IOPL | RF, 0x100, 0xD00, 2, 1, 3, 4]
    assert protected.segment("ds").access_rights & 0x10000
    protected["rsp"] += 4
    protected.ram.write(HANDLERS + 16 * 13, b"\xcf")
    protected.cpu.step(1)
    assert (protected["rip"], protected["cpl"], protected["rsp"]) == (0x10, 3, 0x100)
    assert protected["rflags"] & VM
    assert protected.segment("ss").base == 0xD000


def test_real_mode_through_the_vector_table() -> None:
    machine = Machine()
    machine["idtr_base"], machine["idtr_limit"] = 0, 0x3FF
    machine.set_segment("cs", 0x800, 0x8000, 0xFFFF, 0x9B)
    machine.set_segment("ss", 0, 0, 0xFFFF, 0x93)
    machine["rip"], machine["rsp"], machine["rflags"] = 0x10, 0x700, 0x202
    machine.ram.write(4 * 0x21, struct.pack("<HH", 0x1234, 0x400))
    assert machine.deliver(0x21, kind=4, length=2) == "jump"
    assert (machine["rip"], machine.segment("cs").base, machine["rsp"]) == (0x1234, 0x4000, 0x6FA)
    assert machine.stack(3, 2) == [0x12, 0x800, 0x202]
    assert machine["rflags"] & IF == 0


def test_task_gate(protected: Machine) -> None:
    """SDM, "Task Switching": an interrupt through a task gate, and IRET back."""
    other = 0x7000
    protected.ram.write(GDT + 0x40, struct.pack("<Q", descriptor(other, 0x67, 0x89, 0)))
    protected.ram.write(GDT + TASK, struct.pack("<Q", descriptor(TSS, 0x67, 0x8B, 0)))
    protected.ram.write(IDT + 8 * 8, gate32(0, 0x40, 0x85))
    image = bytearray(0x68)
    struct.pack_into("<IIII", image, 0x1C, 0, HANDLERS, 2, 0x55)  # CR3, EIP, EFLAGS, EAX
    struct.pack_into("<I", image, 0x38, 0xB800)  # ESP
    struct.pack_into("<6I", image, 0x48, DATA, CODE32, DATA, DATA, 0, 0)
    protected.ram.write(other, bytes(image))
    protected["rax"] = 0x77
    assert protected.deliver(8, 0) == "jump"
    assert (protected["rip"], protected["rax"], protected["rsp"]) == (HANDLERS, 0x55, 0xB800 - 4)
    assert protected["rflags"] & NT
    assert protected["cr0"] & 8
    assert protected.segment("tr").selector == 0x40
    assert protected.ram.read_u16(other) == TASK
    assert protected.ram.read_u32(TSS + 0x20) == CODE
    protected["rsp"] += 4
    protected.ram.write(HANDLERS, b"\xcf")
    protected.cpu.step(1)
    assert (protected["rip"], protected["rax"]) == (CODE, 0x77)
    assert protected.segment("tr").selector == TASK
    assert not protected["rflags"] & NT


def test_gate_beyond_the_code_segment(protected: Machine) -> None:
    """SDM, "INT n/INTO/INT3/INT1—Call to Interrupt Procedure": #GP before anything is pushed."""
    protected.ram.write(GDT + 0x40, struct.pack("<Q", descriptor(limit=0xFFF, access=0x9B, flags=0x4)))
    protected.ram.write(IDT + 8 * 0x30, gate32(0x1000, 0x40))
    assert protected.run(b"\xcd\x30") == "halt"
    assert protected.handler == 13
    assert protected.stack(4, 4) == [0, CODE, CODE32, 2 | RF]
