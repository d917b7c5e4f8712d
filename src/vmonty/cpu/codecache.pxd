"""The code cache of one processor: translated blocks, their links, and the stubs that all of them share."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from vmonty.cpu.assembler cimport Assembler
from vmonty.cpu.decode cimport Insn
from vmonty.cpu.known cimport Known
from vmonty.cpu.state cimport CpuState

cdef enum:
    MAX_BLOCKS = 49152
    MAX_LINKS = 131072
    MAX_OFFSETS = 1048576
    CROSS_UNLINKED = 1       # Link.cross_page, 0 for a link within a page
    CROSS_CHAINED = 2        # in the chain of those that an unlinking goes through
    MAX_SIDE = 32768
    BLOCK_BUCKETS = 16384
    PAGE_BUCKETS = 4096
    MAX_PAGES = 16384

# What leaves translated code (CpuState.leave_code), besides LEAVE_* of helpers.
cdef enum:
    OUT_LINK = 16            # leave_argument: index of the link to resolve
    OUT_INDIRECT = 17        # rip: where to go on
    OUT_POLL = 18            # rip: the instruction at which the run flag was seen 0
    OUT_SYSTEM = 19          # leave_argument: index of the side instruction to execute
    OUT_NEXT = 20            # rip: where to go on, after a single-instruction block
    OUT_TRAP = 21            # a host trap: trap_rip, trap_signal, trap_code
    OUT_FAULT = 22           # leave_argument: index of a side instruction whose fetch or decode failed


cdef struct Block:
    uint64_t rip
    uint64_t linear          # rip plus the code segment's base
    uint64_t limit           # the code segment's when it was translated; all ones in 64-bit mode
    uint64_t host_page       # host address of the first page that its code lies in
    uint64_t host_page2      # second page, or 0: of its one instruction, or of a loop that lies in both
    uint32_t key
    uint32_t entry           # offset of the code in the mapping
    uint32_t size
    uint32_t body_size       # without out-of-line stubs
    uint16_t length          # guest bytes
    uint16_t count           # of pairs in offsets: guest instructions, those of each round in a loop
    uint32_t offsets         # index into offsets: host offset, guest offset pairs
    uint32_t pairs           # how many
    uint32_t valid
    uint32_t next            # hash chain, index + 1
    uint32_t page_next       # chains of blocks of one host page
    uint32_t page_next2
    uint32_t incoming        # first link that jumps here, index + 1
    uint32_t is_global
    uint32_t digest          # of the guest bytes in the first page, and in the second (coherence)
    uint32_t digest2


cdef struct Link:
    uint64_t target          # guest rip
    uint32_t patch           # offset of the rel32
    uint32_t stub            # offset of the stub it goes to while unlinked
    uint32_t block           # index of the block that it leaves
    uint32_t destination     # index + 1 of the block that it goes to now, 0 none
    uint32_t next_incoming
    uint32_t cross_page      # one of CROSS_...
    uint32_t next_cross      # chain of links between pages, index + 1


cdef struct CodePage:
    uint64_t host_page
    uint64_t generation      # CpuState.host_generation when its bytes were last compared
    uint32_t first           # first block, index + 1
    uint32_t next
    uint32_t guarded         # counted in code_counters: its writes are noticed
    uint32_t pad


# Parts of a memory operand's check: its tag into rcx, and the host address into r12.
cdef struct Check:
    uint8_t look[24]
    uint8_t use[8]
    int look_size
    int use_size


cdef struct CodeCache:
    uint8_t *writable
    uint8_t *executable
    uint64_t size
    Assembler a
    uint32_t first           # offset after the stubs
    uint32_t blocks_used
    uint32_t links_used
    uint32_t cross           # first link of the chain
    uint32_t offsets_used
    uint32_t side_used
    uint32_t pages_used
    Block *blocks
    Link *links
    uint16_t *offsets
    Insn *side
    Known *known             # what decode made of instructions
    CodePage *pages
    uint32_t *buckets
    uint32_t *page_buckets
    uint32_t span_links      # in use below
    uint32_t span_link[64]   # links to blocks in two pages, which hold until mappings change
    uint64_t flushes
    # What is mapped ahead of use, see cache_prepare.
    uint8_t *code_ready
    uint32_t blocks_ready
    uint32_t links_ready
    uint32_t offsets_ready
    void *state
    # ---- stubs -------------------------------------------------------------------------------------
    uint64_t enter           # int enter(CpuState *, void *code)
    uint64_t load_vectors    # void load_vectors(CpuState *)
    uint64_t save_vectors
    uint64_t leave           # saves everything, returns leave_code
    uint64_t leave_link
    uint64_t leave_indirect
    uint64_t leave_branch        # the same, and r12 goes to branch_at
    uint64_t leave_poll
    uint64_t leave_system    # r15 = number: the dispatcher executes that instruction
    uint64_t execute_system  # the same here, going on with the next block if nothing is in the way
    uint64_t leave_next
    uint64_t leave_fault
    uint64_t trap
    uint64_t guard           # void guard(CpuState *, void (*work)(CpuState *)): abandon comes back from it
    uint64_t abandon         # with the state + 128 in rbp
    uint64_t memory_slow
    uint64_t careful_access
    uint64_t careful_commit
    uint64_t call_helper
    uint64_t to_linear       # rcx = offset, immediate pushed: rcx = linear address after the segment's checks
    uint64_t window[6]       # rcx = linear address, r15 = 8 * slot: fill the slot from a TLB; reads, writes, by set
    Check check[6]           # to be copied, not called; reads, writes, by set
    uint64_t lookup[3]       # r15 = guest rip: jump through the jump cache of a TLB set
    uint64_t copy[4]         # void copy(to, from, count): rep movs by log2 size
    uint64_t fill[4]         # void fill(to, count, value): rep stos
    uint64_t fpu[13]         # void f(buffer, mask): fxsave fxrstor xsave xrstor, then stenv ldenv save rstor, xsavec
    uint64_t store_vectors   # void f(buffer): ymm0 ... ymm15, 32 bytes each
    uint64_t fill_vectors    # the reverse
    uint64_t return_miss     # bottom of the shadow stack


ctypedef int (*enter_function)(CpuState *, void *) noexcept nogil
ctypedef void (*guarded_function)(CpuState *) noexcept nogil
ctypedef void (*guard_function)(CpuState *, guarded_function) noexcept nogil
ctypedef void (*vector_function)(CpuState *) noexcept nogil

cdef inline void put_vectors(CpuState *s) noexcept nogil:
    """Before anything that may use vector registers: put the guest's away, if they are there."""
    if s.vectors_live:
        s.vectors_live = 0
        (<vector_function><void *>(<CodeCache *>s.translator).save_vectors)(s)

cdef inline void take_vectors(CpuState *s) noexcept nogil:
    """Before the guest runs."""
    if s.vectors_live == 0:
        s.vectors_live = 1
        (<vector_function><void *>(<CodeCache *>s.translator).load_vectors)(s)
ctypedef void (*string_function)(uint64_t, uint64_t, uint64_t) noexcept nogil

cdef extern from "<sys/mman.h>" nogil:
    int memfd_create(const char *name, unsigned int flags)

cdef extern from "<sys/mman.h>" nogil:
    int madvise(void *address, size_t length, int advice)

cdef enum:
    MADV_POPULATE_READ = 22  # Linux 5.14; Debian's headers may be older than the kernel
    MADV_POPULATE_WRITE = 23

cdef extern from * nogil:
    int lock_take "__sync_lock_test_and_set"(int *lock, int value)
    void lock_drop "__sync_lock_release"(int *lock)
    int add_byte "__sync_fetch_and_add"(uint8_t *at, int value)

# All processors of this process, and for each page of host memory (by the low 22 bits of its number) how many of them
# hold translations of code in it.
cdef enum:
    CODE_COUNTERS = 4194304

cdef extern from "<immintrin.h>" nogil:
    void cpu_relax "_mm_pause"()
    void read_again "__sync_synchronize"()
    uint64_t host_tsc "__builtin_ia32_rdtsc"()

cdef enum:
    FRESH_PAGES = 8
    POLL_CYCLES = 100000     # a processor that does not poll within that is not running

cdef CpuState *processors[256]
cdef int processors_count
cdef int processors_lock
cdef uint8_t *code_counters

cdef int register_processor(CpuState *s) noexcept
cdef void unregister_processor(CpuState *s) noexcept
# Tell every other processor (s NULL: every one) that a page with code was written.
cdef void announce_write(CpuState *s, uint64_t host_page) noexcept nogil
# Drop what others announced; the dispatcher calls it when the run flag went 0.
cdef void drain_writes(CpuState *s) noexcept nogil

cdef CodeCache *cache_new(CpuState *s, uint64_t size, void *memory_slow, void *careful_access, void *careful_commit,
                          void *call_helper, void *to_linear, void *execute_system) noexcept nogil
cdef void cache_free(CpuState *s) noexcept nogil
cdef void cache_flush(CpuState *s) noexcept nogil
# Do what touches guest memory, outside of run_cpu(), too; False when that was gone. After prepare_thread().
cdef bint run_guarded(CpuState *s, guarded_function work) noexcept nogil
cdef void cache_prepare(CodeCache *c) noexcept nogil
cdef Block *block_find(CodeCache *c, uint64_t rip, uint64_t linear, uint64_t limit, uint64_t host_page,
                       uint32_t key) noexcept nogil
# Notice writes to a page from now on; before its code is read. c.pages must have room.
cdef CodePage *page_guard(CodeCache *c, uint64_t host_page) noexcept nogil
cdef void block_register(CodeCache *c, Block *b) noexcept nogil
cdef void block_invalidate(CpuState *s, Block *b) noexcept nogil
cdef int is_code_page(CpuState *s, uint64_t host_page) noexcept nogil
cdef int code_written(CpuState *s, uint64_t host_page) noexcept nogil
cdef uint32_t link_filter_index(uint64_t va) noexcept nogil
cdef void link_to(CpuState *s, uint32_t link, Block *b) noexcept nogil
cdef CodePage *page_find(CodeCache *c, uint64_t host_page) noexcept nogil
cdef int drop_page(CpuState *s, uint64_t host_page) noexcept nogil
cdef void unlink_cross_page(CpuState *s) noexcept nogil
cdef void unlink_spans(CpuState *s) noexcept nogil
cdef void forget_jumps_to(CpuState *s, uint64_t va) noexcept nogil
cdef Block *block_at_host(CodeCache *c, uint64_t host_rip) noexcept nogil
cdef void shadow_reset(CpuState *s) noexcept nogil
cdef void jump_cache_clear(CpuState *s) noexcept nogil
cdef void jump_cache_clear_local(CpuState *s) noexcept nogil
