"""Segment loads, system registers, far transfers. SDM, "Protection"; the instructions' pages."""

from __future__ import annotations

import struct

import pytest

from vmonty.cpu import inspection

from .machine import (
    CODE,
    CODE32,
    CODE64,
    DATA,
    GATE_SLOT,
    GDT,
    LDT_SLOT,
    STACK0,
    TASK,
    TSS,
    USER_CODE64,
    USER_DATA,
    Machine,
    descriptor,
    gate64,
)

SLOT = 0x40


def put(machine: Machine, selector: int, value: int) -> None:
    machine.ram.write(GDT + (selector & 0xFFF8), struct.pack("<Q", value))


@pytest.fixture
def long() -> Machine:
    return Machine().long_mode()


@pytest.fixture
def protected() -> Machine:
    return Machine().protected_mode()


def load(machine: Machine, name: str, selector: int) -> tuple[int, int] | None:
    """Load; None, or the exception's vector and error code."""
    if inspection.move_to_segment(machine.cpu, name, selector) == "go_on":
        return None
    return machine.cpu.event["vector"], machine.cpu.event["error_code"]


def test_load_unpacks_the_descriptor_and_sets_accessed(protected: Machine) -> None:
    put(protected, SLOT, descriptor(0x12345678, 0x54321, 0x92, 0xC))
    assert load(protected, "fs", SLOT) is None
    found = protected.segment("fs")
    assert (found.base, found.limit, found.access_rights) == (0x12345678, 0x54321FFF, 0xC093)
    assert protected.ram.read_u8(GDT + SLOT + 5) == 0x93


@pytest.mark.parametrize(
    ("name", "access", "rpl", "fault"),
    [
        ("ds", 0x92, 3, (13, SLOT)),  # RPL 3 > DPL 0
        ("ds", 0xF2, 3, None), ("ds", 0x98, 0, (13, SLOT)),  # execute-only code
        ("ds", 0x9A, 0, None), ("ds", 0x9E, 3, None),  # conforming: any privilege
        ("ds", 0x12, 0, (11, SLOT)), ("ds", 0x82, 0, (13, SLOT)),  # not present; an LDT
        ("ss", 0x92, 0, None), ("ss", 0x90, 0, (13, SLOT)), ("ss", 0xF2, 0, (13, SLOT)), ("ss", 0x92, 1, (13, SLOT)),
        ("ss", 0x12, 0, (12, SLOT)), ("ss", 0x9A, 0, (13, SLOT)),
    ],
)  # fmt: skip
def test_load_checks(protected: Machine, name: str, access: int, rpl: int, fault: tuple[int, int] | None) -> None:
    put(protected, SLOT, descriptor(0, 0xFFFFF, access))
    assert load(protected, name, SLOT | rpl) == fault


def test_null_selectors(protected: Machine) -> None:
    assert load(protected, "gs", 3) is None
    assert protected.segment("gs").access_rights & 0x10000
    assert load(protected, "ss", 0) == (13, 0)


def test_null_ss_in_64_bit_mode(long: Machine) -> None:
    assert load(long, "ss", 0) is None
    assert load(long, "ss", 3) == (13, 0)


def test_beyond_the_table(protected: Machine) -> None:
    protected["gdtr_limit"] = 0x1F
    assert load(protected, "ds", 0x20) == (13, 0x20)
    assert load(protected, "ds", 0x1C) == (13, 0x1C)  # LDT, which isn't there


def test_ltr_in_long_mode(long: Machine) -> None:
    """SDM, "LTR—Load Task Register": 16 bytes, busy afterwards; a busy one is refused."""
    put(long, TASK, descriptor(TSS, 0x67, 0x89, 0))
    long.ram.write_u64(GDT + TASK + 8, 0xFFFF8000)
    assert inspection.load_task_register(long.cpu, TASK) == "go_on"
    assert long.segment("tr").base == 0xFFFF800000000000 | TSS
    assert long.ram.read_u8(GDT + TASK + 5) == 0x8B
    assert inspection.load_task_register(long.cpu, TASK) == "event"
    assert long.cpu.event["error_code"] == TASK


def run(machine: Machine, code: str) -> str:
    return machine.run(bytes.fromhex(code.replace(" ", "")))


def test_lgdt_sgdt_lidt_sidt(long: Machine) -> None:
    long.ram.write(0x5000, struct.pack("<HQ", 0x123, 0xFFFF800000001000))
    assert run(long, "0f011c2500500000 0f010c2510500000 f4") == "halt"  # lidt [0x5000]; sidt [0x5010]
    assert (long["idtr_limit"], long["idtr_base"]) == (0x123, 0xFFFF800000001000)
    assert long.ram.read(0x5010, 10) == long.ram.read(0x5000, 10)


@pytest.mark.parametrize(
    ("access", "flags", "rights", "limit"),
    [
        (0x9B, 0xA, 0xA09B00, 0xFFFFFFFF),
        (0xF3, 0xC, 0xC0F300, 0xFFFFFFFF),
        (0x89, 0, 0x8900, 0xFFFFF),
        (0x85, 0, None, None),
    ],
)
def test_lar_and_lsl(long: Machine, access: int, flags: int, rights: int | None, limit: int | None) -> None:
    put(long, SLOT, descriptor(0, 0xFFFFF, access, flags))
    long["rbx"], long["rax"], long["rcx"] = SLOT, 0x1111, 0x2222
    assert run(long, "0f02c3 0f94c2 0f03cb 0f94c6 f4") == "halt"  # lar eax, ebx; setz dl; lsl ecx, ebx; setz dh
    if rights is None:
        assert (long["rax"], long["rcx"], long["rdx"] & 0xFFFF) == (0x1111, 0x2222, 0)
    else:
        assert (long["rax"] & 0xF0FF00, long["rcx"], long["rdx"] & 0xFFFF) == (rights, limit, 0x101)


def test_verr_and_verw(long: Machine) -> None:
    for access, readable, writable in ((0x93, 1, 1), (0x91, 1, 0), (0x9B, 1, 0), (0x99, 0, 0), (0x89, 0, 0)):
        machine = Machine().long_mode()
        put(machine, SLOT, descriptor(0, 0xFFFFF, access))
        machine["rbx"], machine["rdx"] = SLOT, 0
        assert run(machine, "0f00e3 0f94c2 0f00eb 0f94c6 f4") == "halt"
        assert machine["rdx"] == readable | writable << 8
    assert long["cpl"] == 0


def test_far_return_to_compatibility_mode_and_jump_back(long: Machine) -> None:
    """32-bit code in long mode: RETF into it, JMP far back to 64-bit code."""
    long["rsp"] = STACK0 - 0x200
    # push CODE32; push 0x9000; retfq
    long.ram.write(0x9000, bytes.fromhex("b8efbeadde 90 ea00a000000800".replace(" ", "")))
    long.ram.write(0xA000, b"\xf4")
    assert run(long, f"6a{CODE32:02x} 6800900000 48cb") == "halt"
    assert (long["rax"], long["rip"]) == (0xDEADBEEF, 0xA001)
    assert long.segment("cs").selector == CODE64


def test_call_gate_in_long_mode(long: Machine) -> None:
    """SDM, "IA-32e Mode Call Gates": 16 bytes, stack from the TSS, SS becomes null."""
    machine = Machine().long_mode(user=True)
    machine.ram.write(GDT + GATE_SLOT, gate64(0xA000, CODE64, 0xEC))
    machine.ram.write(0x5000, struct.pack("<IH", 0x1234, GATE_SLOT | 3))
    machine.ram.write(0xA000, b"\xf4")
    assert run(machine, "ff1c2500500000") == "halt"  # call far [0x5000]
    assert (machine["rip"], machine["cpl"]) == (0xA001, 0)
    assert machine.stack(4) == [CODE + 7, USER_CODE64, STACK3_AT_START, USER_DATA]
    assert long["cpl"] == 0


STACK3_AT_START = 0xD000


def test_call_gate_with_parameters_in_protected_mode(protected: Machine) -> None:
    protected.set_segment("cs", 0x43, 0, 0xFFFFFFFF, 0xC0FB)
    put(protected, SLOT, descriptor(access=0xFB, flags=0xC))
    protected.set_segment("ss", USER_DATA, 0, 0xFFFFFFFF, 0xC0F3)
    protected["cpl"], protected["rsp"] = 3, 0xD000 - 8
    protected.ram.write(0xD000 - 8, struct.pack("<II", 0x11, 0x22))
    protected.ram.write(TSS + 4, struct.pack("<II", STACK0, DATA))
    gate = 0xA000 | CODE32 << 16 | 2 << 32 | 0xEC << 40
    protected.ram.write(GDT + GATE_SLOT, struct.pack("<Q", gate))
    protected.ram.write(0xA000, b"\xf4")
    assert run(protected, f"9a00000000{GATE_SLOT | 3:02x}00") == "halt"
    assert protected["cpl"] == 0
    assert protected.stack(6, 4) == [CODE + 7, 0x43, 0x11, 0x22, 0xD000 - 8, USER_DATA]
    # and back: retf 8
    protected.ram.write(0xA001, bytes.fromhex("ca0800"))
    protected["activity"] = 0
    protected.cpu.step(1)
    assert (protected["rip"], protected["cpl"], protected["rsp"]) == (CODE + 7, 3, 0xD000)


def test_ldt_segments(protected: Machine) -> None:
    put(protected, LDT_SLOT, descriptor(0x6000, 0x17, 0x82, 0))
    protected.ram.write(0x6000 + 8, struct.pack("<Q", descriptor(0x7000, 0xFF, 0x93, 0x4)))
    protected["rbx"] = LDT_SLOT
    assert run(protected, "0f00d3 bb0c000000 8ee3 f4") == "halt"  # lldt bx; mov fs, bx (4 + 8)
    assert (protected.segment("fs").base, protected.segment("fs").limit) == (0x7000, 0xFF)


def test_enter_long_mode_from_protected_mode(protected: Machine) -> None:
    """SDM, "Initializing IA-32e Mode": CR4.PAE, CR3, EFER.LME, CR0.PG, a far jump."""
    code = (
        "0f20e0 83c820 0f22e0 b800000100 0f22d8 b9800000c0 0f32 0d00010000 0f30 0f20c0 0d00000080 0f22c0 ea00a000000800"
    )
    protected.ram.write(0xA000, bytes.fromhex("48b8efcdab8967452301f4"))
    assert run(protected, code) == "halt"
    assert protected["rax"] == 0x0123456789ABCDEF
    assert protected["efer"] & 0x500 == 0x500


@pytest.mark.parametrize(
    ("code", "rax"),
    [
        ("0f22c0", 0x80000000),  # PG without PE
        ("0f22c0", 0x20000011),  # NW without CD
        ("0f22c0", 1 << 32 | 0x80000011),
        ("0f22e0", 0x6A0 & ~0x20),  # PAE off in long mode
        ("0f22e0", 1 << 31),
        ("0f22d8", 1 << 51),
        ("0f30", 0),  # wrmsr EFER: LME may not change under paging
    ],
)
def test_control_registers_refuse(long: Machine, code: str, rax: int) -> None:
    """SDM, "MOV—Move to/from Control Registers", 64-bit mode exceptions: #GP(0)."""
    long["rax"], long["rcx"], long["rdx"] = rax, 0xC0000080, 0
    assert run(long, code) == "halt"
    assert long.handler == 13
    assert long.stack(2) == [0, CODE]


@pytest.mark.parametrize("high", [0x8000, 0x00FFFFFF, 0xAAAAAAAA])
@pytest.mark.parametrize(("code", "kind"), [("0f00d3", 0x82), ("0f00db", 0x89)], ids=["lldt", "ltr"])
def test_bases_that_are_not_canonical(long: Machine, code: str, kind: int, high: int) -> None:
    """SDM, "LTR—Load Task Register", 64-bit mode exceptions; the register and the descriptor stay as they are."""
    put(long, SLOT, descriptor(TSS, 0x67, kind, 0))
    long.ram.write_u64(GDT + SLOT + 8, high)
    before = (long.segment("ldtr"), long.segment("tr"))
    long["rbx"] = SLOT
    assert run(long, f"{code} f4") == "halt"
    assert (long.handler, long.stack(2)) == (13, [SLOT, CODE])
    assert (long.segment("ldtr"), long.segment("tr"), long.ram.read_u8(GDT + SLOT + 5)) == (*before, kind)


@pytest.mark.parametrize("code", ["0f01142500500000", "0f011c2500500000"], ids=["lgdt", "lidt"])
def test_tables_at_addresses_that_are_not_canonical(long: Machine, code: str) -> None:
    """SDM, "LGDT/LIDT—Load Global/Interrupt Descriptor Table Register", 64-bit mode exceptions."""
    long.ram.write(0x5000, struct.pack("<HQ", 0x123, 0x8000_0000_0000))
    assert run(long, f"{code} f4") == "halt"
    assert (long.handler, long.stack(2)) == (13, [0, CODE])


@pytest.mark.parametrize("far", [True, False], ids=["retf", "iret"])
def test_return_to_an_outer_level_nulls_segments(long: Machine, far: bool) -> None:
    """SDM, "RET—Return From Procedure", RETURN-TO-OUTER-PRIVILEGE-LEVEL: selectors, not the bases of FS and GS."""
    long.set_segment("es", 3, 0, 0, 0x10000)
    long.set_segment("ds", USER_DATA, 0, 0xFFFFFFFF, 0xC0F3)
    long.set_segment("fs", 1, 0x5000, 0, 0x10000)
    long.set_segment("gs", DATA, 0x6000, 0xFFFFFFFF, 0xC093)
    long.ram.write_u64(0x6000, 0x1234)
    long.ram.write(0x9000, bytes.fromhex("65488b042500000000 90".replace(" ", "")))  # mov rax, gs:[0]
    frame = [0x9000, USER_CODE64, *([] if far else [2]), 0xD000, USER_DATA]
    long["rsp"] = STACK0 - 0x200
    for number, value in enumerate(frame):
        long.ram.write_u64(long["rsp"] + 8 * number, value)
    long.ram.write(CODE, bytes.fromhex("48cb" if far else "48cf"))
    long["rip"] = CODE
    long.cpu.step(2)
    assert (long["cpl"], long["rip"], long["rax"]) == (3, 0x9009, 0x1234)
    assert [long.segment(name).selector for name in ("es", "ds", "fs", "gs")] == [0, USER_DATA, 0, 0]
    assert [long.segment(name).base for name in ("fs", "gs")] == [0x5000, 0x6000]


@pytest.mark.parametrize("far", [True, False], ids=["retf", "iret"])
def test_nulled_segments_fault_outside_64_bit_mode(protected: Machine, far: bool) -> None:
    """SDM, "Segment Selectors": a null selector in DS raises #GP when it is used."""
    put(protected, SLOT, descriptor(access=0xFB, flags=0xC))
    frame = [0x9000, SLOT | 3, *([] if far else [2]), 0xD000, USER_DATA]
    protected["rsp"] = STACK0 - 0x200
    protected.ram.write(protected["rsp"], struct.pack(f"<{len(frame)}I", *frame))
    protected.ram.write(0x9000, bytes.fromhex("a100000000 f4".replace(" ", "")))  # mov eax, [0]
    protected.ram.write(CODE, b"\xcb" if far else b"\xcf")
    protected["rip"] = CODE
    protected.cpu.stop_at_events()
    protected.cpu.run()
    assert (protected["rip"], protected.cpu.event["vector"]) == (0x9000, 13)


@pytest.mark.parametrize(("esp", "faults"), [(0x2004, True), (0x2005, False), (0x2003, True), (0xD000, False)])
@pytest.mark.parametrize("code", ["cb", "cf"], ids=["retf", "iret"])
def test_expand_down_stack(protected: Machine, code: str, esp: int, faults: bool) -> None:
    """SDM, "Limit Checking": of an expand-down segment all offsets up to the limit are outside."""
    protected.set_segment("ss", DATA, 0, 0x2004, 0xC097)
    protected.ram.write(esp, struct.pack("<III", 0x9000, CODE32, 2))
    protected.ram.write(0x9000, b"\xf4")
    protected.cpu.stop_at_events()
    protected["rsp"] = esp
    ended = run(protected, code)
    assert (ended != "halt") is faults
    assert not faults or protected.cpu.event["vector"] == 12


@pytest.mark.parametrize(("esp", "vector"), [(0x200D, -1), (0x200C, 12)])
def test_far_call_on_an_expand_down_stack(protected: Machine, esp: int, vector: int) -> None:
    protected.set_segment("ss", DATA, 0, 0x2004, 0xC097)
    protected.ram.write(0x9000, b"\xf4")
    protected.cpu.stop_at_events()
    protected["rsp"] = esp
    run(protected, f"9a00900000{CODE32:02x}00")
    assert (protected.cpu.event["vector"] if protected.cpu.event["pending"] else -1) == vector
