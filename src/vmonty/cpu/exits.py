"""The ways out of a block: links to other blocks, polls, faults, helpers, and the stubs behind its body."""

import cython
from cython.cimports.vmonty.cpu.assembler import (
    CC_BE,
    CC_E,
    NONE,
    call_to,
    fit,
    jcc_open,
    jcc_to,
    jmp_open,
    jmp_to,
    load32,
    mov_imm,
    mov_rr,
    op_mem,
    op_reg,
    push_imm32,
    put8,
)
from cython.cimports.vmonty.cpu.codecache import CROSS_UNLINKED, Link
from cython.cimports.vmonty.cpu.operands import (
    RBP_HOST,
    S0,
    S1,
    S2,
    emit_ea,
    slot_field,
)
from cython.cimports.vmonty.cpu.state import TLB_SETS
from cython.cimports.vmonty.cpu.stubs import displacement
from cython.cimports.vmonty.cpu.translate import (
    STUB_LINK,
    STUB_LOOKUP,
    STUB_MEMORY_LIVE,
    STUB_POLL,
    STUB_SLOT,
    Stub,
    Work,
)


def exit_to(w, target, patch):
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
    e.cross_page = CROSS_UNLINKED if cross else 0
    e.next_cross = 0


def jump_to(w, target):
    """Emit a jump to a guest address."""
    fit(w.a, 5)
    exit_to(w, target, jmp_open(w.a))


def leave_at(w, rip, stub):
    """Load r15 with a guest address and go to a stub of the cache."""
    mov_imm(w.a, S2, rip)
    jmp_to(w.a, stub)


def emit_poll(w, i, target):
    """On a back-edge, look at the run flag; gives the jrcxz byte to be resolved by poll_end, or NULL."""
    if target > i.rip or w.single:
        return cython.NULL
    w.kept = 0
    fit(w.a, 5)
    load32(w.a, S0, RBP_HOST, displacement(w.s, cython.address(w.s.run)))
    put8(w.a, 0xE3)
    put8(w.a, 0)
    return w.a.at - 1


def poll_aside(w, i):
    """Look at the run flag where no flag is live; the way out is behind the block."""
    k: cython.pointer(Stub) = cython.address(w.stub[w.stubs])
    fit(w.a, 10)
    op_mem(w.a, 0, 0, 0x83, 7, RBP_HOST, NONE, 0, displacement(w.s, cython.address(w.s.run)))
    put8(w.a, 0)
    k.kind = STUB_POLL
    k.patch = jcc_open(w.a, CC_E)
    k.target = i.rip
    w.stubs += 1


def poll_end(w, i, at):
    """Resolve the poll's branch: leave the block in front of the instruction."""
    if at == cython.NULL:
        return
    at[0] = cython.cast(uint64_t, w.a.at) - cython.cast(uint64_t, at) - 1
    leave_at(w, i.rip, w.c.leave_poll)


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


def leave_fault(w, i, vector):
    """End the block with an exception of the instruction."""
    i.fault = vector
    mov_imm(w.a, S2, _side(w, i))
    jmp_to(w.a, w.c.leave_fault)
    w.closed = 1


def leave_system(w, i):
    """End the block with an instruction that a helper executes; a single one goes back to the dispatcher for it."""
    mov_imm(w.a, S2, _side(w, i))
    jmp_to(w.a, w.c.leave_system if w.single else w.c.execute_system)
    w.closed = 1


def call_helper(w, i):
    """Call a compiled helper for the instruction and go on."""
    mov_imm(w.a, S2, _side(w, i))
    call_to(w.a, w.c.call_helper)


def lookup_stub(w):
    """Give the stub that goes to the guest address in r15; the jump cache serves only 64-bit mode."""
    return w.c.lookup[w.s.tlb_set] if w.code_size == 8 else w.c.leave_indirect


def cut(w, i, target):
    """Cut a branch target to the operand size."""
    if w.code_size == 8:
        return target
    return target & 0xFFFF if i.operand_size == 2 else cython.cast(uint32_t, target)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _patch32(at: cython.p_uchar, to: cython.p_uchar) -> cython.void:
    cython.cast(cython.pointer(int32_t), at)[0] = cython.cast(
        int32_t, cython.cast(uint64_t, to) - cython.cast(uint64_t, at) - 4
    )


def emit_stubs(w):
    """Emit what stands behind the body: exits that are not linked yet, and the slow paths of memory operands."""
    a: cython.pointer(Assembler) = w.a
    n: cython.int
    k: cython.pointer(Stub)
    for n in range(w.stubs):
        k = cython.address(w.stub[n])
        _patch32(k.patch, a.at)
        if k.kind == STUB_LINK:
            w.c.links[k.what].stub = a.at - w.c.writable
            mov_imm(a, S2, k.what)
            jmp_to(a, w.c.leave_link)
        elif k.kind == STUB_LOOKUP:
            mov_imm(a, S1, k.patch - w.c.writable)
            mov_imm(a, S2, k.target)
            jmp_to(a, w.c.leave_next if w.single else lookup_stub(w))
        elif k.kind == STUB_POLL:
            mov_imm(a, S2, k.target)
            jmp_to(a, w.c.leave_poll)
        else:
            emit_ea(w, cython.address(k.ea))
            if k.kind == STUB_SLOT:  # flags are dead: look into the TLBs, remember what is there, go on
                mov_imm(a, S2, 8 * k.slot)
                call_to(a, w.c.window[(TLB_SETS if k.write else 0) + w.s.tlb_set])
                emit_ea(w, cython.address(k.ea))
                op_mem(a, 0, 1, 0x03, S0, RBP_HOST, NONE, 0, slot_field(w, k.slot, -1))
                op_mem(a, 0, 1, 0x3B, S0, RBP_HOST, NONE, 0, slot_field(w, k.slot, 1))
                if k.what == 0:
                    jcc_to(a, CC_BE, cython.cast(uint64_t, k.back) + a.delta)
                    jmp_to(a, cython.cast(uint64_t, w.c.executable) + w.block.entry)
                    continue
                jcc_to(a, CC_BE, cython.cast(uint64_t, k.back) + a.delta)
                emit_ea(w, cython.address(k.ea))
            push_imm32(a, k.what)
            call_to(a, w.c.memory_slow)
            if k.kind != STUB_MEMORY_LIVE:  # no flag is live
                op_reg(a, 0, 0, 0x33, S1, S1)
            else:
                mov_rr(a, S1, S0)
            # A slot's load of r12 is stepped over.
            jmp_to(a, cython.cast(uint64_t, k.back) + (7 if k.kind == STUB_SLOT else 0) + a.delta)
