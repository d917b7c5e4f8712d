from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy

cdef enum:
    PLANAR = 0
    CGA = 1
    INDEXED = 2
    RGB15 = 3
    RGB16 = 4
    RGB24 = 5
    RGB32 = 6

cdef void _glyph_line(
    uint32_t *at, unsigned int bits, int width, uint32_t ink, uint32_t paper, bint repeat_last) noexcept nogil
cdef void _widen(uint32_t *at, int width) noexcept nogil
cdef void _planar_line(
    uint32_t *at, const uint8_t *memory, size_t size, size_t place, int width, int planes, const uint32_t *palette
) noexcept nogil
cdef void _cga_line(
    uint32_t *at, const uint8_t *memory, size_t size, size_t place, int width, const uint32_t *palette) noexcept nogil
cdef void _packed_line(
    uint32_t *at, const uint8_t *memory, size_t size, size_t place, int width, int kind, const uint32_t *palette
) noexcept nogil
