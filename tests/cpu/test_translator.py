"""What differential tests of straight-line code do not reach: control flow, stores to code, MMIO, kicks, limits."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time

import pytest
from tests.cpu.flat import CODE, SIZE, STACK, Machine

from vmonty.cpu import core


@pytest.fixture
def machine() -> Machine:
    """A machine at CPL 0."""
    return Machine()


def test_loop_and_conditional(machine: Machine) -> None:
    """A chained self-loop counts down."""
    assert machine.run("b8 40 42 0f 00  31 db  48 83 c3 03  83 e8 01  75 f7  f4") == "halt"
    assert machine.cpu["rbx"] == 3_000_000
    assert machine.cpu["rax"] == 0


def test_call_and_return(machine: Machine) -> None:
    """Calls push the return address; returns find their way, predicted or not."""
    # call f; add eax, 1; hlt; f: mov eax, 41; ret
    assert machine.run("e8 04 00 00 00  83 c0 01  f4  b8 29 00 00 00  c3") == "halt"
    assert machine.cpu["rax"] == 42
    assert machine.cpu["rsp"] == STACK
    assert machine.get64(STACK - 8) == CODE + 5


def test_return_to_another_place(machine: Machine) -> None:
    """A return address that was changed is obeyed: the prediction only guesses."""
    # call f; hlt; nop; mov eax, 7; hlt; f: add qword [rsp], 2; ret
    assert machine.run("e8 08 00 00 00  f4 90  b8 07 00 00 00  f4  48 83 04 24 02  c3") == "halt"
    assert machine.cpu["rax"] == 7


def test_deep_recursion(machine: Machine) -> None:
    """The shadow stack overflows and the program does not notice."""
    machine.cpu["rsp"] = 0xF00000
    # mov ecx, 100000; call f; hlt; f: dec ecx; jz out; call f; out: inc eax; ret
    assert machine.run("31 c0  b9 a0 86 01 00  e8 01 00 00 00  f4  ff c9  74 05  e8 f7 ff ff ff  ff c0  c3") == "halt"
    assert machine.cpu["rax"] == 100000


def test_indirect_jump_and_call(machine: Machine) -> None:
    """Indirect targets go through the jump cache."""
    # lea rbx, [rip+f]; mov ecx, 1000; l: call rbx; dec ecx; jnz l; hlt; f: add rax, 2; ret
    assert machine.run("48 8d 1d 0c 00 00 00  b9 e8 03 00 00  ff d3  ff c9  75 fa  f4  48 83 c0 02  c3") == "halt"
    assert machine.cpu["rax"] == 2000


def test_self_modifying_code(machine: Machine) -> None:
    """A store into the instruction that follows is seen by it. SDM, "Handling Self- and Cross-Modifying Code"."""
    # mov byte [rip+1], 9 ; mov eax, 1 (its immediate is written) ; hlt
    assert machine.run("c6 05 01 00 00 00 09  b8 01 00 00 00  f4") == "halt"
    assert machine.cpu["rax"] == 9


def test_code_changed_between_runs_by_the_guest(machine: Machine) -> None:
    """A function that is called, overwritten, and called again shows the new code."""
    machine.load("b8 01 00 00 00 c3", CODE + 0x2000)
    # call 0x2000; mov ebx, eax; mov byte [0x102001], 5; call 0x2000; hlt
    code = "e8 fb 1f 00 00  89 c3  c6 04 25 01 20 10 00 05  e8 ec 1f 00 00  f4"
    assert machine.run(code) == "halt"
    assert (machine.cpu["rbx"], machine.cpu["rax"]) == (1, 5)


def test_mmio_read_and_write(machine: Machine) -> None:
    """Accesses beside RAM end run(); a read resumes with the caller's data."""
    # mov eax, [rbx]; add eax, 1; mov [rbx+4], eax; hlt
    machine.cpu["rbx"] = 0x3000000
    assert machine.run("8b 03  83 c0 01  89 43 04  f4") == "mmio"
    assert machine.cpu.exit == {"reason": "mmio", "address": 0x3000000, "size": 4, "write": 0, "data": 0}
    machine.cpu.answer(41)
    assert machine.cpu.run() == "mmio"
    assert machine.cpu.exit == {"reason": "mmio", "address": 0x3000004, "size": 4, "write": 1, "data": 42}
    assert machine.cpu.run() == "halt"


def test_mmio_read_modify_write(machine: Machine) -> None:
    """One instruction may report twice."""
    machine.cpu["rbx"] = 0x3000000
    assert machine.run("83 03 05  f4") == "mmio"
    machine.cpu.answer(10)
    assert machine.cpu.run() == "mmio"
    assert (machine.cpu.exit["write"], machine.cpu.exit["data"]) == (1, 15)
    assert machine.cpu.run() == "halt"


def test_kick_ends_an_endless_loop(machine: Machine) -> None:
    """Another thread gets the processor out of translated code."""
    machine.load("eb fe")
    result: list[str] = []
    thread = threading.Thread(target=lambda: result.append(machine.cpu.run()))
    thread.start()
    time.sleep(0.05)  # most likely inside by now; a kick that comes first must give the same
    machine.cpu.kick()
    thread.join(5)
    assert result == ["run_flag"]
    assert machine.cpu["rip"] == CODE


def test_two_processors_at_once() -> None:
    """Two processors run in two threads, each with its own translations."""
    machines = [Machine(), Machine()]
    results: list[str] = []
    for n, m in enumerate(machines):
        m.load("b8 00 e1 f5 05  48 83 c3 %02x  83 e8 01  75 f7  f4" % (n + 1))
    threads = [threading.Thread(target=lambda m=m: results.append(m.cpu.run())) for m in machines]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    assert results == ["halt", "halt"]
    assert [m.cpu["rbx"] for m in machines] == [100_000_000, 200_000_000]


def test_step(machine: Machine) -> None:
    """Single-stepping executes exactly one instruction."""
    machine.load("b8 01 00 00 00  50  59  f4")
    assert machine.cpu.step() == "budget"
    assert machine.cpu["rip"] == CODE + 5
    assert machine.cpu.step(2) == "budget"
    assert (machine.cpu["rip"], machine.cpu["rcx"], machine.cpu["rsp"]) == (CODE + 7, 1, STACK)


def test_store_across_pages(machine: Machine) -> None:
    """A store that crosses pages writes both."""
    machine.cpu["rbx"] = 0x200FFD
    machine.cpu["rax"] = 0x1122334455667788
    assert machine.run("48 89 03  48 8b 0b  f4") == "halt"
    assert machine.cpu["rcx"] == 0x1122334455667788
    assert machine.memory[0x200FFD:0x201005] == bytes.fromhex("8877665544332211")


def test_group_of_operands_across_pages(machine: Machine) -> None:
    """Operands that share a TLB check still work when they lie in two pages."""
    machine.cpu["rbx"] = 0x200FF0
    # mov [rbx], 1; mov [rbx+8], 2; mov [rbx+16], 3; mov rax, [rbx+16]; hlt
    code = "48 c7 03 01 00 00 00  48 c7 43 08 02 00 00 00  48 c7 43 10 03 00 00 00  48 8b 43 10  f4"
    for _ in range(3):
        machine.cpu["rip"] = CODE
        assert machine.run(code) == "halt"
        assert [machine.get64(0x200FF0 + 8 * n) for n in range(3)] == [1, 2, 3]
        assert machine.cpu["rax"] == 3


def test_rep_movs_and_stos(machine: Machine) -> None:
    """Repeated string instructions over many pages."""
    machine.memory[0x300000:0x304000] = bytes(range(256)) * 64
    machine.cpu["rsi"], machine.cpu["rdi"], machine.cpu["rcx"] = 0x300003, 0x400001, 0x3000
    assert machine.run("f3 a4  b0 77  b9 05 20 00 00  f3 aa  f4") == "halt"
    assert machine.memory[0x400001:0x403001] == machine.memory[0x300003:0x303003]
    assert machine.memory[0x403001:0x405006] == b"\x77" * 0x2005
    assert machine.cpu["rcx"] == 0
    assert machine.cpu["rdi"] == 0x405006


def test_cache_is_bounded() -> None:
    """A small cache is dropped and filled again, and the program goes on."""
    machine = Machine()
    code = bytearray()
    for n in range(2000):
        code += bytes.fromhex("48 83 c0 01 eb 00".replace("01", f"{n % 100 + 1:02x}"))
    machine.load(bytes(code) + b"\xf4")
    assert machine.cpu.run() == "halt"
    assert machine.cpu["rax"] == sum(n % 100 + 1 for n in range(2000))


def test_code_written_by_another_processor() -> None:
    """One processor spins in a loop until the other overwrites its jump. SDM, "Handling ... Cross-Modifying Code"."""
    spinning = Machine()
    writing = Machine(spinning.memory)
    spinning.load("f3 90  eb fc  b8 05 00 00 00  f4")
    writing.load("66 c7 04 25 02 00 10 00 90 90  f4", CODE + 0x3000)  # mov word [0x100002], 0x9090
    writing.cpu["rip"] = CODE + 0x3000
    thread = threading.Thread(target=spinning.cpu.run)
    thread.start()
    time.sleep(0.1)  # most likely spinning by now; a write that comes first must give the same
    assert writing.cpu.run() == "halt"
    thread.join(5)
    stuck = thread.is_alive()
    spinning.cpu.kick()
    thread.join(5)
    assert not stuck
    assert spinning.cpu["rax"] == 5


def test_code_written_by_a_device(machine: Machine) -> None:
    """Host software that writes guest memory says so, and old translations go."""
    assert machine.run("b8 01 00 00 00  f4") == "halt"
    machine.load("b8 02 00 00 00  f4")
    address = ctypes.addressof(ctypes.c_char.from_buffer(machine.memory))
    core.memory_written(address + CODE, 6)
    machine.cpu["rip"] = CODE
    assert machine.cpu.run() == "halt"
    assert machine.cpu["rax"] == 2


@pytest.mark.parametrize(
    "code",
    ["48 8b 04 25 00 00 20 00", "48 89 04 25 fc ff 1f 00", "0f ae 04 25 00 00 20 00", "ff 24 25 00 00 20 00"],
    ids=["load", "crossing-store", "helper", "jump"],
)
def test_memory_that_is_gone_ends_the_run(code: str) -> None:
    """Not the process. The instruction has not been executed; it is when the memory is back."""
    fd, lost = os.memfd_create("test"), 0x200000
    os.ftruncate(fd, SIZE)
    machine = Machine(mmap.mmap(fd, SIZE))
    machine.put64(lost, CODE + 0x800)
    machine.load("f4", CODE + 0x800)
    before = machine.cpu["rsp"]
    os.ftruncate(fd, lost)
    for _ in range(2):
        assert machine.run(bytes.fromhex("90" + code) + b"\xf4") == "host_fault"
        assert machine.cpu["rip"] == CODE + 1
        assert machine.cpu.exit["address"]
    os.ftruncate(fd, SIZE)
    machine.put64(lost, CODE + 0x800)
    assert machine.cpu.run() == "halt"
    assert machine.cpu["rsp"] == before
    os.close(fd)


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize(
    "code",
    ["ff e0", "ff 24 25 00 00 20 00", "ff d0", "ff 14 25 00 00 20 00", "c3", "c2 10 00", "f3 c3"],
    ids=["jmp", "jmp-m", "call", "call-m", "ret", "ret-n", "rep-ret"],
)
@pytest.mark.parametrize("target", [0xAAAAAAAAAAAAAAAA, 0x800000000000])
def test_branch_to_an_address_that_is_not_canonical(machine: Machine, code: str, stepped: bool, target: int) -> None:
    """SDM, "JMP—Jump", "CALL—Call Procedure", "RET—Return from Procedure": the branch itself faults."""
    machine.put64(0x200000, target)
    machine.put64(machine.cpu["rsp"], target)
    machine.cpu["rax"] = target
    machine.cpu.stop_at_events()
    machine.load("90 90" + code)
    before = machine.cpu["rsp"]
    if stepped:
        machine.cpu.step(3)
    else:
        machine.cpu.run()
    event = machine.cpu.event
    assert (event["pending"], event["vector"], event["error_code"]) == (1, 13, 0)
    assert (machine.cpu["rip"], machine.cpu["rsp"]) == (CODE + 2, before)
    pushed = CODE + 2 + len(bytes.fromhex(code)) if code.startswith(("ff d", "ff 14")) else 0
    assert machine.get64(before - 8) == pushed


def test_return_to_what_the_callee_made_of_its_return_address(machine: Machine) -> None:
    """The return that was predicted faults, not its target."""
    machine.cpu.stop_at_events()
    for flip in (0, 0, 1 << 63):  # call f; hlt; f: xor [rsp], rcx; ret
        machine.cpu["rip"], machine.cpu["rcx"] = CODE, flip
        stopped = machine.run("e8 01 00 00 00  f4  48 31 0c 24  c3")
        assert (stopped == "halt") is (flip == 0)
    event = machine.cpu.event
    assert (event["pending"], event["vector"], machine.cpu["rip"]) == (1, 13, CODE + 10)


BORDER = 0x7FFFFFFFF000  # the last page of the lower half


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize(
    ("code", "rip"),
    [
        ("e9 fb ff 00 00", 0), ("0f 83 fa ff 00 00", 0), ("73 7e", 0), ("e8 fb ff 00 00", 0),
        ("e3 7e", 0), ("e2 7e", 0), ("90", 1), ("73 00", 2), ("e8 00 00 00 00", 0), ("eb 00", 0),
    ],
    ids=["jmp", "jcc", "jcc8", "call", "jrcxz", "loop", "run-on", "jcc-next", "call-next", "jmp-next"],
)  # fmt: skip
def test_direct_branches_over_the_border(machine: Machine, code: str, rip: int, stepped: bool) -> None:
    """They fault themselves; code that runs on faults behind the border. SDM, "Canonical Addressing"."""
    data = bytes.fromhex(code)
    start = BORDER + 0x1000 - len(data)
    for table, entry, shift in ((0x1000, 0x6007, 39), (0x6000, 0x7007, 30), (0x7000, 0x8007, 21), (0x8000, 0x9007, 12)):
        machine.put64(table + 8 * (BORDER >> shift & 511), entry)
    machine.memory[0xA000 - len(data) : 0xA000] = data
    machine.cpu.stop_at_events()
    machine.cpu["rip"], machine.cpu["rcx"] = start, 0 if code.startswith("e3") else 5
    before = machine.cpu["rsp"], machine.cpu["rcx"]
    if stepped:
        machine.cpu.step(2)
    else:
        machine.cpu.run()
    event = machine.cpu.event
    assert (event["pending"], event["vector"], event["error_code"]) == (1, 13, 0)
    assert machine.cpu["rip"] == start + rip
    assert (machine.cpu["rsp"], machine.cpu["rcx"]) == before
