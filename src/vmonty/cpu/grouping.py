"""Operands that share one TLB check: those of a block that lie at constant distances from each other.

Stack frames, fields of a structure, and unrolled loops address memory by one register and different displacements.
The first of them (the leader) checks the bytes of all, from the lowest to the highest, to lie in one page, and keeps
the host address of the lowest; the others use that. If one of them writes, the check is that for writes. Where it fails
for another reason than a missing TLB entry, the block is left for one without groups (``LEAVE_PLAIN``), so that faults
are exact.

A register that only moves by constants (push, pop, add, sub, inc, dec, lea) keeps its group; any other write ends it.
"""

import cython
from cython.cimports.libc.stdint import int32_t, int64_t
from cython.cimports.vmonty.cpu.assembler import NONE
from cython.cimports.vmonty.cpu.decode import (
    C_BTM,
    C_CALL,
    C_CALLI,
    C_COPY,
    C_EMMS,
    C_JCC,
    C_JMP,
    C_JMPI,
    C_LEA,
    C_LEAVE,
    C_LOOP,
    C_MOFFS,
    C_NOP,
    C_POP,
    C_POPM,
    C_PUSH,
    C_PUSHI,
    C_PUSHM,
    C_RET,
    C_XLAT,
    NO_REGISTER,
    RIP_BASE,
    W_B,
    W_E,
    W_E_BYTE,
    W_G,
    W_G_BYTE,
    W_RAX,
    W_RCX,
    W_RDX,
    Insn,
)
from cython.cimports.vmonty.cpu.state import FS
from cython.cimports.vmonty.cpu.translate import MAX_GROUPS, Group

HULL_LIMIT = cython.declare(cython.int, 384)  # bytes: longer groups would cross pages too often


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _join(w: cython.pointer(Work), number: cython.int, base: cython.int, index: cython.int, scale: cython.int,
          version: cython.p_int, low: int64_t, size: cython.int, write: cython.int) -> cython.void:  # fmt: skip
    """Put the operand of instruction ``number`` into the group it belongs to, or begin one."""
    k: cython.int
    g: cython.pointer(Group)
    i: cython.pointer(Insn) = cython.address(w.insns[number])
    stack: cython.int = 1 if base == 4 or base == 5 else 0
    new_low: int64_t
    new_high: int64_t
    k = w.groups - 1
    while k >= 0:
        g = cython.address(w.group[k])
        if (
            g.base == base
            and g.index == index
            and (index == NONE or g.scale == scale)
            and g.base_version == version[base]
            and (index == NONE or g.index_version == version[index])
        ):
            new_low = min(g.low, low)
            new_high = max(g.high, low + size)
            if new_high - new_low <= HULL_LIMIT:
                g.low = new_low
                g.high = new_high
                g.members += 1
                g.write |= write
                i.group = k + 1
                i.group_offset = cython.cast(int32_t, low)
                return
        k -= 1
    if w.groups >= MAX_GROUPS:
        return
    g = cython.address(w.group[w.groups])
    w.groups += 1
    g.base = base
    g.index = index
    g.scale = scale
    g.base_version = version[base]
    g.index_version = version[index] if index != NONE else 0
    g.members = 1
    g.write = 1 if write or stack else 0
    g.low = low
    g.high = low + size
    g.first = number
    i.group = w.groups
    i.group_offset = cython.cast(int32_t, low)


def constant_step(i, reg, by):
    """Tell whether the instruction only moves a 64-bit register by a constant."""
    digit: cython.int = i.modrm >> 3 & 7
    if i.map or i.vex or i.operand_size != 8 or i.opcode not in (0x05, 0x2D, 0x81, 0x83, 0x8D, 0xFF):
        return 0
    if i.cls == C_LEA:
        reg[0] = i.reg
        by[0] = i.displacement
        return i.base == i.reg and i.index == NO_REGISTER and i.address_size == 8
    if i.has_memory or i.lock:
        return 0
    if i.opcode == 0x05 or i.opcode == 0x2D:
        reg[0] = 0
        by[0] = cython.cast(int32_t, i.immediate)
        if i.opcode == 0x2D:
            by[0] = -by[0]
        return 1
    reg[0] = i.rm
    if (i.opcode == 0x81 or i.opcode == 0x83) and (digit == 0 or digit == 5):
        if i.opcode == 0x83:
            by[0] = cython.cast(cython.schar, i.immediate)
        else:
            by[0] = cython.cast(int32_t, i.immediate)
        if digit == 5:
            by[0] = -by[0]
        return 1
    if i.opcode == 0xFF and digit < 2:
        by[0] = 1 if digit == 0 else -1
        return 1
    return 0


def count_writes(i, version):
    """Count up the versions of the registers that the instruction writes."""
    written: cython.uint = i.written
    version[i.reg] += (written & W_G) != 0
    if not i.has_memory:
        version[i.rm] += (written & W_E) != 0
        if written & W_E_BYTE and 4 <= i.rm < 8:
            version[i.rm - 4] += 1
    if written & W_G_BYTE and 4 <= i.reg < 8:
        version[i.reg - 4] += 1
    if written & (W_RAX | W_RCX | W_RDX | W_B):
        version[0] += (written & W_RAX) != 0
        version[1] += (written & W_RCX) != 0
        version[2] += (written & W_RDX) != 0
        version[i.vvvv] += (written & W_B) != 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _new_versions(version: cython.p_int) -> cython.void:
    k: cython.int
    for k in range(16):
        version[k] += 1


def find_groups(w):
    """Find the groups of a block that has been decoded, and mark their members and leaders."""
    version: cython.int[16]
    delta: int64_t[16]
    k: cython.int
    n: cython.int = 0
    by: int64_t = 0
    size: cython.int
    i: cython.pointer(Insn)
    g: cython.pointer(Group)
    cls: cython.int
    old: cython.int
    for k in range(16):
        version[k] = 0
        delta[k] = 0
    for k in range(w.total):
        i = cython.address(w.insns[k])
        cls = i.cls
        size = i.operand_size
        if i.fault:
            break
        if cls in (C_COPY, C_LEA, C_NOP, C_EMMS):
            if (
                cls == C_COPY
                and i.has_memory
                and i.base >= 0
                and i.base != RIP_BASE
                and i.segment < FS
                and i.address_size == 8
                and 0 < i.memory_size <= 64
            ):
                by = i.displacement + delta[i.base]
                if i.index >= 0:
                    by += delta[i.index] << i.scale
                _join(w, k, i.base, i.index, i.scale, cython.address(version[0]), by, i.memory_size,
                      1 if i.memory_access & 2 else 0)  # fmt: skip
            if cls != C_NOP and cls != C_EMMS:
                if constant_step(i, cython.address(n), cython.address(by)):
                    delta[n] += by
                else:
                    count_writes(i, cython.address(version[0]))
        elif cls in (C_PUSH, C_PUSHI):
            _join(w, k, 4, NONE, 0, cython.address(version[0]), delta[4] - size, size, 1)
            delta[4] -= size
        elif cls == C_POP:
            _join(w, k, 4, NONE, 0, cython.address(version[0]), delta[4], size, 0)
            delta[4] += size
            version[i.reg] += 1
        elif cls == C_CALL:
            _join(w, k, 4, NONE, 0, cython.address(version[0]), delta[4] - 8, 8, 1)
        elif cls == C_RET:
            _join(w, k, 4, NONE, 0, cython.address(version[0]), delta[4], 8, 0)
        elif cls in (C_BTM, C_MOFFS, C_XLAT, C_JCC, C_JMP, C_JMPI, C_CALLI, C_LOOP, C_PUSHM, C_POPM, C_LEAVE):
            if cls == C_PUSHM:
                delta[4] -= size
            elif cls in (C_POPM, C_LEAVE):
                _new_versions(cython.address(version[0]))
            else:
                count_writes(i, cython.address(version[0]))
        else:
            _new_versions(cython.address(version[0]))  # a helper may change anything
    for k in range(w.groups):
        g = cython.address(w.group[k])
        old = g.first
        w.insns[old].leader = 1
        if g.members < 2:
            w.insns[old].group = 0
    for k in range(w.total):
        i = cython.address(w.insns[k])
        if i.group:
            i.group_offset -= cython.cast(int32_t, w.group[i.group - 1].low)
