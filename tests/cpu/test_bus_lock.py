"""Locked operations are atomic among processors wherever their operand lies. SDM, "Bus Locking"."""

from __future__ import annotations

import mmap

import pytest

from vmonty.cpu.observe import Access, Observer
from vmonty.testing.nasm import assemble

from .flat import CODE, SIZE, Machine, run_together

ROUNDS = 3000
TABLE = 0x5000
FIRST, SECOND = 0x600000, 0x700000  # where the pages of WINDOW are
WINDOW = 0x40000000
WORD = WINDOW + 0xFFE  # a doubleword with two bytes in each page


def map_window(machine: Machine, first: int, second: int) -> None:
    """Map two pages at WINDOW."""
    machine.put64(0x2008, TABLE | 7)
    machine.put64(TABLE, TABLE + 0x1000 | 7)
    machine.put64(TABLE + 0x1000, first | 7)
    machine.put64(TABLE + 0x1008, second | 7)


def loop(step: str, at: int) -> bytes:
    """A step ROUNDS times."""
    return assemble(
        f"mov r12d, {ROUNDS}\n mov ebp, 1\n next:\n mov edx, 1\n {step}\n dec r12d\n jnz next\n hlt", 64, at
    )


def start(machine: Machine, step: str, at: int) -> None:
    machine.load(loop(step, at), at)
    machine.cpu["rip"], machine.cpu["rsp"] = at, 0x80000


def total(machine: Machine, first: int = FIRST, second: int = SECOND) -> int:
    """The doubleword."""
    data = machine.memory[first + 0xFFE : first + 0x1000] + machine.memory[second : second + 2]
    return int.from_bytes(data, "little")


STEPS = {
    "inc": f"mov rbx, {WORD}\n lock inc dword [rbx]",
    "xadd": f"mov rbx, {WORD}\n lock xadd [rbx], edx",
    "cmpxchg": f"""mov rbx, {WORD}
        again: mov eax, [rbx]
        lea ecx, [rax + 1]
        lock cmpxchg [rbx], ecx
        jne again""",
}


@pytest.mark.parametrize("kind", ["shared", "private"])
@pytest.mark.parametrize("second", [SECOND, FIRST + 0x1000], ids=["apart", "adjacent"])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_across_two_pages(step: str, second: int, kind: str) -> None:
    memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_SHARED if kind == "shared" else mmap.MAP_PRIVATE)
    machines = [Machine(memory), Machine(memory)]
    map_window(machines[0], FIRST, second)
    for n, machine in enumerate(machines):
        start(machine, step, CODE + 0x400 * n)
    run_together(*machines)
    assert total(machines[0], FIRST, second) == 2 * ROUNDS


@pytest.mark.parametrize("second", [SECOND, FIRST + 0x1000], ids=["apart", "adjacent"])
def test_against_locked_operations_in_one_of_the_pages(second: int) -> None:
    """The other processor's go straight to memory; they and the split ones must not lose one another's."""
    split = Machine()
    whole = Machine(split.memory)
    map_window(split, FIRST, second)
    start(split, STEPS["inc"], CODE)
    start(whole, f"mov rbx, {WINDOW + 0x1000}\n lock inc word [rbx]", CODE + 0x400)
    run_together(split, whole)
    assert total(split, FIRST, second) == ROUNDS + (ROUNDS << 16)


def test_exchange_without_a_prefix() -> None:
    """XCHG locks by itself: nothing is lost, nothing comes twice. SDM, "XCHG—Exchange Register/Memory"."""
    machines = [Machine()]
    machines.append(Machine(machines[0].memory))
    map_window(machines[0], FIRST, SECOND)
    step = f"mov rbx, {WORD}\n xchg [rbx], ebp"
    for n, machine in enumerate(machines):  # 1, 2 and what was there, 0, go round
        machine.load(
            assemble(f"mov r12d, {ROUNDS}\n mov ebp, {n + 1}\n next:\n {step}\n dec r12d\n jnz next\n hlt", 64, CODE),
            CODE + 0x400 * n,
        )
        machine.cpu["rip"] = CODE + 0x400 * n
    run_together(*machines)
    assert sorted([machines[0].cpu["rbp"], machines[1].cpu["rbp"], total(machines[0])]) == [0, 1, 2]


@pytest.mark.parametrize("place", ["page", "adjacent", "apart"])
def test_under_an_observer(place: str) -> None:
    """Who is observed runs instructions one by one, with the same effect for the others."""
    machines = [Machine()]
    machines.append(Machine(machines[0].memory))
    second = FIRST + 0x1000 if place == "adjacent" else SECOND
    map_window(machines[0], FIRST, second)
    step = STEPS["inc"] if place != "page" else f"mov rbx, {WINDOW}\n lock inc dword [rbx]"
    seen: list[Access] = []
    for n, machine in enumerate(machines):
        start(machine, step, CODE + 0x400 * n)
    with Observer(machines[0].cpu, on_memory=seen.append):
        run_together(*machines)
    if place == "page":
        assert int.from_bytes(machines[0].memory[FIRST : FIRST + 4], "little") == 2 * ROUNDS
    else:
        assert total(machines[0], FIRST, second) == 2 * ROUNDS
    assert len(seen) == 2 * ROUNDS
    assert [access.write for access in seen[:2]] == [False, True]
