"""The translator: guest blocks to host code.

A block is up to MAX_INSNS instructions of one page (its last may reach into the next page), ended by a control
transfer. Its slow paths and the stubs of its unlinked exits stand behind its body.
"""

import cython
from cython.cimports.vmonty.cpu.assembler import (
    CC_E,
    CC_NE,
    NONE,
    alu_imm,
    call_to,
    jmp_to,
    lea,
    load,
    load32,
    mov_imm,
    mov_rr,
    op_mem,
    op_reg,
    pext_mem,
    push_imm32,
    put8,
    put16,
    put32,
    rorx,
    store,
)
from cython.cimports.vmonty.cpu.codecache import (
    MAX_BLOCKS,
    MAX_LINKS,
    MAX_OFFSETS,
    MAX_PAGES,
    MAX_SIDE,
    Link,
    block_register,
    cache_flush,
    displacement,
)
from cython.cimports.vmonty.cpu.coherence import block_digest
from cython.cimports.vmonty.cpu.decode import (
    A_VECTOR,
    A_X87,
    C_BTM,
    C_CALL,
    C_CALLI,
    C_CLI,
    C_COPY,
    C_DF,
    C_EMMS,
    C_ENTER,
    C_FPU,
    C_JCC,
    C_JMP,
    C_JMPI,
    C_LEA,
    C_LEAVE,
    C_LOOP,
    C_MASKMOV,
    C_MOFFS,
    C_NOP,
    C_POP,
    C_POPF,
    C_POPM,
    C_PUSH,
    C_PUSHF,
    C_PUSHI,
    C_PUSHM,
    C_RET,
    C_STRING,
    C_SYS,
    C_SYSEND,
    C_UD,
    C_XLAT,
    DECODE_INVALID,
    DECODE_TOO_LONG,
    F_ALL,
    ROW,
    decode,
)
from cython.cimports.vmonty.cpu.grouping import find_groups
from cython.cimports.vmonty.cpu.liveness import analyse, live_at
from cython.cimports.vmonty.cpu.operands import (
    GUEST_RCX,
    GUEST_RSP,
    RBP_HOST,
    S0,
    S1,
    S2,
    access_op,
    ea_of,
    ea_stack,
    emit_access,
    emit_commit,
    emit_copy,
    emit_ea,
    home,
    host,
)
from cython.cimports.vmonty.cpu.state import AR_DB, CS, MODE_COMPAT32, MODE_LONG64, MODE_PROT32, SS, TLB_ENTRIES
from cython.cimports.vmonty.cpu.tlb import fetch_page

# ---- exits ---------------------------------------------------------------------------------------------


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _exit_to(w: cython.pointer(Work), target: uint64_t, patch: cython.p_uchar) -> cython.void:
    """Arrange for the rel32 at ``patch`` to reach guest address ``target``."""
    k: cython.pointer(Stub) = cython.address(w.stub[w.stubs])
    e: cython.pointer(Link)
    c: cython.pointer(CodeCache) = w.c
    cross: cython.int = (((target + w.code_base) ^ w.block.linear) >> 12) != 0
    w.stubs += 1
    k.patch = patch
    k.target = target
    if w.single or (cross and (not w.is_global or w.code_size != 8)):
        k.kind = STUB_LOOKUP
        return
    k.kind = STUB_LINK
    k.what = c.links_used
    e = cython.address(c.links[c.links_used])
    c.links_used += 1
    e.target = target
    e.patch = patch - c.writable
    e.block = w.block - c.blocks
    e.destination = 0
    e.next_incoming = 0
    e.cross_page = cross


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _jump(w: cython.pointer(Work), target: uint64_t) -> cython.void:
    put8(w.a, 0xE9)
    put32(w.a, 0)
    _exit_to(w, target, w.a.at - 4)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _leave_at(w: cython.pointer(Work), rip: uint64_t, stub: uint64_t) -> cython.void:
    mov_imm(w.a, S2, rip)
    jmp_to(w.a, stub)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _poll(w: cython.pointer(Work), i: cython.pointer(Insn), target: uint64_t) -> cython.p_uchar:
    """On a back-edge, look at the run flag; gives the jrcxz byte to be resolved by _poll_end, or NULL."""
    if target > i.rip or w.single:
        return cython.NULL
    load32(w.a, S0, RBP_HOST, displacement(w.s, cython.address(w.s.run)))
    put8(w.a, 0xE3)
    put8(w.a, 0)
    return w.a.at - 1


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _poll_end(w: cython.pointer(Work), i: cython.pointer(Insn), at: cython.p_uchar) -> cython.void:
    if at == cython.NULL:
        return
    at[0] = cython.cast(uint64_t, w.a.at) - cython.cast(uint64_t, at) - 1
    _leave_at(w, i.rip, w.c.leave_poll)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _side(w: cython.pointer(Work), i: cython.pointer(Insn)) -> uint32_t:
    """Keep an instruction for the helpers."""
    number: uint32_t = w.c.side_used
    to: cython.p_uchar = cython.cast(cython.p_uchar, cython.address(w.c.side[number]))
    k: cython.size_t
    w.c.side_used += 1
    for k in range(cython.sizeof(Insn)):
        to[k] = cython.cast(cython.p_uchar, i)[k]
    return number


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _fault(w: cython.pointer(Work), i: cython.pointer(Insn), vector: cython.int) -> cython.void:
    i.fault = vector
    mov_imm(w.a, S2, _side(w, i))
    jmp_to(w.a, w.c.leave_fault)
    w.closed = 1


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _system(w: cython.pointer(Work), i: cython.pointer(Insn)) -> cython.void:
    """End the block: the dispatcher executes the instruction."""
    mov_imm(w.a, S2, _side(w, i))
    jmp_to(w.a, w.c.leave_system)
    w.closed = 1


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _helper(w: cython.pointer(Work), i: cython.pointer(Insn)) -> cython.void:
    """Call a compiled helper for the instruction and go on."""
    mov_imm(w.a, S2, _side(w, i))
    call_to(w.a, w.c.call_helper)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _lookup_stub(w: cython.pointer(Work)) -> uint64_t:
    """Give the stub that goes to the guest address in r15; the jump cache serves only 64-bit mode."""
    return w.c.lookup[w.s.tlb_set] if w.code_size == 8 else w.c.leave_indirect


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _cut(w: cython.pointer(Work), i: cython.pointer(Insn), target: uint64_t) -> uint64_t:
    """Cut a branch target to the operand size."""
    if w.code_size == 8:
        return target
    return target & 0xFFFF if i.operand_size == 2 else cython.cast(uint32_t, target)


# ---- stack ----------------------------------------------------------------------------------------------


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _adjust_rsp(w: cython.pointer(Work), by: cython.int) -> cython.void:
    if w.stack_size == 8:
        lea(w.a, GUEST_RSP, GUEST_RSP, NONE, 0, by)
    elif w.stack_size == 4:
        op_mem(w.a, 0, 0, 0x8D, GUEST_RSP, GUEST_RSP, NONE, 0, by)
    else:
        lea(w.a, S0, GUEST_RSP, NONE, 0, by)
        op_reg(w.a, 0x66, 0, 0x8B, GUEST_RSP, S0)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _push(w: cython.pointer(Work), i: cython.pointer(Insn)) -> cython.void:
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
    _adjust_rsp(w, -size)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _push_constant(w: cython.pointer(Work), i: cython.pointer(Insn), value: uint64_t, size: cython.int) -> cython.void:
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
    _adjust_rsp(w, -size)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _pop(w: cython.pointer(Work), i: cython.pointer(Insn)) -> cython.void:
    ea: Ea
    size: cython.int = i.operand_size
    h: cython.int = host(i.reg)
    ea_stack(w, 0, cython.address(ea))
    emit_access(w, i, cython.address(ea), size, 1, 1)
    if i.reg == 4:
        if size == 2:
            _adjust_rsp(w, 2)
        access_op(w, 0x66 if size == 2 else 0, 1 if size == 8 else 0, 0x8B, GUEST_RSP)
        return
    if h < 0:
        if size == 2:
            load(w.a, S2, RBP_HOST, home(w, i.reg))
        access_op(w, 0x66 if size == 2 else 0, 1 if size == 8 else 0, 0x8B, S2)
        store(w.a, S2, RBP_HOST, home(w, i.reg))
    else:
        access_op(w, 0x66 if size == 2 else 0, 1 if size == 8 else 0, 0x8B, h)
    _adjust_rsp(w, size)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _load_target(w: cython.pointer(Work), i: cython.pointer(Insn)) -> cython.void:
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


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _keep(w: cython.pointer(Work), reg: cython.int, back: cython.int) -> cython.void:
    """Park a register in the state across a memory access, or take it back."""
    if back:
        load(w.a, reg, RBP_HOST, displacement(w.s, cython.address(w.s.temp[1])))
    else:
        store(w.a, reg, RBP_HOST, displacement(w.s, cython.address(w.s.temp[1])))


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _push_memory(w: cython.pointer(Work), i: cython.pointer(Insn)) -> cython.void:
    ea: Ea
    size: cython.int = i.operand_size
    _load_target(w, i)
    _keep(w, S2, 0)
    ea_stack(w, -size, cython.address(ea))
    emit_access(w, i, cython.address(ea), size, 2, 1)
    _keep(w, S2, 1)
    access_op(w, 0x66 if size == 2 else 0, 1 if size == 8 else 0, 0x89, S2)
    emit_commit(w, 2)
    _adjust_rsp(w, -size)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _pop_memory(w: cython.pointer(Work), i: cython.pointer(Insn)) -> cython.void:
    ea: Ea
    size: cython.int = i.operand_size
    p: cython.int = 0x66 if size == 2 else 0
    wide: cython.int = 1 if size == 8 else 0
    if not i.has_memory:
        i.reg = i.rm
        _pop(w, i)
        return
    ea_stack(w, 0, cython.address(ea))
    emit_access(w, i, cython.address(ea), size, 1, 1)
    access_op(w, p, wide, 0x8B, S2)
    _keep(w, S2, 0)
    ea_of(w, i, cython.address(ea))
    if ea.base == 4:
        ea.displacement += size  # the address is computed after the increment
    emit_access(w, i, cython.address(ea), size, 2, 0)
    _keep(w, S2, 1)
    access_op(w, p, wide, 0x89, S2)
    emit_commit(w, 2)
    _adjust_rsp(w, size)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _leave_frame(w: cython.pointer(Work), i: cython.pointer(Insn)) -> cython.void:
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
    _adjust_rsp(w, size)
    store(w.a, S2, RBP_HOST, home(w, 5))


# ---- control transfers -----------------------------------------------------------------------------------


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _landing(w: cython.pointer(Work), next_rip: uint64_t) -> cython.void:
    """What stands behind a call: rcx and r15 hold the address that the guest returns to."""
    negative: uint64_t = 0 - next_rip
    if cython.cast(int64_t, negative) >> 31 == 0 or cython.cast(int64_t, negative) >> 31 == -1:
        lea(w.a, S0, S0, NONE, 0, cython.cast(int32_t, negative))
    else:
        mov_imm(w.a, S1, negative)
        lea(w.a, S0, S0, S1, 0, 0)
    put8(w.a, 0xE3)
    put8(w.a, 5)
    jmp_to(w.a, _lookup_stub(w))
    _jump(w, next_rip)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _lookup(w: cython.pointer(Work), call: cython.int) -> cython.void:
    """Go to the guest address in r15 through the jump cache."""
    s: cython.pointer(CpuState) = w.s
    a: cython.pointer(Assembler) = w.a
    if w.single or w.code_size != 8:
        if call and not w.single:
            call_to(a, w.c.leave_indirect)
        else:
            jmp_to(a, w.c.leave_next if w.single else w.c.leave_indirect)
        return
    pext_mem(a, S1, S2, RBP_HOST, displacement(s, cython.address(s.jump_mask)))
    op_mem(a, 0, 1, 0x8B, S0, RBP_HOST, S1, 3, displacement(s, cython.address(s.jump_negated[s.tlb_set][0])))
    lea(a, S0, S0, S2, 0, 0)
    put8(a, 0xE3)
    if call:
        put8(a, 7)
        call_to(a, w.c.leave_indirect)
        put8(a, 0xEB)  # over the other call, to the landing
        put8(a, 8)
        op_mem(a, 0, 0, 0xFF, 2, RBP_HOST, S1, 3, displacement(s, cython.address(s.jump_code[s.tlb_set][0])))
    else:
        put8(a, 5)
        jmp_to(a, w.c.leave_indirect)
        op_mem(a, 0, 0, 0xFF, 4, RBP_HOST, S1, 3, displacement(s, cython.address(s.jump_code[s.tlb_set][0])))


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _call(w: cython.pointer(Work), i: cython.pointer(Insn)) -> cython.void:
    next_rip: uint64_t = i.rip + i.length
    target: uint64_t = _cut(w, i, next_rip + i.immediate)
    poll: cython.p_uchar = _poll(w, i, target)
    over: cython.p_uchar
    if poll != cython.NULL:  # the way out stands in front: the call's own exits are far
        put8(w.a, 0xEB)
        put8(w.a, 0)
        over = w.a.at
        _poll_end(w, i, poll)
        over[-1] = cython.cast(uint64_t, w.a.at) - cython.cast(uint64_t, over)
    _push_constant(w, i, next_rip, i.operand_size)
    if w.single:
        _leave_at(w, target, w.c.leave_next)
    else:
        put8(w.a, 0xE8)
        put32(w.a, 0)
        _exit_to(w, target, w.a.at - 4)
        _landing(w, next_rip)
    w.closed = 1


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _poll_indirect(w: cython.pointer(Work), i: cython.pointer(Insn)) -> cython.void:
    at: cython.p_uchar
    if w.single:
        return
    load32(w.a, S0, RBP_HOST, displacement(w.s, cython.address(w.s.run)))
    put8(w.a, 0xE3)
    put8(w.a, 2)
    put8(w.a, 0xEB)
    put8(w.a, 0)
    at = w.a.at
    _leave_at(w, i.rip, w.c.leave_poll)
    at[-1] = cython.cast(uint64_t, w.a.at) - cython.cast(uint64_t, at)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _call_indirect(w: cython.pointer(Work), i: cython.pointer(Insn)) -> cython.void:
    ea: Ea
    _poll_indirect(w, i)
    _load_target(w, i)
    _keep(w, S2, 0)
    ea_stack(w, -i.operand_size, cython.address(ea))
    emit_access(w, i, cython.address(ea), i.operand_size, 2, 1)
    mov_imm(w.a, S2, i.rip + i.length)
    access_op(w, 0x66 if i.operand_size == 2 else 0, 1 if i.operand_size == 8 else 0, 0x89, S2)
    emit_commit(w, 2)
    _adjust_rsp(w, -i.operand_size)
    _keep(w, S2, 1)
    _lookup(w, 1)
    if not w.single:
        _landing(w, i.rip + i.length)
    w.closed = 1


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _return(w: cython.pointer(Work), i: cython.pointer(Insn)) -> cython.void:
    ea: Ea
    ea_stack(w, 0, cython.address(ea))
    emit_access(w, i, cython.address(ea), i.operand_size, 1, 1)
    if i.operand_size == 2:
        access_op(w, 0, 0, 0x1B7, S2)
    else:
        access_op(w, 0, 1 if i.operand_size == 8 else 0, 0x8B, S2)
    _adjust_rsp(w, i.operand_size + cython.cast(cython.int, i.immediate))
    mov_rr(w.a, S0, S2)
    if w.single:
        jmp_to(w.a, w.c.leave_next)
    else:
        put8(w.a, 0xC3)
    w.closed = 1


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _conditional(w: cython.pointer(Work), i: cython.pointer(Insn)) -> cython.void:
    next_rip: uint64_t = i.rip + i.length
    target: uint64_t = _cut(w, i, next_rip + i.immediate)
    poll: cython.p_uchar = _poll(w, i, target)
    put8(w.a, 0x0F)
    put8(w.a, 0x80 | (i.opcode & 15))
    put32(w.a, 0)
    _exit_to(w, target, w.a.at - 4)
    _jump(w, next_rip)
    _poll_end(w, i, poll)
    w.closed = 1


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _loop(w: cython.pointer(Work), i: cython.pointer(Insn)) -> cython.void:
    """LOOP, LOOPE, LOOPNE, JCXZ."""
    a: cython.pointer(Assembler) = w.a
    next_rip: uint64_t = i.rip + i.length
    target: uint64_t = _cut(w, i, next_rip + i.immediate)
    poll: cython.p_uchar = _poll(w, i, target)
    over: cython.p_uchar
    at: cython.p_uchar
    also: cython.p_uchar = cython.NULL
    if poll != cython.NULL:
        put8(a, 0xEB)
        put8(a, 0)
        over = a.at
        _poll_end(w, i, poll)
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
        _jump(w, next_rip)
        at[-1] = cython.cast(uint64_t, a.at) - cython.cast(uint64_t, at)
        _jump(w, target)
    else:
        if i.opcode != 0xE2:
            put8(a, 0x70 | (CC_NE if i.opcode == 0xE1 else CC_E))
            put8(a, 0)
            also = a.at
        _jump(w, target)
        at[-1] = cython.cast(uint64_t, a.at) - cython.cast(uint64_t, at)
        if also != cython.NULL:
            also[-1] = cython.cast(uint64_t, a.at) - cython.cast(uint64_t, also)
        _jump(w, next_rip)
    w.closed = 1


# ---- the rest -------------------------------------------------------------------------------------------


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _lea(w: cython.pointer(Work), i: cython.pointer(Insn)) -> cython.void:
    ea: Ea
    h: cython.int = host(i.reg)
    b: cython.int
    x: cython.int
    wide: cython.int = 1 if i.operand_size == 8 else 0
    ea_of(w, i, cython.address(ea))
    ea.segment = NONE
    b = host(ea.base) if ea.base != NONE else NONE
    x = host(ea.index) if ea.index != NONE else NONE
    if (
        h >= 0
        and i.operand_size >= 4
        and i.address_size == 8
        and (ea.base == NONE or b >= 0)
        and (ea.index == NONE or x >= 0)
        and (b >= 0 or x >= 0)
    ):
        op_mem(w.a, 0, wide, 0x8D, h, b, x, ea.scale, cython.cast(int32_t, ea.displacement))
        return
    emit_ea(w, cython.address(ea))
    if i.operand_size == 4:
        op_reg(w.a, 0, 0, 0x8B, S0, S0)
    elif i.operand_size == 2:
        if h >= 0:
            op_reg(w.a, 0x66, 0, 0x8B, h, S0)
        else:
            op_mem(w.a, 0x66, 0, 0x89, S0, RBP_HOST, NONE, 0, home(w, i.reg))
        return
    if h >= 0:
        mov_rr(w.a, h, S0)
    else:
        store(w.a, S0, RBP_HOST, home(w, i.reg))


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _moffs(w: cython.pointer(Work), i: cython.pointer(Insn)) -> cython.void:
    """MOV between the accumulator and an absolute address."""
    ea: Ea
    size: cython.int = i.operand_size if i.opcode & 1 else 1
    access: cython.int = 2 if i.opcode & 2 else 1
    opcode: cython.int = (0x88 if access == 2 else 0x8A) | (i.opcode & 1)
    ea_of(w, i, cython.address(ea))
    ea.base = NONE
    ea.index = NONE
    ea.displacement = cython.cast(int64_t, i.immediate)
    emit_access(w, i, cython.address(ea), size, access, 0)
    access_op(w, 0x66 if size == 2 else 0, 1 if size == 8 else 0, opcode, 0)
    emit_commit(w, access)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _xlat(w: cython.pointer(Work), i: cython.pointer(Insn)) -> cython.void:
    ea: Ea
    ea_of(w, i, cython.address(ea))
    ea.base = 3
    ea.index = NONE
    ea.displacement = 0
    ea.special = EA_XLAT
    emit_access(w, i, cython.address(ea), 1, 1, 0)
    access_op(w, 0, 0, 0x8A, 0)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _masked_move(w: cython.pointer(Work), i: cython.pointer(Insn)) -> cython.void:
    """MASKMOVQ and MASKMOVDQU: the memory operand is at rdi, which then has to hold the host address."""
    ea: Ea
    k: cython.int
    ea_of(w, i, cython.address(ea))
    ea.base = 7
    ea.index = NONE
    ea.displacement = 0
    emit_access(w, i, cython.address(ea), 16 if i.pp == 1 else 8, 3, 0)
    mov_rr(w.a, S2, 7)
    op_mem(w.a, 0, 1, 0x8D, 7, w.base, w.index, 0, w.disp)
    for k in range(i.length):  # only register operands: as it stands, without prefixes that change the address
        if i.bytes[k] == 0x64 or i.bytes[k] == 0x65 or i.bytes[k] == 0x67:
            continue
        put8(w.a, i.bytes[k])
    mov_rr(w.a, 7, S2)
    emit_commit(w, 2)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _flag_in_state(w: cython.pointer(Work), i: cython.pointer(Insn), bit: cython.int, value: cython.int) -> cython.void:
    """Set or clear a bit of RFLAGS' second byte in the state."""
    if i.flags_in:
        _helper(w, i)
        return
    op_mem(w.a, 0, 0, 0x80, 1 if value else 4, RBP_HOST, NONE, 0,
           displacement(w.s, cython.address(w.s.rflags)) + 1)  # fmt: skip
    put8(w.a, bit if value else ~bit)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _vector_fault(w: cython.pointer(Work), i: cython.pointer(Insn)) -> cython.int:
    """Give the exception that the control registers demand of x87, MMX, SSE and AVX instructions, or 0."""
    key: uint32_t = w.s.block_key
    attributes: cython.uint = ROW[i.row].attributes
    if attributes & A_X87:
        return 7 if key & 0x200 else 0
    if i.map == 0 and i.opcode == 0x9B:
        return 7 if key & 0x4000 else 0
    if not attributes & A_VECTOR and ROW[i.row].cls != C_EMMS:
        return 0
    if i.vex:
        if not key & 0x1000:
            return 6
    elif key & 0x400:
        return 6
    return 7 if key & 0x200 else 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _instruction(w: cython.pointer(Work), i: cython.pointer(Insn)) -> cython.void:
    cls: cython.int = ROW[i.row].cls
    vector: cython.int
    if i.fault:
        _fault(w, i, i.fault)
        return
    vector = _vector_fault(w, i)
    if vector:
        _fault(w, i, vector)
        return
    if cls in (C_COPY, C_BTM, C_EMMS):
        emit_copy(w, i)
    elif cls == C_JCC:
        _conditional(w, i)
    elif cls == C_PUSH:
        _push(w, i)
    elif cls == C_POP:
        _pop(w, i)
    elif cls == C_CALL:
        _call(w, i)
    elif cls == C_RET:
        _return(w, i)
    elif cls == C_JMP:
        _direct_jump(w, i)
    elif cls == C_LEA:
        _lea(w, i)
    elif cls == C_NOP:
        if i.opcode == 0x90 and i.rep == 0xF3:
            put8(w.a, 0xF3)
            put8(w.a, 0x90)
    elif cls == C_JMPI:
        _poll_indirect(w, i)
        _load_target(w, i)
        _lookup(w, 0)
        w.closed = 1
    elif cls == C_CALLI:
        _call_indirect(w, i)
    elif cls == C_LOOP:
        _loop(w, i)
    elif cls == C_PUSHI:
        _push_constant(w, i, _sign(i.immediate, i.immediate_size), i.operand_size)
    elif cls == C_PUSHM:
        _push_memory(w, i)
    elif cls == C_POPM:
        _pop_memory(w, i)
    elif cls == C_LEAVE:
        _leave_frame(w, i)
    elif cls == C_MOFFS:
        _moffs(w, i)
    elif cls == C_XLAT:
        _xlat(w, i)
    elif cls == C_DF:
        _flag_in_state(w, i, 4, i.opcode & 1)
    elif cls == C_CLI:
        if w.s.cpl == 0 and w.s.mode == MODE_LONG64:
            _flag_in_state(w, i, 2, 0)
        else:
            _system(w, i)
    elif cls == C_MASKMOV:
        _masked_move(w, i)
    elif cls in (C_SYS, C_STRING, C_FPU, C_PUSHF, C_ENTER):
        _helper(w, i)
    elif cls == C_UD:
        _fault(w, i, 6)
    else:
        _system(w, i)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _sign(value: uint64_t, size: cython.int) -> uint64_t:
    if size == 1:
        return cython.cast(uint64_t, cython.cast(int64_t, cython.cast(cython.schar, value)))
    if size == 2:
        return cython.cast(uint64_t, cython.cast(int64_t, cython.cast(cython.short, value)))
    return cython.cast(uint64_t, cython.cast(int64_t, cython.cast(int32_t, value)))


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _direct_jump(w: cython.pointer(Work), i: cython.pointer(Insn)) -> cython.void:
    target: uint64_t = _cut(w, i, i.rip + i.length + i.immediate)
    poll: cython.p_uchar = _poll(w, i, target)
    _jump(w, target)
    _poll_end(w, i, poll)
    w.closed = 1


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _patch32(at: cython.p_uchar, to: cython.p_uchar) -> cython.void:
    cython.cast(cython.pointer(int32_t), at)[0] = cython.cast(
        int32_t, cython.cast(uint64_t, to) - cython.cast(uint64_t, at) - 4
    )


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _emit_stubs(w: cython.pointer(Work)) -> cython.void:
    a: cython.pointer(Assembler) = w.a
    n: cython.int
    k: cython.pointer(Stub)
    at: cython.p_uchar
    for n in range(w.stubs):
        k = cython.address(w.stub[n])
        _patch32(k.patch, a.at)
        if k.kind == STUB_LINK:
            w.c.links[k.what].stub = a.at - w.c.writable
            mov_imm(a, S2, k.what)
            jmp_to(a, w.c.leave_link)
        elif k.kind == STUB_LOOKUP:
            mov_imm(a, S2, k.target)
            jmp_to(a, w.c.leave_next if w.single else _lookup_stub(w))
        else:
            emit_ea(w, cython.address(k.ea))
            if k.kind == STUB_SLOT:  # flags are dead: look into the TLB, remember the page, go on
                rorx(a, 0, S1, S0, 8)
                alu_imm(a, 0, 4, S1, (TLB_ENTRIES - 1) << 4)
                op_mem(a, 0, 1, 0x8B, S2, RBP_HOST, S1, 0, k.table)
                lea(a, S0, S0, S2, 0, 0)
                alu_imm(a, 1, 7, S0, 4096 - k.size)
                put8(a, 0x77)
                put8(a, 0)
                at = a.at
                op_mem(a, 0, 1, 0x8B, S1, RBP_HOST, S1, 0, k.table + 8)
                store(a, S2, RBP_HOST, k.slot)
                store(a, S1, RBP_HOST, k.slot + 8)
                jmp_to(a, cython.cast(uint64_t, k.back) + a.delta)
                at[-1] = cython.cast(uint64_t, a.at) - cython.cast(uint64_t, at)
                emit_ea(w, cython.address(k.ea))
            push_imm32(a, k.what)
            call_to(a, w.c.memory_slow)
            if k.kind != STUB_MEMORY_LIVE:
                mov_imm(a, S1, 0)
            else:
                mov_rr(a, S1, S0)
            jmp_to(a, cython.cast(uint64_t, k.back) + a.delta)


# ---- blocks ----------------------------------------------------------------------------------------------


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _ends_block(i: cython.pointer(Insn)) -> cython.int:
    cls: cython.int = ROW[i.row].cls
    if i.fault:
        return 1
    return cls in (C_JCC, C_JMP, C_CALL, C_JMPI, C_CALLI, C_RET, C_LOOP, C_SYSEND, C_UD, C_POPF)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _read_block(w: cython.pointer(Work), page: cython.pointer(FetchEntry), why: cython.p_int) -> cython.int:
    """Decode the block's instructions; 0 when the first one cannot be fetched."""
    b: cython.pointer(Block) = w.block
    at: cython.int = b.linear & 0xFFF
    start: cython.int = at
    code: cython.p_uchar = cython.cast(cython.p_uchar, page.host)
    i: cython.pointer(Insn)
    n: cython.int
    k: cython.int
    part: cython.int
    limit: cython.int = 1 if w.single else MAX_INSNS
    buffer: cython.uchar[16]
    second: cython.pointer(FetchEntry)
    w.window = code
    w.window_size = 4096
    w.count = 0
    while w.count < limit and at < 4096:
        i = cython.address(w.insns[w.count])
        n = decode(code + at, 4096 - at, b.rip + (at - start), w.code_size, i)
        if n == 0:
            if w.count:
                break  # the next block begins with it
            second = fetch_page(w.s, (b.linear | 0xFFF) + 1, why)
            if second == cython.NULL or second.host == 0:
                return 0
            part = 4096 - at
            for k in range(part):
                buffer[k] = code[at + k]
            for k in range(15 - part):
                buffer[part + k] = cython.cast(cython.p_uchar, second.host)[k]
            n = decode(buffer, 15, b.rip, w.code_size, i)
            b.host_page2 = second.host
            if not second.is_global:
                w.is_global = 0
        if n == DECODE_INVALID:
            i.fault = 6
            i.row = 0
            i.length = 1
            n = 1
        elif n == DECODE_TOO_LONG:
            i.fault = 13
            i.row = 0
            i.length = 1
            n = 1
        w.count += 1
        at += n
        if _ends_block(i):
            break
    b.length = at - start
    b.count = w.count
    return 1


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _live_at(w: cython.pointer(Work), target: uint64_t) -> cython.int:
    linear: uint64_t = target + w.code_base
    if (linear ^ w.block.linear) >> 12:
        return F_ALL
    return live_at(w.window + (linear & 0xFFF), 4096 - cython.cast(cython.int, linear & 0xFFF), target, w.code_size)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _live_out(w: cython.pointer(Work)) -> cython.int:
    i: cython.pointer(Insn) = cython.address(w.insns[w.count - 1])
    cls: cython.int = ROW[i.row].cls
    next_rip: uint64_t = i.rip + i.length
    if i.fault or w.single:
        return F_ALL
    if cls == C_JCC:
        return _live_at(w, next_rip) | _live_at(w, next_rip + i.immediate)
    if cls in (C_JMP, C_CALL):
        return _live_at(w, next_rip + i.immediate)
    if not _ends_block(i):
        return _live_at(w, next_rip)
    return F_ALL


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _find_loop(w: cython.pointer(Work)) -> cython.void:
    """See whether the block is (the end of) a loop, and which registers it loads from memory.

    Accesses in a loop remember their last page, which saves the way through the TLB; not those by a register that was
    loaded from memory, as pointer chasing seldom stays in a page.
    """
    i: cython.pointer(Insn) = cython.address(w.insns[w.count - 1])
    cls: cython.int = ROW[i.row].cls
    target: uint64_t = i.rip + i.length + i.immediate
    k: cython.int
    w.in_loop = 0
    w.loaded = 0
    if (
        w.single
        or w.code_size != 8
        or (cls != C_JCC and cls != C_JMP)
        or target > w.block.rip
        or w.block.rip - target > 256
    ):
        return
    w.in_loop = 1
    for k in range(w.count):
        i = cython.address(w.insns[k])
        if ROW[i.row].cls == C_COPY and i.has_memory and i.map == 0 and i.opcode == 0x8B:
            w.loaded |= cython.cast(uint32_t, 1) << i.reg
        elif i.map == 0 and not i.has_memory and i.opcode == 0x01:  # strides of unknown size leave pages often
            w.loaded |= cython.cast(uint32_t, 1) << i.rm
        elif i.map == 0 and not i.has_memory and i.opcode == 0x03:
            w.loaded |= cython.cast(uint32_t, 1) << i.reg


def translate_block(s, rip, page, single, plain, why):
    """Translate the block at ``rip``, whose code lies in ``page``; NULL with ``why`` when it cannot be fetched.

    ``single`` makes a careful block of one instruction, ``plain`` gives each operand its own TLB check.
    The cache may be flushed first.
    """
    c: cython.pointer(CodeCache) = cython.cast(cython.pointer(CodeCache), s.translator)
    w: Work
    b: cython.pointer(Block)
    k: cython.int
    i: cython.pointer(Insn)
    start: cython.p_uchar
    if (
        c.a.limit - c.a.at < 65536
        or c.blocks_used + 1 >= MAX_BLOCKS
        or c.links_used + 8 >= MAX_LINKS
        or c.offsets_used + 2 * MAX_INSNS + 2 >= MAX_OFFSETS
        or c.side_used + MAX_INSNS >= MAX_SIDE
        or c.pages_used + 2 >= MAX_PAGES
    ):
        cache_flush(s)
    b = cython.address(c.blocks[c.blocks_used])
    start = c.a.at
    b.rip = rip
    b.host_page = page.host
    b.host_page2 = 0
    b.key = s.block_key | (KEY_SINGLE if single else (KEY_PLAIN if plain else 0))
    b.entry = start - c.writable
    b.valid = 0
    b.next = 0
    b.page_next = 0
    b.page_next2 = 0
    b.incoming = 0
    b.offsets = c.offsets_used
    w.s = s
    w.c = c
    w.a = cython.address(c.a)
    w.block = b
    w.single = single
    w.groups = 0
    w.is_global = page.is_global
    w.code_size = 8
    w.stack_size = 8
    w.code_base = 0
    b.linear = rip
    if s.mode != MODE_LONG64:
        w.code_size = 4 if s.mode == MODE_PROT32 or s.mode == MODE_COMPAT32 else 2
        w.stack_size = 4 if s.segs[SS].access_rights & AR_DB else 2
        w.code_base = s.segs[CS].base
        b.linear = cython.cast(uint32_t, rip + w.code_base)
    w.stubs = 0
    w.closed = 0
    if not _read_block(cython.address(w), page, why):
        return cython.NULL
    b.is_global = w.is_global
    analyse(cython.address(w.insns[0]), w.count, _live_out(cython.address(w)))
    _find_loop(cython.address(w))
    if not single and not plain and w.code_size == 8:
        find_groups(cython.address(w))
    for k in range(w.count):
        i = cython.address(w.insns[k])
        c.offsets[c.offsets_used] = c.a.at - start
        c.offsets[c.offsets_used + 1] = i.rip - rip
        c.offsets_used += 2
        _instruction(cython.address(w), i)
    if not w.closed:
        if single:
            _leave_at(cython.address(w), rip + b.length, c.leave_next)
        else:
            _jump(cython.address(w), rip + b.length)
    b.body_size = c.a.at - start
    _emit_stubs(cython.address(w))
    b.size = c.a.at - start
    c.blocks_used += 1
    block_digest(b)
    block_register(c, b)
    return b
