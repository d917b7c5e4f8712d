"""DR0 to DR3, DR6, DR7. SDM, "Debug Registers", "Debug Exceptions"."""

from __future__ import annotations

import pytest

from vmonty.testing.nasm import assemble

from .machine import CODE, DATA, HANDLERS, Machine

TF, RF, DE = 1 << 8, 1 << 16, 1 << 3
AT = 0x20000
LENGTHS = {1: 0, 2: 1, 4: 3, 8: 2}
WRITES, ALL, PORTS = 1, 3, 2


def armed(number: int, kind: int, length: int = 1) -> int:
    """DR7 with one breakpoint, locally enabled."""
    return 0x400 | 1 << 2 * number | kind << 16 + 4 * number | LENGTHS[length] << 18 + 4 * number


@pytest.fixture
def long() -> Machine:
    return Machine().long_mode()


def run(machine: Machine, source: str) -> str:
    return machine.run(assemble(f"default abs\n{source}\nhlt", 64, CODE))


def trapped(machine: Machine) -> tuple[int, int]:
    """Where the #DB handler would return to, and what DR6 shows."""
    assert machine.handler == 1
    return machine.stack(1)[0] - CODE, machine["dr6"] & 0xE00F


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("offset", [-1, 0, 1, 7, 8])
def test_write_meets_the_bytes_watched(long: Machine, length: int, offset: int) -> None:
    """SDM, "Breakpoint Field Recognition": a trap when any byte is touched."""
    long["dr1"], long["dr7"] = AT, armed(1, WRITES, length)
    assert run(long, f"mov byte [{AT + offset}], 5\n nop") == "halt"
    if 0 <= offset < length:
        assert trapped(long) == (8, 2)
        assert long.ram.read_u8(AT + offset) == 5
    else:
        assert long["rip"] == CODE + 10


def test_low_address_bits_are_ignored(long: Machine) -> None:
    long["dr0"], long["dr7"] = AT + 3, armed(0, WRITES, 4)
    run(long, f"mov byte [{AT}], 5\n nop")
    assert trapped(long) == (8, 1)


@pytest.mark.parametrize(("kind", "traps"), [(WRITES, False), (ALL, True)])
def test_reads(long: Machine, kind: int, traps: bool) -> None:
    long["dr2"], long["dr7"] = AT, armed(2, kind, 4)
    run(long, f"mov al, [{AT + 2}]\n nop")
    assert (long["rip"] < HANDLERS + 4096) is traps
    if traps:
        assert trapped(long) == (7, 4)


def test_wide_access_meets_several(long: Machine) -> None:
    long["dr0"], long["dr3"], long["dr7"] = AT + 1, AT + 15, armed(0, WRITES) | armed(3, WRITES)
    run(long, f"movups [{AT}], xmm0\n nop")
    assert trapped(long) == (8, 0b1001)


def test_access_over_two_pages(long: Machine) -> None:
    long["dr0"], long["dr7"] = AT + 0x1000, armed(0, WRITES)
    run(long, f"mov qword [{AT + 0xFFC}], rax\n nop")
    assert trapped(long) == (8, 1)


@pytest.mark.parametrize(
    "source", ["push rax", "call $+5", "inc qword [rsp-8]", "xchg [rsp-8], rax", "pushfq", "fnsave [rsp-108]"]
)
def test_every_way_of_writing(long: Machine, source: str) -> None:
    """Translated code, helpers and the stack alike."""
    long["dr0"], long["dr7"] = long["rsp"] - 8, armed(0, WRITES, 8)
    run(long, f"{source}\n nop")
    assert trapped(long)[1] == 1


def test_page_that_the_tlb_knows(long: Machine) -> None:
    """Arming takes the page out of the TLB, also where loops remember it."""
    run(
        long,
        f"""
        mov rbx, {AT}
        mov ecx, 200
    again:
        mov [rbx + 8], rcx
        add [rbx], rcx
        cmp ecx, 100
        jne next
        mov eax, {AT}
        mov dr0, rax
        mov eax, {armed(0, WRITES, 8)}
        mov dr7, rax
    next:
        dec ecx
        jnz again""",
    )
    assert (trapped(long)[1], long["rcx"] & 0xFFFFFFFF) == (1, 99)


def test_disarmed_page_is_free_again(long: Machine) -> None:
    long["dr0"], long["dr7"] = AT, armed(0, WRITES, 8)
    assert run(long, f"xor eax, eax\n mov dr7, rax\n mov [{AT}], rax\n mov [{AT}], rax") == "halt"
    assert long["rip"] > CODE


def test_repeated_string_traps_behind_the_iteration(long: Machine) -> None:
    """SDM, "Data Memory and I/O Breakpoint Exception Conditions": RF is pushed between iterations."""
    long["dr0"], long["dr7"] = AT + 2, armed(0, WRITES)
    run(long, f"mov edi, {AT}\n mov ecx, 5\n mov al, 7\n rep stosb\n nop")
    assert (trapped(long), long["rcx"], long["rdi"]) == ((12, 1), 2, AT + 3)
    assert long.stack(3)[2] & RF
    assert long.ram.read(AT, 5) == b"\7\7\7\0\0"


def test_repeated_string_traps_behind_the_last_iteration(long: Machine) -> None:
    long["dr0"], long["dr7"] = AT + 2, armed(0, WRITES)
    run(long, f"mov edi, {AT}\n mov ecx, 3\n mov al, 7\n rep stosb\n nop")
    assert (trapped(long), long["rcx"]) == ((14, 1), 0)
    assert not long.stack(3)[2] & RF


def test_single_step_of_a_repeated_string(long: Machine) -> None:
    """SDM, "Single-Step Exception Condition": behind each iteration."""
    long["rflags"], long["rcx"], long["rdi"] = 2 | TF, 3, AT
    run(long, "rep stosb\n nop")
    assert (trapped(long), long["rcx"]) == ((0, 0x4000), 2)


def test_instruction_that_faults_traps_not(long: Machine) -> None:
    """The read was done, but the instruction was not."""
    long["dr0"], long["dr7"] = long["rsp"], armed(0, ALL, 8)
    run(long, "pop qword [0x40000000]\n nop")
    assert (long.handler, long["dr6"] & 15) == (14, 0)


def test_mov_ss_holds_the_trap_back(long: Machine) -> None:
    """SDM, "MOV—Move": until the end of the next instruction."""
    long.ram.write(AT, bytes([DATA, 0]))
    long["dr0"], long["dr7"] = AT, armed(0, ALL, 2)
    run(long, f"mov ss, [{AT}]\n nop\n nop")
    assert trapped(long) == (8, 1)


def test_instruction_breakpoint_behind_mov_ss(long: Machine) -> None:
    """Suppressed as if RF were set."""
    long["rax"], long["dr0"], long["dr1"], long["dr7"] = DATA, CODE + 2, CODE + 3, 0x405
    run(long, "mov ss, eax\n nop\n nop")
    assert trapped(long) == (3, 2)


def test_general_detect(long: Machine) -> None:
    """SDM, "General-Detect Exception Condition": a fault before MOV DR; GD is off in the handler."""
    long["dr7"] = 0x2400
    run(long, "mov rax, dr0")
    assert trapped(long) == (0, 0x2000)
    assert long["dr7"] == 0x400
    assert long.stack(3)[2] & RF


@pytest.mark.parametrize(("port", "de", "traps"), [(0x81, True, True), (0x84, True, False), (0x81, False, False)])
@pytest.mark.parametrize("source", ["out dx, al", "in al, dx"])
def test_port_breakpoint(long: Machine, source: str, port: int, de: bool, traps: bool) -> None:
    """SDM, "Debug Control Register (DR7)": R/W = 10b needs CR4.DE."""
    long["cr4"] |= DE if de else 0
    long["dr0"], long["dr7"], long["rdx"] = 0x80, armed(0, PORTS, 4), port
    assert run(long, f"{source}\n nop") == "pio"
    assert long.cpu.run() == "halt"
    assert (trapped(long) == (1, 1)) if traps else long["rip"] == CODE + 3


def test_step_over_a_port_access(long: Machine) -> None:
    long["rflags"] = 2 | TF
    assert run(long, "out 0x80, al\n nop") == "pio"
    long.cpu.run()
    assert trapped(long) == (2, 0x4000)


def test_interrupt_pushes_no_stale_rf(long: Machine) -> None:
    """RF lasts for one instruction, also where no breakpoint is armed."""
    long["rflags"] = 2 | RF
    run(long, "nop\n nop\n int 0x20")
    assert not long.stack(3)[2] & RF


def test_syscall_steps_only_when_the_kernel_keeps_tf(long: Machine) -> None:
    """SYSCALL clears the flags of IA32_FMASK before the trap is looked for."""
    long["lstar"], long["star"], long["fmask"] = CODE + 0x40, 8 << 32, TF
    long["rflags"] = 2 | TF
    long.ram.write(CODE + 0x40, b"\x90\xf4")
    run(long, "syscall")
    assert long["rip"] == CODE + 0x42


@pytest.mark.parametrize(
    ("source", "vectors"),
    [("int1", [1]), ("int3", [3, 1]), ("int 0x20", [0x20, 1]), ("ud2", [6]), ("mov eax, [0x40000000]", [14])],
)
def test_what_mov_ss_held_back_at_an_event(long: Machine, source: str, vectors: list[int]) -> None:
    """SDM, "Delivery of Pending Debug Exceptions after VM Entry": software interrupts let it through, faults do not."""
    long.ram.write(AT, bytes([DATA, 0]))
    long["dr0"], long["dr7"] = AT, armed(0, ALL, 2)
    for vector in vectors:
        long.ram.write(HANDLERS + 16 * vector, b"\x90\xf4")
    run(long, f"mov ss, [{AT}]\n {source}\n nop")
    assert (long["rip"] - 2 - HANDLERS) // 16 == vectors[-1]
    assert long["dr6"] & 0xF == (1 if len(vectors) > 1 else 0)
    if len(vectors) > 1:  # before the handler's first instruction
        assert long.stack(1) == [HANDLERS + 16 * vectors[0]]


def test_general_detect_behind_mov_ss_loses_the_step(long: Machine) -> None:
    """SDM, "General-Detect Exception Condition": MOV SS does not hold back the fault, which has BD and no more."""
    long["rax"], long["dr7"], long["rflags"] = DATA, 0x2400, 2 | TF
    run(long, "mov ss, eax\n mov dr6, rbx\n nop")
    assert trapped(long) == (2, 0x2000)
