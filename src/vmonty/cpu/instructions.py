"""What each class of instructions becomes, and the instructions that fit nowhere else."""

import cython
from cython.cimports.vmonty.cpu.assembler import (
    NONE,
    load,
    mov_rr,
    op_mem,
    op_reg,
    put8,
    store,
    vex3,
)
from cython.cimports.vmonty.cpu.branches import (
    call,
    call_indirect,
    conditional,
    direct_jump,
    lookup,
    loop,
    ret,
)
from cython.cimports.vmonty.cpu.decode import (
    A_SSE,
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
    C_GATHER,
    C_JCC,
    C_JMP,
    C_JMPI,
    C_LEA,
    C_LEAVE,
    C_LOOP,
    C_MASKED,
    C_MASKMOV,
    C_MOFFS,
    C_NOP,
    C_POP,
    C_POPM,
    C_PUSH,
    C_PUSHF,
    C_PUSHI,
    C_PUSHM,
    C_RET,
    C_STRING,
    C_SYS,
    C_UD,
    C_XLAT,
    RIP_BASE,
    ROW,
)
from cython.cimports.vmonty.cpu.exits import call_helper, leave_fault, leave_system
from cython.cimports.vmonty.cpu.operands import (
    RBP_HOST,
    S0,
    S1,
    S2,
    access_op,
    ea_of,
    emit_access,
    emit_commit,
    emit_copy,
    emit_ea,
    home,
    host,
)
from cython.cimports.vmonty.cpu.stack import (
    goes_on,
    leave_frame,
    load_target,
    pop,
    pop_memory,
    push,
    push_constant,
    push_memory,
    settle_rsp,
)
from cython.cimports.vmonty.cpu.state import GS, MODE_LONG64
from cython.cimports.vmonty.cpu.stubs import displacement
from cython.cimports.vmonty.cpu.translate import EA_XLAT, Ea, Work
from cython.cimports.vmonty.cpu.vmx_exit import INTERCEPT_PAUSE, INTERCEPT_RDRAND, INTERCEPT_RDSEED


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _lea(w: cython.pointer(Work), i: cython.pointer(Insn)) -> cython.void:
    ea: Ea
    h: cython.int = host(i.reg)
    b: cython.int
    x: cython.int
    wide: cython.int = 1 if i.operand_size == 8 else 0
    if i.operand_size >= 4 and i.address_size == 8 and i.base != RIP_BASE and (i.base != NONE or i.index != NONE):
        b = host(i.base) if i.base != NONE else NONE
        if b < 0 and i.base != NONE:
            b = S0
            load(w.a, S0, RBP_HOST, home(w, i.base))
        x = host(i.index) if i.index != NONE else NONE
        if x < 0 and i.index != NONE:
            x = S1
            load(w.a, S1, RBP_HOST, home(w, i.index))
        if b != S0 and x != S1 and h >= 0:
            w.held = w.kept
        op_mem(w.a, 0, wide, 0x8D, h if h >= 0 else S0, b, x, i.scale, cython.cast(int32_t, i.displacement))
        if h < 0:
            store(w.a, S0, RBP_HOST, home(w, i.reg))
        return
    ea_of(w, i, cython.address(ea))
    ea.segment = NONE
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
    """MASKMOVQ and MASKMOVDQU: the memory operand is at rdi, which then has to hold the host address.

    The whole operand must be in memory for that; else a helper looks at each byte, between an FWAIT and a move that
    make of MASKMOVQ the x87 exception and the transition to MMX that are its.
    """
    ea: Ea
    k: cython.int
    if w.single:
        if i.pp != 1:
            put8(w.a, 0x9B)
        call_helper(w, i)
        if i.pp != 1:
            put8(w.a, 0x0F)  # movq mm0, mm0
            put8(w.a, 0x6F)
            put8(w.a, 0xC0)
        return
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
def _zero_low_vectors(w: cython.pointer(Work), i: cython.pointer(Insn)) -> cython.void:
    """VZEROUPPER and VZEROALL outside 64-bit mode, where there are no ymm8 to ymm15."""
    k: cython.int
    for k in range(8):
        vex3(w.a, 1, 1, 0, 0, k if i.l else 0, 0, 0, 0)  # vpxor k, k, k or vmovdqa k, k, of 16 bytes
        put8(w.a, 0xEF if i.l else 0x6F)
        put8(w.a, 0xC0 | (k << 3) | k)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _swap_gs(w: cython.pointer(Work)) -> cython.void:
    """SWAPGS at CPL 0 in 64-bit mode; nobody intercepts it."""
    base: int32_t = displacement(w.s, cython.address(w.s.segs[GS].base))
    other: int32_t = displacement(w.s, cython.address(w.s.kernel_gs_base))
    load(w.a, S0, RBP_HOST, base)
    load(w.a, S1, RBP_HOST, other)
    store(w.a, S1, RBP_HOST, base)
    store(w.a, S0, RBP_HOST, other)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _flag_in_state(w: cython.pointer(Work), i: cython.pointer(Insn), bit: cython.int, value: cython.int) -> cython.void:
    """Set or clear a bit of RFLAGS' second byte in the state."""
    if i.flags_in:
        call_helper(w, i)
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
    if not attributes & A_VECTOR and i.cls != C_EMMS:
        return 0
    if i.vex:
        if not key & 0x1000:
            return 6
    elif key & 0x400 or (attributes & A_SSE and not key & 0x800):
        return 6
    return 7 if key & 0x200 else 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _intercepted(w: cython.pointer(Work), i: cython.pointer(Insn)) -> cython.int:
    """Tell whether the hypervisor is to be asked about an instruction that is copied elsewhere."""
    if i.map == 0:
        return w.s.intercepts & INTERCEPT_PAUSE and i.opcode == 0x90 and i.rep == 0xF3 and not i.rex & 1
    if i.map != 1 or i.opcode != 0xC7 or i.has_memory or i.rep == 0xF3:
        return 0
    return w.s.intercepts & (INTERCEPT_RDRAND if (i.modrm >> 3 & 7) == 6 else INTERCEPT_RDSEED)


def emit_instruction(w, i):
    """Emit one instruction of a block, or the exception that it raises."""
    cls: cython.int = i.cls
    vector: cython.int
    if w.pending and not goes_on(w, i):
        settle_rsp(w)
    w.kept = w.held
    w.held = 0
    if i.fault:
        leave_fault(w, i, i.fault)
        return
    if cls == C_COPY and i.map == 0 and not i.vex and not 0xD8 <= i.opcode <= 0xDF and i.opcode != 0x9B:
        emit_copy(w, i)  # no vector, nothing that is intercepted
        return
    vector = _vector_fault(w, i)
    if vector:
        leave_fault(w, i, vector)
        return
    if w.s.intercepts and _intercepted(w, i):
        call_helper(w, i)
    elif cls == C_EMMS and i.vex and w.code_size != 8:
        _zero_low_vectors(w, i)
    elif cls in (C_COPY, C_BTM, C_EMMS) or (cls == C_MASKED and not w.single):
        emit_copy(w, i)
    elif cls == C_JCC:
        conditional(w, i)
    elif cls == C_PUSH:
        push(w, i)
    elif cls == C_POP:
        pop(w, i)
    elif cls == C_CALL:
        call(w, i)
    elif cls == C_RET:
        ret(w, i)
    elif cls == C_JMP:
        direct_jump(w, i)
    elif cls == C_LEA:
        _lea(w, i)
    elif cls == C_NOP:
        if i.opcode == 0x90 and i.rep == 0xF3:
            put8(w.a, 0xF3)
            put8(w.a, 0x90)
    elif cls == C_JMPI:
        load_target(w, i)
        lookup(w, i, 0)
        w.closed = 1
    elif cls == C_CALLI:
        call_indirect(w, i)
    elif cls == C_LOOP:
        loop(w, i)
    elif cls == C_PUSHI:
        push_constant(w, i, _sign(i.immediate, i.immediate_size), i.operand_size)
    elif cls == C_PUSHM:
        push_memory(w, i)
    elif cls == C_POPM:
        pop_memory(w, i)
    elif cls == C_LEAVE:
        leave_frame(w, i)
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
            leave_system(w, i)
    elif cls == C_MASKMOV:
        _masked_move(w, i)
    elif i.map == 1 and i.opcode == 0x01 and i.modrm == 0xF8 and w.s.cpl == 0 and w.s.mode == MODE_LONG64:
        _swap_gs(w)
    elif cls in (C_SYS, C_STRING, C_FPU, C_PUSHF, C_ENTER, C_GATHER, C_MASKED):
        call_helper(w, i)
    elif cls == C_UD:
        leave_fault(w, i, 6)
    else:
        leave_system(w, i)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _sign(value: uint64_t, size: cython.int) -> uint64_t:
    if size == 1:
        return cython.cast(uint64_t, cython.cast(int64_t, cython.cast(cython.schar, value)))
    if size == 2:
        return cython.cast(uint64_t, cython.cast(int64_t, cython.cast(cython.short, value)))
    return cython.cast(uint64_t, cython.cast(int64_t, cython.cast(int32_t, value)))
