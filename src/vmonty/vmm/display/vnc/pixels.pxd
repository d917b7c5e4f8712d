from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy

# More colours than a palette can have are not counted further.
cdef enum:
    MOST_COLOURS = 256

cdef class PixelFormat:
    cdef readonly int size
    cdef readonly int depth
    cdef readonly bint big_endian
    cdef readonly tuple maxima
    cdef readonly tuple shifts
    cdef readonly bint native
    cdef readonly int compact
    cdef unsigned int _max[3]
    cdef int _shift[3]
    cdef int _compact_from
    cdef bint _rgb
    cdef uint32_t _value(self, uint32_t pixel) noexcept nogil
    cdef uint8_t *_put(self, uint8_t *at, uint32_t pixel) noexcept nogil
    cdef uint8_t *_put_compact(self, uint8_t *at, uint32_t pixel) noexcept nogil
    cdef uint8_t *_put_tight(self, uint8_t *at, uint32_t pixel) noexcept nogil

cdef bint _of_two(const uint32_t *source, int width, uint32_t first, uint32_t second) noexcept nogil
cdef void _mark(uint8_t *at, const uint32_t *source, int width, uint32_t colour) noexcept nogil

cdef class Picture:
    cdef readonly int width
    cdef readonly int height
    cdef object _pixels
    cdef const uint8_t[::1] _view
    cdef const uint32_t *_base
    cdef int _check(self, int x, int y, int width, int height) except -1
