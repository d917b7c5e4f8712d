"""One hardware page walker: 32-bit, PAE, 4- and 5-level paging, alone or under EPT or NPT. (Owner: system side.)"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from vmonty.cpu.state cimport NESTED_ENTRIES, CpuState, NestedEntry, TableEntry

cdef extern from *:
    # Compiler built-ins: page-table entries are changed by several processors at once.
    bint swap64 "__sync_bool_compare_and_swap" (uint64_t *at, uint64_t old, uint64_t new) noexcept nogil
    bint swap32 "__sync_bool_compare_and_swap" (uint32_t *at, uint32_t old, uint32_t new) noexcept nogil

# Translation.fault
cdef enum:
    WALK_OK = 0
    WALK_PAGE_FAULT = 1        # error_code
    WALK_EPT_VIOLATION = 2     # qualification, fault_physical
    WALK_EPT_MISCONFIG = 3     # fault_physical
    WALK_NESTED_FAULT = 4      # NPT: qualification = EXITINFO1, fault_physical
    WALK_RETRY = 5             # another processor changed an entry meanwhile (internal)

# What a walk wants of the second dimension: the EPT permission bits, and bits of the exit qualification.
cdef enum:
    NESTED_READ = 1
    NESTED_WRITE = 2
    NESTED_EXEC = 4
    NESTED_LINEAR = 0x80       # the guest linear address is valid
    NESTED_FINAL = 0x100       # the translation's result, not a paging-structure entry


cdef struct Translation:
    uint64_t host            # where the 4 KB page is in our address space; 0: MMIO of the bare processor
    uint64_t physical        # guest-physical address of the 4 KB page
    uint32_t is_global       # CR4.PGE and G in the leaf
    uint32_t may_write       # the page may enter the write TLB: permitted, and every D bit set
    uint32_t may_execute
    uint32_t user            # a user-mode address (U/S set in every entry)
    uint64_t size            # bytes over which the translation is uniform in every dimension (4096, 2 MiB, …)
    uint64_t linear
    uint32_t fault           # WALK_*
    uint32_t error_code
    uint64_t qualification
    uint64_t fault_physical


# One level of a walk, kept for setting accessed and dirty flags at its end.
cdef struct Step:
    uint64_t physical
    uint64_t host
    uint64_t value


# Walk and record the fault: GO_ON, or LEAVE_EVENT (#PF), LEAVE_EXIT/LEAVE_JUMP (EPT violation …, nested fault).
cdef int translate(CpuState *s, uint64_t va, int access, Translation *t) noexcept nogil
# Walk without side effects on the processor (A/D bits are set, faults only described). Returns Translation.fault.
cdef uint32_t walk(CpuState *s, uint64_t va, uint32_t access, Translation *t) noexcept nogil
cdef int record_fault(CpuState *s, Translation *t) noexcept nogil
# The host address of a physical address of the bare processor (A20 applied), or 0.
cdef uint64_t physical_to_host(CpuState *s, uint64_t physical, int write) noexcept nogil
# A guest-physical address through the second dimension (or Regions): host address, or 0 with t.fault (0: no memory).
cdef uint64_t nested_host(CpuState *s, uint64_t physical, uint32_t wanted, Translation *t, uint64_t *size,
                          uint32_t *granted) noexcept nogil


cdef inline uint64_t known_host(CpuState *s, uint64_t physical, uint32_t wanted) noexcept nogil:
    """What nested_host would answer for an entry of a paging structure, if it is at hand; else 0."""
    cdef NestedEntry *e = &s.nested_pages[(physical >> 12) & (NESTED_ENTRIES - 1)]
    if s.nested == 0:
        return physical if s.direct else 0
    if s.nested == 2:
        wanted |= NESTED_WRITE
    if e.tag == ((physical & ~<uint64_t> 0xFFF) | 1) and (wanted & 7 & ~e.granted) == 0:
        return e.host + (physical & 0xFFF)
    return 0


cdef uint64_t _region_host(CpuState *s, uint64_t physical, uint32_t wanted, uint64_t *size,
                           uint32_t *granted) noexcept nogil
cdef bint _missing_memory(CpuState *s, Translation *t) noexcept nogil
cdef uint64_t _table_host(CpuState *s, uint64_t physical) noexcept nogil
cdef uint64_t _nested_page(CpuState *s, uint64_t physical, uint64_t host, uint32_t wanted, Translation *t,
                           uint32_t *granted) noexcept nogil
cdef uint64_t _ept_violation(Translation *t, uint64_t physical, uint32_t wanted, uint64_t permissions) noexcept nogil
cdef bint _ept_misconfigured(uint64_t value, uint32_t level, bint leaf) noexcept nogil
cdef uint64_t _ept_host(CpuState *s, uint64_t physical, uint32_t wanted, Translation *t, uint64_t *size,
                        uint32_t *granted) noexcept nogil
cdef uint64_t _nested_fault(Translation *t, uint64_t physical, uint32_t wanted, uint64_t error_code) noexcept nogil
cdef uint64_t _npt_host(CpuState *s, uint64_t physical, uint32_t wanted, Translation *t, uint64_t *size,
                        uint32_t *granted) noexcept nogil
cdef bint _reserved_address_bits(uint32_t level, uint64_t value) noexcept nogil
cdef uint32_t _page_fault(CpuState *s, Translation *t, uint32_t access, uint32_t present_reserved) noexcept nogil
cdef uint64_t _entry_host(CpuState *s, uint64_t physical, Translation *t) noexcept nogil
cdef uint32_t _set_flags(CpuState *s, Step *step, uint64_t wish, Translation *t, bint wide) noexcept nogil
cdef uint32_t _finish(CpuState *s, Translation *t, uint32_t access, uint64_t size, bint may_write,
                      bint may_execute) noexcept nogil
cdef bint _permitted(CpuState *s, uint32_t access, uint64_t rights, uint64_t no_execute) noexcept nogil
cdef uint32_t _complete(CpuState *s, uint32_t access, Translation *t, Step *steps, uint32_t count, uint64_t rights,
                        uint64_t no_execute, uint32_t shift, bint wide) noexcept nogil
cdef void _remember_table(TableEntry *known, uint64_t va, Step *step, uint64_t rights,
                          uint64_t no_execute) noexcept nogil
cdef uint32_t _walk_wide(CpuState *s, uint64_t va, uint32_t access, Translation *t) noexcept nogil
cdef uint32_t _walk_32(CpuState *s, uint64_t va, uint32_t access, Translation *t) noexcept nogil
