"""The translator: guest blocks to host code.

A block is up to MAX_INSNS instructions of one page (its last may reach into the next page), ended by a control
transfer. Its slow paths and the stubs of its unlinked exits stand behind its body.
"""

import cython
from cython.cimports.vmonty.cpu.assembler import NONE
from cython.cimports.vmonty.cpu.branches import next_round
from cython.cimports.vmonty.cpu.codecache import (
    MAX_BLOCKS,
    MAX_LINKS,
    MAX_OFFSETS,
    MAX_PAGES,
    MAX_SIDE,
    block_register,
    cache_flush,
    cache_prepare,
    page_guard,
)
from cython.cimports.vmonty.cpu.coherence import block_digest
from cython.cimports.vmonty.cpu.decode import (
    C_CALL,
    C_CALLI,
    C_COPY,
    C_JCC,
    C_JMP,
    C_JMPI,
    C_LOOP,
    C_POP,
    C_POPF,
    C_PUSH,
    C_PUSHI,
    C_RET,
    C_SYSEND,
    C_UD,
    DECODE_INVALID,
    DECODE_TOO_LONG,
    F_ALL,
    VERBATIM,
    decode,
    offered,
    undecoded,
)
from cython.cimports.vmonty.cpu.exits import emit_stubs, jump_to, leave_at
from cython.cimports.vmonty.cpu.grouping import find_groups
from cython.cimports.vmonty.cpu.instructions import emit_instruction
from cython.cimports.vmonty.cpu.known import decode_known
from cython.cimports.vmonty.cpu.liveness import analyse, live_at, open_at_end
from cython.cimports.vmonty.cpu.operands import move
from cython.cimports.vmonty.cpu.stack import settle_rsp
from cython.cimports.vmonty.cpu.state import (
    AR_DB,
    CS,
    MODE_COMPAT32,
    MODE_LONG64,
    MODE_PROT16,
    MODE_PROT32,
    SS,
)
from cython.cimports.vmonty.cpu.stripcode import emit_setup, emit_strip_end, emit_turn
from cython.cimports.vmonty.cpu.strips import find_strip
from cython.cimports.vmonty.cpu.tlb import fetch_ahead, fetch_page


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _ends_block(i: cython.pointer(Insn)) -> cython.int:
    return i.fault != 0 or i.cls in (C_JCC, C_JMP, C_CALL, C_JMPI, C_CALLI, C_RET, C_LOOP, C_SYSEND, C_UD, C_POPF)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _loop_inside(w: cython.pointer(Work)) -> cython.int:
    """Give the number of the instruction that the block's last one goes back to, if that is not its first; else 0.

    The block ends in front of it, or a loop's first iteration would be translated apart from the others.
    """
    i: cython.pointer(Insn) = cython.address(w.insns[w.count - 1])
    k: cython.int = w.count - 1
    target: uint64_t = i.rip + i.length + i.immediate
    if i.cls != C_JCC or i.fault or w.code_size != 8 or target <= w.block.rip or target > i.rip:
        return 0
    while k > 0 and w.insns[k].rip > target:
        k -= 1
    return k if w.insns[k].rip == target else 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _loop_beyond(w: cython.pointer(Work), code: cython.p_uchar, at: cython.int) -> cython.int:
    """Go on in the next page if the block's end there goes back to its beginning; gives where the block ends.

    If it goes back to another instruction, the block ends in front of that.
    """
    b: cython.pointer(Block) = w.block
    first: cython.int = b.linear & 0xFFF
    count: cython.int = w.count
    operands: cython.int = w.operands
    end: cython.int = at
    k: cython.int
    n: cython.int
    i: cython.pointer(Insn)
    buffer: cython.uchar[176]
    second: cython.pointer(FetchEntry) = fetch_ahead(w.s, (b.linear | 0xFFF) + 1)
    if second == cython.NULL or second.host == 0:
        return at
    for k in range(4096 - at):
        buffer[k] = code[at + k]
    for k in range(160):
        buffer[4096 - at + k] = cython.cast(cython.p_uchar, second.host)[k]
    while count < MAX_INSNS and end < 4096 + 144:
        i = cython.address(w.insns[count])
        n = decode(cython.address(buffer[end - at]), 16, b.rip + (end - first), 8, i)
        if n <= 0 or not offered(i, cython.address(w.s.features[0]), 8):
            return at
        count += 1
        end += n
        if i.cls == C_COPY and i.has_memory:
            operands += 1
        if _ends_block(i):
            if i.cls != C_JCC or i.rip + i.length + i.immediate < b.rip:
                return at
            for k in range(1, w.count):
                if w.insns[k].rip == i.rip + i.length + i.immediate:  # the loop begins there
                    w.count = k
                    return first + cython.cast(cython.int, w.insns[k].rip - b.rip)
            if i.rip + i.length + i.immediate != b.rip:
                return at
            page_guard(w.c, second.host)
            for k in range(160):
                if buffer[4096 - at + k] != cython.cast(cython.p_uchar, second.host)[k]:
                    return at  # it was written meanwhile
            b.host_page2 = second.host
            if not second.is_global:
                w.is_global = 0
            w.count = count
            w.operands = operands
            return end
    return at


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _shares_check(i: cython.pointer(Insn)) -> cython.int:
    """Tell whether the instruction's operand may belong to a group."""
    if i.cls == C_COPY:
        return i.has_memory
    return i.cls in (C_PUSH, C_PUSHI, C_POP, C_CALL, C_RET)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _read_known(w: cython.pointer(Work), code: cython.p_uchar, at: cython.int, limit: cython.int) -> cython.int:
    """Decode a block of 64-bit code as far as its bytes are surely there and nothing is wrong with them.

    Gives the offset in the page behind what was read.
    """
    rip: uint64_t = w.block.rip
    count: cython.int = 0
    operands: cython.int = 0
    ended: cython.int = 0
    n: cython.int
    i: cython.pointer(Insn) = cython.address(w.insns[0])
    while count < limit and at <= 4096 - 24 and not ended:
        n = decode_known(w.c.known, code + at, rip, i)
        if n <= 0:
            break
        if not offered(i, cython.address(w.s.features[0]), 8):
            i.fault = 6
            i.verbatim = 0
        operands += _shares_check(i)
        ended = _ends_block(i)
        at += n
        rip += n
        count += 1
        i += 1
    w.count = count
    w.operands = operands
    w.ended = ended
    return at


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _read_block(w: cython.pointer(Work), page: cython.pointer(FetchEntry), why: cython.p_int) -> cython.int:
    """Decode the block's instructions; 0 when the first one cannot be fetched.

    An instruction that reaches beyond the code segment's limit raises #GP(0). SDM, "Limit Checking".
    """
    b: cython.pointer(Block) = w.block
    at: cython.int = b.linear & 0xFFF
    start: cython.int = at
    code: cython.p_uchar = cython.cast(cython.p_uchar, page.host)
    i: cython.pointer(Insn)
    n: cython.int
    k: cython.int
    part: cython.int
    room: uint64_t
    limit: cython.int = 1 if w.single else MAX_INSNS
    left: uint64_t
    buffer: cython.uchar[16]
    second: cython.pointer(FetchEntry)
    w.window = code
    w.window_size = 4096
    w.count = 0
    w.operands = 0
    w.ended = 0
    if w.code_size == 8:
        at = _read_known(w, code, at, limit)
    while not w.ended and w.count < limit and at < 4096 and b.rip + (at - start) <= b.limit:
        i = cython.address(w.insns[w.count])
        left = b.limit - (b.rip + (at - start))  # bytes after this one
        part = 4096 - at
        room = part
        n = decode(code + at, left + 1 if left < room else part, b.rip + (at - start), w.code_size, i)
        if n == 0:
            if w.count:
                break  # the next block begins with it
            if left >= room:
                second = fetch_page(w.s, (b.linear | 0xFFF) + 1, why)
                if second == cython.NULL or second.host == 0:
                    return 0
                page_guard(w.c, second.host)
                for k in range(part):
                    buffer[k] = code[at + k]
                for k in range(15 - part):
                    buffer[part + k] = cython.cast(cython.p_uchar, second.host)[k]
                n = decode(buffer, left + 1 if left < 15 else 15, b.rip, w.code_size, i)
                b.host_page2 = second.host
                if not second.is_global:
                    w.is_global = 0
            if n == 0:
                n = DECODE_TOO_LONG
        if n < 0:  # DECODE_TOO_LONG also where the limit comes before its end
            undecoded(i, 6 if n == DECODE_INVALID else 13)
            n = 1
        elif not offered(i, cython.address(w.s.features[0]), w.code_size) or (i.vex and w.s.mode < MODE_PROT16):
            i.fault = 6
            i.verbatim = 0
        w.operands += _shares_check(i)
        w.count += 1
        at += n
        w.ended = _ends_block(i)
    if at > 4096 - 15 and w.code_size == 8 and w.count > 1 and not w.single:
        if not w.ended:
            at = _loop_beyond(w, code, at)
    n = _loop_inside(w)
    if n:
        w.count = n
        at = start + cython.cast(cython.int, w.insns[n].rip - b.rip)
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
    if target > w.block.limit or w.block.limit - target < 4095 - (linear & 0xFFF):
        return F_ALL  # the limit is met before the end of the page
    return live_at(
        w.window + (linear & 0xFFF), 4096 - cython.cast(cython.int, linear & 0xFFF), target, w.code_size,
        cython.address(w.s.features[0]),
    )  # fmt: skip


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _live_out(w: cython.pointer(Work)) -> cython.int:
    """Give the flags that are needed behind the block; all when that makes no difference to its code."""
    i: cython.pointer(Insn) = cython.address(w.insns[w.count - 1])
    cls: cython.int = i.cls
    next_rip: uint64_t = i.rip + i.length
    live: cython.int
    if i.fault or w.single or not open_at_end(cython.address(w.insns[0]), w.count):
        return F_ALL
    if cls == C_JCC:
        live = _live_at(w, next_rip)
        return live if live == F_ALL else live | _live_at(w, next_rip + i.immediate)
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
    cls: cython.int = i.cls
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
        if i.cls == C_COPY and i.has_memory and i.map == 0 and i.opcode == 0x8B:
            w.loaded |= cython.cast(uint32_t, 1) << i.reg
        elif i.map == 0 and not i.has_memory and i.opcode == 0x01:  # strides of unknown size leave pages often
            w.loaded |= cython.cast(uint32_t, 1) << i.rm
        elif i.map == 0 and not i.has_memory and i.opcode == 0x03:
            w.loaded |= cython.cast(uint32_t, 1) << i.reg


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _unroll(w: cython.pointer(Work)) -> cython.void:
    """Let the body of a loop stand several times in a row: a short one would spend much of its time on the way round.

    Its operands can share checks across the rounds.
    """
    i: cython.pointer(Insn) = cython.address(w.insns[w.count - 1])
    rounds: cython.int = 1
    k: cython.int
    w.total = w.count
    if not w.has_strip and (not w.in_loop or i.cls != C_JCC or i.rip + i.length + i.immediate != w.block.rip):
        return
    if w.has_strip:
        rounds = min(MAX_INSNS // w.count, 4)
    elif w.count <= 20:
        rounds = 4 if w.count <= 8 else 2
    w.total = rounds * w.count
    for k in range(w.count, w.total):
        w.insns[k] = w.insns[k - w.count]
        if w.insns[k].cls == C_COPY and w.insns[k].has_memory:
            w.operands += 1


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _offset(w: cython.pointer(Work), i: cython.pointer(Insn)) -> cython.void:
    """Note where the host code of an instruction begins."""
    w.pairs[0] = w.a.at - w.entry
    w.pairs[1] = i.rip - w.block.rip
    w.pairs += 2


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _emit_body(w: cython.pointer(Work)) -> cython.void:
    i: cython.pointer(Insn)
    k: cython.int
    last: cython.int = w.count - 1  # of its round
    for k in range(w.count):
        w.slot_of[k] = NONE
    for k in range(w.total):
        i = cython.address(w.insns[k])
        _offset(w, i)
        if k != last:
            if i.verbatim == VERBATIM and w.pending == 0:
                w.kept = w.held
                move(w, i)
            else:
                emit_instruction(w, i)
        elif k == w.total - 1:
            if w.has_strip:
                emit_turn(w, i)
            else:
                emit_instruction(w, i)
        else:
            settle_rsp(w)
            next_round(w, i)
            w.held = 0
            last += w.count


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _emit_strip(w: cython.pointer(Work)) -> cython.void:
    """Emit a loop's setup and strip behind its ordinary body."""
    k: cython.int
    n: cython.int
    strip: cython.p_uchar
    last: cython.pointer(Insn) = cython.address(w.insns[w.count - 1])
    w.held = 0
    w.kept = 0
    w.strip_rounds = 4 if w.count <= 8 else (2 if w.count <= 16 else 1)
    emit_setup(w)
    strip = w.a.at
    w.strip = 1
    for n in range(w.strip_rounds):
        for k in range(w.count - 1):
            _offset(w, cython.address(w.insns[k]))
            emit_instruction(w, cython.address(w.insns[k]))
        _offset(w, last)
        if n < w.strip_rounds - 1:
            next_round(w, last)
    emit_strip_end(w, last, strip)
    w.strip = 0
    w.closed = 1


def cache_full(c):
    """Tell whether the next block may not find room."""
    return (
        c.a.limit - c.a.at < 65536
        or c.blocks_used + 1 >= MAX_BLOCKS
        or c.links_used + 8 >= MAX_LINKS
        or c.offsets_used + 4 * MAX_INSNS + 2 >= MAX_OFFSETS
        or c.side_used + MAX_INSNS >= MAX_SIDE
        or c.pages_used + 2 >= MAX_PAGES
    )


def translate_block(s, rip, page, single, plain, why):
    """Translate the block at ``rip``, whose code lies in ``page``; NULL with ``why`` when it cannot be fetched.

    ``single`` makes a careful block of one instruction, ``plain`` gives each operand its own TLB check.
    The cache may be flushed first.
    """
    c: cython.pointer(CodeCache) = cython.cast(cython.pointer(CodeCache), s.translator)
    w: Work
    b: cython.pointer(Block)
    k: cython.int
    start: cython.p_uchar
    if cache_full(c):
        cache_flush(s)
    cache_prepare(c)
    c.a.at += (0 - cython.cast(uint64_t, c.a.at)) & 63
    b = cython.address(c.blocks[c.blocks_used])
    start = c.a.at
    b.rip = rip
    b.host_page = page.host
    b.host_page2 = 0
    page_guard(c, page.host)
    b.key = s.block_key | (KEY_SINGLE if single else (KEY_PLAIN if plain else 0))
    b.entry = start - c.writable
    b.valid = 0
    b.next = 0
    b.page_next = 0
    b.page_next2 = 0
    b.incoming = 0
    b.offsets = c.offsets_used
    w.pairs = cython.address(c.offsets[c.offsets_used])
    w.entry = start
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
    b.limit = ~cython.cast(uint64_t, 0)
    if s.mode != MODE_LONG64:
        w.code_size = 4 if s.mode == MODE_PROT32 or s.mode == MODE_COMPAT32 else 2
        w.stack_size = 4 if s.segs[SS].access_rights & AR_DB else 2
        w.code_base = s.segs[CS].base
        b.linear = cython.cast(uint32_t, rip + w.code_base)
        b.limit = s.segs[CS].limit
    w.stubs = 0
    w.closed = 0
    if not _read_block(cython.address(w), page, why):
        return cython.NULL
    b.is_global = w.is_global
    analyse(cython.address(w.insns[0]), w.count, _live_out(cython.address(w)))
    if s.exact_flags:
        for k in range(w.count):
            w.insns[k].flags_in = F_ALL
            w.insns[k].flags_needed = F_ALL
    _find_loop(cython.address(w))
    w.strip = 0
    w.held = 0
    w.kept = 0
    w.pending = 0
    w.has_strip = not single and not plain and find_strip(cython.address(w))
    _unroll(cython.address(w))
    if not single and not plain and w.code_size == 8 and w.operands > 1:
        find_groups(cython.address(w))
    _emit_body(cython.address(w))
    if w.has_strip:
        _emit_strip(cython.address(w))
    if not w.closed:
        settle_rsp(cython.address(w))
        if single:
            leave_at(cython.address(w), rip + b.length, c.leave_next)
        else:
            jump_to(cython.address(w), rip + b.length)
    b.pairs = (w.pairs - cython.address(c.offsets[c.offsets_used])) >> 1
    c.offsets_used += 2 * b.pairs
    b.body_size = c.a.at - start
    emit_stubs(cython.address(w))
    b.size = c.a.at - start
    c.blocks_used += 1
    block_digest(b)
    block_register(c, b)
    return b
