"""The translation look-aside buffers, and linear memory for compiled helpers.

A data TLB entry holds minus the page's linear address, so that translated code gets the offset in the page by one
addition and checks tag and page crossing by one comparison. Only RAM enters; only pages that may be written, are
dirty, and hold no translated code enter a write table. Everything else comes to ``memory_slow`` each time.
"""

import cython
from cython.cimports.vmonty.cpu.breakpoints import watch_access, watch_meets, watched_page
from cython.cimports.vmonty.cpu.codecache import (
    Block,
    CodeCache,
    block_at_host,
    code_written,
    forget_jumps_to,
    is_code_page,
    jump_cache_clear_local,
    shadow_reset,
    string_function,
    unlink_cross_page,
    unlink_spans,
)
from cython.cimports.vmonty.cpu.coherence import page_verify
from cython.cimports.vmonty.cpu.decode import A_ALIGN, A_X87, C_COPY, ROW, Insn, decode
from cython.cimports.vmonty.cpu.mmio import mmio_read, mmio_write
from cython.cimports.vmonty.cpu.paging import WALK_OK, Translation, translate, walk
from cython.cimports.vmonty.cpu.segmentation import linear_address
from cython.cimports.vmonty.cpu.state import (
    ACCESS_EXEC,
    ACCESS_IMPLICIT,
    ACCESS_UNALIGNED,
    ACCESS_USER,
    ACCESS_WRITE,
    AR_DB,
    AR_L,
    CS,
    DS,
    ES,
    FETCH_BITS,
    FETCH_ENTRIES,
    FLAG_AC,
    FLAG_VM,
    LARGE_BYTES,
    LARGE_ENTRIES,
    LEAVE_CAREFUL,
    LEAVE_EVENT,
    LEAVE_PLAIN,
    LOCAL_FETCH,
    LOCAL_LOG,
    LOCAL_TLB,
    MODE_COMPAT16,
    MODE_COMPAT32,
    MODE_LONG64,
    MODE_PROT16,
    MODE_PROT32,
    MODE_REAL,
    MODE_VM86,
    NESTED_ENTRIES,
    OBSERVE_MEMORY,
    SS,
    TABLE_ENTRIES,
    TLB_BITS,
    TLB_ENTRIES,
    TLB_SETS,
    LargeEntry,
    TlbEntry,
    forget_windows,
    is_canonical,
    misaligned,
    note_local,
    raise_error,
)


def _fill() -> None:
    k: cython.int
    for k in range(8192):
        _open_bus[k] = 0xFF


_fill()


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _page(va: uint64_t) -> uint64_t:
    return va & ~cython.cast(uint64_t, 0xFFF)


def copy_bytes(to, source, size):
    """Copy without libc: vector registers belong to the guest."""
    k: uint32_t = 0
    while k + 8 <= size:
        cython.cast(cython.pointer(uint64_t), to + k)[0] = cython.cast(cython.pointer(uint64_t), source + k)[0]
        k += 8
    while k < size:
        to[k] = source[k]
        k += 1


def note_access(s, va, physical, data, size, kind):
    """Keep an access for the observer. ``kind``: 1 for a write, with ACCESS_IMPLICIT."""
    k: uint32_t = s.access_count
    if k >= 128 or s.access_bytes + size > 8192:
        s.access_lost += 1
        return
    s.accesses[k].linear = va
    s.accesses[k].physical = physical
    s.accesses[k].size = size
    s.accesses[k].write = kind & 1
    s.accesses[k].implicit = kind & ACCESS_IMPLICIT
    s.accesses[k].at = s.access_bytes
    copy_bytes(cython.address(s.access_data[s.access_bytes]), data, size)
    s.access_bytes += size
    s.access_count = k + 1


def check_canonical(s, va, stack):
    if s.cr0 >> 31 & 1 and s.efer >> 10 & 1 and not is_canonical(s, va):
        return raise_error(s, 12 if stack else 13, 0)
    return 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _enter_large(s: cython.pointer(CpuState), set_: cython.int, page: uint64_t, host: uint64_t,
                 write: cython.int) -> cython.void:  # fmt: skip
    """Enter the 2 MiB around a page, which are mapped alike; to write, the stretch around it that holds no code."""
    e: cython.pointer(LargeEntry)
    index: cython.int = (page >> 21) & (LARGE_ENTRIES - 1)
    low: uint64_t = page & ~cython.cast(uint64_t, LARGE_BYTES - 1)
    high: uint64_t = low + LARGE_BYTES
    if write:
        e = cython.address(s.large_write[set_][index])
        low = page
        while low & (LARGE_BYTES - 1) and not is_code_page(s, host - (page - low) - 4096):
            low -= 4096
        high = page + 4096
        while high & (LARGE_BYTES - 1) and not is_code_page(s, host + (high - page)):
            high += 4096
    else:
        e = cython.address(s.large_read[set_][index])
    e.negated_tag = 0 - low
    e.last = high - low - 1
    e.host = host - (page - low)
    s.large_used = 1


def look(s, va, access, t):
    """Translate one page, entering what may enter into the tables.

    Implicit accesses are those of a supervisor without EFLAGS.AC, whatever the CPL: table set 0.
    """
    set_: cython.int = 0 if access & ACCESS_IMPLICIT else s.tlb_set
    index: cython.int = (va >> 12) & (TLB_ENTRIES - 1)
    page: uint64_t = _page(va)
    r: cython.int
    large: cython.bint
    e: cython.pointer(TlbEntry)
    wide: cython.pointer(LargeEntry)
    e = cython.address(s.tlb_read[set_][index])
    if access & ACCESS_WRITE:
        e = cython.address(s.tlb_write[set_][index])
    if e.negated_tag + page == 0 and not s.observe:
        t.host = e.host
        t.may_write = 1
        return 0
    wide = cython.address(s.large_read[set_][(page >> 21) & (LARGE_ENTRIES - 1)])
    if access & ACCESS_WRITE:
        wide = cython.address(s.large_write[set_][(page >> 21) & (LARGE_ENTRIES - 1)])
    if page + wide.negated_tag <= wide.last and not s.observe:
        t.host = wide.host + (page + wide.negated_tag)
        t.may_write = 1
        note_local(s, LOCAL_TLB, cython.address(s.local_tlb[0]), set_ << TLB_BITS | index)
        e.negated_tag = 0 - page
        e.host = t.host
        return 0
    r = translate(s, va, access, t)
    if r:
        return r
    if t.host and not (s.watch and watched_page(s, page)):
        if not t.is_global:
            note_local(s, LOCAL_TLB, cython.address(s.local_tlb[0]), set_ << TLB_BITS | index)
        e = cython.address(s.tlb_read[set_][index])
        large = t.size >= LARGE_BYTES and not s.watch and (s.direct or not s.nested)
        wide = cython.address(s.large_read[set_][(page >> 21) & (LARGE_ENTRIES - 1)])
        e.negated_tag = 0 - page
        e.host = t.host
        if large and page + wide.negated_tag > wide.last:
            _enter_large(s, set_, page, t.host, 0)
        if access & ACCESS_WRITE and t.may_write and not is_code_page(s, t.host):
            e = cython.address(s.tlb_write[set_][index])
            e.negated_tag = 0 - page
            e.host = t.host
            wide = cython.address(s.large_write[set_][(page >> 21) & (LARGE_ENTRIES - 1)])
            if large and page + wide.negated_tag > wide.last:
                _enter_large(s, set_, page, t.host, 1)
    return 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _set_rip(s: cython.pointer(CpuState), what: uint32_t, host_rip: uint64_t) -> cython.void:
    b: cython.pointer(Block) = block_at_host(cython.cast(cython.pointer(CodeCache), s.translator), host_rip)
    if b != cython.NULL:
        s.rip = b.rip + (what & SLOW_OFFSET)


def leave_block(s, code, what, host_rip):
    _set_rip(s, what, host_rip)
    s.leave_code = code
    return 0


def bounce_buffer(s, k, va):
    """Give the buffer for an operand, aligned as the operand is: instructions that demand it look at the buffer."""
    start: uint64_t = (cython.cast(uint64_t, cython.address(s.bounce[k][0])) + 63) & ~cython.cast(uint64_t, 63)
    return cython.cast(cython.p_uchar, start + (va & 63))


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _leader_faults(s: cython.pointer(CpuState), what: uint32_t, host_rip: uint64_t) -> cython.int:
    """Tell whether the first operand of a group faults by itself, with that recorded; else the others are to blame."""
    b: cython.pointer(Block) = block_at_host(cython.cast(cython.pointer(CodeCache), s.translator), host_rip)
    at: cython.int
    access: cython.int = ACCESS_USER if s.cpl == 3 else 0
    linear: uint64_t
    i: Insn
    t: Translation
    if b == cython.NULL:
        return 0
    at = (b.linear & 0xFFF) + (what & SLOW_OFFSET)
    if at > 4096 - 16 or decode(cython.cast(cython.p_uchar, b.host_page) + at, 16, 0, 8, cython.address(i)) <= 0:
        return 0
    if ROW[i.row].cls != C_COPY or not i.has_memory or i.base < 0 or ROW[i.row].attributes & A_ALIGN:
        return 0  # of the stack; or it may be misaligned, which comes first
    if ROW[i.row].attributes & A_X87 and i.memory_access & 2:
        return 0  # faults only if it stores, which a careful block finds out
    linear = s.gpr[i.base] + i.displacement
    if i.index >= 0:
        linear += s.gpr[i.index] << i.scale
    if s.event.vector == 14 and not s.event.error_code & 1:  # the page is not there: the same for reads and writes
        s.event.payload = linear
        s.event.error_code = (s.event.error_code & ~cython.cast(uint32_t, 2)) | (i.memory_access & 2)
        return 1
    s.event.pending = 0
    if i.memory_access & 2:
        access |= ACCESS_WRITE
    return look(s, linear, access, cython.address(t)) == LEAVE_EVENT


def memory_slow(s, va, what, host_rip):
    """Serve a TLB miss of translated code: the host address to use, or 0 to leave the block.

    A read that crosses pages gets a copy. A write that crosses, that meets a page with code, or anything that meets
    MMIO leaves the block before anything changed; the dispatcher runs the instruction in a careful block.
    """
    size: uint32_t = (what >> SLOW_SIZE_SHIFT) & 0x3FF
    access: cython.int = (ACCESS_WRITE if what & SLOW_WRITE else 0) | (ACCESS_USER if s.cpl == 3 else 0)
    t: Translation
    u: Translation
    r: cython.int
    first: uint32_t
    to: cython.p_uchar
    s.slow_host_rip = host_rip
    s.slow_what = what
    r = 0
    if what & (SLOW_GROUP | SLOW_MASKED):
        if (va & 0xFFF) + size > 4096:
            r = 1
        else:
            r = check_canonical(s, va, 0)
        if not r:
            r = look(s, va, access, cython.address(t))
            if r == LEAVE_EVENT and what & SLOW_GROUP and _leader_faults(s, what, host_rip):
                return leave_block(s, r, what, host_rip)
        if (
            r
            or t.host == 0
            or (access & ACCESS_WRITE and is_code_page(s, t.host))
            or (s.watch and watch_meets(s, va, size, 1))
        ):
            s.event.pending = 0
            return leave_block(s, LEAVE_PLAIN if what & SLOW_GROUP else LEAVE_CAREFUL, what, host_rip)
        return t.host + (va & 0xFFF)
    if what & SLOW_ALIGNED and va & (size - 1):
        r = raise_error(s, 13, 0)
    if not r:
        r = check_canonical(s, va, what & SLOW_STACK)
    if r:
        return leave_block(s, r, what, host_rip)
    r = look(s, va, access, cython.address(t))
    if r:
        return leave_block(s, r, what, host_rip)
    if t.host == 0 or (s.watch and watch_meets(s, va, size, access & ACCESS_WRITE)):
        return leave_block(s, LEAVE_CAREFUL, what, host_rip)
    if (va & 0xFFF) + size <= 4096:
        if access & ACCESS_WRITE and is_code_page(s, t.host):
            return leave_block(s, LEAVE_CAREFUL, what, host_rip)
        return t.host + (va & 0xFFF)
    if access & ACCESS_WRITE:
        return leave_block(s, LEAVE_CAREFUL, what, host_rip)
    first = 4096 - (va & 0xFFF)
    r = check_canonical(s, va + size - 1, what & SLOW_STACK)
    if not r:
        r = look(s, va + first, access, cython.address(u))
    if r:
        return leave_block(s, r, what, host_rip)
    if u.host == 0:
        return leave_block(s, LEAVE_CAREFUL, what, host_rip)
    to = bounce_buffer(s, 0, va)
    copy_bytes(to, cython.cast(cython.p_uchar, t.host + (va & 0xFFF)), first)
    copy_bytes(to + first, cython.cast(cython.p_uchar, u.host), size - first)
    return cython.cast(uint64_t, to)


def refuse(s, code, what, host_rip):
    """Leave a careful block, but for an x87 store whose fault counts only if it stores: the commit finds out."""
    save: string_function
    _set_rip(s, what, host_rip)
    s.leave_code = code
    if code != LEAVE_EVENT or not what & SLOW_LATE:
        return 0
    save = cython.cast(
        string_function,
        cython.cast(cython.p_void, cython.cast(cython.pointer(CodeCache), s.translator).fpu[0]),
    )
    save(cython.cast(uint64_t, bounce_buffer(s, 1, 0)), 0, 0)
    s.careful_late = 1
    return cython.cast(uint64_t, bounce_buffer(s, 0, 0))


def to_linear(s, offset, what, host_rip):
    """Give translated code outside 64-bit mode a linear address, bit 63 set; 0 leaves the block with #GP or #SS."""
    linear: uint64_t = 0
    r: cython.int = linear_address(
        s,
        (what >> SLOW_SEGMENT_SHIFT) & 7,
        offset,
        (what >> SLOW_SIZE_SHIFT) & 0x3FF,
        1 if what & SLOW_WRITE else 0,
        cython.address(linear),
    )
    if what & SLOW_ALIGNED and linear & (((what >> SLOW_SIZE_SHIFT) & 0x3FF) - 1):
        r = raise_error(s, 13, 0)  # comes before what is wrong with the segment
    if r and what & SLOW_MASKED:
        s.event.pending = 0
        r = LEAVE_CAREFUL
    if r:
        return refuse(s, r, what, host_rip)
    return linear | (cython.cast(uint64_t, 1) << 63)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _access(s: cython.pointer(CpuState), access: cython.int) -> cython.int:
    access &= ~ACCESS_UNALIGNED
    return access | (ACCESS_USER if s.cpl == 3 and not access & ACCESS_IMPLICIT else 0)


def read_linear(s, va, data, size, access):
    """Read linear memory for a helper. Gives 0, or LEAVE_* with the exception or exit recorded."""
    to: cython.p_uchar = cython.cast(cython.p_uchar, data)
    t: Translation
    r: cython.int
    part: uint32_t
    if s.watch and not access & ACCESS_IMPLICIT:
        watch_access(s, va, size, 0)
    if misaligned(s, va, size) and not access & (ACCESS_IMPLICIT | ACCESS_UNALIGNED) and not check_canonical(s, va, 0):
        return raise_error(s, 17, 0)
    access = _access(s, access)
    while size:
        part = 4096 - (va & 0xFFF)
        if part > size:
            part = size
        r = check_canonical(s, va, 0)
        if not r:
            r = look(s, va, access, cython.address(t))
        if r:
            return r
        if t.host:
            copy_bytes(to, cython.cast(cython.p_uchar, t.host + (va & 0xFFF)), part)
        else:
            r = mmio_read(s, t.physical | (va & 0xFFF), to, part)
            if r:
                return r
        if s.observe & OBSERVE_MEMORY:
            note_access(s, va, t.physical | (va & 0xFFF), to, part, access & ACCESS_IMPLICIT)
        to += part
        va += part
        size -= part
    return 0


def probe_write(s, va, size, access):
    """Check a write of a helper; nothing is written."""
    t: Translation
    r: cython.int = check_canonical(s, va, 0)
    if not r and misaligned(s, va, size) and not access & (ACCESS_IMPLICIT | ACCESS_UNALIGNED):
        r = raise_error(s, 17, 0)
    access = _access(s, access | ACCESS_WRITE)
    if not r:
        r = look(s, va, access, cython.address(t))
    if not r and (va & 0xFFF) + size > 4096:
        r = check_canonical(s, va + size - 1, 0)
        if not r:
            r = look(s, _page(va + size - 1), access, cython.address(t))
    return r


def write_linear(s, va, data, size, access):
    """Write linear memory for a helper: all pages are checked before the first byte is written."""
    source: cython.p_uchar = cython.cast(cython.p_uchar, data)
    t: Translation
    r: cython.int
    part: uint32_t
    r = probe_write(s, va, size, access)
    if r:
        return r
    if s.watch and not access & ACCESS_IMPLICIT:
        watch_access(s, va, size, 1)
    access = _access(s, access | ACCESS_WRITE)
    while size:
        part = 4096 - (va & 0xFFF)
        if part > size:
            part = size
        r = look(s, va, access, cython.address(t))
        if r:
            return r
        if t.host:
            if is_code_page(s, t.host):
                code_written(s, t.host)
            copy_bytes(cython.cast(cython.p_uchar, t.host + (va & 0xFFF)), source, part)
        else:
            mmio_write(s, t.physical | (va & 0xFFF), source, part)
        if s.observe & OBSERVE_MEMORY:
            note_access(s, va, t.physical | (va & 0xFFF), source, part, 1 | (access & ACCESS_IMPLICIT))
        source += part
        va += part
        size -= part
    return 0


def read_value(s, va, size, access, value):
    """Read 1, 2, 4 or 8 bytes, zero-extended."""
    value[0] = 0
    return read_linear(s, va, value, size, access)


def write_value(s, va, size, access, value):
    """Write the low 1, 2, 4 or 8 bytes of ``value``."""
    return write_linear(s, va, cython.address(value), size, access)


def host_of(s, va, access, where):
    """Find the host address of a linear one; 0 in ``where`` for what has to go through read_linear or write_linear:
    MMIO, a page with a data breakpoint, and a write to a page with code.
    """
    t: Translation
    r: cython.int
    access = _access(s, access)
    r = check_canonical(s, va, 0)
    if not r:
        r = look(s, va, access, cython.address(t))
    if r:
        return r
    where[0] = t.host + (va & 0xFFF) if t.host else 0
    if access & ACCESS_WRITE and t.host and is_code_page(s, t.host):
        where[0] = 0
    if s.observe or s.alignment or (s.watch and watched_page(s, _page(va))):
        where[0] = 0
    return 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _enter_fetch(s: cython.pointer(CpuState), e: cython.pointer(FetchEntry), user: cython.int, va: uint64_t,
                 t: cython.pointer(Translation)) -> cython.void:  # fmt: skip
    """Fill an entry of the small TLB for instructions."""
    index: cython.int = user << FETCH_BITS | ((va >> 12) & (FETCH_ENTRIES - 1))
    e.tag = _page(va) | 1
    e.host = t.host
    e.physical = t.physical
    e.is_global = t.is_global
    if not t.is_global:
        note_local(s, LOCAL_FETCH, cython.address(s.local_fetch[0]), index)
    s.code_filter[(va >> 12) & 4095] = 1
    if t.host == 0 and s.guest_mode == 0:  # a bare processor fetches ones from a bus where nobody answers
        e.host = (cython.cast(uint64_t, cython.address(_open_bus[0])) + 4095) & ~cython.cast(uint64_t, 0xFFF)
    elif t.host == 0:
        e.tag = 0
    else:
        page_verify(s, t.host)


def fetch_page(s, va, why):
    """Translate the page of an instruction address for execution, through a small TLB of its own."""
    user: cython.int = 1 if s.cpl == 3 else 0
    e: cython.pointer(FetchEntry) = cython.address(s.fetch[user][(va >> 12) & (FETCH_ENTRIES - 1)])
    t: Translation
    if e.tag == (_page(va) | 1):
        return e
    why[0] = check_canonical(s, va, 0)
    if not why[0]:
        why[0] = translate(s, va, ACCESS_EXEC | (ACCESS_USER if user else 0), cython.address(t))
    if why[0]:
        return cython.NULL
    _enter_fetch(s, e, user, va, cython.address(t))
    return e


def fetch_ahead(s, va):
    """Translate a page of code ahead of time, in 64-bit mode; NULL, with nothing recorded, where that is impossible."""
    user: cython.int = 1 if s.cpl == 3 else 0
    e: cython.pointer(FetchEntry) = cython.address(s.fetch[user][(va >> 12) & (FETCH_ENTRIES - 1)])
    t: Translation
    if e.tag != (_page(va) | 1):
        if not is_canonical(s, va):
            return cython.NULL
        if walk(s, va, ACCESS_EXEC | (ACCESS_USER if user else 0), cython.address(t)) != WALK_OK or t.host == 0:
            return cython.NULL
        _enter_fetch(s, e, user, va, cython.address(t))
    return e


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _clear(s: cython.pointer(CpuState), table: cython.pointer(TlbEntry), entries: uint64_t) -> cython.void:
    """Make entries match no address."""
    c: cython.pointer(CodeCache) = cython.cast(cython.pointer(CodeCache), s.translator)
    k: uint64_t
    fill: string_function
    if c != cython.NULL and entries > 64:
        fill = cython.cast(string_function, cython.cast(cython.p_void, c.fill[3]))
        fill(cython.cast(uint64_t, table), entries * 2, cython.cast(uint64_t, 1) << 62)
        return
    for k in range(entries):
        table[k].negated_tag = cython.cast(uint64_t, 1) << 62


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _clear_data(s: cython.pointer(CpuState)) -> cython.void:
    _clear(s, cython.address(s.tlb_read[0][0]), TLB_SETS * TLB_ENTRIES)
    _clear(s, cython.address(s.tlb_write[0][0]), TLB_SETS * TLB_ENTRIES)
    s.local_count[LOCAL_TLB] = 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _clear_tables(s: cython.pointer(CpuState)) -> cython.void:
    k: cython.int
    for k in range(TABLE_ENTRIES):
        s.tables[k].tag = 0


def flush_all(s):
    """Forget every translation: of linear addresses, global ones as well, and of guest-physical ones."""
    k: cython.int
    n: cython.int
    _clear_tables(s)
    for k in range(NESTED_ENTRIES):
        s.nested_pages[k].tag = 0
    forget_windows(s)
    _clear_data(s)
    for n in range(2):
        for k in range(FETCH_ENTRIES):
            s.fetch[n][k].tag = 0
    s.local_count[LOCAL_FETCH] = 0
    for k in range(4096):
        s.code_filter[k] = 0
    if s.translator != cython.NULL:
        unlink_spans(s)
        unlink_cross_page(s)


def flush_non_global(s):
    """Forget the translations that a load of CR3 forgets."""
    k: uint32_t
    n: uint32_t
    _clear_tables(s)
    forget_windows(s)
    if s.local_count[LOCAL_TLB] > LOCAL_LOG:
        _clear_data(s)
    for k in range(s.local_count[LOCAL_TLB]):
        n = s.local_tlb[k]
        s.tlb_read[n >> TLB_BITS][n & (TLB_ENTRIES - 1)].negated_tag = cython.cast(uint64_t, 1) << 62
        s.tlb_write[n >> TLB_BITS][n & (TLB_ENTRIES - 1)].negated_tag = cython.cast(uint64_t, 1) << 62
    s.local_count[LOCAL_TLB] = 0
    if s.local_count[LOCAL_FETCH] > LOCAL_LOG:
        for k in range(2 * FETCH_ENTRIES):
            s.fetch[k >> FETCH_BITS][k & (FETCH_ENTRIES - 1)].tag = 0
    else:
        for k in range(s.local_count[LOCAL_FETCH]):
            n = s.local_fetch[k]
            s.fetch[n >> FETCH_BITS][n & (FETCH_ENTRIES - 1)].tag = 0
    s.local_count[LOCAL_FETCH] = 0
    if s.translator != cython.NULL:
        unlink_spans(s)
        jump_cache_clear_local(s)
        shadow_reset(s)


def flush_page(s, va):
    """Forget one page (INVLPG), global or not."""
    k: cython.int = (va >> 12) & (TLB_ENTRIES - 1)
    n: cython.int
    _clear_tables(s)
    forget_windows(s)
    for n in range(TLB_SETS):
        s.tlb_read[n][k].negated_tag = cython.cast(uint64_t, 1) << 62
        s.tlb_write[n][k].negated_tag = cython.cast(uint64_t, 1) << 62
    k = (va >> 12) & (FETCH_ENTRIES - 1)
    for n in range(2):
        s.fetch[n][k].tag = 0
    if s.code_filter[(va >> 12) & 4095]:
        unlink_spans(s)
        forget_jumps_to(s, va)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _flat(s: cython.pointer(CpuState), k: cython.int) -> cython.int:
    return (
        s.segs[k].base == 0
        and cython.cast(uint32_t, s.segs[k].limit + 1) == 0
        and not s.segs[k].access_rights & 0x10000
    )


def mode_changed(s):
    """Recompute what depends on control registers, CPL, and the code and stack segments.

    block_key: bits 0-2 mode, 3 user, 4-5 TLB set; outside 64-bit mode 6 stack is 32 bits wide, 7 flat data
    segments (bases 0, full limits), 8 flat code segment; 9 CR0.TS or EM (vector instructions trap), 10 CR0.EM,
    11 CR4.OSFXSR, 12 AVX enabled, 14 CR0.MP and TS (FWAIT), 15 CPL 1 or 2, 16-18 INTERCEPT_*.
    """
    key: uint32_t
    rights: uint32_t = s.segs[CS].access_rights
    s.alignment = 1 if s.cpl == 3 and s.cr0 >> 18 & 1 and s.rflags & FLAG_AC else 0
    if not s.cr0 & 1:
        s.mode = MODE_REAL
    elif s.efer & 0x400:
        if rights & AR_L:
            s.mode = MODE_LONG64
        elif rights & AR_DB:
            s.mode = MODE_COMPAT32
        else:
            s.mode = MODE_COMPAT16
    elif s.rflags & FLAG_VM:
        s.mode = MODE_VM86
    elif rights & AR_DB:
        s.mode = MODE_PROT32
    else:
        s.mode = MODE_PROT16
    s.tlb_set = 0
    if s.cpl == 3:
        s.tlb_set = 1
    elif s.cr4 >> 21 & 1 and s.rflags & FLAG_AC:
        s.tlb_set = 2
    key = s.mode | (8 if s.cpl == 3 else 0) | s.tlb_set << 4
    if s.mode != MODE_LONG64:
        if s.segs[SS].access_rights & AR_DB:
            key |= 0x40
        if _flat(s, DS) and _flat(s, ES) and _flat(s, SS):
            key |= 0x80
        if _flat(s, CS):
            key |= 0x100
    if s.cr0 & 0xC:
        key |= 0x200
    if s.cr0 & 4:
        key |= 0x400
    if s.cr4 & 0x200:
        key |= 0x800
    if s.cr4 >> 18 & 1 and s.xcr0 & 6 == 6:
        key |= 0x1000
    if s.cr0 & 0xA == 0xA:
        key |= 0x4000
    if s.cpl == 1 or s.cpl == 2:
        key |= 0x8000
    s.block_key = key | s.intercepts
