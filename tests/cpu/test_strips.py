"""Loops whose operands share one look at their pages (see cpu.strips), against the same code one instruction at a time.

Random loops over memory of small pages, which lie anywhere, are missing or read-only, and of large ones.
"""

from __future__ import annotations

import random
import threading
import time

import pytest
from tests.cpu.flat import CODE, SIZE, Machine

from vmonty.testing.nasm import assemble

SMALL, PAGES = 0x4000_0000, 48  # linear: scattered small pages
LARGE = 0x80_0000  # identity, large pages
TABLE = 0x5000
GENERAL = ("rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")
NUMBERED = GENERAL[7:]
HALF = {name: name + "d" if name in NUMBERED else "e" + name[1:] for name in GENERAL}
BYTE = {name: name + "b" if name in NUMBERED else name[1:] + "l" for name in GENERAL}
BYTE |= {"rax": "al", "rcx": "cl", "rdx": "dl", "rbx": "bl"}
STEPS = 40_000
FILLED = 4 << 20  # where the pages of both regions lie
CONTENTS = random.Random(1).randbytes(SIZE - FILLED)


def machine(seed: int, faults: bool) -> Machine:
    """Memory full of random bytes, with the region of small pages."""
    rng = random.Random(seed)
    m = Machine()
    m.memory[FILLED:] = CONTENTS
    pages = list(range(0x40_0000 >> 12, 0x60_0000 >> 12))
    rng.shuffle(pages)
    m.put64(0x2000 + 8 * (SMALL >> 30), TABLE + 7)
    m.put64(TABLE, TABLE + 0x1007)
    for n in range(PAGES):
        rights = rng.choice((0, 1, 3, 3, 3, 3, 3, 3)) if faults else 3
        m.put64(TABLE + 0x1000 + 8 * n, pages[n] << 12 | rights)
    m.cpu.stop_at_events()
    return m


class Loop:
    """A random loop that a strip may serve: pointers and indexes that move, others that stay, operands by them."""

    def __init__(self, seed: int) -> None:
        rng = self.rng = random.Random(seed)
        names = list(GENERAL)
        rng.shuffle(names)
        self.counter, self.step, self.index, *rest = names
        self.moving, self.still, self.free = rest[:2], rest[2:4], rest[4:]
        self.start = {name: rng.getrandbits(64) for name in names}
        for name in (*self.moving, *self.still):
            self.start[name] = self._address()
        self.start[self.step] = rng.choice((1, 3, 8, 64, 700, 5000, 0, 1 << 31, 1 << 63))
        self.start[self.index] = rng.choice((0, 0, 5, -200 & (1 << 64) - 1, 0xFFFF_FF80, 1000))
        lines = [self._operand() for _ in range(rng.randint(1, 5))]
        for name in (*self.moving, self.index):
            if rng.random() < 0.8:
                lines.insert(rng.randint(0, len(lines)), self._move(name))
        self.start[self.counter] = rng.choice((1, 2, 7, 40, 300, 1500))
        end = rng.choice((f"dec {self.counter}", f"sub {HALF[self.counter]}, 1", f"add {self.counter}, -1"))
        self.source = "\n".join(["again:", *lines, end, "jnz again", "hlt"])

    def _address(self) -> int:
        rng = self.rng
        if rng.random() < 0.25:
            return LARGE + rng.randrange(4 << 20)
        return SMALL + rng.randrange(PAGES) * 4096 + rng.choice((0, 4095, 4090, 2048, rng.randrange(4096)))

    def _move(self, name: str) -> str:
        rng = self.rng
        by = rng.choice((1, 1, 2, 4, 8, 16, 16, 100, 256, 300))
        wide = HALF[name] if name == self.index and rng.random() < 0.4 else name
        kinds = [f"add {wide}, {by}", f"sub {wide}, {by}", f"inc {wide}", f"dec {wide}", f"lea {name}, [{name} + {by}]"]
        kinds += [f"add {name}, {self.step}", f"lea {name}, [{name} - {by}]", f"inc {wide}\n add {wide}, {by}"]
        return rng.choice(kinds)

    def _place(self) -> str:
        rng = self.rng
        pointer = rng.choice((*self.moving, *self.moving, *self.still))
        text = pointer
        if rng.random() < 0.5:
            text += f" + {self.index} * {rng.choice((1, 1, 2, 4, 8))}"
        return f"[{text} + {rng.choice((0, 0, 1, 8, 64, -16, 300))}]"

    def _operand(self) -> str:
        rng = self.rng
        a, b = rng.sample(self.free, 2)
        at = self._place()
        return rng.choice((
            f"mov {a}, {at}", f"mov {at}, {a}", f"movzx {HALF[a]}, byte {at}", f"add {HALF[a]}, {at}",
            f"add byte {at}, 3", f"add {at}, {BYTE[b]}", f"cmp {at}, {HALF[a]}", f"movups xmm1, {at}",
            f"movups {at}, xmm2", f"paddd xmm2, xmm1\n movdqu xmm3, {at}", f"vmovdqu ymm4, {at}",
            f"imul {a}, {at}, 5", f"bswap {HALF[a]}\n xor {a}, {at}", f"xchg {at}, {a}", f"lock add {at}, {HALF[a]}",
            f"movzx {HALF[a]}, byte {at}\n mov {BYTE[b]}, [{self.still[0]} + {a}]", f"bextr {a}, {at}, {b}",
            f"mov word {at}, 7", f"shl qword {at}, 3", f"movaps xmm5, {at}", f"mov {a}, [rel again]",
            f"sete {BYTE[a]}\n mov {at}, {BYTE[a]}",
        ))  # fmt: skip


def outcome(m: Machine, reason: str) -> dict[str, object]:
    """What can be compared: flags are not when a fault finds them dead."""
    event = m.cpu.event if reason == "debug" else m.cpu.exit if reason == "mmio" else {}
    flags = m.cpu["rflags"] & 0x8D5 if reason == "halt" else 0
    return {"reason": reason, "event": event, "rip": m.cpu["rip"], "registers": m.cpu.registers.hex(), "flags": flags}


@pytest.mark.parametrize("part", range(8))
def test_random_loops(part: int) -> None:
    """Registers, flags, faults and memory are those of single instructions."""
    for seed in range(part * 25, part * 25 + 25):
        loop = Loop(seed)
        start = CODE if seed % 3 else CODE + 4096 - loop.rng.randrange(1, 40)  # a third may lie in two pages
        code = assemble(loop.source, 64, start)
        ends = []
        memories = []
        for single in (False, True):
            m = machine(seed, faults=seed % 2 == 1)
            m.load(code, start)
            m.cpu["rip"] = start
            for name, value in loop.start.items():
                m.cpu[name] = value
            reason = m.cpu.step(STEPS) if single else m.cpu.run()
            assert reason in ("halt", "debug", "mmio"), (seed, reason, loop.source)
            ends.append(outcome(m, reason))
            memories.append(m.memory[FILLED:])
        assert ends[0] == ends[1], (seed, loop.source)
        assert memories[0] == memories[1], (seed, loop.source)


def test_kick_ends_an_endless_strip() -> None:
    """The limit comes round however long the loop is."""
    m = machine(0, faults=False)
    m.load(assemble("mov ebx, 0x800000\nagain: mov al, [rbx]\n inc rcx\n test rbx, rbx\n jnz again", 64, CODE))

    def kick() -> None:
        time.sleep(0.05)
        m.cpu.kick()

    thread = threading.Thread(target=kick)
    thread.start()
    assert m.cpu.run() == "run_flag"
    thread.join()
    assert m.cpu["rcx"] > 1000
    assert CODE <= m.cpu["rip"] <= CODE + 15


@pytest.mark.parametrize("page", [SMALL, LARGE])
def test_store_to_code_in_the_way(page: int) -> None:
    """A strip's stores reach a page with code: that code is translated anew, also where the strip was there before."""
    m = machine(0, faults=False)
    source = f"""
        mov ebp, 3
    round:
        mov rbx, {page}
        mov ecx, 0x9000
    again:
        mov byte [rbx], 0x90
        inc rbx
        dec ecx
        jnz again
        mov rax, {page + 0x4800}
        mov dword [rax], 0xC3C2FF ; inc edx, ret
        call rax
        mov dword [rax], 0xC3C6FF ; inc esi, ret
        call rax
        dec ebp
        jnz round
        hlt"""
    m.load(assemble(source, 64, CODE))
    m.cpu["rdx"] = m.cpu["rsi"] = 0
    assert m.cpu.run() == "halt"
    assert (m.cpu["rdx"], m.cpu["rsi"]) == (3, 3)


def test_strip_that_overwrites_itself() -> None:
    """A store to the loop's own next instruction is seen by it. SDM, "Handling Self- and Cross-Modifying Code"."""
    m = machine(0, faults=False)
    # The third iteration's store makes the INC a DEC.
    source = """
        times 64 nop
        lea rbx, [rel change - 2 * 16 + 1]
        mov ecx, 10
    again:
        mov byte [rbx], 0xC8
    change:
        inc eax
        add rbx, 16
        dec ecx
        jnz again
        hlt
        times 200 nop"""
    single = machine(0, faults=False)
    for each in (m, single):
        each.load(assemble(source, 64, LARGE + 0x1000), LARGE + 0x1000)
        each.cpu["rip"], each.cpu["rax"] = LARGE + 0x1000, 100
    assert (m.cpu.run(), single.cpu.step(200)) == ("halt", "halt")
    assert m.cpu.registers == single.cpu.registers
    assert m.cpu["rax"] != 110


SPAN = SMALL + 8 * 4096  # linear: the page that a loop begins in, at its end
FIRST, SECOND, OTHER = 0x60_0000, 0x60_2000, 0x60_5000  # physical
ENTRY = TABLE + 0x1000 + 8 * (8 + 1)  # of the page that it ends in
OTHER_ROOT, OTHER_TABLES = 0x8000, 0x9000
HEAD = 14  # bytes of its code in the first page


def spanning() -> Machine:
    """A loop of 300 rounds in two pages; its second half adds 1, or 16 where that page is another one."""
    m = machine(0, faults=False)
    m.put64(ENTRY - 8, FIRST | 3)
    m.put64(ENTRY, SECOND | 3)
    head = "mov ecx, 300\n jmp short again\n again: add eax, 1\n add dword [rbx], 1\n nop\n"  # HEAD bytes
    for second, more in ((SECOND, ""), (OTHER, "add eax, 15\n")):
        code = assemble(f"{head} {more} dec ecx\n jnz again\n ret", 64, SPAN + 4096 - HEAD)
        m.load(code[:HEAD], FIRST + 4096 - HEAD)
        m.load(code[HEAD:], second)
    # Another address space, where the second page is the other one.
    m.memory[OTHER_TABLES : OTHER_TABLES + 4096] = m.memory[0x2000:0x3000]
    m.put64(OTHER_ROOT, OTHER_TABLES + 7)
    m.put64(OTHER_TABLES + 8 * (SMALL >> 30), OTHER_TABLES + 0x1007)
    m.put64(OTHER_TABLES + 0x1000, OTHER_TABLES + 0x2007)
    m.memory[OTHER_TABLES + 0x2000 : OTHER_TABLES + 0x3000] = m.memory[TABLE + 0x1000 : TABLE + 0x2000]
    m.put64(OTHER_TABLES + 0x2000 + (ENTRY - TABLE - 0x1000), OTHER | 3)
    return m


@pytest.mark.parametrize("change", ["invlpg", "cr3", "root", "store", "away"])
def test_loop_in_two_pages(change: str) -> None:
    """What its second page is, is seen anew when mappings or its bytes change; a fault there comes in its turn."""
    changes = {
        "invlpg": f"mov qword [{ENTRY}], {OTHER | 3}\n invlpg [rdi]",
        "cr3": f"mov qword [{ENTRY}], {OTHER | 3}\n mov rax, cr3\n mov cr3, rax",
        "root": f"mov rax, {OTHER_ROOT}\n mov cr3, rax",
        "store": "mov dword [rdi], 0x9090C3",  # RET
        "away": f"mov qword [{ENTRY}], 0\n invlpg [rdi]",
    }
    source = f"""
        mov rsi, {SPAN + 4096 - HEAD}
        mov rdi, {SPAN + 4096}
        mov rbx, 0x800000
        mov ebp, 3
    round:
        xor eax, eax
        call rsi
        add r8, rax
        dec ebp
        jnz round
        {changes[change]}
        xor eax, eax
        call rsi
        hlt"""
    ends = []
    for single in (False, True):
        m = spanning()
        m.load(assemble(source, 64, CODE))
        m.put64(0x80_0000, 0)
        m.cpu["r8"] = 0
        reason = m.cpu.step(STEPS) if single else m.cpu.run()
        ends.append((outcome(m, reason), m.get64(0x80_0000)))
    assert ends[0] == ends[1]
    assert m.cpu["r8"] == 900
    if change in ("invlpg", "cr3", "root"):
        assert m.cpu["rax"] == 300 * 16
    if change == "store":
        assert m.cpu["rax"] == 1
    if change == "away":
        assert ends[0][0]["event"]
        assert m.cpu["rip"] == SPAN + 4096


@pytest.mark.parametrize("rights", [0, 1])
@pytest.mark.parametrize(
    "source",
    [
        "mov eax, [rbx + 8]\n mov [rbx + 16], ecx",
        "mov [rbx + 8], ecx\n mov eax, [rbx]",
        "add dword [rbx + rdx * 4 + 8], 1\n mov eax, [rbx + rdx * 4]",
        "mov eax, [rbx + 8]\n add [rbx + 8], ecx\n movups xmm0, [rbx + 16]",
        "movaps xmm0, [rbx + 12]\n mov [rbx], eax",  # misaligned: #GP comes first
    ],
)
def test_operands_that_share_a_check_fault_in_their_turn(source: str, rights: int) -> None:
    """A page that is missing or read-only: address, error code and rip are those of single instructions."""
    ends = []
    for single in (False, True):
        m = machine(0, faults=False)
        m.put64(TABLE + 0x1000 + 8 * 3, 0x60_0000 | rights)
        m.load(assemble(f"mov rbp, cr0\n bts rbp, 16\n mov cr0, rbp\n {source}\n hlt", 64, CODE))  # WP
        m.cpu["rbx"], m.cpu["rdx"] = SMALL + 3 * 4096 + 0x40, 5
        reason = m.cpu.step(STEPS) if single else m.cpu.run()
        ends.append(outcome(m, reason))
    assert ends[0] == ends[1]
    assert ends[0]["event"]


def test_an_instruction_across_the_border_does_not_split_a_loop() -> None:
    """The loop is as many blocks as inside of a page, once the second page is known."""
    body = "add eax, 1\n inc edx\n add ebx, 0x01010101\n dec ecx\n jnz again"
    source = f"mov ecx, 300\n jmp short again\n again: {body}\n hlt"
    blocks = []
    for start in (CODE + 0x100, CODE + 4096 - 14):
        m = machine(0, faults=False)
        m.load(assemble(source, 64, start), start)
        m.load(assemble(f"jmp {start}", 64, CODE + 4200), CODE + 4200)
        m.cpu["rip"], m.cpu["rax"] = CODE + 4200, 0
        assert m.cpu.run() == "halt"
        assert m.cpu["rax"] == 300
        blocks.append(m.cpu.statistics["blocks"])
    assert blocks[0] == blocks[1]
