"""Loops of one block whose addresses move evenly: many iterations behind one check of their pages.

Such a block begins with its *ordinary* body, which stands there up to four times: many loops have ended by then. Behind
it comes the *setup*. There each stream of accesses (operands by the same registers) is looked up in its slot, and what
its unchanging registers come to in the host is kept. The registers that move, the drivers, get a limit up to which all
their streams stay in the pages that were looked up, at most STRIP iterations away. The *strip* is the loop with
operands that need no check, a short one several times in a row; at its end it compares the drivers with their limits.
At a limit it looks at the run flag and goes back to the setup, so another thread's flush is seen there, as at any poll.
Where the setup does not succeed, the ordinary body goes round once more.

::

    ordinary → poll → setup → strip ⟲ → (limit) → poll → setup        (no window, run flag 0) → ordinary

In a strip no operand can fault or need anything but its bytes: pages, permissions, code pages and watched ones are in
the windows that the TLBs gave. The flags are dead where a strip may begin.
"""

import cython
from cython.cimports.libc.stdint import int32_t, int64_t
from cython.cimports.vmonty.cpu.assembler import NONE
from cython.cimports.vmonty.cpu.decode import (
    A_CL,
    A_SSE,
    A_VECTOR,
    A_WCX,
    A_X87,
    C_COPY,
    C_JCC,
    C_LEA,
    C_NOP,
    RIP_BASE,
    ROW,
    Insn,
    OpRow,
)
from cython.cimports.vmonty.cpu.grouping import constant_step, count_writes
from cython.cimports.vmonty.cpu.operands import S0, S1, S2, host
from cython.cimports.vmonty.cpu.state import FS, PAGE_SLOTS
from cython.cimports.vmonty.cpu.translate import MAX_DRIVERS, MAX_STREAMS, Driver, Stream

HULL_LIMIT = cython.declare(cython.int, 384)  # bytes
STEP_LIMIT = cython.declare(cython.int, 256)  # bytes: longer steps leave their pages too soon
FAR = cython.declare(cython.int, 4096)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _traps(w: cython.pointer(Work), i: cython.pointer(Insn)) -> cython.int:
    """Tell whether the control registers may forbid the instruction (see instructions)."""
    attributes: cython.uint = ROW[i.row].attributes
    if i.map == 0 and i.opcode == 0x9B:
        return 1
    if not attributes & (A_VECTOR | A_X87 | A_SSE):
        return 0
    if w.s.block_key & 0x600:
        return 1
    return not w.s.block_key & (0x1000 if i.vex else 0x800)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _narrow_step(i: cython.pointer(Insn), reg: cython.p_int, by: cython.pointer(int64_t)) -> cython.int:
    """Tell whether the instruction only moves a 32-bit register by a constant."""
    result: cython.int
    if i.operand_size != 4 or i.address_size != 8:
        return 0
    i.operand_size = 8
    result = constant_step(i, reg, by)
    i.operand_size = 4
    return result


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _find_moves(w: cython.pointer(Work), moves: cython.pointer(Driver)) -> cython.int:
    """See how each register moves; 0 when an instruction is none for strips."""
    k: cython.int
    n: cython.int = 0
    by: int64_t = 0
    old: cython.int[16]
    version: cython.int[16]
    i: cython.pointer(Insn)
    kind: cython.int
    for k in range(16):
        version[k] = 0
        moves[k].reg = k
        moves[k].kind = STILL
        moves[k].step = 0
    for k in range(w.count - 1):
        i = cython.address(w.insns[k])
        if i.fault or _traps(w, i) or (i.map == 1 and i.opcode == 0xC7):
            return 0
        if ROW[i.row].cls == C_NOP:
            continue
        if ROW[i.row].cls != C_COPY and ROW[i.row].cls != C_LEA:
            return 0
        kind = ANYHOW
        if constant_step(i, cython.address(n), cython.address(by)):
            kind = WIDE
        elif _narrow_step(i, cython.address(n), cython.address(by)):
            kind = NARROW
        elif i.map == 0 and not i.vex and not i.has_memory and i.operand_size == 8 and i.opcode | 2 == 3:
            kind = BY_REGISTER
            n = i.rm if i.opcode == 1 else i.reg
            by = i.reg if i.opcode == 1 else i.rm
        if kind != ANYHOW:
            if moves[n].kind != STILL and (moves[n].kind != kind or kind == BY_REGISTER):
                kind = ANYHOW
            elif kind == NARROW and (moves[n].step ^ by) < 0:
                kind = ANYHOW  # it might wrap around and come back
            moves[n].kind = kind
            if kind == BY_REGISTER:
                moves[n].by = cython.cast(cython.int, by)
            else:
                moves[n].step += by
                if not -FAR < moves[n].step < FAR:
                    moves[n].kind = ANYHOW
            continue
        for n in range(16):
            old[n] = version[n]
        count_writes(i, cython.address(version[0]))
        for n in range(16):
            if version[n] != old[n]:
                moves[n].kind = ANYHOW
    for n in range(16):
        if (moves[n].kind == WIDE or moves[n].kind == NARROW) and (
            moves[n].step == 0 or not -STEP_LIMIT <= moves[n].step <= STEP_LIMIT
        ):
            moves[n].kind = ANYHOW
    for n in range(16):
        if moves[n].kind == BY_REGISTER and moves[moves[n].by].kind != STILL:
            moves[n].kind = ANYHOW
    return 1


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _driver(w: cython.pointer(Work), move: cython.pointer(Driver)) -> cython.int:
    """Give the number of a register's driver, entering it; -1 when there are too many."""
    k: cython.int
    for k in range(w.drivers):
        if w.driver[k].reg == move.reg:
            return k
    if w.drivers >= MAX_DRIVERS:
        return -1
    w.driver[w.drivers] = move[0]
    w.drivers += 1
    return w.drivers - 1


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _join(w: cython.pointer(Work), i: cython.pointer(Insn), moves: cython.pointer(Driver),
          delta: cython.pointer(int64_t)) -> cython.int:  # fmt: skip
    """Give the number + 1 of the stream that an operand belongs to, or 0."""
    base: cython.int = i.base
    low: int64_t = i.displacement
    new_low: int64_t
    new_high: int64_t
    moving: cython.int = NONE
    k: cython.int
    t: cython.pointer(Stream)
    if base == RIP_BASE:
        base = NONE
        low += cython.cast(int64_t, i.rip + i.length)
    if base >= 0:
        if moves[base].kind == ANYHOW or delta[base] >= FAR:
            return 0
        if moves[base].kind != STILL:
            moving = base
        low += delta[base]
    if i.index >= 0:
        if moves[i.index].kind == ANYHOW or delta[i.index] >= FAR:
            return 0
        if moves[i.index].kind != STILL:
            if moving != NONE:
                return 0
            moving = i.index
        low += delta[i.index] << i.scale
    if (base >= 0 or i.index >= 0) and low != cython.cast(int32_t, low):
        return 0
    for k in range(w.streams):
        t = cython.address(w.stream[k])
        if t.base == base and t.index == i.index and (i.index < 0 or t.scale == i.scale):
            new_low = min(t.low, low)
            new_high = max(t.high, low + i.memory_size)
            if new_high - new_low <= HULL_LIMIT:
                t.low = new_low
                t.high = new_high
                t.write |= i.memory_access & 2
                return k + 1
    if w.streams >= MAX_STREAMS:
        return 0
    k = NONE
    if moving != NONE:
        k = _driver(w, cython.address(moves[moving]))
        if k < 0:
            return 0
    t = cython.address(w.stream[w.streams])
    w.streams += 1
    t.base = base
    t.index = i.index
    t.scale = i.scale
    t.driver = k
    t.low = low
    t.high = low + i.memory_size
    t.write = i.memory_access & 2
    t.reg = NONE
    return w.streams


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _needs_scratch(w: cython.pointer(Work), number: cython.int) -> cython.int:
    """Tell whether an instruction of the strip may use rcx, r12 or r15."""
    i: cython.pointer(Insn) = cython.address(w.insns[number])
    r: cython.pointer(OpRow) = cython.address(ROW[i.row])
    k: cython.int
    g: cython.int
    letter: cython.uchar
    if r.cls == C_NOP:
        return 0
    if r.cls == C_LEA:
        return (
            host(i.reg) < 0
            or i.operand_size < 4
            or i.address_size != 8
            or i.base == RIP_BASE
            or (i.base < 0 and i.index < 0)
            or (i.base >= 0 and host(i.base) < 0)
            or (i.index >= 0 and host(i.index) < 0)
        )
    if r.attributes & (A_CL | A_WCX | A_X87):
        return 1
    if i.has_memory:
        k = w.stream_of[number]
        if k == 0:
            return 1
        k = w.stream[k - 1].driver
        if k != NONE and host(w.driver[k].reg) < 0:
            return 1
    for k in range(r.operands):
        letter = r.letter[k]
        g = NONE
        if letter == ord("G") or letter == ord("Z"):
            g = i.reg
        elif (letter == ord("E") and not i.has_memory) or letter == ord("R"):
            g = i.rm
        elif letter == ord("B"):
            g = i.vvvv
        if g >= 0 and (host(g) < 0 or (r.size[k] == ord("b") and 4 <= g < 8 and not i.rex)):
            return 1
    return 0


def find_strip(w):
    """See whether the decoded block is a loop with a strip, and describe it in ``w``."""
    i: cython.pointer(Insn) = cython.address(w.insns[w.count - 1])
    moves: Driver[16]
    delta: int64_t[16]
    k: cython.int
    n: cython.int = 0
    by: int64_t = 0
    free: cython.int = 1
    w.streams = 0
    w.drivers = 0
    if (
        w.count < 2
        or ROW[i.row].cls != C_JCC
        or i.fault
        or i.rip + i.length + i.immediate != w.block.rip
        or w.code_size != 8
        or w.insns[0].flags_in
        or w.s.page_slots_used + MAX_STREAMS + MAX_DRIVERS + w.count > PAGE_SLOTS
        or not _find_moves(w, cython.address(moves[0]))
    ):
        return 0
    for k in range(16):
        delta[k] = 0
    for k in range(w.count - 1):
        i = cython.address(w.insns[k])
        w.stream_of[k] = 0
        if (
            ROW[i.row].cls == C_COPY
            and i.has_memory
            and i.segment < FS
            and i.address_size == 8
            and 0 < i.memory_size <= 64
            and not ROW[i.row].attributes & A_X87
        ):
            w.stream_of[k] = _join(w, i, cython.address(moves[0]), cython.address(delta[0]))
        if constant_step(i, cython.address(n), cython.address(by)) or _narrow_step(
            i, cython.address(n), cython.address(by)
        ):
            delta[n] += by
        else:
            for n in range(16):
                if (
                    moves[n].kind == BY_REGISTER
                    and not i.has_memory
                    and ((i.opcode == 1 and i.rm == n) or (i.opcode == 3 and i.reg == n))
                ):
                    delta[n] = FAR  # how far is not known here
    for k in range(16):
        if w.drivers == 0 and (moves[k].kind == WIDE or moves[k].kind == NARROW):
            _driver(w, cython.address(moves[k]))
    if w.drivers == 0:
        return 0
    for k in range(w.count - 1):
        if _needs_scratch(w, k):
            free = 0
    for k in range(w.streams):
        if free and (k < 2 or w.streams == 3):
            w.stream[k].reg = S2 if k == 0 else (S1 if k == 1 else S0)
    return 1
