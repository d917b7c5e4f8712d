"""The state of one logical processor: allocation, reset values, and how helpers record exceptions.

The fields are in ``state.pxd``; that file is the contract between the translator and the system side.
"""

import cython
from cython.cimports.libc.stdlib import free
from cython.cimports.posix.mman import MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap


def state_new():
    """Give a zeroed, page-aligned state with the constants that translated code reads; NULL without memory."""
    memory: cython.p_void = mmap(
        cython.NULL, cython.sizeof(CpuState), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0
    )
    if memory == MAP_FAILED:
        return cython.NULL
    s: cython.pointer(CpuState) = cython.cast(cython.pointer(CpuState), memory)
    s.run = 1
    k: cython.int
    s.index_mask = cython.cast(uint64_t, TLB_ENTRIES - 1) << 12
    s.page_mask = ~cython.cast(uint64_t, 0xFFF)
    s.jump_mask = (JUMP_CACHE_ENTRIES - 1) << 2
    s.bit_mask_16 = 15
    s.bit_mask_32 = 31
    s.bit_mask_64 = 63
    s.physical_bits = 46
    s.large_used = 1
    forget_windows(s)
    for k in range(8):
        s.features[k] = ~cython.cast(uint64_t, 0)
    return s


def forget_windows(s):
    """Take everything out of the TLBs for large pages, and out of what accesses remember."""
    k: uint32_t
    n: uint32_t
    for k in range(s.page_slots_used):
        s.slot_tags[k] = cython.cast(uint64_t, 1) << 62
    if s.large_used:
        for n in range(cython.cast(uint32_t, TLB_SETS)):
            for k in range(cython.cast(uint32_t, LARGE_ENTRIES)):
                s.large_read[n][k].negated_tag = cython.cast(uint64_t, 1) << 62
                s.large_write[n][k].negated_tag = cython.cast(uint64_t, 1) << 62
        s.large_used = 0


def state_free(s):
    """Give the memory back; the state must not be in use by any thread."""
    free(s.vmx)
    free(s.svm)
    free(s.models)
    munmap(s, cython.sizeof(CpuState))


def raise_exception(s, vector):
    """Record a fault without an error code and leave the block. SDM, "Exception and Interrupt Reference"."""
    s.event.pending = 1
    s.event.kind = EVENT_EXCEPTION
    s.event.vector = vector
    s.event.has_error = 0
    s.event.error_code = 0
    s.event.instruction_length = 0
    s.event.payload = 0
    s.event.is_fault = 0
    return LEAVE_EVENT


def raise_error(s, vector, error_code):
    """Record a fault with an error code and leave the block."""
    raise_exception(s, vector)
    s.event.has_error = 1
    s.event.error_code = error_code
    return LEAVE_EVENT


def raise_page_fault(s, address, error_code):
    """Record #PF; CR2 is loaded when it is delivered. SDM, "Page-Fault Exception (#PF)"."""
    raise_error(s, 14, error_code)
    s.event.payload = address
    return LEAVE_EVENT
