from libc.stdint cimport uint16_t, uint64_t

from vmonty.base.ram cimport Ram

cdef enum:
    RELAXED = 0
    ACQUIRE = 2
    RELEASE = 3
    SEQUENTIAL = 5

cdef enum:
    NEXT = 1
    WRITE = 2
    INDIRECT = 4

cdef unsigned int MOST_CHAIN
cdef uint64_t MOST_TOTAL

# The driver runs on other processors: these read and write each word once, in order.
cdef extern from * nogil:
    uint16_t load16 "__atomic_load_n" (uint16_t *place, int order) noexcept
    uint64_t load64 "__atomic_load_n" (uint64_t *place, int order) noexcept
    void store16 "__atomic_store_n" (uint16_t *place, uint16_t value, int order) noexcept
    void store64 "__atomic_store_n" (uint64_t *place, uint64_t value, int order) noexcept
    void fence "__atomic_thread_fence" (int order) noexcept

cdef class Chain:
    cdef public list readable
    cdef public list writable
    cdef readonly unsigned long long readable_size
    cdef readonly unsigned long long writable_size
    cdef readonly unsigned int head
    cdef readonly unsigned long epoch
    cdef readonly list places

cdef class Queue:
    cdef readonly int index
    cdef readonly int max_size
    cdef public int size
    cdef public unsigned long long descriptors
    cdef public unsigned long long driver
    cdef public unsigned long long device
    cdef readonly bint enabled
    cdef readonly unsigned long epoch
    cdef object _memory
    cdef Ram _ram
    cdef unsigned char *_descriptor_table
    cdef unsigned char *_driver_area
    cdef unsigned char *_device_area
    cdef unsigned int _mask
    cdef uint16_t _available
    cdef uint16_t _used
    cdef uint16_t _signalled
    cdef bint _signalled_valid
    cdef bint _news
    cdef bint _indirect
    cdef bint _event_idx
    cdef int _in_flight
    cdef unsigned char *_find(self, uint64_t address, uint64_t size) except? NULL
    cdef long long _offset(self, uint64_t address, uint64_t size) except? -1
    cdef Chain _walk(self, unsigned int head)
