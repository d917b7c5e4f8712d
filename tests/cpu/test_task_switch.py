"""Task switches: what is checked, in whose context it faults, and what is left behind. SDM, "Task Switching"."""

from __future__ import annotations

import struct

import pytest

from vmonty.testing.nasm import assemble

from .machine import CODE, CODE32, DATA, GDT, HANDLERS, IDT, TSS, Machine, descriptor, gate32

OLD, NEW, GATE, LDT, OTHER_CODE, OTHER_DATA = 0x38, 0x40, 0x48, 0x50, 0x58, 0x60
NEW_TSS, NEW_LDT, NEW_STACK, NEW_CODE = 0x7000, 0x7800, 0xB800, 0xA000
NT, IF, TF, VM = 1 << 14, 1 << 9, 1 << 8, 1 << 17
SELECTORS = {"es": 0x48, "cs": 0x4C, "ss": 0x50, "ds": 0x54, "fs": 0x58, "gs": 0x5C, "ldt": 0x60}


def machine() -> Machine:
    """32-bit protected mode with a second task."""
    m = Machine().protected_mode()
    for vector in range(64):
        m.ram.write(IDT + 8 * vector, gate32(HANDLERS + 16 * vector, CODE32))
        m.ram.write(HANDLERS + 16 * vector, b"\xf4")
    put(m, OLD, descriptor(TSS, 0x67, 0x8B, 0))
    put(m, NEW, descriptor(NEW_TSS, 0x67, 0x89, 0))
    put(m, GATE, int.from_bytes(gate32(0, NEW, 0x85), "little"))
    put(m, LDT, descriptor(NEW_LDT, 0xFF, 0x82, 0))
    put(m, OTHER_CODE, descriptor(access=0x9B))
    put(m, OTHER_DATA, descriptor(access=0x93))
    image = bytearray(0x68)
    struct.pack_into("<IIII", image, 0x1C, 0, NEW_CODE, 2, 0x55)  # CR3, EIP, EFLAGS, EAX
    struct.pack_into("<I", image, 0x38, NEW_STACK)
    struct.pack_into("<7I", image, 0x48, DATA, CODE32, DATA, DATA, 0, 0, 0)
    m.ram.write(NEW_TSS, bytes(image))
    m.ram.write(NEW_CODE, b"\x90\xf4")
    m["rax"], m["rbx"] = 0x77, 0x1234
    return m


def put(m: Machine, selector: int, value: int) -> None:
    m.ram.write_u64(GDT + selector, value)


def access(m: Machine, selector: int) -> int:
    """The access byte of a descriptor."""
    return m.ram.read_u8(GDT + selector + 5)


def go(m: Machine, source: str) -> None:
    """Execute one instruction, and what its fault delivers, up to the HLT of a handler or of the new task."""
    assert m.run(assemble(source, 32, CODE)) == "halt"


def faulted(m: Machine) -> tuple[int, int]:
    """Vector and error code."""
    return m.handler, m.stack(1, 4)[0]


def in_old_task(m: Machine, eip: int = CODE) -> bool:
    """Is everything as before the instruction?"""
    return (
        m.segment("tr").selector == OLD
        and m["rax"] == 0x77
        and m.stack(2, 4)[1] == eip
        and access(m, OLD) == 0x8B
        and m.ram.read_u32(TSS + 0x20) == 0
        and not m["cr0"] & 8
    )


@pytest.mark.parametrize("how", ["call", "jmp"])
@pytest.mark.parametrize("through", [NEW, GATE], ids=["tss", "gate"])
def test_call_and_jump(how: str, through: int) -> None:
    """Busy bits, link, NT, TS and the old task's image. SDM, "Task Linking"; table "Effect of a Task Switch on Busy
    Flag, NT Flag, Previous Task Link Field, and TS Flag".
    """
    m = machine()
    go(m, f"{how} {through}:0")
    assert (m["rip"], m["rax"], m["rsp"], m.segment("tr").selector) == (NEW_CODE + 2, 0x55, NEW_STACK, NEW)
    assert access(m, NEW) == 0x8B
    assert access(m, OLD) == (0x8B if how == "call" else 0x89)
    assert m.ram.read_u16(NEW_TSS) == (OLD if how == "call" else 0)
    assert bool(m["rflags"] & NT) is (how == "call")
    assert m["cr0"] & 8
    assert [m.ram.read_u32(TSS + at) for at in (0x20, 0x24, 0x28, 0x34)] == [CODE + 7, 2, 0x77, 0x1234]
    assert m.ram.read_u16(TSS + 0x4C) == CODE32


def test_return() -> None:
    """IRET with NT: the new task is available again, the old one goes on; NT is clear in what was saved."""
    m = machine()
    m.ram.write(NEW_CODE, b"\xcf\xf4")
    m.ram.write(CODE + 7, b"\xf4")
    go(m, f"call {NEW}:0")
    assert (m["rip"], m["rax"], m.segment("tr").selector) == (CODE + 8, 0x77, OLD)
    assert (access(m, OLD), access(m, NEW)) == (0x8B, 0x89)
    assert not m.ram.read_u32(NEW_TSS + 0x24) & NT
    assert m.ram.read_u32(NEW_TSS + 0x20) == NEW_CODE + 1
    assert not m["rflags"] & NT


# ---- "Exception Conditions Checked During a Task Switch": in the old task, which is whole ----------------------------

OLD_FAULTS = {
    "local": (f"call {NEW | 4}:0", None, 13, NEW | 4),
    "beyond": ("call 0x1008:0", None, 13, 0x1008),
    "busy": (f"call {NEW}:0", descriptor(NEW_TSS, 0x67, 0x8B, 0), 13, NEW),
    "not-present": (f"call {NEW}:0", descriptor(NEW_TSS, 0x67, 0x09, 0), 11, NEW),
    "jmp-busy": (f"jmp {NEW}:0", descriptor(NEW_TSS, 0x67, 0x8B, 0), 13, NEW),
    "limit": (f"call {NEW}:0", descriptor(NEW_TSS, 0x66, 0x89, 0), 10, NEW),
    "limit-jmp": (f"jmp {NEW}:0", descriptor(NEW_TSS, 0x66, 0x89, 0), 10, NEW),
    "limit-16": (f"jmp {NEW}:0", descriptor(NEW_TSS, 0x2A, 0x81, 0), 10, NEW),
    "gate-busy": (f"call {GATE}:0", descriptor(NEW_TSS, 0x67, 0x8B, 0), 13, NEW),
    "gate-not-present": (f"jmp {GATE}:0", descriptor(NEW_TSS, 0x67, 0x09, 0), 11, NEW),
}


@pytest.mark.parametrize(("source", "tss", "vector", "error"), OLD_FAULTS.values(), ids=OLD_FAULTS.keys())
def test_faults_in_the_old_task(source: str, tss: int | None, vector: int, error: int) -> None:
    m = machine()
    if tss is not None:
        put(m, NEW, tss)
    before = access(m, NEW)
    go(m, source)
    assert faulted(m) == (vector, error)
    assert in_old_task(m)
    assert access(m, NEW) == before


IRET_FAULTS = {
    "not-busy": (NEW, descriptor(NEW_TSS, 0x67, 0x89, 0), 10, NEW),
    "null": (0, None, 10, 0),
    "local": (NEW | 4, None, 10, NEW | 4),
    "beyond": (0x1008, None, 10, 0x1008),
    "not-a-tss": (DATA, None, 10, DATA),
    "not-present": (NEW, descriptor(NEW_TSS, 0x67, 0x0B, 0), 11, NEW),
    "limit": (NEW, descriptor(NEW_TSS, 0x66, 0x8B, 0), 10, NEW),
}


@pytest.mark.parametrize(("link", "tss", "vector", "error"), IRET_FAULTS.values(), ids=IRET_FAULTS.keys())
def test_faults_of_a_return(link: int, tss: int | None, vector: int, error: int) -> None:
    """#TS instead of #GP. SDM, "Interrupt 10—Invalid TSS Exception (#TS)"."""
    m = machine()
    m.ram.write_u16(TSS, link)
    if tss is not None:
        put(m, NEW, tss)
    m["rflags"] = NT | 2
    go(m, "iret")
    assert faulted(m) == (vector, error)
    assert in_old_task(m)


@pytest.mark.parametrize("what", ["new", "new-end", "old"])
def test_page_faults_come_before_anything_changed(what: str) -> None:
    """SDM, "Task Switching": all that the switch uses is checked to be paged in first."""
    m = machine()
    root, table = 0x30000, 0x31000
    m.ram.write_u32(root, table | 7)
    for n in range(0x100):
        m.ram.write_u32(table + 4 * n, n << 12 | 7)
    if what == "old":
        gone, at = 0x50, 0x50000
        m.set_segment("tr", OLD, at, 0x67, 0x8B)
    else:
        at = 0x50FC0
        gone = 0x50 if what == "new" else 0x51
        put(m, NEW, descriptor(at, 0x67, 0x89, 0))
        m.ram.write(at, m.ram.read(NEW_TSS, 0x68))
    m.ram.write_u32(table + 4 * gone, 0)
    m["cr3"], m["cr0"] = root, 0x80000011
    go(m, f"call {NEW}:0")
    assert m.handler == 14
    assert m["cr2"] >> 12 == gone
    assert m.stack(2, 4)[1] == CODE
    assert (access(m, NEW), access(m, OLD)) == (0x89, 0x8B)
    assert m.segment("tr").selector == OLD
    assert m["rax"] == 0x77


# ---- in the new task -----------------------------------------------------------------------------------------------

NEW_FAULTS = {
    "ldt-local": ("ldt", LDT | 4, None, 10, LDT | 4),
    "ldt-beyond": ("ldt", 0x1008, None, 10, 0x1008),
    "ldt-type": ("ldt", DATA, None, 10, DATA),
    "ldt-not-present": ("ldt", LDT, (LDT, descriptor(NEW_LDT, 0xFF, 0x02, 0)), 10, LDT),
    "cs-null": ("cs", 0, None, 10, 0),
    "cs-data": ("cs", DATA, None, 10, DATA),
    "cs-dpl": ("cs", OTHER_CODE, (OTHER_CODE, descriptor(access=0xFB)), 10, OTHER_CODE),
    "cs-conforming": ("cs", OTHER_CODE, (OTHER_CODE, descriptor(access=0xFF)), 10, OTHER_CODE),
    "cs-not-present": ("cs", OTHER_CODE, (OTHER_CODE, descriptor(access=0x1B)), 11, OTHER_CODE),
    "ss-null": ("ss", 0, None, 10, 0),
    "ss-code": ("ss", CODE32, None, 10, CODE32),
    "ss-read-only": ("ss", OTHER_DATA, (OTHER_DATA, descriptor(access=0x91)), 10, OTHER_DATA),
    "ss-dpl": ("ss", OTHER_DATA, (OTHER_DATA, descriptor(access=0xF3)), 10, OTHER_DATA),
    "ss-rpl": ("ss", DATA | 3, None, 10, DATA),
    "ss-not-present": ("ss", OTHER_DATA, (OTHER_DATA, descriptor(access=0x13)), 12, OTHER_DATA),
    "ds-beyond": ("ds", 0x1008, None, 10, 0x1008),
    "es-system": ("es", NEW, None, 10, NEW),
    "fs-execute-only": ("fs", OTHER_CODE, (OTHER_CODE, descriptor(access=0x99)), 10, OTHER_CODE),
    "gs-not-present": ("gs", OTHER_DATA, (OTHER_DATA, descriptor(access=0x13)), 11, OTHER_DATA),
}


@pytest.mark.parametrize(("name", "selector", "change", "vector", "error"), NEW_FAULTS.values(), ids=NEW_FAULTS.keys())
def test_faults_in_the_new_task(
    name: str, selector: int, change: tuple[int, int] | None, vector: int, error: int
) -> None:
    """The switch is done: its first instruction has not been executed, the old task is saved. The fault is handled by
    a task of its own, as the manual advises, for the new task's stack may not be there.
    """
    m = machine()
    handler_tss, handler = 0x7400, 0x68
    put(m, handler, descriptor(handler_tss, 0x67, 0x89, 0))
    image = bytearray(m.ram.read(NEW_TSS, 0x68))
    struct.pack_into("<I", image, 0x20, NEW_CODE + 0x100)
    struct.pack_into("<I", image, 0x38, NEW_STACK + 0x400)
    m.ram.write(handler_tss, bytes(image))
    m.ram.write(NEW_CODE + 0x100, b"\xf4")
    m.ram.write(IDT + 8 * vector, gate32(0, handler, 0x85))
    m.ram.write_u32(NEW_TSS + SELECTORS[name], selector)
    if change:
        put(m, *change)
    go(m, f"call {NEW}:0")
    assert m.segment("tr").selector == handler
    assert m.stack(1, 4)[0] == error
    assert m.ram.read_u16(handler_tss) == NEW
    assert m.ram.read_u32(NEW_TSS + 0x20) == NEW_CODE
    assert m.ram.read_u32(NEW_TSS + 0x24) & NT
    assert m.ram.read_u32(NEW_TSS + 0x28) == 0x55
    assert m.ram.read_u32(TSS + 0x20) == CODE + 7
    assert (access(m, OLD), access(m, NEW), access(m, handler)) == (0x8B, 0x8B, 0x8B)


def test_data_faults_leave_a_stack_to_handle_them_on() -> None:
    m = machine()
    m.ram.write_u32(NEW_TSS + SELECTORS["ds"], 0x1008)
    go(m, f"call {NEW}:0")
    assert m.handler == 10
    assert m.stack(3, 4) == [0x1008, NEW_CODE, CODE32]
    assert m["rsp"] == NEW_STACK - 16


# ---- events through task gates ---------------------------------------------------------------------------------------


def test_an_exceptions_error_code_is_pushed_on_the_new_stack() -> None:
    m = machine()
    m.ram.write(IDT + 8 * 13, gate32(0, NEW, 0x85))
    go(m, "mov ax, 0x1008\n mov ds, ax")
    assert (m["rip"], m["rsp"], m.stack(1, 4)) == (NEW_CODE + 2, NEW_STACK - 4, [0x1008])
    assert m.ram.read_u32(TSS + 0x20) == CODE + 4  # the faulting instruction
    assert m.ram.read_u32(TSS + 0x24) & (1 << 16)  # RF


def test_error_codes_of_external_events_say_so() -> None:
    """EXT, in the old task and in the new one. SDM, "Error Code"."""
    for change, vector, error in (((NEW, descriptor(NEW_TSS, 0x66, 0x89, 0)), 10, NEW | 1), (None, 10, 0x1009)):
        m = machine()
        m.ram.write(IDT + 8 * 0x30, gate32(0, NEW, 0x85))
        if change:
            put(m, *change)
        else:
            m.ram.write_u32(NEW_TSS + SELECTORS["ds"], 0x1008)
        assert m.deliver(0x30, kind=0) == "jump"
        assert ((m["rip"] - HANDLERS) // 16, m.stack(1, 4)[0]) == (vector, error)


def test_the_gate_itself() -> None:
    """SDM, "Task-Gate Descriptor": DPL for software interrupts, then present."""
    m = machine()
    m.ram.write(IDT + 8 * 0x30, gate32(0, NEW, 0x05))
    go(m, "int 0x30")
    assert faulted(m) == (11, 0x30 * 8 + 2)
    m = machine()
    m.ram.write(IDT + 8 * 0x30, gate32(0, NEW | 4, 0x85))
    go(m, "int 0x30")
    assert faulted(m) == (13, NEW | 4)


# ---- the T bit, and where the new task goes on -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["jmp", "interrupt"])
def test_the_t_bit(how: str) -> None:
    """#DB before the new task's first instruction, DR6.BT. SDM, "Task-Switch Exception Condition"."""
    m = machine()
    m.ram.write_u16(NEW_TSS + 0x64, 1)
    if how == "jmp":
        go(m, f"jmp {NEW}:0")
    else:
        m.ram.write(IDT + 8 * 0x30, gate32(0, NEW, 0x85))
        go(m, "int 0x30")
    assert m.handler == 1
    assert m["dr6"] & 0xE00F == 0x8000
    assert m.stack(2, 4) == [NEW_CODE, CODE32]


def test_a_task_in_virtual_8086_mode() -> None:
    m = machine()
    m.ram.write_u32(NEW_TSS + 0x24, VM | 2)
    for name, value in (("cs", NEW_CODE >> 4), ("ss", 0xB00), ("ds", 7), ("es", 8), ("fs", 9), ("gs", 10)):
        m.ram.write_u32(NEW_TSS + SELECTORS[name], value)
    m.ram.write_u32(NEW_TSS + 0x20, 0)
    m.ram.write(CODE, assemble(f"jmp {NEW}:0", 32, CODE))
    m.cpu.step(2)
    assert (m["rip"], m["cpl"], m.segment("cs").base, m.segment("gs").base) == (1, 3, NEW_CODE, 0xA0)
    assert m["rflags"] & VM


def test_local_breakpoints_end_with_their_task() -> None:
    """SDM, "Debug Control Register (DR7)": L0 to L3 are cleared, G0 to G3 stay."""
    m = machine()
    m["dr0"], m["dr7"] = 0x20000, 0x40F
    go(m, f"jmp {NEW}:0")
    assert m["dr7"] & 0xFF == 0xA


def test_16_bit_task() -> None:
    """The upper halves of the registers, FS and GS: the new task's TSS has no room for them."""
    m = machine()
    put(m, NEW, descriptor(NEW_TSS, 0x2B, 0x81, 0))
    words = [NEW_CODE, 2, 0x55, 1, 2, 3, 0xB800, 4, 5, 6, DATA, CODE32, DATA, DATA, 0]
    m.ram.write(NEW_TSS + 0x0E, struct.pack("<15H", *words))
    go(m, f"call {NEW}:0")
    assert (m["rip"], m["rax"] & 0xFFFF, m["rsp"] & 0xFFFF) == (NEW_CODE + 2, 0x55, 0xB800)
    assert m.segment("fs").selector == 0
    assert m.ram.read_u16(NEW_TSS) == OLD
