from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp

cdef enum:
    TILE_WIDTH = 64
    TILE_HEIGHT = 16

cdef uint64_t _hash_line(const uint8_t *line, size_t size) noexcept nogil
