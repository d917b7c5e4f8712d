"""Alignment checking. SDM, "Alignment Check Exception (#AC)". The cases are what an Intel processor did with them in a
Linux process that had set EFLAGS.AC; ``natural`` is the alignment that it asked for.
"""

from __future__ import annotations

import pytest

from vmonty.testing.nasm import assemble

from .machine import CODE, STACK3, Machine

AC, AM = 17, 1 << 18
FLAG_AC = 1 << 18
AT = 0x20000
ONES = "pcmpeqb xmm1, xmm1\n"
CASES = [
    ("mov al, [rdi]", 1), ("mov ax, [rdi]", 2), ("mov eax, [rdi]", 4), ("mov rax, [rdi]", 8), ("mov [rdi], ax", 2),
    ("mov [rdi], rax", 8), ("push qword [rdi]", 8), ("pop qword [rdi]", 8), ("movups xmm0, [rdi]", 1),
    ("vmovups ymm0, [rdi]", 1), ("movq xmm0, [rdi]", 8), ("movss xmm0, [rdi]", 4), ("movlps xmm0, [rdi]", 8),
    ("fld dword [rdi]", 4), ("fld qword [rdi]", 8), ("fld tword [rdi]", 8), ("fldz\n fstp tword [rdi]", 8),
    ("fild word [rdi]", 2), ("fbld [rdi]", 8), ("fnstenv [rdi]", 4), ("o16 fnstenv [rdi]", 2), ("fnsave [rdi]", 4),
    ("fnstcw [rdi]", 2), ("stmxcsr [rdi]", 4), ("bt dword [rdi], 3", 4), ("xor ecx, ecx\n bts qword [rdi], rcx", 8),
    ("cmpxchg8b [rdi]", 8), ("xchg eax, [rdi]", 4), ("lock add dword [rdi], 1", 4), ("mov rsi, rdi\n movsw", 2),
    ("stosd", 4), ("mov rsi, rdi\n lodsq", 8), ("mov ecx, 3\n rep stosw", 2), ("pinsrw xmm0, [rdi], 1", 2),
    ("pmovzxbw xmm0, [rdi]", 8), ("pmovzxbd xmm0, [rdi]", 4), ("vpbroadcastq ymm0, [rdi]", 8),
    ("cvtps2pd xmm0, [rdi]", 8),
    (f"{ONES} maskmovdqu xmm0, xmm1", 8), (f"{ONES} vmaskmovps xmm0, xmm1, [rdi]", 1), ("movnti [rdi], eax", 4),
    (f"{ONES} pxor xmm2, xmm2\n vpgatherdd xmm0, [rdi + xmm2], xmm1", 1), ("movbe eax, [rdi]", 4),
    ("lar eax, [rdi]", 2),
    ("vpaddd xmm0, xmm0, [rdi]", 1), ("movq mm0, [rdi]\n emms", 8), ("cmp eax, eax\n cmovne eax, [rdi]", 4),
    ("prefetcht0 [rdi]", 1), ("nop dword [rdi]", 1), ("movzx eax, word [rdi]", 2), ("movsxd rax, dword [rdi]", 4),
]  # fmt: skip


def user(am: bool = True, flag: bool = True, cpl3: bool = True) -> Machine:
    machine = Machine().long_mode(user=cpl3)
    machine["cr0"] = machine["cr0"] | AM if am else machine["cr0"] & ~AM
    machine["cr4"] |= 0x40600
    machine["xcr0"] = 7
    machine["rflags"] = 2 | (FLAG_AC if flag else 0)
    machine.cpu.stop_at_events()
    return machine


def vector(machine: Machine, source: str, at: int) -> int:
    """What the instruction raises, or -1; #BP ends the code."""
    machine["rdi"] = at
    machine.run(assemble(f"{source}\n int3", 64, CODE))
    event = machine.cpu.event
    assert event["vector"] != AC or (event["has_error"], event["error_code"]) == (1, 0)
    return -1 if event["vector"] == 3 else int(event["vector"])


@pytest.mark.parametrize(("source", "natural"), CASES, ids=[source.replace("\n", ";") for source, _ in CASES])
def test_operands(source: str, natural: int) -> None:
    for offset in (0, 1, 2, 4, 8):
        expected = AC if offset % natural else -1
        assert vector(user(), source, AT + offset) == expected, offset


@pytest.mark.parametrize(("am", "flag", "cpl3"), [(False, True, True), (True, False, True), (True, True, False)])
def test_off(am: bool, flag: bool, cpl3: bool) -> None:
    assert vector(user(am, flag, cpl3), "mov rax, [rdi]", AT + 1) == -1


@pytest.mark.parametrize(("offset", "expected"), [(1, AC), (2, AC), (4, 13), (8, 13), (0, -1)])
@pytest.mark.parametrize(
    "source", ["fxsave [rdi]", "xor eax, eax\n xor edx, edx\n xsave [rdi]"], ids=["fxsave", "xsave"]
)
def test_areas(source: str, offset: int, expected: int) -> None:
    """Misaligned by less than four bytes they raise #AC, else #GP(0)."""
    assert vector(user(), source, AT + offset) == expected


def test_stack() -> None:
    machine = user()
    machine["rsp"] = STACK3 - 4
    assert vector(machine, "push rax", AT) == AC
    assert (machine["rip"], machine["rsp"]) == (CODE, STACK3 - 4)


def test_comes_and_goes_with_the_flag() -> None:
    """POPF sets it in the middle of code that runs on."""
    machine = user(flag=False)
    source = "mov rax, [rdi]\n pushfq\n or dword [rsp], 0x40000\n popfq\n mov eax, 5\n mov rbx, [rdi]"
    assert vector(machine, source, AT + 1) == AC
    assert machine["rax"] == 5
    machine = user()
    assert vector(machine, "pushfq\n and dword [rsp], ~0x40000\n popfq\n mov rbx, [rdi]", AT + 1) == -1


def test_not_for_what_the_processor_reads_itself() -> None:
    """Descriptor tables and stacks of inner levels are accesses of the supervisor."""
    machine = user()
    machine["idtr_base"] = machine["idtr_base"] + 1
    for at in range(0xFFF, -1, -1):
        machine.ram.write(0x2001 + at, machine.ram.read(0x2000 + at, 1))
    machine.cpu.stop_at_events(False)
    assert machine.run(assemble("mov rax, [0x20001]", 64, CODE)) == "halt"
    assert machine.handler == AC
    assert machine.stack(1) == [0]
