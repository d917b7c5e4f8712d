"""Which arithmetic flags are needed where, inside a block and just past its end.

A flag is dead before an instruction that writes it (or leaves it undefined) on every path. Where nothing is known,
all flags are live: never assume dead.
"""

import cython
from cython.cimports.vmonty.cpu.decode import (
    C_BTM,
    C_COPY,
    C_JCC,
    C_JMP,
    C_LEA,
    C_LEAVE,
    C_MOFFS,
    C_NOP,
    C_POP,
    C_PUSH,
    C_PUSHI,
    F_ALL,
    decode,
    glance,
    offered,
)


def live_at(code, available, rip, code_size, features):
    """Look a few instructions ahead: the flags that may be needed at ``rip``."""
    i: Insn
    at: cython.int = 0
    n: cython.int
    k: cython.int
    cls: cython.int
    live: cython.int = 0
    open_: cython.int = F_ALL  # neither read nor overwritten so far
    for k in range(6):
        n = glance(code + at, cython.address(i)) if code_size == 8 and available - at >= 24 else 0
        if n == 0:
            n = decode(code + at, available - at, rip + at, code_size, cython.address(i))
            if n <= 0 or not offered(cython.address(i), features, code_size):
                return live | open_
        cls = i.cls
        live |= flags_read(cython.address(i)) & open_
        if cls in (C_COPY, C_LEA, C_NOP, C_PUSH, C_POP, C_PUSHI, C_LEAVE, C_BTM, C_MOFFS):
            open_ &= ~i.kills
        else:
            return live | open_
        if not open_:
            return live
        at += n
    return live | open_


def open_at_end(block, count):
    """Look from the end for an instruction that touches memory or RFLAGS before one that overwrites every flag."""
    k: cython.int = count - 1
    cls: cython.int
    while k >= 0:
        cls = block[k].cls
        if cls not in (C_COPY, C_JCC, C_JMP, C_LEA, C_NOP):
            return 1
        if block[k].kills == F_ALL:
            return 0
        if cls == C_COPY and block[k].has_memory:
            return 1
        k -= 1
    return 0


def analyse(block, count, live_out):
    """Fill in flags_needed (after) and flags_in (before) of each instruction, from the end backwards."""
    live: cython.int = live_out
    k: cython.int = count - 1
    while k >= 0:
        block[k].flags_needed = live
        live = (live & ~block[k].kills) | flags_read(cython.address(block[k]))
        block[k].flags_in = live
        k -= 1
