"""Instructions that work on the stack: PUSH, POP, LEAVE."""

import cython
from cython.cimports.vmonty.cpu.assembler import (
    NONE,
    lea,
    load,
    mov_imm,
    mov_rr,
    op_mem,
    op_reg,
    put16,
    put32,
    store,
)
from cython.cimports.vmonty.cpu.decode import C_CALL, C_POP, C_PUSH, C_PUSHI, C_RET, ROW
from cython.cimports.vmonty.cpu.operands import (
    GUEST_RSP,
    RBP_HOST,
    S0,
    S2,
    access_op,
    ea_of,
    ea_stack,
    emit_access,
    emit_commit,
    home,
    host,
)
from cython.cimports.vmonty.cpu.stubs import displacement
from cython.cimports.vmonty.cpu.translate import Ea


def adjust_rsp(w, by):
    """Add a constant to rsp, as wide as the stack; at once only where the block may be left before ``settle_rsp``."""
    if w.stack_size == 8 and not w.single:
        w.pending += by
    elif w.stack_size == 8:
        lea(w.a, GUEST_RSP, GUEST_RSP, NONE, 0, by)
    elif w.stack_size == 4:
        op_mem(w.a, 0, 0, 0x8D, GUEST_RSP, GUEST_RSP, NONE, 0, by)
    else:
        lea(w.a, S0, GUEST_RSP, NONE, 0, by)
        op_reg(w.a, 0x66, 0, 0x8B, GUEST_RSP, S0)


def settle_rsp(w):
    """Move rsp by what a run of pushes or pops has moved it."""
    if w.pending:
        lea(w.a, GUEST_RSP, GUEST_RSP, NONE, 0, w.pending)
        w.pending = 0


def goes_on(w, i):
    """Tell whether the instruction is a stack access that cannot fault and does not look at rsp.

    Its leader has checked the bytes, so no state between the leader and it is ever seen.
    """
    cls: cython.int = ROW[i.row].cls
    if not i.group or i.leader or w.code_size != 8:
        return 0
    if cls in (C_PUSH, C_POP):
        return i.reg != 4
    return cls in (C_PUSHI, C_CALL, C_RET)


def push(w, i):
    """PUSH of a register."""
    ea: Ea
    size: cython.int = i.operand_size
    p: cython.int = 0x66 if size == 2 else 0
    wide: cython.int = 1 if size == 8 else 0
    h: cython.int = host(i.reg)
    ea_stack(w, -size, cython.address(ea))
    emit_access(w, i, cython.address(ea), size, 2, 1)
    if h < 0:
        h = S2
        load(w.a, S2, RBP_HOST, home(w, i.reg))
    access_op(w, p, wide, 0x89, h)
    emit_commit(w, 2)
    adjust_rsp(w, -size)


def push_constant(w, i, value, size):
    """Push a constant, for PUSH and CALL."""
    ea: Ea
    ea_stack(w, -size, cython.address(ea))
    emit_access(w, i, cython.address(ea), size, 2, 1)
    if size == 2:
        access_op(w, 0x66, 0, 0xC7, 0)
        put16(w.a, cython.cast(uint32_t, value))
    elif size == 4:
        access_op(w, 0, 0, 0xC7, 0)
        put32(w.a, cython.cast(uint32_t, value))
    elif cython.cast(int64_t, value) >> 31 == 0 or cython.cast(int64_t, value) >> 31 == -1:
        access_op(w, 0, 1, 0xC7, 0)
        put32(w.a, cython.cast(uint32_t, value))
    else:
        mov_imm(w.a, S2, value)
        access_op(w, 0, 1, 0x89, S2)
    emit_commit(w, 2)
    adjust_rsp(w, -size)


def pop(w, i):
    """POP to a register."""
    ea: Ea
    size: cython.int = i.operand_size
    h: cython.int = host(i.reg)
    ea_stack(w, 0, cython.address(ea))
    emit_access(w, i, cython.address(ea), size, 1, 1)
    if i.reg == 4:
        if size == 2 and w.stack_size != 2:  # with 16 bits it is overwritten whole, and the operand would be lost
            adjust_rsp(w, 2)
            settle_rsp(w)
        access_op(w, 0x66 if size == 2 else 0, 1 if size == 8 else 0, 0x8B, GUEST_RSP)
        return
    if h < 0:
        if size == 2:
            load(w.a, S2, RBP_HOST, home(w, i.reg))
        access_op(w, 0x66 if size == 2 else 0, 1 if size == 8 else 0, 0x8B, S2)
        store(w.a, S2, RBP_HOST, home(w, i.reg))
    else:
        access_op(w, 0x66 if size == 2 else 0, 1 if size == 8 else 0, 0x8B, h)
    adjust_rsp(w, size)


def load_target(w, i):
    """Load the r/m operand of PUSH, CALL or JMP into r15 (zero-extended)."""
    ea: Ea
    size: cython.int = i.operand_size
    h: cython.int
    if i.has_memory:
        ea_of(w, i, cython.address(ea))
        emit_access(w, i, cython.address(ea), size, 1, 0)
        if size == 2:
            access_op(w, 0, 0, 0x1B7, S2)
        else:
            access_op(w, 0, 1 if size == 8 else 0, 0x8B, S2)
        return
    h = host(i.rm)
    if h < 0:
        load(w.a, S2, RBP_HOST, home(w, i.rm))
        h = S2
    if size == 8:
        mov_rr(w.a, S2, h)
    else:
        op_reg(w.a, 0, 0, 0x1B7 if size == 2 else 0x8B, S2, h)


def keep(w, reg, back):
    """Park a register in the state across a memory access, or take it back."""
    if back:
        load(w.a, reg, RBP_HOST, displacement(w.s, cython.address(w.s.temp[1])))
    else:
        store(w.a, reg, RBP_HOST, displacement(w.s, cython.address(w.s.temp[1])))


def push_memory(w, i):
    """PUSH r/m."""
    ea: Ea
    size: cython.int = i.operand_size
    load_target(w, i)
    keep(w, S2, 0)
    ea_stack(w, -size, cython.address(ea))
    emit_access(w, i, cython.address(ea), size, 2, 1)
    keep(w, S2, 1)
    access_op(w, 0x66 if size == 2 else 0, 1 if size == 8 else 0, 0x89, S2)
    emit_commit(w, 2)
    adjust_rsp(w, -size)


def pop_memory(w, i):
    """POP r/m."""
    ea: Ea
    size: cython.int = i.operand_size
    p: cython.int = 0x66 if size == 2 else 0
    wide: cython.int = 1 if size == 8 else 0
    if not i.has_memory:
        i.reg = i.rm
        pop(w, i)
        return
    ea_stack(w, 0, cython.address(ea))
    emit_access(w, i, cython.address(ea), size, 1, 1)
    access_op(w, p, wide, 0x8B, S2)
    keep(w, S2, 0)
    ea_of(w, i, cython.address(ea))
    if ea.base == 4:
        ea.displacement += size  # the address is computed after the increment
    emit_access(w, i, cython.address(ea), size, 2, 0)
    keep(w, S2, 1)
    access_op(w, p, wide, 0x89, S2)
    emit_commit(w, 2)
    adjust_rsp(w, size)


def leave_frame(w, i):
    """LEAVE: rsp = rbp; pop rbp."""
    ea: Ea
    size: cython.int = i.operand_size
    ea_stack(w, 0, cython.address(ea))
    ea.base = 5
    emit_access(w, i, cython.address(ea), size, 1, 1)
    if size == 2:
        load(w.a, S2, RBP_HOST, home(w, 5))
    access_op(w, 0x66 if size == 2 else 0, 1 if size == 8 else 0, 0x8B, S2)
    if w.stack_size == 2:
        op_mem(w.a, 0x66, 0, 0x8B, GUEST_RSP, RBP_HOST, NONE, 0, home(w, 5))
    else:
        load(w.a, GUEST_RSP, RBP_HOST, home(w, 5))
    adjust_rsp(w, size)
    store(w.a, S2, RBP_HOST, home(w, 5))
