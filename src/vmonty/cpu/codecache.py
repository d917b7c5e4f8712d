"""The code cache of one processor: translated blocks, their links, and the stubs that all of them share.

W^X: one memfd, mapped twice; the emitter writes through one mapping, the processor executes the other. When any
arena is full the whole cache is dropped (``cache_flush``), which only the dispatcher does.

Registers inside translated code (see DESIGN, "What the prototype taught"): guest rax rdx rbx rsi rdi r8-r11 in
themselves, guest rsp in r13, guest rcx in r14, the other guest registers in the state; rcx r12 r15 scratch; rbp =
state + 128; rsp = the shadow stack of return predictions.
"""

import cython
from cython.cimports.posix.mman import (
    MAP_ANONYMOUS,
    MAP_FAILED,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_EXEC,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    mmap,
    mprotect,
    munmap,
)
from cython.cimports.posix.unistd import close, ftruncate
from cython.cimports.vmonty.cpu.hosttraps import pthread_self
from cython.cimports.vmonty.cpu.known import KNOWN_BITS
from cython.cimports.vmonty.cpu.state import (
    JUMP_CACHE_BITS,
    JUMP_CACHE_ENTRIES,
    LARGE_ENTRIES,
    LOCAL_JUMP,
    LOCAL_LOG,
    SHADOW_STACK,
    TLB_ENTRIES,
    TLB_SETS,
    forget_windows,
)
from cython.cimports.vmonty.cpu.stubs import make_stubs


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _map(size: uint64_t) -> cython.p_void:
    memory: cython.p_void = mmap(
        cython.NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0
    )
    return cython.NULL if memory == MAP_FAILED else memory


def cache_new(s, size, memory_slow, careful_access, careful_commit, call_helper, to_linear, execute_system):
    """Make the cache and its stubs; NULL when the host gives no memory. ``size`` in bytes."""
    k: cython.int
    c: cython.pointer(CodeCache) = cython.cast(cython.pointer(CodeCache), _map(cython.sizeof(CodeCache)))
    if c == cython.NULL:
        return cython.NULL
    fd: cython.int = memfd_create(b"vmonty-code", 1)
    if fd < 0 or ftruncate(fd, size) < 0:
        return cython.NULL
    c.size = size
    c.state = s
    c.writable = cython.cast(cython.p_uchar, mmap(cython.NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0))
    c.executable = cython.cast(cython.p_uchar, mmap(cython.NULL, size, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0))
    close(fd)
    c.blocks = cython.cast(cython.pointer(Block), _map(MAX_BLOCKS * cython.sizeof(Block)))
    c.links = cython.cast(cython.pointer(Link), _map(MAX_LINKS * cython.sizeof(Link)))
    c.offsets = cython.cast(cython.pointer(uint16_t), _map(MAX_OFFSETS * 2))
    c.side = cython.cast(cython.pointer(Insn), _map(MAX_SIDE * cython.sizeof(Insn)))
    c.pages = cython.cast(cython.pointer(CodePage), _map(MAX_PAGES * cython.sizeof(CodePage)))
    c.buckets = cython.cast(cython.pointer(uint32_t), _map(BLOCK_BUCKETS * 4))
    c.page_buckets = cython.cast(cython.pointer(uint32_t), _map(PAGE_BUCKETS * 4))
    c.known = cython.cast(cython.pointer(Known), _map(cython.sizeof(Known) << KNOWN_BITS))
    shadow: cython.p_void = _map(SHADOW_STACK + 8192)
    if (
        cython.cast(cython.p_void, c.writable) == MAP_FAILED
        or cython.cast(cython.p_void, c.executable) == MAP_FAILED
        or c.blocks == cython.NULL
        or c.links == cython.NULL
        or c.offsets == cython.NULL
        or c.side == cython.NULL
        or c.pages == cython.NULL
        or c.buckets == cython.NULL
        or c.page_buckets == cython.NULL
        or c.known == cython.NULL
        or shadow == cython.NULL
    ):
        return cython.NULL
    mprotect(shadow, 4096, PROT_NONE)  # a push that meets it is a full shadow stack: hosttraps resets it
    c.a.at = c.writable
    c.a.limit = c.writable + size
    c.code_ready = c.writable
    c.a.delta = cython.cast(int64_t, cython.cast(uint64_t, c.executable) - cython.cast(uint64_t, c.writable))
    functions: cython.pointer(cython.p_void) = cython.cast(cython.pointer(cython.p_void), s.host_xsave)
    functions[0] = memory_slow
    functions[1] = careful_access
    functions[2] = careful_commit
    functions[3] = call_helper
    functions[4] = to_linear
    functions[5] = execute_system
    make_stubs(c, s)
    c.first = c.a.at - c.writable
    s.translator = c
    s.code_low = cython.cast(uint64_t, c.executable)
    s.code_high = s.code_low + size
    s.trap_exit = c.trap
    s.shadow_base = cython.cast(uint64_t, shadow)
    s.shadow_size = SHADOW_STACK
    shadow_reset(s)
    for k in range(TLB_SETS):
        s.jump_used[k] = 1  # by zeroes, which are addresses, too
    jump_cache_clear(s)
    return c


def cache_free(s):
    """Unmap everything; the processor must be idle."""
    c: cython.pointer(CodeCache) = cython.cast(cython.pointer(CodeCache), s.translator)
    if c == cython.NULL:
        return
    munmap(c.writable, c.size)
    munmap(c.executable, c.size)
    munmap(c.blocks, MAX_BLOCKS * cython.sizeof(Block))
    munmap(c.links, MAX_LINKS * cython.sizeof(Link))
    munmap(c.offsets, MAX_OFFSETS * 2)
    munmap(c.side, MAX_SIDE * cython.sizeof(Insn))
    munmap(c.pages, MAX_PAGES * cython.sizeof(CodePage))
    munmap(c.buckets, BLOCK_BUCKETS * 4)
    munmap(c.page_buckets, PAGE_BUCKETS * 4)
    munmap(c.known, cython.sizeof(Known) << KNOWN_BITS)
    munmap(cython.cast(cython.p_void, s.shadow_base), SHADOW_STACK + 8192)
    munmap(c, cython.sizeof(CodeCache))
    s.translator = cython.NULL


def shadow_reset(s):
    """Forget all return predictions: the next return looks its target up."""
    c: cython.pointer(CodeCache) = cython.cast(cython.pointer(CodeCache), s.translator)
    s.shadow_top = s.shadow_base + s.shadow_size
    cython.cast(cython.pointer(uint64_t), s.shadow_top)[0] = c.return_miss


def jump_cache_clear(s):
    """Forget all indirect targets."""
    c: cython.pointer(CodeCache) = cython.cast(cython.pointer(CodeCache), s.translator)
    fill: string_function = cython.cast(string_function, cython.cast(cython.p_void, c.fill[3]))
    k: cython.int
    for k in range(TLB_SETS):
        if s.jump_used[k]:
            s.jump_used[k] = 0
            # minus a non-canonical address
            fill(
                cython.cast(uint64_t, cython.address(s.jump_negated[k][0])),
                JUMP_CACHE_ENTRIES,
                cython.cast(uint64_t, 1) << 62,
            )
    s.local_count[LOCAL_JUMP] = 0


def jump_cache_clear_local(s):
    """Forget the indirect targets in pages that are not global."""
    k: uint32_t
    n: uint32_t
    if s.local_count[LOCAL_JUMP] > LOCAL_LOG:
        jump_cache_clear(s)
    for k in range(s.local_count[LOCAL_JUMP]):
        n = s.local_jump[k]
        s.jump_negated[n >> JUMP_CACHE_BITS][n & (JUMP_CACHE_ENTRIES - 1)] = cython.cast(uint64_t, 1) << 62
    s.local_count[LOCAL_JUMP] = 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _ready(array: cython.p_void, size: uint64_t, used: uint32_t, ready: uint32_t, room: uint32_t) -> uint32_t:
    """Map the next 128 KiB of an array whose elements have ``size`` bytes; gives how many elements are mapped."""
    more: uint32_t = cython.cast(uint32_t, 131072 // size)
    first: uint64_t = cython.cast(uint64_t, array) + ready * size & ~cython.cast(uint64_t, 4095)
    if used + 256 < ready or ready + more > room:
        return ready
    madvise(cython.cast(cython.p_void, first), 131072 + 4096, MADV_POPULATE_WRITE)
    return ready + more


def cache_prepare(c):
    """Map what the next blocks are going to fill, many pages at once: a fault for each page costs more than the page.

    A kernel that cannot do that maps page by page.
    """
    page: cython.p_uchar
    c.blocks_ready = _ready(c.blocks, cython.sizeof(Block), c.blocks_used, c.blocks_ready, MAX_BLOCKS)
    c.links_ready = _ready(c.links, cython.sizeof(Link), c.links_used, c.links_ready, MAX_LINKS)
    c.offsets_ready = _ready(c.offsets, 2, c.offsets_used, c.offsets_ready, MAX_OFFSETS)
    if c.a.at + 65536 > c.code_ready and c.code_ready + 262144 <= c.a.limit:
        page = c.code_ready
        madvise(page, 262144, MADV_POPULATE_WRITE)
        madvise(page + c.a.delta, 262144, MADV_POPULATE_READ)
        c.code_ready = page + 262144


def run_guarded(s, work):
    """Nothing is kept of work that was abandoned; whoever does it again, in run_cpu(), is told why."""
    c: cython.pointer(CodeCache) = cython.cast(cython.pointer(CodeCache), s.translator)
    guard: guard_function = cython.cast(guard_function, cython.cast(cython.p_void, c.guard))
    if s.guard_thread:  # it is part of what is guarded already
        work(s)
        return True
    s.guard_thread = pthread_self()
    guard(s, work)
    s.guard_thread = 0
    if not s.host_fault:
        return True
    s.host_fault = 0
    cache_flush(s)
    return False


def cache_flush(s):
    """Drop every translation."""
    c: cython.pointer(CodeCache) = cython.cast(cython.pointer(CodeCache), s.translator)
    k: cython.int
    for k in range(cython.cast(cython.int, c.pages_used)):
        if c.pages[k].guarded:
            add_byte(_counter(c.pages[k].host_page), -1)
    c.a.at = c.writable + c.first
    c.blocks_used = 0
    c.links_used = 0
    c.cross = 0
    c.offsets_used = 0
    c.side_used = 0
    c.pages_used = 0
    for k in range(BLOCK_BUCKETS):
        c.buckets[k] = 0
    for k in range(PAGE_BUCKETS):
        c.page_buckets[k] = 0
    c.span_links = 0
    c.flushes += 1
    s.page_slots_used = 0
    shadow_reset(s)
    jump_cache_clear(s)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _bucket(rip: uint64_t, host_page: uint64_t) -> uint32_t:
    """Blocks of one page have buckets side by side, which are in the host's cache together."""
    h: uint64_t = (host_page >> 12) * cython.cast(uint64_t, 0x9E3779B97F4A7C15)
    return cython.cast(uint32_t, (rip >> 2) + (h >> 40)) & (BLOCK_BUCKETS - 1)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _page_bucket(host_page: uint64_t) -> uint32_t:
    h: uint64_t = (host_page >> 12) * cython.cast(uint64_t, 0x9E3779B97F4A7C15)
    return cython.cast(uint32_t, h >> 40) & (PAGE_BUCKETS - 1)


def block_find(c, rip, linear, limit, host_page, key):
    """Give the valid translation of ``rip`` (code in ``host_page``) under ``key``, or NULL.

    Code segments with different bases reach different bytes of one page with the same rip: ``linear`` tells them apart.
    A block ends at the ``limit`` of its code segment.
    """
    n: uint32_t = c.buckets[_bucket(rip, host_page)]
    b: cython.pointer(Block)
    while n:
        b = cython.address(c.blocks[n - 1])
        if (
            b.rip == rip
            and b.linear == linear
            and b.limit == limit
            and b.host_page == host_page
            and b.key == key
            and b.valid
        ):
            return b
        n = b.next
    return cython.NULL


def page_find(c, host_page):
    """Give what is known of a page that code was translated from, or NULL."""
    n: uint32_t = c.page_buckets[_page_bucket(host_page)]
    while n:
        if c.pages[n - 1].host_page == host_page:
            return cython.address(c.pages[n - 1])
        n = c.pages[n - 1].next
    return cython.NULL


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _counter(host_page: uint64_t) -> cython.p_uchar:
    return code_counters + ((host_page >> 12) & (CODE_COUNTERS - 1))


def is_code_page(s, host_page):
    """Tell whether any processor has translations of that page: then it may not be in a write TLB."""
    return _counter(host_page)[0] != 0


def register_processor(s):
    """Enter a processor into the list. Call with the GIL held; -1 when there is no room or no memory."""
    global code_counters, processors_count
    k: cython.int
    if code_counters == cython.NULL:
        code_counters = cython.cast(cython.p_uchar, _map(CODE_COUNTERS))
        if code_counters == cython.NULL:
            return -1
    for k in range(processors_count):
        if processors[k] == cython.NULL:
            processors[k] = s
            return 0
    if processors_count >= 256:
        return -1
    processors[processors_count] = s
    processors_count += 1
    return 0


def unregister_processor(s):
    """Take a processor out of the list. Call with the GIL held, the processor idle."""
    k: cython.int
    cache_flush(s)
    while lock_take(cython.address(processors_lock), 1):
        pass
    for k in range(processors_count):
        if processors[k] == s:
            processors[k] = cython.NULL
    lock_drop(cython.address(processors_lock))


def announce_write(s, host_page):
    """Queue a written page for every processor but ``s`` and get them to look."""
    k: cython.int
    t: cython.pointer(CpuState)
    while lock_take(cython.address(processors_lock), 1):
        pass
    for k in range(processors_count):
        t = processors[k]
        if t == cython.NULL or t == s:
            continue
        if t.code_queue_count < 64:
            t.code_queue[t.code_queue_count] = host_page
            t.code_queue_count += 1
        else:
            t.code_queue_all = 1
        t.run = 0
    lock_drop(cython.address(processors_lock))


def drain_writes(s):
    """Drop the translations of pages that others wrote."""
    pages: uint64_t[64]
    n: uint32_t
    k: uint32_t
    everything: uint32_t
    _drain_fresh(s)
    while lock_take(cython.address(processors_lock), 1):
        pass
    n = s.code_queue_count
    for k in range(n):
        pages[k] = s.code_queue[k]
    everything = s.code_queue_all
    s.code_queue_count = 0
    s.code_queue_all = 0
    lock_drop(cython.address(processors_lock))
    if everything:
        cache_flush(s)
    else:
        for k in range(n):
            drop_page(s, pages[k])
    if n:
        shadow_reset(s)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _drain_fresh(s: cython.pointer(CpuState)) -> cython.void:
    """Look for the pages in which others found code. Not while anything relies on an entry of the write tables."""
    fresh: uint64_t[FRESH_PAGES]
    count: uint32_t
    asked: uint32_t
    k: uint32_t
    while lock_take(cython.address(processors_lock), 1):
        pass
    count = s.fresh_count
    asked = s.fresh_asked
    for k in range(FRESH_PAGES):
        fresh[k] = s.fresh_queue[k]
    s.fresh_count = 0
    lock_drop(cython.address(processors_lock))
    if count > FRESH_PAGES:
        _forget_all_writable(s)
    else:
        for k in range(count):
            if _forget_writable(s, fresh[k]):
                announce_write(s, fresh[k])
    s.fresh_seen = asked


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _await_polls(s: cython.pointer(CpuState)) -> cython.void:
    """Wait until every processor that runs has looked for the pages queued for it, or its host thread seems to sleep.

    Meanwhile look for those of others, who may be waiting for us.
    """
    k: cython.int
    t: cython.pointer(CpuState)
    begun: uint64_t = host_tsc()
    for k in range(processors_count):
        t = processors[k]
        if t == cython.NULL or t == s:
            continue
        while t.in_run and cython.cast(int32_t, t.fresh_asked - t.fresh_seen) > 0 and host_tsc() - begun < POLL_CYCLES:
            if s.fresh_count:
                _drain_fresh(s)
            cpu_relax()
            read_again()


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _forget_writable(s: cython.pointer(CpuState), host_page: uint64_t) -> cython.int:
    """Take a page out of a processor's write tables; tells whether it was there. Slots come last: they are filled from
    the others.

    Another processor may fill an entry just then, from what it has read before, or be in a strip, which asks no more:
    so the page is also queued for it, it looks itself at its next poll, and the code is read after that
    (``page_guard``).
    """
    k: cython.int
    t: cython.int
    n: cython.int = s.page_slots_used
    none: uint64_t = cython.cast(uint64_t, 1) << 62
    found: cython.int = 0
    for t in range(TLB_SETS):
        for k in range(LARGE_ENTRIES):
            if host_page - s.large_write[t][k].host <= s.large_write[t][k].last:
                found |= s.large_write[t][k].negated_tag != none
                s.large_write[t][k].negated_tag = none
        for k in range(TLB_ENTRIES):
            if s.tlb_write[t][k].host == host_page:
                found |= s.tlb_write[t][k].negated_tag != none
                s.tlb_write[t][k].negated_tag = none
    for k in range(n):
        if host_page - s.page_slots[k].host <= s.page_slots[k].last:
            found |= s.slot_tags[k] != none
            s.slot_tags[k] = none
    return found


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _forget_all_writable(s: cython.pointer(CpuState)) -> cython.void:
    """Empty the write tables: more pages than the queue held got code elsewhere."""
    k: cython.int
    t: cython.int
    for t in range(TLB_SETS):
        for k in range(TLB_ENTRIES):
            s.tlb_write[t][k].negated_tag = cython.cast(uint64_t, 1) << 62
    s.large_used = 1
    forget_windows(s)


def page_guard(c, host_page):
    s: cython.pointer(CpuState) = cython.cast(cython.pointer(CpuState), c.state)
    t: cython.pointer(CpuState)
    p: cython.pointer(CodePage) = page_find(c, host_page)
    h: uint32_t
    n: cython.int
    if p == cython.NULL:
        h = _page_bucket(host_page)
        p = cython.address(c.pages[c.pages_used])
        c.pages_used += 1
        p.host_page = host_page
        p.first = 0
        p.guarded = 0
        p.generation = s.host_generation
        p.next = c.page_buckets[h]
        c.page_buckets[h] = c.pages_used
    if p.guarded:
        return p
    p.guarded = 1
    while lock_take(cython.address(processors_lock), 1):
        pass
    if add_byte(_counter(host_page), 1):  # another processor's code is there: nobody writes unnoticed
        lock_drop(cython.address(processors_lock))
        return p
    for n in range(processors_count):
        t = processors[n]
        if t == cython.NULL:
            continue
        _forget_writable(t, host_page)
        if t != s:
            if t.fresh_count < FRESH_PAGES:
                t.fresh_queue[t.fresh_count] = host_page
            t.fresh_count += 1
            t.fresh_asked += 1
            t.run = 0
    lock_drop(cython.address(processors_lock))
    _await_polls(s)
    return p


def block_register(c, b):
    """Make a finished block findable."""
    number: uint32_t = (b - c.blocks) + 1
    h: uint32_t = _bucket(b.rip, b.host_page)
    p: cython.pointer(CodePage)
    b.next = c.buckets[h]
    c.buckets[h] = number
    p = page_guard(c, b.host_page)
    b.page_next = p.first
    p.first = number
    if b.host_page2 and b.host_page2 != b.host_page:
        p = page_guard(c, b.host_page2)
        b.page_next2 = p.first
        p.first = number
    b.valid = 1


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _patch(c: cython.pointer(CodeCache), at: uint32_t, target: uint32_t) -> cython.void:
    cython.cast(cython.pointer(uint32_t), c.writable + at)[0] = target - (at + 4)


def link_filter_index(va):
    """Where in the state's link_filter a linear page is. Pages of processes do not collide with the kernel's."""
    return ((va >> 12) & 4095) | (va >> 63) << 12


def link_to(s, link, b):
    """Send a direct exit straight to a block; to one in two pages only while there is room to remember that."""
    c: cython.pointer(CodeCache) = cython.cast(cython.pointer(CodeCache), s.translator)
    e: cython.pointer(Link) = cython.address(c.links[link])
    if b.host_page2:
        if c.span_links >= 64:
            return
        c.span_link[c.span_links] = link
        c.span_links += 1
    _patch(c, e.patch, b.entry)
    if e.cross_page:
        s.link_filter[link_filter_index(b.linear)] = 1
        s.link_filter[link_filter_index(b.linear + b.length - 1)] = 1
    if e.cross_page == CROSS_UNLINKED:
        e.cross_page = CROSS_CHAINED
        e.next_cross = c.cross
        c.cross = link + 1
    e.destination = (b - c.blocks) + 1
    e.next_incoming = b.incoming
    b.incoming = link + 1


def block_invalidate(s, b):
    """Take a block out of every index and unlink the exits that go to it. Its code is not reused before a flush."""
    c: cython.pointer(CodeCache) = cython.cast(cython.pointer(CodeCache), s.translator)
    e: cython.pointer(Link)
    n: uint32_t = b.incoming
    number: uint32_t = (b - c.blocks) + 1
    h: cython.int
    k: cython.int
    b.valid = 0
    while n:
        e = cython.address(c.links[n - 1])
        n = e.next_incoming
        if e.destination == number:
            _patch(c, e.patch, e.stub)
            e.destination = 0
    b.incoming = 0
    code: uint64_t = cython.cast(uint64_t, c.executable) + b.entry
    h = (b.rip >> 2) & (JUMP_CACHE_ENTRIES - 1)
    for k in range(TLB_SETS):
        if s.jump_code[k][h] == code:
            s.jump_negated[k][h] = cython.cast(uint64_t, 1) << 62
    # out of its hash chain
    at: cython.pointer(uint32_t) = cython.address(c.buckets[_bucket(b.rip, b.host_page)])
    while at[0]:
        if at[0] == number:
            at[0] = b.next
            break
        at = cython.address(c.blocks[at[0] - 1].next)


def code_written(s, host_page):
    """Drop the translations of a page that is being written; tells how many of ours. Not from translated blocks."""
    host_page &= ~cython.cast(uint64_t, 0xFFF)
    count: cython.int = drop_page(s, host_page)
    if _counter(host_page)[0]:
        announce_write(s, host_page)
    if count:
        s.code_page_written = 1
    return count


def drop_page(s, host_page):
    """Drop the translations of a page; tells how many."""
    c: cython.pointer(CodeCache) = cython.cast(cython.pointer(CodeCache), s.translator)
    p: cython.pointer(CodePage) = page_find(c, host_page)
    b: cython.pointer(Block)
    n: uint32_t
    count: cython.int = 0
    if p == cython.NULL or p.guarded == 0:
        return 0
    n = p.first
    p.first = 0
    p.guarded = 0
    add_byte(_counter(host_page), -1)
    while n:
        b = cython.address(c.blocks[n - 1])
        n = b.page_next if b.host_page == host_page else b.page_next2
        if b.valid:
            block_invalidate(s, b)
            count += 1
    return count


def unlink_spans(s):
    """Undo the direct links to blocks in two pages: the second one may be mapped elsewhere now."""
    c: cython.pointer(CodeCache) = cython.cast(cython.pointer(CodeCache), s.translator)
    e: cython.pointer(Link)
    at: cython.pointer(uint32_t)
    k: uint32_t
    number: uint32_t
    for k in range(c.span_links):
        number = c.span_link[k] + 1
        e = cython.address(c.links[number - 1])
        if e.destination == 0 or not c.blocks[e.destination - 1].host_page2:
            continue
        at = cython.address(c.blocks[e.destination - 1].incoming)
        while at[0] and at[0] != number:
            at = cython.address(c.links[at[0] - 1].next_incoming)
        at[0] = e.next_incoming
        _patch(c, e.patch, e.stub)
        e.destination = 0
    c.span_links = 0


def unlink_cross_page(s):
    """Undo every direct link between pages: a mapping that they relied on may be gone."""
    c: cython.pointer(CodeCache) = cython.cast(cython.pointer(CodeCache), s.translator)
    e: cython.pointer(Link)
    k: uint32_t
    for k in range(8192):
        s.link_filter[k] = 0
    while c.cross:
        e = cython.address(c.links[c.cross - 1])
        c.cross = e.next_cross
        e.cross_page = CROSS_UNLINKED
        if e.destination:
            _unlink_cross_of(c, cython.address(c.blocks[e.destination - 1]))
    shadow_reset(s)
    jump_cache_clear(s)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _unlink_cross_of(c: cython.pointer(CodeCache), b: cython.pointer(Block)) -> cython.void:
    """Undo the links from other pages to a block; the others stay."""
    e: cython.pointer(Link)
    n: uint32_t = b.incoming
    b.incoming = 0
    number: uint32_t = (b - c.blocks) + 1
    following: uint32_t
    while n:
        e = cython.address(c.links[n - 1])
        following = e.next_incoming
        if e.destination == number:
            if e.cross_page:
                _patch(c, e.patch, e.stub)
                e.destination = 0
            else:
                e.next_incoming = b.incoming
                b.incoming = n
        n = following


def forget_jumps_to(s, va):
    """Undo the direct links to a linear page from others, if there are any, and forget every other way to it."""
    if s.link_filter[link_filter_index(va)]:
        unlink_cross_page(s)
    shadow_reset(s)
    jump_cache_clear(s)


def block_at_host(c, host_rip):
    """Give the block whose code holds a host address, or NULL. Blocks lie in the order they were made."""
    offset: uint64_t = host_rip - cython.cast(uint64_t, c.executable)
    low: cython.long = 0
    high: cython.long = c.blocks_used
    middle: cython.long
    if offset >= c.size:
        return cython.NULL
    while low < high:
        middle = (low + high) >> 1
        if c.blocks[middle].entry + c.blocks[middle].size <= offset:
            low = middle + 1
        else:
            high = middle
    if low < c.blocks_used and c.blocks[low].entry <= offset:
        return cython.address(c.blocks[low])
    return cython.NULL
