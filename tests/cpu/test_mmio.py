"""Device memory of the bare processor: each access reported, in order, in parts of up to eight bytes."""

from __future__ import annotations

import pytest

from vmonty.testing.nasm import assemble

from .machine import CODE, SIZE, TABLES, Machine

HOLE = 0x400000


@pytest.fixture
def long() -> Machine:
    machine = Machine().long_mode()
    machine.ram.write_u64(TABLES + 0x2000 + 16, HOLE | 0x87)  # nothing is there
    machine.ram.write_u64(TABLES + 0x2000 + 8, SIZE | 0x87)  # nor behind the end of RAM
    return machine


def accesses(machine: Machine, source: str, reads: tuple[int, ...] = ()) -> list[tuple[int, int, bool, int]]:
    """What the code up to its HLT accesses; reads are answered in turn."""
    answers = iter(reads)
    seen = []
    reason = machine.run(assemble(f"default abs\n{source}\nhlt", 64, CODE))
    while reason == "mmio":
        e = machine.cpu.exit
        if not e["write"]:
            machine.cpu.answer(next(answers))
        seen.append((e["address"], e["size"], bool(e["write"]), 0 if not e["write"] else e["data"]))
        reason = machine.cpu.run()
    assert (reason, next(answers, None)) == ("halt", None)
    return seen


@pytest.mark.parametrize(
    ("source", "reads", "expected"),
    [
        ("mov [HOLE], al", (), [(0, 1, True, 0x88)]),
        ("mov [HOLE + 0xFFE], eax", (), [(0xFFE, 2, True, 0x7788), (0x1000, 2, True, 0x5566)]),
        ("add [HOLE], al", (1,), [(0, 1, False, 0), (0, 1, True, 0x89)]),
        ("xadd [HOLE], rax", (1,), [(0, 8, False, 0), (0, 8, True, 0x1122334455667789)]),
        ("lock cmpxchg [HOLE], ebx", (0x55667788,), [(0, 4, False, 0), (0, 4, True, 7)]),
        ("movups [HOLE], xmm0", (), [(0, 8, True, 0x1122334455667788), (8, 8, True, 0)]),
        ("movaps [HOLE + 16], xmm0", (), [(16, 8, True, 0x1122334455667788), (24, 8, True, 0)]),
        (
            "vmovaps [HOLE + 32], ymm0",
            (),
            [(32, 8, True, 0x1122334455667788), *[(n, 8, True, 0) for n in (40, 48, 56)]],
        ),
        ("vmovups [HOLE], ymm0", (), [(0, 8, True, 0x1122334455667788), *[(n, 8, True, 0) for n in (8, 16, 24)]]),
        ("mov edi, HOLE\n mov ecx, 3\n rep stosb", (), [(n, 1, True, 0x88) for n in range(3)]),
        (
            "mov esi, HOLE\n lea edi, [rsi + 64]\n mov ecx, 2\n rep movsw",
            (5, 6),
            [(0, 2, False, 0), (64, 2, True, 5), (2, 2, False, 0), (66, 2, True, 6)],
        ),
        ("push qword [HOLE]\n pop qword [HOLE + 8]", (9,), [(0, 8, False, 0), (8, 8, True, 9)]),
        ("mov rsp, HOLE + 64\n push rax\n call $+5", (), [(56, 8, True, 0x1122334455667788), (48, 8, True, None)]),
        ("fxsave [HOLE]", None, None),
    ],
    ids=lambda value: value.split("\n")[-1].strip() if isinstance(value, str) else "",
)
def test_every_part_in_order(long: Machine, source: str, reads: tuple[int, ...], expected: list) -> None:
    prelude = "mov rbx, 7\n mov rax, 0x1122334455667788\n vzeroall\n movq xmm0, rax\n"
    code = prelude + source.replace("HOLE", hex(HOLE))
    if expected is None:
        seen = accesses(long, code, (0,) * 64)
        assert [entry[:3] for entry in seen[-64:]] == [(HOLE + 8 * n, 8, True) for n in range(64)]
        return
    seen = [(address - HOLE, size, write, data) for address, size, write, data in accesses(long, code, reads)]
    assert [entry[:3] for entry in seen] == [entry[:3] for entry in expected]
    for got, wanted in zip(seen, expected, strict=True):
        assert wanted[3] is None or got[3] == wanted[3]


def test_sixteen_bytes_are_read_in_two_parts(long: Machine) -> None:
    seen = accesses(long, f"movups xmm1, [{HOLE}]\n movq rax, xmm1\n movhlps xmm1, xmm1\n movq rdx, xmm1", (3, 4))
    assert ([entry[:2] for entry in seen], long["rax"], long["rdx"]) == ([(HOLE, 8), (HOLE + 8, 8)], 3, 4)


def test_write_from_ram_into_the_hole(long: Machine) -> None:
    """The bytes of RAM are written, those behind it reported."""
    assert accesses(long, f"mov eax, 0x44332211\n mov [{SIZE - 1}], eax") == [(SIZE, 3, True, 0x443322)]
    assert long.ram.read_u8(SIZE - 1) == 0x11


def test_budget_counts_the_instruction_once(long: Machine) -> None:
    long.ram.write(CODE, assemble(f"movups [abs {HOLE}], xmm0\n nop", 64))
    long["rip"] = CODE
    assert long.cpu.step() == "mmio"
    assert long["rip"] == CODE + 8
    assert long.cpu.step() == "mmio"
    assert long.cpu.step() == "budget"
    assert long["rip"] == CODE + 9
