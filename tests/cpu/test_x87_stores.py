"""An x87 store with an unmasked exception stores nothing and does not look at its operand; what follows reports it."""

from __future__ import annotations

import struct

import pytest
from tests.cpu.flat import CODE, Machine
from tests.cpu.machine import Machine as SystemMachine

from vmonty.cpu.walks import SegmentState
from vmonty.testing.nasm import assemble

WORD, EDGE, ABSENT, FAR = 0x200000, 0x200FFE, 0x40000000, 0x8000_0000_0000_0000
GP, PF, MF = 13, 14, 16
UNMASKED, MASKED = 0x37E, 0x37F  # invalid operation reported, or answered with the indefinite value


@pytest.fixture
def machine() -> Machine:
    made = Machine()
    made.put64(0x2000 + 8 * (ABSENT >> 30), 0)
    made.cpu.stop_at_events()
    return made


def run(machine: Machine, control: int, store: str, at: int, then: str = "nop") -> int:
    """Load 1e30, which fits no integer, and store it there; the vector of the exception, or -1."""
    machine.memory[WORD : WORD + 2] = struct.pack("<H", control)
    machine.put64(WORD + 8, int.from_bytes(struct.pack("<d", 1e30), "little"))
    source = f"fninit\n fldcw [{WORD:#x}]\n fld qword [{WORD + 8:#x}]\n mov rbx, {at:#x}\n {store}\n {then}\n hlt"
    machine.load(assemble(source, 64, CODE))
    machine.cpu.flush_code()
    machine.cpu.clear_event()
    machine.cpu["rip"] = CODE
    machine.cpu.run()
    return machine.cpu.event["vector"] if machine.cpu.event["pending"] else -1


@pytest.mark.parametrize("store", ["fist dword [rbx]", "fistp qword [rbx]", "fisttp dword [rbx]", "fbstp [rbx]"])
@pytest.mark.parametrize("at", [EDGE - 64, EDGE, ABSENT, ABSENT - 2, FAR])
def test_nothing_is_stored(machine: Machine, store: str, at: int) -> None:
    """Not in one page, nor in two, where there is none, or where no address is. SDM, "FIST/FISTP—Store Integer"."""
    machine.memory[0x200F00:0x201010] = b"\xa5" * 0x110
    assert run(machine, UNMASKED, store, at, "fwait") == MF
    assert machine.memory[machine.cpu["rip"]] == 0x9B
    assert machine.memory[0x200F00:0x201010] == b"\xa5" * 0x110


@pytest.mark.parametrize(("at", "vector"), [(ABSENT, PF), (FAR, GP)])
def test_what_is_stored_faults_with_the_stack_as_it_was(machine: Machine, at: int, vector: int) -> None:
    assert run(machine, MASKED, "fistp dword [rbx]", at) == vector
    if vector == PF:
        assert (machine.cpu.event["payload"], machine.cpu.event["error_code"]) == (ABSENT, 2)
    assert machine.cpu["rip"] == CODE + len(assemble(f"fninit\n fldcw [{WORD:#x}]\n fld qword [{WORD + 8:#x}]", 64)) + (
        len(assemble(f"mov rbx, {at:#x}", 64))
    )
    image = machine.cpu.xsave
    assert struct.unpack_from("<H", image, 2)[0] & 0x3F00 == 7 << 11  # one register in use, no exception but that
    assert image[4] == 0x80


def test_what_is_stored_over_two_pages_is_all_there(machine: Machine) -> None:
    assert run(machine, MASKED, "fistp dword [rbx]", EDGE) == -1
    assert machine.memory[EDGE : EDGE + 4] == struct.pack("<i", -(1 << 31))


@pytest.mark.parametrize(
    "instruction",
    [
        "paddb mm1, [rbx]",
        "movq [rbx], mm1",
        "cvttpd2pi mm1, [rbx]",
        "fld dword [rbx]",
        "fstp dword [rbx]",
        "fldenv [rbx]",
        "frstor [rbx]",
    ],
)
@pytest.mark.parametrize("at", [ABSENT, FAR])
def test_a_pending_exception_comes_before_those_of_an_operand(machine: Machine, instruction: str, at: int) -> None:
    """Also of MMX. SDM, "Exception Handling in x87 FPU and MMX Code"."""
    assert run(machine, UNMASKED, "fistp dword [rbx]", at, instruction) == MF
    assert run(machine, MASKED, "fistp dword [rsp]", at, instruction) == (PF if at == ABSENT else GP)


@pytest.mark.parametrize(("control", "vector"), [(UNMASKED, -1), (MASKED, GP)])
def test_beyond_the_segment(control: int, vector: int) -> None:
    """The limit is not looked at either."""
    machine = SystemMachine().protected_mode()
    machine.cpu.stop_at_events()
    machine.ram.write(0xA000, struct.pack("<Hxxxxxxd", control, 1e30))
    machine["cr0"] = machine["cr0"] | 0x20
    machine.set_segment("es", 16, 0, 0xFFF, 0x4093)
    assert machine.segment("es") == SegmentState(16, 0, 0xFFF, 0x4093)
    machine.run(assemble("fninit\n fldcw [0xA000]\n fld qword [0xA008]\n fistp dword [es:0x2000]\n hlt", 32, 0x8000))
    event = machine.cpu.event
    assert (event["vector"] if event["pending"] else -1) == vector
