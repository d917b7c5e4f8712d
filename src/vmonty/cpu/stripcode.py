"""The code of strips: a loop's setup, and the end of its strip (see strips)."""

import cython
from cython.cimports.libc.stdint import int32_t, uint64_t
from cython.cimports.vmonty.cpu.assembler import (
    CC_B,
    CC_GE,
    CC_LE,
    CC_NE,
    CC_O,
    NONE,
    Assembler,
    alu_imm,
    fit,
    jcc_to,
    jmp_to,
    lea,
    load,
    load32,
    mov_imm,
    mov_rr,
    op_mem,
    op_reg,
    put8,
    put32,
    store,
)
from cython.cimports.vmonty.cpu.branches import next_round
from cython.cimports.vmonty.cpu.exits import emit_poll, jump_to, poll_end
from cython.cimports.vmonty.cpu.operands import (
    RBP_HOST,
    S0,
    S1,
    emit_ea,
    emit_slot_check,
    home,
    host,
    new_slot,
    slot_field,
)
from cython.cimports.vmonty.cpu.strips import BY_REGISTER, NARROW
from cython.cimports.vmonty.cpu.stubs import displacement
from cython.cimports.vmonty.cpu.translate import Driver, Ea, Stream

STRIP = cython.declare(cython.int, 256)  # iterations between two polls


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _to_ordinary(w: cython.pointer(Work), cc: cython.int) -> cython.void:
    """Emit a conditional jump to the ordinary body, which is at the block's entry."""
    jcc_to(w.a, cc, cython.cast(uint64_t, w.c.executable) + w.block.entry)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _with_register(w: cython.pointer(Work), opcode: cython.int, reg: cython.int, g: cython.int) -> cython.void:
    """Emit ``op reg, guest register`` (64 bits)."""
    if host(g) >= 0:
        op_reg(w.a, 0, 1, opcode, reg, host(g))
    else:
        op_mem(w.a, 0, 1, opcode, reg, RBP_HOST, NONE, 0, home(w, g))


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _shift(a: cython.pointer(Assembler), digit: cython.int, reg: cython.int, count: cython.int) -> cython.void:
    op_reg(a, 0, 1, 0xC1, digit, reg)
    put8(a, count)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _at_most(a: cython.pointer(Assembler)) -> cython.void:
    """S1 = min(S1, S0), unsigned."""
    op_reg(a, 0, 1, 0x3B, S1, S0)
    op_reg(a, 0, 1, 0x147, S1, S0)  # cmova


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _emit_stream(w: cython.pointer(Work), t: cython.pointer(Stream), first: cython.int) -> cython.void:
    """Look a stream up, see how far its driver may go, and keep what its other registers come to in the host."""
    a: cython.pointer(Assembler) = w.a
    d: cython.pointer(Driver) = cython.NULL
    ea: Ea
    ea.base = t.base
    ea.index = t.index
    ea.scale = t.scale
    ea.segment = NONE
    ea.address_size = 8
    ea.special = 0
    ea.bit_register = 0
    ea.operand_size = 0
    ea.what = 0
    ea.displacement = t.low
    emit_ea(w, cython.address(ea))
    emit_slot_check(w, t.slot, 0, cython.address(ea), t.write)
    if t.driver != NONE:
        d = cython.address(w.driver[t.driver])
        if d.kind == BY_REGISTER or d.step > 0:
            load(a, S1, RBP_HOST, slot_field(w, t.slot, 1))
            op_reg(a, 0, 1, 0x2B, S1, S0)
        else:
            mov_rr(a, S1, S0)
        if t.base == d.reg:
            ea.base = NONE
        else:
            ea.index = NONE
            if t.scale:
                _shift(a, 5, S1, t.scale)
        if not first:
            load(a, S0, RBP_HOST, d.limit)
            _at_most(a)
        store(a, S1, RBP_HOST, d.limit)
    emit_ea(w, cython.address(ea))
    op_mem(a, 0, 1, 0x03, S0, RBP_HOST, NONE, 0, slot_field(w, t.slot, 3))
    store(a, S0, RBP_HOST, slot_field(w, t.slot, 4))


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _emit_limit(w: cython.pointer(Work), d: cython.pointer(Driver), streams: cython.int) -> cython.void:
    """Turn how far a driver may go into its limit, where all rounds are still possible.

    One step beyond the last may not wrap around.
    """
    a: cython.pointer(Assembler) = w.a
    step: cython.int
    k: cython.int
    if streams:
        load(a, S1, RBP_HOST, d.limit)
    if d.kind == BY_REGISTER:
        _with_register(w, 0x8B, S0, d.by)
        lea(a, S0, S0, NONE, 0, -1)
        _shift(a, 5, S0, 31)  # a step of 1 to 2^31
        _to_ordinary(w, CC_NE)
        _with_register(w, 0x8B, S0, d.by)
        _shift(a, 4, S0, 3)
        op_reg(a, 0, 1, 0x3B, S1, S0)
        _to_ordinary(w, CC_B)  # not worth while
        _shift(a, 4, S0, 5)
        _at_most(a)
        _with_register(w, 0x03, S1, d.by)
        _with_register(w, 0x03, S1, d.reg)
        _to_ordinary(w, CC_O)
        for k in range(w.strip_rounds):
            _with_register(w, 0x2B, S1, d.by)
        store(a, S1, RBP_HOST, d.limit)
        return
    step = cython.cast(cython.int, d.step if d.step > 0 else -d.step)
    if streams:
        if w.strip_rounds > 1:
            alu_imm(a, 1, 7, S1, (w.strip_rounds - 1) * step)
            _to_ordinary(w, CC_B)
        mov_imm(a, S0, step * STRIP)
        _at_most(a)
    else:
        mov_imm(a, S1, step * STRIP)
    _with_register(w, 0x8B, S0, d.reg)
    if d.kind == NARROW:
        _shift(a, 5, S0, 32)
        _to_ordinary(w, CC_NE)
        _with_register(w, 0x8B, S0, d.reg)
    alu_imm(a, 1, 0, S1, step)
    op_reg(a, 0, 1, 0x03 if d.step > 0 else 0x2B, S0, S1)
    _to_ordinary(w, CC_O)
    if d.kind == NARROW:
        mov_rr(a, S1, S0)
        _shift(a, 5, S1, 32)
        _to_ordinary(w, CC_NE)
    lea(a, S0, S0, NONE, 0, cython.cast(int32_t, -d.step * w.strip_rounds))
    store(a, S0, RBP_HOST, d.limit)


def emit_turn(w, i):
    """Emit the ordinary body's last instruction: to the setup, which stands behind it, or out."""
    poll: cython.p_uchar
    fit(w.a, 11)
    poll = emit_poll(w, i, w.block.rip)
    put8(w.a, 0x0F)
    put8(w.a, 0x80 | (i.opcode & 15))
    w.turn = w.a.at
    put32(w.a, 0)
    jump_to(w, i.rip + i.length)
    poll_end(w, i, poll)


def emit_setup(w):
    """Emit what stands in front of the strip's first instruction."""
    k: cython.int
    n: cython.int
    streams: cython.int
    t: cython.pointer(Stream)
    d: cython.pointer(Driver)
    while cython.cast(uint64_t, w.a.at) & 15:
        put8(w.a, 0x90)
    w.setup = w.a.at
    cython.cast(cython.pointer(int32_t), w.turn)[0] = cython.cast(
        int32_t, cython.cast(uint64_t, w.setup) - cython.cast(uint64_t, w.turn) - 4
    )
    for k in range(w.streams):
        t = cython.address(w.stream[k])
        t.slot = new_slot(w, cython.cast(cython.int, t.high - t.low))
        if t.driver == NONE:
            _emit_stream(w, t, 0)
    for n in range(w.drivers):
        d = cython.address(w.driver[n])
        d.limit = slot_field(w, new_slot(w, 0), 5)
        streams = 0
        for k in range(w.streams):
            t = cython.address(w.stream[k])
            if t.driver == n:
                _emit_stream(w, t, streams == 0)
                streams += 1
        _emit_limit(w, d, streams)
    for k in range(w.streams):
        t = cython.address(w.stream[k])
        if t.reg != NONE:
            load(w.a, t.reg, RBP_HOST, slot_field(w, t.slot, 4))
    while cython.cast(uint64_t, w.a.at) & 15:
        put8(w.a, 0x90)


def emit_strip_end(w, i, strip):
    """Emit the strip's last instruction: on to the next rounds, back to the setup, or out."""
    a: cython.pointer(Assembler) = w.a
    k: cython.int
    d: cython.pointer(Driver)
    out: cython.p_uchar[4]
    next_round(w, i)
    for k in range(w.drivers):
        d = cython.address(w.driver[k])
        fit(a, 13 if host(d.reg) >= 0 else 20)
        if host(d.reg) >= 0:
            op_mem(a, 0, 1, 0x3B, host(d.reg), RBP_HOST, NONE, 0, d.limit)
        else:
            load(a, S0, RBP_HOST, home(w, d.reg))
            op_mem(a, 0, 1, 0x3B, S0, RBP_HOST, NONE, 0, d.limit)
        if k == w.drivers - 1:
            jcc_to(a, CC_LE if d.kind == BY_REGISTER or d.step > 0 else CC_GE, cython.cast(uint64_t, strip) + a.delta)
        else:
            put8(a, 0x70 | (CC_LE if d.kind == BY_REGISTER or d.step > 0 else CC_GE) ^ 1)
            put8(a, 0)
            out[k] = a.at
    for k in range(w.drivers - 1):
        out[k][-1] = cython.cast(uint64_t, a.at) - cython.cast(uint64_t, out[k])
    load32(a, S0, RBP_HOST, displacement(w.s, cython.address(w.s.run)))
    put8(a, 0xE3)  # jrcxz: the ordinary body has the poll that leaves the block
    put8(a, 5)
    jmp_to(a, cython.cast(uint64_t, w.setup) + a.delta)
    jmp_to(a, cython.cast(uint64_t, w.c.executable) + w.block.entry)
