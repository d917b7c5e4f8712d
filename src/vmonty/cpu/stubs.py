"""Code that all blocks of a cache share: entry and exit, slow paths of memory, system instructions, lookups, x87."""

import cython
from cython.cimports.vmonty.cpu.assembler import (
    NONE,
    alu_imm,
    here,
    jmp_to,
    lea,
    load,
    load32,
    memory,
    mov_imm,
    mov_rr,
    mov_rr32,
    op_mem,
    op_reg,
    pext_mem,
    put8,
    rorx,
    store,
    store32,
    store_imm32,
    vex3,
)
from cython.cimports.vmonty.cpu.codecache import (
    OUT_FAULT,
    OUT_INDIRECT,
    OUT_LINK,
    OUT_NEXT,
    OUT_POLL,
    OUT_SYSTEM,
    OUT_TRAP,
)
from cython.cimports.vmonty.cpu.state import (
    ARITHMETIC_FLAGS,
    LARGE_ENTRIES,
    TLB_ENTRIES,
    TLB_SETS,
)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _kept(g: cython.int) -> cython.int:
    """Give the host register that holds guest register ``g``, or NONE."""
    if g == 1:
        return 14
    if g == 4:
        return 13
    if g == 5 or g >= 12:
        return NONE
    return g


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _save_all(a: cython.pointer(Assembler), s: cython.pointer(CpuState)) -> cython.void:
    """Store every guest register and merge the flags into rflags; clobbers rax rcx rdx."""
    g: cython.int
    for g in range(16):
        if _kept(g) >= 0:
            store(a, _kept(g), 5, displacement(s, cython.address(s.gpr[g])))
    put8(a, 0x9F)  # lahf
    put8(a, 0x0F)  # seto al
    put8(a, 0x90)
    put8(a, 0xC0)
    load32(a, 1, 5, displacement(s, cython.address(s.rflags)))
    alu_imm(a, 0, 4, 1, ~ARITHMETIC_FLAGS)
    put8(a, 0x0F)  # movzx edx, ah
    put8(a, 0xB6)
    put8(a, 0xD4)
    alu_imm(a, 0, 4, 2, 0xD5)
    op_reg(a, 0, 0, 0x0B, 1, 2)
    put8(a, 0x0F)  # movzx edx, al
    put8(a, 0xB6)
    put8(a, 0xD0)
    put8(a, 0xC1)  # shl edx, 11
    put8(a, 0xE2)
    put8(a, 11)
    op_reg(a, 0, 0, 0x0B, 1, 2)
    store32(a, 1, 5, displacement(s, cython.address(s.rflags)))


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _load_all(a: cython.pointer(Assembler), s: cython.pointer(CpuState)) -> cython.void:
    """Load the flags and every guest register that lives in the host's; rcx, r12, r15 are left alone."""
    g: cython.int
    load32(a, 0, 5, displacement(s, cython.address(s.rflags)))
    mov_rr32(a, 2, 0)
    put8(a, 0xC1)  # shr edx, 11
    put8(a, 0xEA)
    put8(a, 11)
    alu_imm(a, 0, 4, 2, 1)
    put8(a, 0x88)  # mov ah, al
    put8(a, 0xC4)
    put8(a, 0x88)  # mov al, dl
    put8(a, 0xD0)
    put8(a, 0x04)  # add al, 127: sets OF when al was 1
    put8(a, 0x7F)
    put8(a, 0x9E)  # sahf
    for g in range(16):
        if _kept(g) >= 0:
            load(a, _kept(g), 5, displacement(s, cython.address(s.gpr[g])))


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _begin_host_function(a: cython.pointer(Assembler)) -> cython.void:
    """Emit what a function called from compiled code begins with: its state is in rdi, and goes to rbp."""
    k: cython.int
    put8(a, 0x53)  # push rbx, rbp, r12-r15
    put8(a, 0x55)
    for k in range(4):
        put8(a, 0x41)
        put8(a, 0x54 + k)
    alu_imm(a, 1, 5, 4, 8)  # sub rsp, 8: calls from here find the stack aligned
    lea(a, 5, 7, NONE, 0, 128)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _end_host_function(a: cython.pointer(Assembler)) -> cython.void:
    """Emit its end: what was pushed, and the return."""
    k: cython.int
    alu_imm(a, 1, 0, 4, 8)
    for k in range(4):
        put8(a, 0x41)
        put8(a, 0x5F - k)
    put8(a, 0x5D)
    put8(a, 0x5B)
    put8(a, 0xC3)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _repeat(a: cython.pointer(Assembler), k: cython.int, opcode: cython.int) -> cython.void:
    """REP MOVS or STOS of elements of 1 << k bytes, by the opcode for bytes; and return."""
    if k == 1:
        put8(a, 0x66)
    put8(a, 0xF3)
    if k == 3:
        put8(a, 0x48)
    put8(a, opcode if k == 0 else opcode + 1)
    put8(a, 0xC3)


def make_stubs(c, s):
    a: cython.pointer(Assembler) = cython.address(c.a)
    code: uint64_t
    c.enter = here(a)
    _begin_host_function(a)
    store(a, 4, 5, displacement(s, cython.address(s.host_rsp)))
    mov_rr(a, 12, 6)
    load(a, 4, 5, displacement(s, cython.address(s.shadow_top)))
    _load_all(a, s)
    put8(a, 0x41)  # jmp r12
    put8(a, 0xFF)
    put8(a, 0xE4)
    c.leave = here(a)
    _save_all(a, s)
    code = here(a)  # everything saved already
    store(a, 4, 5, displacement(s, cython.address(s.shadow_top)))
    load(a, 4, 5, displacement(s, cython.address(s.host_rsp)))
    put8(a, 0xFC)  # cld
    load32(a, 0, 5, displacement(s, cython.address(s.leave_code)))
    _end_host_function(a)
    _guard_stubs(c, s)
    _memory_stubs(c, s, code)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _guard_stubs(c: cython.pointer(CodeCache), s: cython.pointer(CpuState)) -> cython.void:
    """Emit guard(), and where hosttraps goes on when what it called cannot."""
    a: cython.pointer(Assembler) = cython.address(c.a)
    c.guard = here(a)
    _begin_host_function(a)
    store(a, 4, 5, displacement(s, cython.address(s.guard_rsp)))
    put8(a, 0xFF)  # call rsi
    put8(a, 0xD6)
    c.abandon = here(a)  # rbp is what it was: a called function keeps it
    load(a, 4, 5, displacement(s, cython.address(s.guard_rsp)))
    put8(a, 0xFC)  # cld
    _end_host_function(a)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _leave_with(c: cython.pointer(CodeCache), s: cython.pointer(CpuState), code: cython.int,
                field: cython.p_void) -> uint64_t:  # fmt: skip
    """Emit a stub that stores r15 into ``field`` and leaves with ``code``."""
    a: cython.pointer(Assembler) = cython.address(c.a)
    address: uint64_t = here(a)
    store(a, 15, 5, displacement(s, field))
    store_imm32(a, 5, displacement(s, cython.address(s.leave_code)), code)
    jmp_to(a, c.leave)
    return address


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _call_c(c: cython.pointer(CodeCache), s: cython.pointer(CpuState), function: cython.p_void,
            arguments: cython.int, leave_saved: uint64_t, wants_address: cython.int) -> uint64_t:  # fmt: skip
    """Emit a stub that calls a compiled function with the guest's state saved.

    ``arguments`` 2: (state, rcx, immediate pushed before the call, return address), popped on return;
    1: (state, r15, return address); 0: (state). The result 0 leaves the block when ``wants_address``, else a
    result that is not 0 does; leave_code is then the function's business.
    """
    a: cython.pointer(Assembler) = cython.address(c.a)
    address: uint64_t = here(a)
    at: cython.p_uchar
    if arguments == 2:
        store(a, 1, 5, displacement(s, cython.address(s.temp[0])))
    _save_all(a, s)
    lea(a, 7, 5, NONE, 0, -128)
    if arguments == 2:
        load(a, 6, 5, displacement(s, cython.address(s.temp[0])))
        op_mem(a, 0, 0, 0x8B, 2, 4, NONE, 0, 8)
        load(a, 1, 4, 0)
    elif arguments == 1:
        mov_rr(a, 6, 15)
        load(a, 2, 4, 0)
    store(a, 4, 5, displacement(s, cython.address(s.shadow_top)))
    load(a, 4, 5, displacement(s, cython.address(s.host_rsp)))
    put8(a, 0xFC)
    mov_imm(a, 0, cython.cast(uint64_t, function))
    put8(a, 0xFF)  # call rax
    put8(a, 0xD0)
    load(a, 4, 5, displacement(s, cython.address(s.shadow_top)))
    op_reg(a, 0, 1 if wants_address else 0, 0x85, 0, 0)  # test rax, rax
    put8(a, 0x75 if wants_address else 0x74)  # over the way out
    at = a.at
    put8(a, 0)
    lea(a, 4, 4, NONE, 0, 16 if arguments == 2 else 8)
    if not wants_address:
        store32(a, 0, 5, displacement(s, cython.address(s.leave_code)))
    jmp_to(a, leave_saved)
    at[0] = cython.cast(uint64_t, a.at) - cython.cast(uint64_t, at) - 1
    if wants_address:
        mov_rr(a, 1, 0)
    _load_all(a, s)
    if arguments == 2:
        put8(a, 0xC2)  # ret 8
        put8(a, 8)
        put8(a, 0)
    else:
        put8(a, 0xC3)
    return address


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _execute_stub(c: cython.pointer(CodeCache), s: cython.pointer(CpuState), function: cython.p_void,
                  leave_saved: uint64_t) -> uint64_t:  # fmt: skip
    """Emit a stub that calls function(state, r15) at the end of a block, and goes where the result says or leaves."""
    a: cython.pointer(Assembler) = cython.address(c.a)
    address: uint64_t = here(a)
    at: cython.p_uchar
    _save_all(a, s)
    lea(a, 7, 5, NONE, 0, -128)
    mov_rr(a, 6, 15)
    store(a, 4, 5, displacement(s, cython.address(s.shadow_top)))
    load(a, 4, 5, displacement(s, cython.address(s.host_rsp)))
    put8(a, 0xFC)
    mov_imm(a, 0, cython.cast(uint64_t, function))
    put8(a, 0xFF)  # call rax
    put8(a, 0xD0)
    load(a, 4, 5, displacement(s, cython.address(s.shadow_top)))
    op_reg(a, 0, 1, 0x85, 0, 0)  # test rax, rax
    put8(a, 0x75)
    at = a.at
    put8(a, 0)
    jmp_to(a, leave_saved)
    at[0] = cython.cast(uint64_t, a.at) - cython.cast(uint64_t, at) - 1
    mov_rr(a, 12, 0)
    _load_all(a, s)
    put8(a, 0x41)  # jmp r12
    put8(a, 0xFF)
    put8(a, 0xE4)
    return address


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _fpu_stubs(c: cython.pointer(CodeCache)) -> cython.void:
    """Emit void f(buffer, mask) for each state instruction; see fpu for the numbering."""
    a: cython.pointer(Assembler) = cython.address(c.a)
    n: cython.int
    digit: cython.int
    for n in range(13):
        c.fpu[n] = here(a)
        mov_rr(a, 0, 6)
        mov_rr(a, 2, 6)
        op_reg(a, 0, 1, 0xC1, 5, 2)  # shr rdx, 32
        put8(a, 32)
        if n < 4:
            digit = 0 if n == 0 else (1 if n == 1 else (4 if n == 2 else 5))
            op_mem(a, 0, 1, 0x1AE, digit, 7, NONE, 0, 0)
        elif n == 12:
            op_mem(a, 0, 1, 0x1C7, 4, 7, NONE, 0, 0)
        else:  # 4 fnstenv 5 its 16-bit form 6 fldenv 7 its 16-bit form, 8 fnsave … 10 frstor …
            op_mem(a, 0x66 if n & 1 else 0, 0, 0xDD if n >= 8 else 0xD9, 4 if n & 2 else 6, 7, NONE, 0, 0)
        put8(a, 0xC3)
    for digit in range(2):
        if digit:
            c.fill_vectors = here(a)
        else:
            c.store_vectors = here(a)
        for n in range(16):  # vmovdqu
            vex3(a, 1, 2, 0, 1, 0, n >> 3, 0, 0)
            put8(a, 0x6F if digit else 0x7F)
            memory(a, n, 7, NONE, 0, 32 * n)
        put8(a, 0xC3)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _fill_slot(a: cython.pointer(Assembler), s: cython.pointer(CpuState), tag: int32_t, host: int32_t) -> cython.void:
    """Emit the copy of a TLB entry, at [rbp + r12] and ``tag`` and ``host``, into slot r15 / 8."""
    slot: int32_t = displacement(s, cython.address(s.page_slots[0]))
    op_mem(a, 0, 1, 0x8B, 1, 5, 12, 0, tag)
    op_mem(a, 0, 1, 0x89, 1, 5, 15, 0, displacement(s, cython.address(s.slot_tags[0])))
    lea(a, 15, 15, 15, 1, 0)  # PageSlot has 48 bytes
    op_mem(a, 0, 1, 0x03, 1, 5, 12, 0, host)
    op_mem(a, 0, 1, 0x89, 1, 5, 15, 1, slot + 24)
    op_mem(a, 0, 1, 0x8B, 1, 5, 12, 0, host)
    op_mem(a, 0, 1, 0x89, 1, 5, 15, 1, slot)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _window_stub(c: cython.pointer(CodeCache), s: cython.pointer(CpuState), large: int32_t, table: int32_t) -> uint64_t:
    """Emit the routine that fills a slot from the TLB for large pages or the other one; where both miss it stays.

    In: rcx a linear address, r15 eight times the slot's number. Clobbers rcx, r12, r15 and the flags.
    """
    a: cython.pointer(Assembler) = cython.address(c.a)
    address: uint64_t = here(a)
    slot: int32_t = displacement(s, cython.address(s.page_slots[0]))
    at: cython.p_uchar
    rorx(a, 1, 12, 1, 16)
    alu_imm(a, 0, 4, 12, (LARGE_ENTRIES - 1) << 5)
    op_mem(a, 0, 1, 0x03, 1, 5, 12, 0, large)
    op_mem(a, 0, 1, 0x3B, 1, 5, 12, 0, large + 8)
    put8(a, 0x77)  # ja: not there
    put8(a, 0)
    at = a.at
    _fill_slot(a, s, large, large + 16)
    op_mem(a, 0, 1, 0x8B, 1, 5, 12, 0, large + 8)
    alu_imm(a, 1, 0, 1, 1)
    op_mem(a, 0, 1, 0x2B, 1, 5, 15, 1, slot + 16)
    op_mem(a, 0, 1, 0x89, 1, 5, 15, 1, slot + 8)
    put8(a, 0xC3)
    at[-1] = cython.cast(uint64_t, a.at) - cython.cast(uint64_t, at)
    op_mem(a, 0, 1, 0x2B, 1, 5, 12, 0, large)
    rorx(a, 0, 12, 1, 8)
    alu_imm(a, 0, 4, 12, (TLB_ENTRIES - 1) << 4)
    op_mem(a, 0, 1, 0x03, 1, 5, 12, 0, table)
    alu_imm(a, 1, 7, 1, 4095)
    put8(a, 0x77)
    put8(a, 0)
    at = a.at
    _fill_slot(a, s, table, table + 8)
    mov_imm(a, 1, 4096)
    op_mem(a, 0, 1, 0x2B, 1, 5, 15, 1, slot + 16)
    op_mem(a, 0, 1, 0x89, 1, 5, 15, 1, slot + 8)
    at[-1] = cython.cast(uint64_t, a.at) - cython.cast(uint64_t, at)
    put8(a, 0xC3)
    return address


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _memory_stubs(c: cython.pointer(CodeCache), s: cython.pointer(CpuState), saved: uint64_t) -> cython.void:
    a: cython.pointer(Assembler) = cython.address(c.a)
    at: cython.p_uchar
    c.leave_link = _leave_with(c, s, OUT_LINK, cython.address(s.leave_argument))
    c.leave_indirect = _leave_with(c, s, OUT_INDIRECT, cython.address(s.rip))
    c.leave_poll = _leave_with(c, s, OUT_POLL, cython.address(s.rip))
    c.leave_system = _leave_with(c, s, OUT_SYSTEM, cython.address(s.leave_argument))
    c.leave_fault = _leave_with(c, s, OUT_FAULT, cython.address(s.leave_argument))
    c.leave_next = _leave_with(c, s, OUT_NEXT, cython.address(s.rip))
    c.leave_branch = here(a)
    store(a, 12, 5, displacement(s, cython.address(s.branch_at)))
    jmp_to(a, c.leave_indirect)
    c.trap = here(a)
    store_imm32(a, 5, displacement(s, cython.address(s.leave_code)), OUT_TRAP)
    jmp_to(a, c.leave)
    # The functions' addresses are in host_xsave while the stubs are made.
    functions: cython.pointer(cython.p_void) = cython.cast(cython.pointer(cython.p_void), s.host_xsave)
    c.memory_slow = _call_c(c, s, functions[0], 2, saved, 1)
    c.careful_access = _call_c(c, s, functions[1], 2, saved, 1)
    c.careful_commit = _call_c(c, s, functions[2], 0, saved, 0)
    c.call_helper = _call_c(c, s, functions[3], 1, saved, 0)
    c.to_linear = _call_c(c, s, functions[4], 2, saved, 1)
    c.execute_system = _execute_stub(c, s, functions[5], saved)
    k: cython.int
    for k in range(TLB_SETS):
        c.window[k] = _window_stub(
            c, s, displacement(s, cython.address(s.large_read[k][0])), displacement(s, cython.address(s.tlb_read[k][0]))
        )
        c.window[TLB_SETS + k] = _window_stub(
            c, s, displacement(s, cython.address(s.large_write[k][0])),
            displacement(s, cython.address(s.tlb_write[k][0])),
        )  # fmt: skip
    for k in range(TLB_SETS):
        c.lookup[k] = here(a)
        store(a, 12, 5, displacement(s, cython.address(s.branch_at)))
        pext_mem(a, 12, 15, 5, displacement(s, cython.address(s.jump_mask)))
        op_mem(a, 0, 1, 0x8B, 1, 5, 12, 3, displacement(s, cython.address(s.jump_negated[k][0])))
        lea(a, 1, 1, 15, 0, 0)
        put8(a, 0xE3)  # jrcxz hit
        put8(a, 5)
        jmp_to(a, c.leave_indirect)
        load32(a, 1, 5, displacement(s, cython.address(s.run)))
        put8(a, 0xE3)  # jrcxz: run is 0
        put8(a, 0)
        at = a.at
        op_mem(a, 0, 0, 0xFF, 4, 5, 12, 3, displacement(s, cython.address(s.jump_code[k][0])))
        at[-1] = cython.cast(uint64_t, a.at) - cython.cast(uint64_t, at)
        jmp_to(a, c.leave_poll)
    c.return_miss = here(a)
    lea(a, 4, 4, NONE, 0, -8)
    op_mem(a, 0, 0, 0xFF, 4, 5, NONE, 0, displacement(s, cython.address(s.lookup_now)))
    for k in range(4):
        c.copy[k] = here(a)
        mov_rr(a, 1, 2)
        _repeat(a, k, 0xA4)
        c.fill[k] = here(a)
        mov_rr(a, 1, 6)
        mov_rr(a, 0, 2)
        _repeat(a, k, 0xAA)
    _make_checks(c, s)
    _fpu_stubs(c)
    # void load_vectors(CpuState *): the caller's control words are kept, the guest's state comes in
    c.load_vectors = here(a)
    mov_rr(a, 1, 7)
    op_mem(a, 0, 0, 0x1AE, 3, 1, NONE, 0, displacement(s, cython.address(s.host_mxcsr)) + 128)
    op_mem(a, 0, 0, 0xD9, 7, 1, NONE, 0, displacement(s, cython.address(s.host_fcw)) + 128)
    mov_imm(a, 0, 7)
    op_reg(a, 0, 0, 0x33, 2, 2)
    op_mem(a, 0, 1, 0x1AE, 5, 1, NONE, 0, displacement(s, cython.address(s.xsave)) + 128)
    put8(a, 0xC3)
    c.save_vectors = here(a)
    mov_rr(a, 1, 7)
    mov_imm(a, 0, 7)
    op_reg(a, 0, 0, 0x33, 2, 2)
    op_mem(a, 0, 1, 0x1AE, 4, 1, NONE, 0, displacement(s, cython.address(s.xsave)) + 128)
    put8(a, 0xDB)  # fninit
    put8(a, 0xE3)
    op_mem(a, 0, 0, 0x1AE, 2, 1, NONE, 0, displacement(s, cython.address(s.host_mxcsr)) + 128)
    op_mem(a, 0, 0, 0xD9, 5, 1, NONE, 0, displacement(s, cython.address(s.host_fcw)) + 128)
    put8(a, 0xC5)  # vzeroupper
    put8(a, 0xF8)
    put8(a, 0x77)
    put8(a, 0xC3)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _make_checks(c: cython.pointer(CodeCache), s: cython.pointer(CpuState)) -> cython.void:
    """Make the parts of a memory operand's check (see operands) that are the same for all, to be copied."""
    a: Assembler
    n: cython.int
    table: int32_t
    for n in range(2 * TLB_SETS):
        if n < TLB_SETS:
            table = displacement(s, cython.address(s.tlb_read[n][0]))
        else:
            table = displacement(s, cython.address(s.tlb_write[n - TLB_SETS][0]))
        a.at = cython.address(c.check[n].look[0])
        rorx(cython.address(a), 0, 12, 1, 8)
        alu_imm(cython.address(a), 0, 4, 12, (TLB_ENTRIES - 1) << 4)
        op_mem(cython.address(a), 0, 1, 0x03, 1, 5, 12, 0, table)
        c.check[n].look_size = a.at - cython.address(c.check[n].look[0])
        a.at = cython.address(c.check[n].use[0])
        op_mem(cython.address(a), 0, 1, 0x8B, 12, 5, 12, 0, table + 8)
        c.check[n].use_size = a.at - cython.address(c.check[n].use[0])
