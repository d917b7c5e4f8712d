"""Control transfers: CALL, RET, JMP, Jcc, LOOP; the jump cache and the return prediction."""

import cython
from cython.cimports.vmonty.cpu.assembler import (
    CC_E,
    CC_NE,
    NONE,
    call_to,
    fit,
    jcc_open,
    jmp_to,
    lea,
    load32,
    mov_imm,
    op_mem,
    op_reg,
    pext_mem,
    put8,
    put32,
)
from cython.cimports.vmonty.cpu.exits import (
    cut,
    emit_poll,
    exit_to,
    jump_to,
    leave_at,
    lookup_stub,
    poll_aside,
    poll_end,
)
from cython.cimports.vmonty.cpu.operands import (
    GUEST_RCX,
    RBP_HOST,
    S0,
    S1,
    S2,
    access_op,
    ea_stack,
    emit_access,
    emit_commit,
)
from cython.cimports.vmonty.cpu.stack import adjust_rsp, keep, load_target, push_constant, settle_rsp
from cython.cimports.vmonty.cpu.stubs import displacement
from cython.cimports.vmonty.cpu.translate import Ea, Work


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _landing(w: cython.pointer(Work), i: cython.pointer(Insn), poll: cython.p_uchar) -> cython.void:
    """What stands behind a call: r15 holds the address that the guest returns to."""
    next_rip: uint64_t = i.rip + i.length
    negative: uint64_t = 0 - next_rip
    if cython.cast(int64_t, negative) >> 31 == 0 or cython.cast(int64_t, negative) >> 31 == -1:
        lea(w.a, S0, S2, NONE, 0, cython.cast(int32_t, negative))
    else:
        mov_imm(w.a, S0, negative)
        lea(w.a, S0, S0, S2, 0, 0)
    fit(w.a, 2)
    put8(w.a, 0xE3)
    put8(w.a, 5)
    jmp_to(w.a, lookup_stub(w))
    jump_to(w, next_rip)
    poll_end(w, i, poll)


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _say_where(w: cython.pointer(Work)) -> cython.void:
    """Leave in r12 where this branch is, for who finds its target wrong."""
    mov_imm(w.a, S1, w.a.at - w.c.writable)


def lookup(w, i, call):
    """Go to the guest address in r15 through the jump cache, unless the run flag is 0.

    The dispatcher is told where the branch is: a target that is not canonical is its fault.
    """
    s: cython.pointer(CpuState) = w.s
    a: cython.pointer(Assembler) = w.a
    away: cython.p_uchar
    over: cython.p_uchar = cython.NULL
    if w.single or w.code_size != 8:
        _say_where(w)
        if call and not w.single:
            call_to(a, w.c.leave_branch)
        else:
            jmp_to(a, w.c.leave_next if w.single else w.c.leave_branch)
        return
    pext_mem(a, S1, S2, RBP_HOST, displacement(s, cython.address(s.jump_mask)))
    op_mem(a, 0, 1, 0x8B, S0, RBP_HOST, S1, 3, displacement(s, cython.address(s.jump_negated[s.tlb_set][0])))
    lea(a, S0, S0, S2, 0, 0)
    fit(a, 2)
    put8(a, 0xE3)
    put8(a, 0)
    away = a.at
    _say_where(w)
    if call:
        call_to(a, w.c.leave_branch)
        put8(a, 0xEB)  # over the other call, to the landing
        put8(a, 0)
        over = a.at
    else:
        jmp_to(a, w.c.leave_branch)
    away[-1] = cython.cast(uint64_t, a.at) - cython.cast(uint64_t, away)
    load32(a, S0, RBP_HOST, displacement(s, cython.address(s.run)))
    fit(a, 10)
    put8(a, 0xE3)
    put8(a, 0)
    a.at[-1] = (cython.cast(uint64_t, away) - cython.cast(uint64_t, a.at)) & 0xFF
    op_mem(a, 0, 0, 0xFF, 2 if call else 4, RBP_HOST, S1, 3, displacement(s, cython.address(s.jump_code[s.tlb_set][0])))
    if call:
        over[-1] = cython.cast(uint64_t, a.at) - cython.cast(uint64_t, over)


def call(w, i):
    """CALL rel."""
    next_rip: uint64_t = i.rip + i.length
    target: uint64_t = cut(w, i, next_rip + i.immediate)
    poll: cython.p_uchar = cython.NULL
    if target <= i.rip and not w.single:
        settle_rsp(w)
        if i.flags_in:
            poll = emit_poll(w, i, target)
        else:
            poll_aside(w, i)
    push_constant(w, i, next_rip, i.operand_size)
    settle_rsp(w)
    if w.single:
        leave_at(w, target, w.c.leave_next)
    else:
        fit(w.a, 5)
        put8(w.a, 0xE8)
        put32(w.a, 0)
        exit_to(w, target, w.a.at - 4)
        _landing(w, i, poll)
    w.closed = 1


def call_indirect(w, i):
    """CALL r/m."""
    ea: Ea
    load_target(w, i)
    keep(w, S2, 0)
    ea_stack(w, -i.operand_size, cython.address(ea))
    emit_access(w, i, cython.address(ea), i.operand_size, 2, 1)
    mov_imm(w.a, S2, i.rip + i.length)
    access_op(w, 0x66 if i.operand_size == 2 else 0, 1 if i.operand_size == 8 else 0, 0x89, S2)
    emit_commit(w, 2)
    adjust_rsp(w, -i.operand_size)
    settle_rsp(w)
    keep(w, S2, 1)
    lookup(w, i, 1)
    if not w.single:
        _landing(w, i, cython.NULL)
    w.closed = 1


def ret(w, i):
    """RET: the host's return goes to the landing of the call that it predicts."""
    ea: Ea
    ea_stack(w, 0, cython.address(ea))
    emit_access(w, i, cython.address(ea), i.operand_size, 1, 1)
    if i.operand_size == 2:
        access_op(w, 0, 0, 0x1B7, S2)
    else:
        access_op(w, 0, 1 if i.operand_size == 8 else 0, 0x8B, S2)
    adjust_rsp(w, i.operand_size + cython.cast(cython.int, i.immediate))
    settle_rsp(w)
    if w.single:
        jmp_to(w.a, w.c.leave_next)
    else:
        _say_where(w)
        fit(w.a, 1)
        put8(w.a, 0xC3)
    w.closed = 1


def conditional(w, i):
    """Jcc."""
    next_rip: uint64_t = i.rip + i.length
    target: uint64_t = cut(w, i, next_rip + i.immediate)
    poll: cython.p_uchar
    fit(w.a, 11 if target <= i.rip else 6)
    poll = emit_poll(w, i, target)
    exit_to(w, target, jcc_open(w.a, i.opcode & 15))
    jump_to(w, next_rip)
    poll_end(w, i, poll)
    w.closed = 1


def next_round(w, i):
    """Jcc to the block's own start, of a round that is not the last one that stands there: without a poll."""
    fit(w.a, 6)
    exit_to(w, i.rip + i.length, jcc_open(w.a, (i.opcode & 15) ^ 1))


def loop(w, i):
    """LOOP, LOOPE, LOOPNE, JCXZ."""
    a: cython.pointer(Assembler) = w.a
    next_rip: uint64_t = i.rip + i.length
    target: uint64_t = cut(w, i, next_rip + i.immediate)
    poll: cython.p_uchar = emit_poll(w, i, target)
    over: cython.p_uchar
    at: cython.p_uchar
    also: cython.p_uchar = cython.NULL
    if poll != cython.NULL:
        put8(a, 0xEB)
        put8(a, 0)
        over = a.at
        poll_end(w, i, poll)
        over[-1] = cython.cast(uint64_t, a.at) - cython.cast(uint64_t, over)
    if i.opcode != 0xE3:
        if i.address_size == 2:
            lea(a, S0, GUEST_RCX, NONE, 0, -1)
            op_reg(a, 0x66, 0, 0x8B, GUEST_RCX, S0)
        else:
            op_mem(a, 0, 1 if i.address_size == 8 else 0, 0x8D, GUEST_RCX, GUEST_RCX, NONE, 0, -1)
    if i.address_size == 2:
        op_reg(a, 0, 0, 0x1B7, S0, GUEST_RCX)
    else:
        op_reg(a, 0, 1 if i.address_size == 8 else 0, 0x8B, S0, GUEST_RCX)
    put8(a, 0xE3)
    put8(a, 0)
    at = a.at
    if i.opcode == 0xE3:
        jump_to(w, next_rip)
        at[-1] = cython.cast(uint64_t, a.at) - cython.cast(uint64_t, at)
        jump_to(w, target)
    else:
        if i.opcode != 0xE2:
            put8(a, 0x70 | (CC_NE if i.opcode == 0xE1 else CC_E))
            put8(a, 0)
            also = a.at
        jump_to(w, target)
        at[-1] = cython.cast(uint64_t, a.at) - cython.cast(uint64_t, at)
        if also != cython.NULL:
            also[-1] = cython.cast(uint64_t, a.at) - cython.cast(uint64_t, also)
        jump_to(w, next_rip)
    w.closed = 1


def direct_jump(w, i):
    """JMP rel."""
    target: uint64_t = cut(w, i, i.rip + i.length + i.immediate)
    poll: cython.p_uchar = emit_poll(w, i, target)
    jump_to(w, target)
    poll_end(w, i, poll)
    w.closed = 1
