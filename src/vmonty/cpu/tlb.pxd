"""The translation look-aside buffers, and linear memory for compiled helpers."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from vmonty.cpu.paging cimport Translation
from vmonty.cpu.state cimport CpuState, FetchEntry

# What memory_slow and careful_access are told about the access, in one word.
cdef enum:
    SLOW_OFFSET = 0xFFF      # guest bytes from the start of the block to the instruction
    SLOW_READ = 0x1000
    SLOW_WRITE = 0x2000
    SLOW_STACK = 0x4000      # a stack reference: #SS instead of #GP
    SLOW_ALIGNED = 0x8000    # misaligned: #GP before any page fault
    SLOW_SIZE_SHIFT = 16
    SLOW_GROUP = 0x4000000   # the bytes of several operands: all in one page, or LEAVE_PLAIN
    SLOW_LATE = 0x4000000    # the same bit in a careful block: an x87 store, which faults only if it stores
    SLOW_MASKED = 0x8000000  # perhaps only some of its elements: a careful block finds out when not all are there
    SLOW_SEGMENT_SHIFT = 28  # to_linear: the segment register
    SLOW_LOCK = 0x80000000   # in a careful block: LOCK, or XCHG
    TLB_INVALID = 1          # low bits of a negated tag that never match

cdef uint64_t memory_slow(CpuState *s, uint64_t va, uint32_t what, uint64_t host_rip) noexcept nogil
cdef uint64_t to_linear(CpuState *s, uint64_t offset, uint32_t what, uint64_t host_rip) noexcept nogil

# Linear memory for helpers: current privilege unless ``access`` adds ACCESS_IMPLICIT; any size up to 512 bytes;
# crossing pages, MMIO and code pages are handled. 0, or LEAVE_* with the reason recorded.
cdef int read_linear(CpuState *s, uint64_t va, void *data, uint32_t size, int access) noexcept nogil
cdef int write_linear(CpuState *s, uint64_t va, void *data, uint32_t size, int access) noexcept nogil
cdef int read_value(CpuState *s, uint64_t va, uint32_t size, int access, uint64_t *value) noexcept nogil
cdef int write_value(CpuState *s, uint64_t va, uint32_t size, int access, uint64_t value) noexcept nogil
# Check that a write would succeed, without doing it.
cdef int probe_write(CpuState *s, uint64_t va, uint32_t size, int access) noexcept nogil

cdef int host_of(CpuState *s, uint64_t va, int access, uint64_t *where) noexcept nogil

# Where the code at va lies; NULL with the exception recorded.
cdef FetchEntry *fetch_page(CpuState *s, uint64_t va, int *why) noexcept nogil
# The same ahead of time, in 64-bit mode: NULL, and nothing recorded, where it cannot be executed.
cdef FetchEntry *fetch_ahead(CpuState *s, uint64_t va) noexcept nogil

cdef void flush_all(CpuState *s) noexcept nogil
cdef void flush_non_global(CpuState *s) noexcept nogil
cdef void flush_page(CpuState *s, uint64_t va) noexcept nogil

# To be called after cr0, cr3 (mode bits only), cr4, efer, cpl, cs, ss or EFLAGS.VM/AC changed: recomputes mode, tlb_set
# and block_key. Flushes nothing.
cdef void mode_changed(CpuState *s) noexcept nogil

# For careful blocks too. look: one page, entered into the tables where it may. leave_block: 0, with rip and the reason
# set. refuse: the same for a careful block, but for an x87 store. bounce_buffer: one of four, aligned as the operand.
cdef void copy_bytes(unsigned char *to, unsigned char *source, uint32_t size) noexcept nogil
cdef void note_access(CpuState *s, uint64_t va, uint64_t physical, unsigned char *data, uint32_t size,
                      uint32_t kind) noexcept nogil
cdef int check_canonical(CpuState *s, uint64_t va, int stack) noexcept nogil
cdef int look(CpuState *s, uint64_t va, int access, Translation *t) noexcept nogil
cdef uint64_t leave_block(CpuState *s, int code, uint32_t what, uint64_t host_rip) noexcept nogil
cdef uint64_t refuse(CpuState *s, int code, uint32_t what, uint64_t host_rip) noexcept nogil
cdef unsigned char *bounce_buffer(CpuState *s, uint32_t k, uint64_t va) noexcept nogil

# A page of ones lies in it.
cdef unsigned char _open_bus[8192]
