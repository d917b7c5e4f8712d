"""Memory operands, and instructions that are copied with their operands rewritten.

A TLB check is one of two sequences. Where no flag is live::

    lea rcx, ea ; rorx r12, rcx, 8 ; and r12d, mask ; add rcx, [tag + r12] ; cmp rcx, 4096 - size ; ja slow
    mov r12, [host + r12]                                  operand: [rcx + r12]

Where flags are live, the same without touching them::

    lea rcx, ea ; pext r12, rcx, mask ; lea r12, [r12 * 2] ; mov r15, [tag + r12 * 8] ; lea r15, [r15 + rcx]
    mov r12, [host + r12 * 8] ; lea r12, [r12 + r15] ; lea rcx, [r15 + size - 1] ; pext rcx, rcx, ~0xFFF
    jrcxz hit ; jmp slow ; hit:                            operand: [r12]
"""

import cython
from cython.cimports.vmonty.cpu.assembler import (
    CC_A,
    NONE,
    Assembler,
    address,
    alu_imm,
    call_to,
    fit,
    jcc_open,
    jmp_open,
    lea,
    load,
    memory,
    mov_imm,
    mov_rr,
    op_mem,
    op_reg,
    pext_mem,
    push_imm32,
    put8,
    put64,
    rorx,
    store,
    store_imm32,
    vex3,
)
from cython.cimports.vmonty.cpu.codecache import Check
from cython.cimports.vmonty.cpu.decode import (
    A_ALIGN,
    A_CL,
    A_MODRM,
    A_SIZED,
    A_WCX,
    A_X87,
    C_BTM,
    C_MASKED,
    C_MASKMOV,
    RIP_BASE,
    ROW,
    OpRow,
    operand_bytes,
)
from cython.cimports.vmonty.cpu.state import FS, PAGE_SLOTS, SS, TLB_ENTRIES, TLB_SETS
from cython.cimports.vmonty.cpu.stubs import displacement
from cython.cimports.vmonty.cpu.tlb import (
    SLOW_ALIGNED,
    SLOW_GROUP,
    SLOW_LATE,
    SLOW_LOCK,
    SLOW_MASKED,
    SLOW_OFFSET,
    SLOW_READ,
    SLOW_SEGMENT_SHIFT,
    SLOW_SIZE_SHIFT,
    SLOW_STACK,
    SLOW_WRITE,
)
from cython.cimports.vmonty.cpu.translate import (
    EA_BIT,
    EA_PLAIN,
    EA_XLAT,
    STUB_MEMORY,
    STUB_MEMORY_LIVE,
    STUB_SLOT,
    Group,
    Stream,
    Stub,
)


def ea_of(w, i, ea):
    """Describe the memory operand of an instruction."""
    ea.base = i.base
    ea.index = i.index
    ea.scale = i.scale
    ea.displacement = i.displacement
    ea.address_size = i.address_size
    ea.segment = i.segment if i.segment >= FS or w.code_size != 8 else NONE
    ea.special = EA_PLAIN
    if i.base == RIP_BASE:
        ea.base = NONE
        ea.displacement = i.displacement + cython.cast(int64_t, i.rip + i.length)
        if i.address_size == 4:
            ea.displacement = cython.cast(uint32_t, ea.displacement)


def ea_stack(w, offset, ea):
    """Describe [rsp + offset]."""
    ea.base = 4
    ea.index = NONE
    ea.scale = 0
    ea.displacement = offset
    ea.address_size = w.stack_size
    ea.segment = NONE if w.code_size == 8 else SS
    ea.special = EA_PLAIN


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _emit_bit_offset(w: cython.pointer(Work), ea: cython.pointer(Ea)) -> cython.void:
    """Add the bytes that the bit offset reaches beyond the operand. SDM, "Bit Test"."""
    shift: cython.int = 4 if ea.operand_size == 2 else (5 if ea.operand_size == 4 else 6)
    h: cython.int = host(ea.bit_register)
    if h < 0:
        load(w.a, S1, RBP_HOST, home(w, ea.bit_register))
        h = S1
    if ea.operand_size == 2:
        op_reg(w.a, 0, 1, 0x1BF, S1, h)  # movsx r12, word
    elif ea.operand_size == 4:
        op_reg(w.a, 0, 1, 0x63, S1, h)  # movsxd
    else:
        mov_rr(w.a, S1, h)
    mov_imm(w.a, S2, shift)
    vex3(w.a, 2, 2, 1, 0, S2, 1, 0, 1)  # sarx r12, r12, r15
    put8(w.a, 0xF7)
    put8(w.a, 0xC0 | ((S1 & 7) << 3) | (S1 & 7))
    if shift == 6:
        lea(w.a, S0, S0, S1, 3, 0)
    elif shift == 5:
        lea(w.a, S0, S0, S1, 2, 0)
    else:
        lea(w.a, S0, S0, S1, 1, 0)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _emit_segment(w: cython.pointer(Work), ea: cython.pointer(Ea)) -> cython.void:
    """Outside 64-bit mode, turn the offset in rcx into a linear address; flat segments need nothing."""
    if ea.segment == NONE:
        return
    if (ea.segment == 0 or ea.segment == 2 or ea.segment == 3) and w.s.block_key & 0x80:
        return
    push_imm32(w.a, ea.what | (cython.cast(uint32_t, ea.segment) << SLOW_SEGMENT_SHIFT))
    call_to(w.a, w.c.to_linear)
    op_reg(w.a, 0, 0, 0x8B, S0, S0)


def emit_ea(w, ea):
    """Emit the linear address into rcx; clobbers r12, and r15 for bit offsets. The flags stay."""
    a: cython.pointer(Assembler) = w.a
    wide: cython.int = 1 if ea.address_size == 8 else 0
    b: cython.int = NONE
    x: cython.int = NONE
    if ea.base == NONE and ea.index == NONE:
        mov_imm(a, S0, cython.cast(uint64_t, ea.displacement))
    else:
        if ea.base != NONE:
            b = host(ea.base)
            if b < 0:
                b = S0
                load(a, S0, RBP_HOST, home(w, ea.base))
        if ea.index != NONE:
            x = host(ea.index)
            if x < 0:
                x = S1
                load(a, S1, RBP_HOST, home(w, ea.index))
        if x == NONE and ea.displacement == 0 and b >= 0 and wide:
            mov_rr(a, S0, b)
        else:
            op_mem(a, 0, wide, 0x8D, S0, b, x, ea.scale, cython.cast(int32_t, ea.displacement))
    if ea.address_size == 2:
        op_reg(a, 0, 0, 0x1B7, S0, S0)
    elif ea.address_size == 4 and ea.base == NONE and ea.index == NONE:
        op_reg(a, 0, 0, 0x8B, S0, S0)
    if ea.special == EA_BIT:
        _emit_bit_offset(w, ea)
    elif ea.special == EA_XLAT:
        op_reg(a, 0, 0, 0x1B6, S1, 0)
        op_mem(a, 0, wide, 0x8D, S0, S0, S1, 0, 0)
    if ea.special and ea.address_size != 8:  # what was added wraps around, too
        op_reg(a, 0, 0, 0x1B7 if ea.address_size == 2 else 0x8B, S0, S0)
    if w.code_size != 8:
        _emit_segment(w, ea)
    elif ea.segment != NONE:
        load(a, S1, RBP_HOST, displacement(w.s, cython.address(w.s.segs[ea.segment].base)))
        lea(a, S0, S0, S1, 0, 0)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _stub(w: cython.pointer(Work), kind: cython.int, patch: cython.p_uchar, what: uint32_t,
          ea: cython.pointer(Ea)) -> cython.void:  # fmt: skip
    k: cython.pointer(Stub) = cython.address(w.stub[w.stubs])
    w.stubs += 1
    k.kind = kind
    k.patch = patch
    k.back = w.a.at
    k.what = what
    k.ea.base = ea.base
    k.ea.index = ea.index
    k.ea.scale = ea.scale
    k.ea.segment = ea.segment
    k.ea.address_size = ea.address_size
    k.ea.special = ea.special
    k.ea.bit_register = ea.bit_register
    k.ea.operand_size = ea.operand_size
    k.ea.displacement = ea.displacement
    k.ea.what = ea.what


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _is_loaded(w: cython.pointer(Work), g: cython.int) -> cython.int:
    return g >= 0 and (w.loaded >> g) & 1


def new_slot(w, size):
    """Take a slot for an access, or for several that lie within ``size`` bytes; there must be one."""
    n: cython.int = w.s.page_slots_used
    w.s.page_slots_used += 1
    w.s.slot_tags[n] = cython.cast(uint64_t, 1) << 62
    w.s.page_slots[n].last = 0
    w.s.page_slots[n].host = 0
    w.s.page_slots[n].size = size
    return n


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _slot_of(w: cython.pointer(Work), i: cython.pointer(Insn), size: cython.int) -> cython.int:
    """Give the slot of an instruction's operand: in each round of a loop the same, if no others share it."""
    number: cython.int
    if i.group and not w.strip:
        return new_slot(w, size)
    number = (i - cython.address(w.insns[0])) % w.count
    if w.slot_of[number] < 0:
        w.slot_of[number] = new_slot(w, size)
    return w.slot_of[number]


def slot_field(w, slot, field):
    """Give the displacement from rbp of a field of a slot: 0 host, 1 last, 3 delta, 4 base, 5 limit; -1 its tag."""
    if field < 0:
        return displacement(w.s, cython.address(w.s.slot_tags[slot]))
    return displacement(w.s, cython.address(w.s.page_slots[slot])) + 8 * field


def emit_slot_check(w, slot, what, ea, write):
    """Turn the linear address in rcx into the offset in the slot's window; where it does not fit, go to a stub.

    ``what`` 0: it is for a strip, and the stub goes to the loop's ordinary body if there is no window.
    """
    a: cython.pointer(Assembler) = w.a
    at: cython.p_uchar
    k: cython.pointer(Stub)
    op_mem(a, 0, 1, 0x03, S0, RBP_HOST, NONE, 0, slot_field(w, slot, -1))
    fit(a, 13)
    op_mem(a, 0, 1, 0x3B, S0, RBP_HOST, NONE, 0, slot_field(w, slot, 1))
    at = jcc_open(a, CC_A)
    _stub(w, STUB_SLOT, at, what, ea)
    k = cython.address(w.stub[w.stubs - 1])
    k.slot = slot
    k.write = write


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _in_stream(w: cython.pointer(Work), i: cython.pointer(Insn), ea: cython.pointer(Ea)) -> cython.int:
    """In a strip, address an operand by what the setup has kept; 0 when it belongs to no stream."""
    number: cython.int = w.stream_of[i - cython.address(w.insns[0])]
    t: cython.pointer(Stream)
    reg: cython.int
    if number == 0:
        return 0
    t = cython.address(w.stream[number - 1])
    w.disp = cython.cast(int32_t, ea.displacement - t.low)
    w.index = NONE
    if t.driver != NONE:
        reg = w.driver[t.driver].reg
        w.index = host(reg)
        if w.index < 0:
            w.index = S1
            load(w.a, S1, RBP_HOST, home(w, reg))
        if reg != t.base:
            w.scale = t.scale
    w.base = t.reg
    if t.reg == NONE:
        w.base = S0
        load(w.a, S0, RBP_HOST, slot_field(w, t.slot, 4))
    return 1


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _waits(i: cython.pointer(Insn)) -> cython.int:
    """Tell whether an instruction is one of the x87 that report a pending exception: not FNSTCW and FNSTSW."""
    return ROW[i.row].attributes & A_X87 and ((i.opcode != 0xD9 and i.opcode != 0xDD) or (i.modrm >> 3 & 7) != 7)


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _put_word(a: cython.pointer(Assembler), source: cython.p_uchar, at: cython.int) -> cython.void:
    """Copy eight bytes to where code is emitted next, and ``at`` bytes on."""
    cython.cast(cython.pointer(uint64_t), a.at + at)[0] = cython.cast(cython.pointer(uint64_t), source)[0]


def emit_access(w, i, ea, size, access, stack):
    """Emit the way to one memory operand; w.base and w.index then address it in the host.

    ``access``: 1 read, 2 write, 3 both. rcx, r12 (and r15 where flags are live) are clobbered.
    """
    a: cython.pointer(Assembler) = w.a
    what: uint32_t = cython.cast(uint32_t, i.rip - w.block.rip) & SLOW_OFFSET
    table: int32_t
    at: cython.p_uchar
    whole: Ea
    g: cython.pointer(Group)
    check: cython.pointer(Check)
    k: cython.int
    constant: cython.int = (
        ea.base == NONE and ea.index == NONE and ea.segment == NONE and ea.special == EA_PLAIN and w.code_size == 8
    )
    slot: int32_t = 0
    if access & 1:
        what |= SLOW_READ
    if access & 2:
        what |= SLOW_WRITE
    if stack or ea.base == 4 or ea.base == 5:
        what |= SLOW_STACK
    if ROW[i.row].attributes & A_ALIGN and (size == 16 or size == 32):
        what |= SLOW_ALIGNED
    if ROW[i.row].cls in (C_MASKED, C_MASKMOV):
        what |= SLOW_MASKED
    elif access & 2 and _waits(i):
        what |= SLOW_LATE if w.single else SLOW_MASKED
    what |= cython.cast(uint32_t, size) << SLOW_SIZE_SHIFT
    w.disp = 0
    w.scale = 0
    if w.strip and _in_stream(w, i, ea):
        return
    if i.group and not w.strip:
        g = cython.address(w.group[i.group - 1])
        if not i.leader:
            w.base = w.held_base
            if w.kept != i.group:
                load(a, S0, RBP_HOST, displacement(w.s, cython.address(w.s.slots[i.group - 1])))
                w.base = S0
            w.held = i.group
            w.held_base = w.base
            w.index = NONE
            w.disp = i.group_offset
            return
        whole.base = ea.base
        whole.index = ea.index
        whole.scale = ea.scale
        whole.segment = NONE
        whole.address_size = 8
        whole.special = EA_PLAIN
        whole.bit_register = 0
        whole.operand_size = 0
        whole.displacement = ea.displacement - i.group_offset
        size = cython.cast(cython.int, g.high - g.low)
        ea = cython.address(whole)
        access = 2 if g.write else 1
        what = (cython.cast(uint32_t, i.rip - w.block.rip) & SLOW_OFFSET) | SLOW_GROUP
        what |= SLOW_WRITE if g.write else SLOW_READ
        what |= cython.cast(uint32_t, size) << SLOW_SIZE_SHIFT
    ea.what = what
    emit_ea(w, ea)
    if w.single:
        if i.lock or (access == 3 and i.map == 0 and (i.opcode & 0xFE) == 0x86):
            what |= SLOW_LOCK
        push_imm32(a, what)
        call_to(a, w.c.careful_access)
        w.base = S0
        w.index = NONE
        return
    if access & 2:
        table = displacement(w.s, cython.address(w.s.tlb_write[w.s.tlb_set][0]))
    else:
        table = displacement(w.s, cython.address(w.s.tlb_read[w.s.tlb_set][0]))
    if constant:
        slot = cython.cast(int32_t, (cython.cast(uint64_t, ea.displacement) >> 12) & (TLB_ENTRIES - 1)) * 16
    if (
        i.flags_in == 0
        and w.in_loop
        and not constant
        and w.s.page_slots_used < PAGE_SLOTS
        and not _is_loaded(w, ea.base)
        and not _is_loaded(w, ea.index)
    ):
        slot = _slot_of(w, i, size)
        emit_slot_check(w, slot, what, ea, 1 if access & 2 else 0)
        load(a, S1, RBP_HOST, slot_field(w, slot, 0))
        w.base = S0
        w.index = S1
        if i.group and not w.strip:
            lea(a, S0, S0, S1, 0, 0)
            w.index = NONE
            _keep_group(w, i)
        return
    if i.flags_in == 0:
        check = cython.address(w.c.check[(TLB_SETS if access & 2 else 0) + w.s.tlb_set])
        if constant:
            op_mem(a, 0, 1, 0x03, S0, RBP_HOST, NONE, 0, table + slot)
        else:
            for k in range(3):
                _put_word(a, cython.address(check.look[8 * k]), 8 * k)
            a.at += check.look_size
        fit(a, 13)
        alu_imm(a, 1, 7, S0, 4096 - size)
        at = jcc_open(a, CC_A)
        if constant:
            load(a, S1, RBP_HOST, table + slot + 8)
        else:
            _put_word(a, cython.address(check.use[0]), 0)
            a.at += check.use_size
        _stub(w, STUB_MEMORY, at, what, ea)
        w.base = S0
        w.index = S1
        if i.group and not w.strip:
            lea(a, S0, S0, S1, 0, 0)
            w.index = NONE
            _keep_group(w, i)
        return
    if constant:
        load(a, S2, RBP_HOST, table + slot)
        lea(a, S2, S2, S0, 0, 0)
        load(a, S1, RBP_HOST, table + slot + 8)
    else:
        pext_mem(a, S1, S0, RBP_HOST, displacement(w.s, cython.address(w.s.index_mask)))
        lea(a, S1, S1, S1, 0, 0)
        op_mem(a, 0, 1, 0x8B, S2, RBP_HOST, S1, 3, table)
        lea(a, S2, S2, S0, 0, 0)
        op_mem(a, 0, 1, 0x8B, S1, RBP_HOST, S1, 3, table + 8)
    lea(a, S1, S1, S2, 0, 0)
    lea(a, S0, S2, NONE, 0, size - 1)
    pext_mem(a, S0, S0, RBP_HOST, displacement(w.s, cython.address(w.s.page_mask)))
    fit(a, 7)
    put8(a, 0xE3)
    put8(a, 5)
    at = jmp_open(a)
    _stub(w, STUB_MEMORY_LIVE, at, what, ea)
    w.base = S1
    w.index = NONE
    if i.group and not w.strip:
        _keep_group(w, i)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _keep_group(w: cython.pointer(Work), i: cython.pointer(Insn)) -> cython.void:
    """Keep the host address of the group's lowest byte for its other members."""
    store(w.a, w.base, RBP_HOST, displacement(w.s, cython.address(w.s.slots[i.group - 1])))
    w.held = i.group
    w.held_base = w.base
    w.disp = i.group_offset


def emit_commit(w, access):
    """In a careful block, let the writes take effect."""
    if w.single and access & 2:
        call_to(w.a, w.c.careful_commit)


def access_op(w, prefix, wide, opcode, reg):
    """Emit an instruction on the memory operand that emit_access prepared."""
    op_mem(w.a, prefix, wide, opcode, reg, w.base, w.index, w.scale, w.disp)


def to_one_register(w, reg):
    """Bring the host address into one register, rcx or r12, freeing the other."""
    w.held = 0
    if w.index != NONE or w.disp:
        lea(w.a, reg, w.base, w.index, w.scale, w.disp)
    elif w.base != reg:
        mov_rr(w.a, reg, w.base)
    w.base = reg
    w.index = NONE
    w.scale = 0
    w.disp = 0


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _prefix66(i: cython.pointer(Insn), r: cython.pointer(OpRow)) -> cython.int:
    if r.attributes & A_SIZED:
        return i.operand_size == 2
    return r.prefix == 1


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _body(w: cython.pointer(Work), i: cython.pointer(Insn), reg: cython.int, rm: cython.int, base: cython.int,
          index: cython.int, disp: cython.int, vvvv: cython.int, force_rex: cython.int) -> cython.void:  # fmt: skip
    """Emit the instruction again with other registers; ``rm`` NONE takes the memory operand [base + index + disp].

    The index is scaled by w.scale.
    """
    a: cython.pointer(Assembler) = w.a
    r: cython.pointer(OpRow) = cython.address(ROW[i.row])
    p: cython.p_uchar
    rex: cython.int
    high_b: cython.int = rm >> 3 if rm >= 0 else (base >> 3 if base >= 0 else 0)
    high_x: cython.int = 1 if rm < 0 and index >= 8 else 0
    if i.vex:
        vex3(a, i.map, i.pp, i.w, i.l, vvvv, reg >> 3, high_x, high_b)
        put8(a, i.opcode)
    else:
        p = a.at
        if i.lock:
            p[0] = 0xF0
            p += 1
        if _prefix66(i, r):
            p[0] = 0x66
            p += 1
        if r.prefix >= 2:
            p[0] = 0xF3 if r.prefix == 2 else 0xF2
            p += 1
        if r.in_opcode:
            rex = (i.w << 3) | (reg >> 3)
        else:
            rex = (i.w << 3) | ((reg >> 3) << 2) | (high_x << 1) | high_b
        if rex or force_rex:
            p[0] = 0x40 | rex
            p += 1
        if i.map:
            p[0] = 0x0F
            p += 1
            if i.map >= 2:
                p[0] = 0x38 if i.map == 2 else 0x3A
                p += 1
        if r.in_opcode:
            p[0] = (i.opcode & 0xF8) | (reg & 7)
        elif i.opcode == 0x82 and i.map == 0:  # what 64-bit mode dropped is the same as 80
            p[0] = 0x80
        else:
            p[0] = i.opcode
        a.at = p + 1
    if r.attributes & A_MODRM:
        if rm >= 0:
            put8(a, 0xC0 | ((reg & 7) << 3) | (rm & 7))
        else:
            memory(a, reg, base, index, w.scale if index != NONE else 0, disp)
    if i.immediate_size:
        put64(a, i.immediate)  # what is too much is overwritten
        a.at += cython.cast(cython.int, i.immediate_size) - 8


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _loose_body(w: cython.pointer(Work), i: cython.pointer(Insn)) -> cython.void:
    """Emit an instruction again whose memory operand alone is elsewhere: [w.base + w.index + w.disp]."""
    a: cython.pointer(Assembler) = w.a
    p: cython.p_uchar = a.at
    rex: cython.int = (i.w << 3) | ((i.reg >> 3) << 2) | ((w.index > 7) << 1) | (w.base > 7)
    p[0] = 0x40 | rex
    p += rex != 0
    p[0] = 0x0F
    p += i.map
    p[0] = i.opcode
    p = address(p + 1, i.reg, w.base, w.index, w.scale if w.index != NONE else 0, w.disp)
    cython.cast(cython.pointer(uint64_t), p)[0] = i.immediate  # what is too much is overwritten
    a.at = p + i.immediate_size


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _emit_high(w: cython.pointer(Work), i: cython.pointer(Insn), g: cython.int, g_byte: cython.int,
               g_access: cython.int, e: cython.int, e_access: cython.int) -> cython.void:  # fmt: skip
    """Emit an instruction that uses AH, CH, DH or BH: no REX prefix may stand on it.

    ``g`` and ``e`` are the register operands as encoded (NONE when absent); ``g_byte`` tells a byte operand.
    """
    a: cython.pointer(Assembler) = w.a
    h: cython.int
    reg: cython.int = i.reg
    ea: Ea
    if i.has_memory:
        ea_of(w, i, cython.address(ea))
        emit_access(w, i, cython.address(ea), i.memory_size, i.memory_access, 0)
        to_one_register(w, S0)
        if (reg & 3) == 1:
            rorx(a, 1, GUEST_RCX, GUEST_RCX, 8)
            _body(w, i, GUEST_RCX, NONE, S0, NONE, 0, 0, 0)
            rorx(a, 1, GUEST_RCX, GUEST_RCX, 56)
        else:
            _body(w, i, reg, NONE, S0, NONE, 0, 0, 0)
        emit_commit(w, i.memory_access)
        return
    if g != NONE and not g_byte:
        rorx(a, 1, S0, host(e - 4), 8)
        h = host(g)
        if h < 0:
            h = S2
            load(a, S2, RBP_HOST, home(w, g))
        _body(w, i, h, S0, NONE, NONE, 0, 0, 0)
        if h == S2 and g_access & 2:
            store(a, S2, RBP_HOST, home(w, g))
        return
    if (g != NONE and (g & 3) == 1) or (e != NONE and (e & 3) == 1) or ROW[i.row].attributes & A_CL:
        mov_rr(a, S0, GUEST_RCX)
        _body(w, i, reg, e, NONE, NONE, 0, 0, 0)
        mov_rr(a, GUEST_RCX, S0)
    else:
        _body(w, i, reg, e, NONE, NONE, 0, 0, 0)


def emit_copy(w, i):
    """Emit an instruction as it is, but for its registers and its memory operand."""
    a: cython.pointer(Assembler) = w.a
    r: cython.pointer(OpRow) = cython.address(ROW[i.row])
    k: cython.int
    g: cython.int = NONE  # guest numbers of the G or Z, E or R, and B operands
    e: cython.int = NONE
    b: cython.int = NONE
    g_access: cython.int = 0
    e_access: cython.int = 0
    b_access: cython.int = 0
    g_size: cython.int = 8
    e_size: cython.int = 8
    g_byte: cython.int = 0
    e_byte: cython.int = 0
    e_narrow: cython.int = 0
    reg: cython.int = i.reg
    rm: cython.int = i.rm
    vvvv: cython.int = i.vvvv
    base: cython.int = NONE
    index: cython.int = NONE
    disp: cython.int = 0
    temporary: cython.int
    direct: cython.int = 0
    ea: Ea
    force_rex: cython.int = 0
    if i.verbatim:
        move(w, i)
        return
    if i.loose:
        ea_of(w, i, cython.address(ea))
        emit_access(w, i, cython.address(ea), i.memory_size, i.memory_access, 0)
        _loose_body(w, i)
        emit_commit(w, i.memory_access)
        return
    if (
        (i.opcode | 2) in (0x2B, 0x33)
        and i.map == 0
        and not i.vex
        and not i.has_memory
        and i.reg == i.rm
        and i.operand_size >= 4
        and host(i.reg) < 0
    ):  # SUB and XOR of a register with itself: what it holds does not matter
        op_reg(a, 0, 0, i.opcode | 2, S0, S0)
        store(a, S0, RBP_HOST, home(w, i.reg))
        return
    if r.g:
        k = r.g - 1
        g = i.reg
        g_access = r.access[k]
        g_size = operand_bytes(i, k)
        g_byte = r.size[k] == ord("b")
    if r.e and not i.has_memory:
        k = r.e - 1
        e = i.rm
        e_access = r.access[k]
        e_size = operand_bytes(i, k)
        e_byte = r.size[k] == ord("b")
        e_narrow = r.size[k] == ord("1") or r.size[k] == ord("2") or r.size[k] == ord("4")
    if r.b:
        b = i.vvvv
        b_access = r.access[r.b - 1]
    if not i.rex and ((g_byte and 4 <= g < 8) or (e_byte and 4 <= e < 8)):
        _emit_high(w, i, g, g_byte, g_access, e, e_access)
        return
    if i.has_memory:
        ea_of(w, i, cython.address(ea))
        if r.cls == C_BTM:
            ea.special = EA_BIT
            ea.bit_register = i.reg
            ea.operand_size = i.operand_size
        if _waits(i) or r.letter[0] == ord("P") or r.letter[1] == ord("P"):  # x87, or with an MMX register
            put8(a, 0x9B)  # fwait: an exception that is pending comes before those of the operand
        emit_access(w, i, cython.address(ea), i.memory_size, i.memory_access, 0)
        if r.attributes & (A_CL | A_WCX):
            to_one_register(w, S1)
        elif b != NONE and host(b) < 0:
            to_one_register(w, S0)
        base = w.base
        index = w.index
        disp = w.disp
        rm = NONE
    # ---- the register operand in modrm.rm -----------------------------------------------------------
    temporary = S1 if r.attributes & A_CL else S0
    if e != NONE:
        rm = host(e)
        if rm < 0:
            if r.cls == C_BTM:  # in memory a bit offset would reach beyond the operand
                direct = 0
            elif e_access == 1 or (
                e_size == 8
                and not e_narrow
                and (g == NONE or host(g) >= 0)
                and i.opcode != 135
                and r.letter[0] == ord("E")
            ):
                direct = 1
            if direct:
                base = RBP_HOST
                disp = home(w, e)
            else:
                rm = temporary
                if e_access & 1 or (e_size < 4 and not e_narrow):
                    load(a, rm, RBP_HOST, home(w, e))
        if e_byte and 4 <= rm < 8:
            force_rex = 1
    # ---- the one in modrm.reg (or the opcode), and the one in VEX.vvvv --------------------------------
    if g != NONE:
        reg = host(g)
        if reg < 0:
            reg = S2
            if g_access & 1 or g_size < 4:
                load(a, S2, RBP_HOST, home(w, g))
        if g_byte and 4 <= reg < 8:
            force_rex = 1
        if r.cls == C_BTM and i.has_memory:  # the bits beyond the operand are in the address
            if i.operand_size == 2:
                pext_mem(a, S2, reg, RBP_HOST, displacement(w.s, cython.address(w.s.bit_mask_16)))
            elif i.operand_size == 4:
                pext_mem(a, S2, reg, RBP_HOST, displacement(w.s, cython.address(w.s.bit_mask_32)))
            else:
                pext_mem(a, S2, reg, RBP_HOST, displacement(w.s, cython.address(w.s.bit_mask_64)))
            reg = S2
    if b != NONE:
        vvvv = host(b)
        if vvvv < 0:
            vvvv = S1
            if b_access & 1:
                load(a, S1, RBP_HOST, home(w, b))
    if r.attributes & A_CL:
        mov_rr(a, S0, GUEST_RCX)
    _body(w, i, reg, rm, base, index, disp, vvvv, force_rex)
    if r.attributes & A_WCX:
        mov_rr(a, GUEST_RCX, S0)
    if b != NONE and vvvv == S1 and b_access & 2:
        store(a, S1, RBP_HOST, home(w, b))
    if g != NONE and g_access & 2 and host(g) < 0:
        store(a, S2, RBP_HOST, home(w, g))
    if e != NONE and e_access & 2 and host(e) < 0 and not direct:
        store(a, rm, RBP_HOST, home(w, e))
    if i.has_memory:
        if w.single and i.memory_access & 2 and _waits(i):  # fnstsw, fnstcw: an unmasked exception stores nothing
            op_mem(a, 0, 0, 0xDD, 7, RBP_HOST, NONE, 0, displacement(w.s, cython.address(w.s.careful_fsw)))
            op_mem(a, 0, 0, 0xD9, 7, RBP_HOST, NONE, 0, displacement(w.s, cython.address(w.s.careful_fcw)))
            store_imm32(a, RBP_HOST, displacement(w.s, cython.address(w.s.careful_x87)), 1)
        emit_commit(w, i.memory_access)
