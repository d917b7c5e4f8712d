"""Virtual-8086 mode with and without CR4.VME, and CR4.PVI. SDM, "8086 Emulation"."""

from __future__ import annotations

import struct

import pytest

from vmonty.testing.nasm import assemble

from .machine import CODE, CODE32, DATA, GDT, HANDLERS, IDT, STACK0, STACK3, TSS, USER_DATA, Machine, descriptor, gate32

IF, TF, NT, VM, AC = 1 << 9, 1 << 8, 1 << 14, 1 << 17, 1 << 18
VIF, VIP, RF = 1 << 19, 1 << 20, 1 << 16
IOPL3 = 3 << 12
VME, PVI = 1, 2
SEGMENT, STACK_SEGMENT = 0x800, 0xD00  # CODE is SEGMENT:0
STACK_TOP = 0x100
VECTOR = 0x21
HANDLER_SEGMENT, HANDLER = 0x600, 0x34
MAP_BASE = 0x88  # of the I/O map; the redirection bitmap ends there


def virtual(flags: int = 2, cr4: int = 0, redirected: bool = True) -> Machine:
    """Virtual-8086 mode; INT VECTOR has an entry in the table at 0, a gate of DPL 3, and its redirection bit."""
    machine = Machine().protected_mode()
    for vector in range(64):
        machine.ram.write(IDT + 8 * vector, gate32(HANDLERS + 16 * vector, CODE32, 0xEE))
    machine.ram.write(TSS + 4, struct.pack("<II", STACK0, DATA))
    machine.ram.write_u16(TSS + 0x66, MAP_BASE)
    for n in range(32):
        machine.ram.write_u8(TSS + MAP_BASE - 32 + n, 0xFF)
    if redirected:
        machine.ram.write_u8(TSS + MAP_BASE - 32 + VECTOR // 8, 0xFF & ~(1 << VECTOR % 8))
    machine.set_segment("tr", 0x38, TSS, 0x200, 0x8B)
    machine.ram.write(4 * VECTOR, struct.pack("<HH", HANDLER, HANDLER_SEGMENT))
    machine["rflags"] = flags | VM | 2
    machine["cr4"] = cr4
    for name, selector in (("cs", SEGMENT), ("ss", STACK_SEGMENT), ("ds", 1), ("es", 2), ("fs", 3), ("gs", 4)):
        machine.set_segment(name, selector, selector << 4, 0xFFFF, 0xF3)
    machine["cpl"], machine["rip"], machine["rsp"] = 3, 0, STACK_TOP
    return machine


def step(machine: Machine, source: str) -> None:
    """Execute one instruction there, with the delivery of what it raises."""
    machine.ram.write(CODE, assemble(source, 16, 0) + b"\xf4")
    machine["rip"] = 0
    machine.cpu.step(1)


def words(machine: Machine) -> list[int]:
    """The three words on the 8086 program's stack."""
    at = (STACK_SEGMENT << 4) + machine["rsp"]
    return [machine.ram.read_u16(at + 2 * n) for n in range(3)]


def protected_handler(machine: Machine) -> int:
    """The vector of the protected-mode handler that is about to run; -1 for none."""
    if machine["rflags"] & VM:
        return -1
    return (machine["rip"] - HANDLERS) // 16


# ---- INT n: "Software Interrupt Handling Methods While in Virtual-8086 Mode" --------------------------------------


def test_method_1_without_vme() -> None:
    """IOPL 3: to the protected-mode handler, whatever the bitmap says."""
    machine = virtual(IOPL3 | IF | NT)
    step(machine, f"int {VECTOR}")
    assert protected_handler(machine) == VECTOR
    assert machine.stack(9, 4) == [2, SEGMENT, VM | IOPL3 | IF | NT | 2, STACK_TOP, STACK_SEGMENT, 2, 1, 3, 4]
    assert not machine["rflags"] & (VM | RF | NT | TF | IF)
    assert all(machine.segment(name).selector == 0 for name in ("ds", "es", "fs", "gs"))


@pytest.mark.parametrize("iopl", [0, 1, 2])
def test_method_2_without_vme(iopl: int) -> None:
    machine = virtual(iopl << 12)
    step(machine, f"int {VECTOR}")
    assert protected_handler(machine) == 13
    assert machine.stack(2, 4) == [0, 0]


def test_method_3_not_redirected_below_iopl_3() -> None:
    machine = virtual(0, VME, redirected=False)
    step(machine, f"int {VECTOR}")
    assert protected_handler(machine) == 13


def test_method_4_not_redirected() -> None:
    machine = virtual(IOPL3, VME, redirected=False)
    step(machine, f"int {VECTOR}")
    assert protected_handler(machine) == VECTOR


def test_method_5_redirected() -> None:
    """Through the 8086 program's own table; IF and TF are cleared, the flags are pushed as they are."""
    machine = virtual(IOPL3 | IF | VIF, VME)
    step(machine, f"int {VECTOR}")
    assert (machine["rip"], machine.segment("cs").base, machine["rsp"]) == (
        HANDLER,
        HANDLER_SEGMENT << 4,
        STACK_TOP - 6,
    )
    assert words(machine) == [2, SEGMENT, IOPL3 | IF | 2]
    assert machine["rflags"] & (VM | IF | VIF | IOPL3) == VM | VIF | IOPL3


@pytest.mark.parametrize("vif", [0, VIF])
def test_method_6_redirected_below_iopl_3(vif: int) -> None:
    """IOPL is pushed as 3, VIF as IF; VIF is cleared, IF stays."""
    machine = virtual(IF | vif, VME)
    step(machine, f"int {VECTOR}")
    assert machine["rip"] == HANDLER
    assert words(machine) == [2, SEGMENT, IOPL3 | (IF if vif else 0) | 2]
    assert machine["rflags"] & (VM | IF | VIF | IOPL3) == VM | IF


@pytest.mark.parametrize(("source", "vector"), [("int3", 3), ("into", 4), ("db 0xf1", 1)])
def test_others_are_not_redirected(source: str, vector: int) -> None:
    """Nor do they look at IOPL. SDM, "INT n/INTO/INT3/INT1—Call to Interrupt Procedure"."""
    machine = virtual(0x800, VME)
    for n in range(32):
        machine.ram.write_u8(TSS + MAP_BASE - 32 + n, 0)
    step(machine, source)
    assert protected_handler(machine) == vector


# ---- VIF and VIP: "Class 2—Maskable Hardware Interrupt Handling in Virtual-8086 Mode Using the Virtual Interrupt
# Mechanism" -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "cr4", "fault", "after"),
    [
        (0, 0, True, 0), (0, VME, False, VIF), (VIP, VME, True, VIP), (IOPL3, 0, False, IF), (IOPL3, VME, False, IF),
        (IOPL3 | VIP, VME, False, IF | VIP),
    ],
)  # fmt: skip
def test_sti(flags: int, cr4: int, fault: bool, after: int) -> None:
    """SDM, "STI—Set Interrupt Flag"."""
    machine = virtual(flags, cr4)
    step(machine, "sti")
    if fault:
        assert protected_handler(machine) == 13
        assert machine.stack(4, 4)[3] & (IF | VIF | VIP) == after
    else:
        assert machine["rflags"] & (IF | VIF | VIP) == after


@pytest.mark.parametrize(
    ("flags", "cr4", "fault", "after"),
    [(IF, 0, True, IF), (IF | VIF, VME, False, IF), (IOPL3 | IF | VIF, VME, False, VIF), (IOPL3 | IF, 0, False, 0)],
)
def test_cli(flags: int, cr4: int, fault: bool, after: int) -> None:
    """SDM, "CLI—Clear Interrupt Flag"."""
    machine = virtual(flags, cr4)
    step(machine, "cli")
    assert (protected_handler(machine) == 13) is fault
    value = machine.stack(4, 4)[3] if fault else machine["rflags"]
    assert value & (IF | VIF | VIP) == after


@pytest.mark.parametrize(
    ("source", "flags", "cr4", "pushed"),
    [
        ("pushf", IF, 0, None), ("pushf", IF, VME, IOPL3), ("pushf", VIF, VME, IOPL3 | IF), ("pushfd", VIF, VME, None),
        ("pushf", IOPL3 | IF | VIF, VME, IOPL3 | IF), ("pushf", IOPL3 | VIF, VME, IOPL3),
        ("pushfd", IOPL3 | IF | VIF, 0, IOPL3 | IF | VIF),
    ],
)  # fmt: skip
def test_pushf(source: str, flags: int, cr4: int, pushed: int | None) -> None:
    """SDM, "PUSHF/PUSHFD/PUSHFQ—Push EFLAGS Register Onto the Stack"; VM and RF are pushed as 0."""
    machine = virtual(flags, cr4)
    step(machine, source)
    if pushed is None:
        assert protected_handler(machine) == 13
        return
    at, size = (STACK_SEGMENT << 4) + machine["rsp"], 4 if source == "pushfd" else 2
    assert int.from_bytes(machine.ram.read(at, size), "little") == pushed | 2


@pytest.mark.parametrize(
    ("source", "flags", "cr4", "popped", "after"),
    [
        ("popf", 0, 0, IF, None), ("popf", 0, VME, IF, VIF), ("popf", VIF, VME, 0, 0), ("popf", VIP, VME, IF, None),
        ("popf", VIP | VIF, VME, 0, VIP), ("popf", 0, VME, TF, None), ("popfd", 0, VME, 0, None),
        ("popf", IOPL3, VME, IF, IF | IOPL3), ("popf", IOPL3, 0, IF, IF | IOPL3), ("popf", IOPL3 | IF, 0, 0, IOPL3),
        ("popf", 0, VME, IOPL3, 0), ("popf", IOPL3 | VIF, VME, IF, IF | VIF | IOPL3),
        ("popfd", IOPL3 | VIF, VME, IF | VIP, IF | VIF | IOPL3),
    ],
)  # fmt: skip
def test_popf(source: str, flags: int, cr4: int, popped: int, after: int | None) -> None:
    """SDM, "POPF/POPFD/POPFQ—Pop Stack Into EFLAGS Register": IOPL never changes."""
    machine = virtual(flags, cr4)
    machine.ram.write_u32((STACK_SEGMENT << 4) + STACK_TOP, popped)
    step(machine, source)
    if after is None:
        assert protected_handler(machine) == 13
        assert machine.stack(5, 4)[4] == STACK_TOP
        return
    assert machine["rflags"] & (IF | VIF | VIP | IOPL3) == after
    assert machine["rsp"] == STACK_TOP + (4 if source == "popfd" else 2)


@pytest.mark.parametrize(
    ("source", "flags", "cr4", "popped", "after"),
    [
        ("iret", 0, 0, 0, None), ("iret", 0, VME, IF, VIF), ("iret", VIF, VME, 0, 0), ("iret", VIP, VME, IF, None),
        ("iret", 0, VME, TF, None), ("iretd", 0, VME, 0, None), ("iret", IOPL3, 0, IF, IF | IOPL3),
        ("iret", IOPL3 | IF | VIF, VME, 0, VIF | IOPL3), ("iretd", IOPL3, VME, IF, IF | IOPL3),
    ],
)  # fmt: skip
def test_iret(source: str, flags: int, cr4: int, popped: int, after: int | None) -> None:
    """SDM, "IRET/IRETD/IRETQ—Interrupt Return", RETURN-FROM-VIRTUAL-8086-MODE."""
    machine = virtual(flags, cr4)
    frame = struct.pack("<III" if source == "iretd" else "<HHH", HANDLER, HANDLER_SEGMENT, popped)
    machine.ram.write((STACK_SEGMENT << 4) + STACK_TOP, frame)
    step(machine, source)
    if after is None:
        assert protected_handler(machine) == 13
        assert machine.stack(5, 4)[4] == STACK_TOP
        return
    assert (machine["rip"], machine.segment("cs").selector) == (HANDLER, HANDLER_SEGMENT)
    assert machine["rflags"] & (IF | VIF | VIP | IOPL3 | VM) == after | VM
    assert machine["rsp"] == STACK_TOP + len(frame)


@pytest.mark.parametrize(("cr4", "iopl", "due"), [(VME, 0, True), (VME, IOPL3, False), (0, 0, False)])
def test_return_to_a_program_with_a_virtual_interrupt_pending(cr4: int, iopl: int, due: bool) -> None:
    """VIF and VIP at the beginning of an instruction: #GP in front of it."""
    machine = virtual(0, cr4)
    machine["rflags"] = 2
    machine.protected_mode()
    machine["cr4"] = cr4
    flags = VM | VIF | VIP | iopl | 2
    machine["rsp"] = STACK0 - 0x200
    frame = [0x10, SEGMENT, flags, STACK_TOP, STACK_SEGMENT, 2, 1, 3, 4]
    machine.ram.write(machine["rsp"], struct.pack("<9I", *frame))
    machine.ram.write(CODE + 0x100, b"\xcf")
    machine["rip"] = CODE + 0x100
    machine.ram.write(CODE + 0x10, b"\x90")
    machine.cpu.stop_at_events()
    machine.cpu.step(2)
    assert machine["rflags"] & (VM | VIF | VIP) == VM | VIF | VIP
    assert machine["rip"] == (0x10 if due else 0x11)
    assert bool(machine.cpu.event["pending"]) is due


def test_mov_to_cr_and_hlt_are_privileged() -> None:
    """SDM, "Sensitive Instructions"; CPL is 3."""
    for source in ("hlt", "mov eax, cr0", "clts", "lgdt [0]", "wbinvd"):
        machine = virtual(IOPL3)
        step(machine, source)
        assert protected_handler(machine) == 13, source


@pytest.mark.parametrize(
    "source", ["sldt ax", "str ax", "lldt ax", "ltr ax", "verr ax", "lar ax, ax", "lsl ax, ax", "arpl ax, ax"]
)
def test_instructions_of_protected_mode_do_not_exist(source: str) -> None:
    """SDM, "Instruction Set": #UD."""
    machine = virtual(IOPL3)
    step(machine, source)
    assert protected_handler(machine) == 6


# ---- "Protected-Mode Virtual Interrupts" ---------------------------------------------------------------------------


def user(flags: int, cr4: int) -> Machine:
    """32-bit code at CPL 3."""
    machine = virtual(0)
    machine["rflags"] = flags | 2
    machine["cr4"] = cr4
    machine.ram.write(GDT + 0x40, struct.pack("<Q", descriptor(access=0xFB, flags=0xC)))
    machine.set_segment("cs", 0x43, 0, 0xFFFFFFFF, 0xC0FB)
    for name in ("ss", "ds", "es"):
        machine.set_segment(name, USER_DATA, 0, 0xFFFFFFFF, 0xC0F3)
    machine["cpl"], machine["rsp"] = 3, STACK3
    return machine


def step_user(machine: Machine, source: str) -> None:
    machine.ram.write(CODE, assemble(source, 32, CODE) + b"\xf4")
    machine["rip"] = CODE
    machine.cpu.step(1)


@pytest.mark.parametrize(
    ("source", "flags", "cr4", "after"),
    [
        ("sti", 0, PVI, VIF), ("sti", VIP, PVI, None), ("sti", 0, VME, None), ("sti", IOPL3, PVI, IF),
        ("cli", IF | VIF, PVI, IF), ("cli", IF | VIF, 0, None), ("cli", IOPL3 | IF | VIF, PVI, VIF),
    ],
)  # fmt: skip
def test_cli_and_sti_with_pvi(source: str, flags: int, cr4: int, after: int | None) -> None:
    machine = user(flags, cr4)
    step_user(machine, source)
    if after is None:
        assert protected_handler(machine) == 13
    else:
        assert machine["rflags"] & (IF | VIF | VIP) == after


def test_popf_and_pushf_with_pvi() -> None:
    """They go on with IF itself; POPF leaves it alone below IOPL."""
    machine = user(IF, PVI)
    step_user(machine, "pushf")
    assert machine.stack(1, 4)[0] & (IF | VIF) == IF
    machine.ram.write_u32(machine["rsp"], 2)
    machine.ram.write(CODE + 0x10, b"\x9d\xf4")
    machine["rip"] = CODE + 0x10
    machine.cpu.step(1)
    assert machine["rflags"] & (IF | VIF) == IF
